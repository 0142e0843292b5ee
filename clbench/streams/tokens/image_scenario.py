"""Continual pre-training on images: groups of classes one after the other, for masked autoencoders. Imports no torch.

The rules are those of `cpt`: experiences of the same group read disjoint images, orders are pure functions of a key, past the
first pass the same images come again in other orders. What is a token there is an image here: budgets, ledger and evaluation
sets count images, and the loss of an image is one number. Labels are for the linear probe alone; no learner sees them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from clbench.interfaces import Budget, Facts
from clbench.streams import rng
from clbench.streams.handles import Handle, end, opened
from clbench.streams.tokens import sequences
from clbench.streams.tokens.mae_images import Pictures, augmented, with_keys
from clbench.streams.tokens.manifest import TokenBudget, TokenManifest
from clbench.streams.tokens.scenario import Probing, described


@dataclass(frozen=True, eq=False)
class ImageDomain:
    """A group of classes: sample ids of its training and evaluation images, and the labels [N] of all samples."""

    name: str
    classes: tuple[int, ...]
    pictures: Pictures
    y: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    sha256: str


@dataclass(frozen=True, eq=False)
class _Group:
    """What the handle of an `ImageData` opens: images first..first+size-1 of a group, in the order of `key`."""

    name: str
    pictures: Pictures
    rows: np.ndarray
    first: int
    size: int
    key: int

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Own images by number 0..size-1 -> [B] int64 places in the group."""
        inside = sequences.own(numbers, self.size, self.name)
        return sequences.permuted(rng.key(self.key, "domain"), len(self.rows), self.first + inside)


@dataclass(frozen=True, eq=False)
class ImageData:
    """The training images of one experience, in an order drawn once by `key`; the counterpart of `cpt.TokenData`.

    `images` is a handle: `read` and `take` give this experience's own images, until `close`.
    """

    name: str
    domain: int
    images: Handle
    side: int
    batch: int
    steps: int
    first: int
    size: int
    key: int
    augment: str = "none"
    context: ClassVar[int] = 1

    def __len__(self) -> int:
        return self.size

    @property
    def sequence_bytes(self) -> int:
        """What one stored image takes."""
        return self.side**2 * 3

    def numbers(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Own images by position -> [B] int64 in 0..size-1; `size`: only the first so many are used."""
        return sequences.passes(self.key, size or self.size, positions, first_in_order=True)

    def ids(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Images by position -> [B] int64 places in the group; `size`: only the first so many are used."""
        return opened(self.images).places(self.numbers(positions, size))

    def read(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Images by position -> rows [B, S * S * 3 + 8] uint8."""
        return self.take(self.numbers(positions, size), "new", positions)

    def take(self, numbers: np.ndarray, role: str, positions: np.ndarray) -> np.ndarray:
        """Own images by number; mask and view are drawn from (`role`, position in that stream) -> rows.

        Raises `UserError` for a number outside 0..size-1, and after `close`.
        """
        group: _Group = opened(self.images)
        keys = rng.bits(rng.key(self.key, "mask", role, self.first), positions)
        return with_keys(augmented(group.pictures(group.rows[group.places(numbers)]), keys, self.augment), keys)

    def close(self) -> None:
        """Let go of the images: the experience is over."""
        end(self.images)


@dataclass(frozen=True, eq=False)
class Labelled:
    """What a linear probe is fitted to and judged on: rows as the model reads them, labels [N] int64."""

    train: np.ndarray
    train_y: np.ndarray
    test: np.ndarray
    test_y: np.ndarray


@dataclass(frozen=True)
class ImageProbing(Probing):
    """How often it is looked at, and how many labelled images of each set a linear probe is fitted to.

    labelled  after each experience
    look      while training
    """

    labelled: int = 1000
    look: int = 50


@dataclass(frozen=True, eq=False)
class ImageScenario:
    """A stream of images that can be run: the manifest, the images, the rules. The counterpart of `cpt.TokenScenario`."""

    name: str
    manifest: TokenManifest
    domains: tuple[ImageDomain, ...]
    augment: str = "none"
    probing: ImageProbing = field(default_factory=ImageProbing)
    asks: ClassVar[Literal["loss"]] = "loss"

    @property
    def budget(self) -> TokenBudget:
        """Images and bytes that a learner may use."""
        return TokenBudget(**self.manifest.budget)

    @cached_property
    def side(self) -> int:
        """Height and width of every image."""
        return self.domains[0].pictures.side

    @property
    def iid(self) -> bool:
        """Whether all experiences are of one group: then nothing shifts."""
        return self.manifest.iid

    def facts(self) -> Facts:
        """What is compared with a learner's capabilities."""
        return Facts(self.name, "loss", False, True, False, Budget(exemplar_bytes=self.budget.exemplar_bytes))

    def data(self, index: int) -> ImageData:
        """The training images of experience `index`. Order, masks and views depend on the stream, not on the run's seed."""
        entry = self.manifest.experiences[index]
        domain = self.domains[entry["domain"]]
        key = rng.key("order", int(domain.sha256[:16], 16))
        name, first, size = f"experience {entry['name']}", entry["first"], entry["sequences"]
        images = Handle(name, _Group(name, domain.pictures, domain.train, first, size, key))
        shape = (domain.pictures.side, self.manifest.batch, entry["steps"], first, size)
        return ImageData(entry["name"], entry["domain"], images, *shape, key, self.augment)

    def _held(self, j: int) -> tuple[ImageDomain, np.ndarray]:
        entry = self.manifest.evals[j]
        domain = self.domains[entry["domain"]]
        return domain, domain.validation[_spread(len(domain.validation), entry["sequences"])]

    def evaluation(self, j: int) -> np.ndarray:
        """Rows of evaluation set j -> [N, S * S * 3 + 8] uint8: whole images, each with a mask that never changes."""
        domain, ids = self._held(j)
        keys = rng.bits(rng.key("evaluation mask", int(domain.sha256[:16], 16)), np.arange(len(ids)))
        return with_keys(domain.pictures(ids), keys)

    def labelled(self, j: int) -> Labelled:
        """Labelled images of evaluation set j: some of its group's training images, and the evaluation images."""
        domain, ids = self._held(j)
        chosen = domain.train[_spread(len(domain.train), min(self.probing.labelled, len(domain.train)))]
        train = with_keys(domain.pictures(chosen), np.zeros(len(chosen), np.uint64))
        return Labelled(train, domain.y[chosen], self.evaluation(j), domain.y[ids])

    def describe(self) -> dict[str, Any]:
        """What a record says about the stream and its evaluation sets."""
        return described(self.name, self.manifest, self.probing)


def _spread(whole: int, number: int) -> np.ndarray:
    """`number` places of 0..whole-1 in a fixed order that is spread over all of it."""
    return sequences.permuted(rng.key("evaluation"), whole, np.arange(number))
