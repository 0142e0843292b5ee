"""The graph of skills, learned by pilots (Chen et al. 2023, "Skill-it!", arXiv 2307.14430; its released code has no such part).

For every pair of domains i, j a copy of the model is trained on both, half of each batch, and one on j alone, for equally many
steps. There is an edge from i to j where the first ends with the lower loss on j, although it has read half as much of it:

    A_ij = max(0, (L_j(j) - L_j(i, j)) / L_j(j)),   A_jj = 1

and 0 unless the pair is lower in every one of `repeats` pilots, each on other sequences. These are repeats * K^2 trainings of
`steps` steps. Losses are those of sequences that no pilot is trained on, the first `JUDGED` of each domain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.tokens import sequences
from clbench.training.pretraining.pilot import after_pilot, losses

JUDGED = 32


def edges(alone: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Losses of pilots -> A [K, K].

    alone  [R, K], of domain j after j alone, by repeat
    pairs  [R, K, K], of domain j after i and j; the diagonal is not read
    """
    gain = (alone[:, None, :] - pairs) / alone[:, None, :]
    found = np.where((gain > 0).all(0), gain.mean(0), 0.0)
    np.fill_diagonal(found, 1.0)
    return found


class Pilots:
    """Short trainings from one state of a model, which is as it was afterwards.

    texts  `TokenData` of the domains
    read   is called with the number of sequences that pilots were trained on
    """

    def __init__(
        self,
        model: nn.Module,
        texts: Sequence[Any],
        *,
        steps: int,
        lr: float,
        adam: Mapping[str, Any],
        key: int,
        check_stop: Callable[[], None],
        read: Callable[[int], None],
    ):
        self.model, self.texts, self.steps, self.lr, self.adam, self.key = model, list(texts), steps, lr, adam, key
        self.check_stop, self.read = check_stop, read
        for text in self.texts:
            if len(text) < JUDGED + text.batch:
                raise UserError(f"learner.graph=learned needs {JUDGED + text.batch} sequences, {text.name} has {len(text)}")

    def graph(self, repeats: int) -> np.ndarray:
        """A [K, K] from as many pilots of each kind."""
        number = len(self.texts)
        alone, pairs = np.zeros((repeats, number)), np.zeros((repeats, number, number))
        for r in range(repeats):
            for j in range(number):
                alone[r, j] = self.loss_after((j,), j, r)
                for i in range(number):
                    pairs[r, i, j] = alone[r, j] if i == j else self.loss_after((i, j), j, r)
        return edges(alone, pairs)

    def loss_after(self, domains: Sequence[int], judged: int, repeat: int) -> float:
        """Mean loss of domain `judged` after one pilot on `domains`, equal parts of each batch."""
        options: dict[str, Any] = {"steps": self.steps, "lr": self.lr, "adam": self.adam, "check_stop": self.check_stop}
        with after_pilot(self.model, lambda step: self.batch(domains, step, repeat), **options), torch.no_grad():
            self.read(self.steps * self.texts[0].batch)
            rows = self.texts[judged].take(np.arange(JUDGED), "judged", np.arange(JUDGED))
            return float(losses(self.model, rows).double().mean())

    def batch(self, domains: Sequence[int], step: int, repeat: int) -> np.ndarray:
        """Tokens [B, L + 1] of a step: of each domain its share, from passes over what is not judged."""
        size, parts = self.texts[0].batch, []
        edge = [round(i * size / len(domains)) for i in range(len(domains) + 1)]
        for place, d in enumerate(domains):
            positions = step * size + np.arange(edge[place], edge[place + 1])
            numbers = sequences.passes(rng.key(self.key, "pilot", repeat, d), len(self.texts[d]) - JUDGED, positions)
            parts.append(self.texts[d].take(JUDGED + numbers, "pilot", positions))
        return np.concatenate(parts)
