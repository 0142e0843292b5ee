"""Continual pre-training on images: groups of classes one after the other, for masked autoencoders. Imports no torch.

The rules are those of `TokenScenario`. What is a token there is an image here: budgets, ledger and evaluation sets count
images, and the loss of an image is one number. Labels are for the linear probe alone; no learner sees them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from clbench.streams import rng
from clbench.streams.tokens import sequences
from clbench.streams.tokens.data import Source
from clbench.streams.tokens.mae_images import Pictures, augmented, with_keys
from clbench.streams.tokens.scenario import Probing, TokenScenario


@dataclass(frozen=True, eq=False)
class Labelled:
    """What a linear probe is fitted to and judged on: rows as the model reads them, labels [N] int64."""

    train: np.ndarray
    train_y: np.ndarray
    test: np.ndarray
    test_y: np.ndarray


@dataclass(frozen=True, eq=False)
class ImageDomain:
    """A group of classes: sample ids of its training and evaluation images, and the labels [N] of all samples.

    augment  views of training images
    """

    name: str
    classes: tuple[int, ...]
    pictures: Pictures
    y: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    sha256: str
    augment: str = "none"

    def source(self, context: int, first: int, key: int) -> Source:
        """Training images as rows [B, S * S * 3 + 8] uint8 with the keys of their masks."""

        def read(places: np.ndarray, role: str, positions: np.ndarray) -> np.ndarray:
            keys = rng.bits(rng.key(key, "mask", role, first), positions)
            return with_keys(augmented(self.pictures(self.train[places]), keys, self.augment), keys)

        return Source(len(self.train), self.pictures.side**2 * 3, read)

    def evaluation(self, number: int, context: int) -> np.ndarray:
        """Rows of evaluation images [number, S * S * 3 + 8] uint8: whole images, each with a mask that never changes."""
        keys = rng.bits(rng.key("evaluation mask", int(self.sha256[:16], 16)), np.arange(number))
        return with_keys(self.pictures(_spread(self.validation, number)), keys)

    def labelled(self, fitted: int, number: int) -> Labelled:
        """At most `fitted` of the training images, and `number` evaluation images, with their labels."""
        chosen = _spread(self.train, min(fitted, len(self.train)))
        train = with_keys(self.pictures(chosen), np.zeros(len(chosen), np.uint64))
        return Labelled(train, self.y[chosen], self.evaluation(number, 1), self.y[_spread(self.validation, number)])


def _spread(ids: np.ndarray, number: int) -> np.ndarray:
    """`number` of the ids in a fixed order that is spread over all of them."""
    return ids[sequences.permuted(rng.key("evaluation"), len(ids), np.arange(number))]


@dataclass(frozen=True)
class ImageProbing(Probing):
    """How often it is looked at, and how many labelled images of each set a linear probe is fitted to.

    labelled  after each experience
    look      while training
    """

    labelled: int = 1000
    look: int = 50


@dataclass(frozen=True, eq=False)
class ImageScenario(TokenScenario):
    """A stream of groups of images, with labels for a linear probe."""

    probing: ImageProbing = field(default_factory=ImageProbing)

    @property
    def side(self) -> int:
        """Height and width of every image."""
        return self.domains[0].pictures.side

    def labelled(self, j: int) -> Labelled:
        """Labelled images of evaluation set j: some of its group's training images, and the evaluation images."""
        entry = self.manifest.evals[j]
        return self.domains[entry.domain].labelled(self.probing.labelled, entry.sequences)
