"""What a pre-trained encoder is good for: a linear classifier on frozen features of labelled images. See `run/token_stream.py`.

The classifier is ridge regression on -1 / 1 targets (scikit-learn's `RidgeClassifier`, penalty 1 on standardised features):
closed form, so nothing has to be tuned or seeded. Published linear probes train a layer with SGD: compare with care.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clbench.interfaces import UserError
from clbench.streams.tokens.image_scenario import ImageScenario, Labelled


def hits(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> np.ndarray:
    """Fit on features [N, D] and labels [N]; whether test samples [M, D] get their label [M] -> [M] bool."""
    from sklearn.linear_model import RidgeClassifier

    if len(np.unique(train_y)) < 2:
        return np.full(len(test_y), len(train_y) > 0) & (test_y == train_y[:1])
    mean, spread = train_x.mean(0), train_x.std(0)
    spread = np.where(spread > 1e-6, spread, 1.0)
    found = RidgeClassifier(alpha=1.0).fit((train_x - mean) / spread, train_y)
    return np.asarray(found.predict((test_x - mean) / spread)) == test_y


def linear_probe(scenario: Any, model: Any, device: torch.device, batch: int, ledger: Any) -> LinearProbe | None:
    """The linear probe of a stream that has labelled images beside its own, None of another stream.

    Features of whole images are counted in `ledger`.
    """
    if not hasattr(scenario, "labelled"):
        return None
    cost = 3 * float(getattr(model, "feature_flops", 0.0))  # the ledger takes a third of what training costs

    def count(images: int) -> None:
        ledger.look("probe", images, cost)

    return LinearProbe(scenario, device, batch, count)


def look_at(model: Any, probe: Tensor, sizes: Sequence[int], linear: LinearProbe | None) -> tuple[Tensor, list[float]]:
    """Losses on the probe [B, L], and for each set the share of right guesses: of the next token, or by the linear probe."""
    if linear is not None:
        return model.loss(probe).float(), linear.look(model)
    logits, targets = model(probe[:, :-1]).float(), probe[:, 1:]
    nats = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    right = (logits.argmax(-1) == targets).float()
    return nats, [float(part.double().mean()) for part in right.split(list(sizes))]


class LinearProbe:
    """Labelled images of every evaluation set of a stream of images, on the device once.

    count  is called with the number of images whose features were computed
    """

    def __init__(self, scenario: ImageScenario, device: torch.device, batch: int, count: Callable[[int], None]):
        self.first_seen = [entry.first_seen for entry in scenario.manifest.evals]
        self.sets = [scenario.labelled(j) for j in range(len(self.first_seen))]
        self.numbers = scenario.probing
        self.device, self.batch, self.count = device, batch, count

    @property
    def n(self) -> list[int]:
        """Images that each set is judged on."""
        return [len(one.test_y) for one in self.sets]

    def look(self, model: Any) -> list[float]:
        """Share of right answers on the first images of each set, by one classifier for all groups, those to come included.

        It is fitted to a few images of each group.
        """
        few = [
            Labelled(
                one.train[: self.numbers.look],
                one.train_y[: self.numbers.look],
                one.test[: self.numbers.sequences],
                one.test_y[: self.numbers.sequences],
            )
            for one in self.sets
        ]
        found = _together(few, self._features(model, few))
        return [float(part.mean()) for part in found]

    def right(self, model: Any, experience: int | None) -> tuple[list[int], list[int | None]]:
        """Right answers on each set: (one classifier for each group's classes, one for all groups seen so far).

        experience  the last one learned; None before the first. A set that is not seen yet has no number in the second list.
        """
        found = self._features(model, self.sets)
        own = [int(hits(a, s.train_y, b, s.test_y).sum()) for s, (a, b) in zip(self.sets, found, strict=True)]
        seen = [j for j, first in enumerate(self.first_seen) if experience is not None and first <= experience]
        together: list[int | None] = [None] * len(self.sets)
        for j, part in zip(seen, _together([self.sets[j] for j in seen], [found[j] for j in seen]), strict=True):
            together[j] = int(part.sum())
        return own, together

    @torch.no_grad()
    def _features(self, model: Any, sets: Sequence[Labelled]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Features [N, D] and [M, D] float64 of training and evaluation images of each set."""
        rows = np.concatenate([part for one in sets for part in (one.train, one.test)])
        made = []
        model.eval()
        for start in range(0, len(rows), self.batch):
            made.append(model.features(torch.from_numpy(rows[start : start + self.batch]).to(self.device)).double().cpu())
        self.count(len(rows))
        features = torch.cat(made).numpy()
        if not np.isfinite(features).all():
            raise UserError("the features of an evaluation set are NaN or infinite")
        parts = np.split(features, np.cumsum([len(part) for one in sets for part in (one.train, one.test)])[:-1])
        return list(zip(parts[::2], parts[1::2], strict=True))


def _together(sets: Sequence[Labelled], features: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """One classifier for the classes of all these sets -> whether each evaluation image is right, [M] bool for each set."""
    if not sets:
        return []
    train, test = (np.concatenate([pair[i] for pair in features]) for i in range(2))
    labels = np.concatenate([one.train_y for one in sets]), np.concatenate([one.test_y for one in sets])
    return np.split(hits(train, labels[0], test, labels[1]), np.cumsum([len(one.test_y) for one in sets])[:-1])
