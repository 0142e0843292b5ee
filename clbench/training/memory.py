"""Exemplar memories: which raw samples of earlier experiences are kept.

reservoir  a uniform sample of everything seen: the m samples with the smallest random keys (Vitter 1985; a key per sample
           makes the choice independent of order and resumable without state)
balanced   the same within every class, m / K samples a class
herding    iCaRL's greedy choice (Rebuffi et al. 2017): the running mean of L2-normalised features follows the class mean;
           shrinking a class keeps the front of its list. No sample is chosen twice (iCaRL's and LUCIR's released loops may
           choose one again, which moves the mean and fills no place)

Legend: M stored samples, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import BudgetExceeded, UserError
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch, ImageData, shuffled
from clbench.training.fit import Batches
from clbench.training.runtime import Runtime

POLICIES = ("reservoir", "balanced", "herding")


def herd(features: Tensor, count: int) -> list[int]:
    """Greedy herding of one class: features [N, D] -> at most `count` row numbers, best first (ties: the lowest row)."""
    f = torch.nn.functional.normalize(features.double(), dim=1)
    mean, total = f.mean(0), torch.zeros_like(f[0])
    free = torch.ones(len(f), dtype=torch.bool)
    chosen: list[int] = []
    for k in range(min(count, len(f))):
        gap = (mean - (total + f) / (k + 1)).norm(dim=1).cpu()
        row = int(torch.where(free, gap, torch.inf).argmin())
        chosen.append(row)
        free[row] = False
        total = total + f[row]
    return chosen


def exemplar_means(features: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """L2-normalised means of L2-normalised features [M, D] by class -> [K, D]; NaN for a class without samples."""
    f = torch.nn.functional.normalize(features, dim=1)
    means = [
        torch.nn.functional.normalize(f[y == c].mean(0), dim=0) if (y == c).any() else torch.full_like(f[0], torch.nan)
        for c in range(num_classes)
    ]
    return torch.stack(means)


class Memory:
    """Raw samples under a limit in samples and in bytes (None: no limit; both None: nothing is kept)."""

    def __init__(self, policy: str, samples: int | None, max_bytes: int | None, seed: int):
        if policy not in POLICIES:
            raise UserError(f"unknown memory policy {policy!r}: choose {', '.join(POLICIES)}")
        self.policy, self.samples, self.max_bytes, self.seed = policy, samples, max_bytes, seed
        self.images: list[np.ndarray] = []
        self.y = np.zeros(0, np.int64)
        self.ids = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.y)

    def num_bytes(self) -> int:
        """Bytes of the stored pixels."""
        return sum(image.nbytes for image in self.images)

    def update(self, new: Any, features: Tensor | None = None) -> None:
        """Choose again from what is stored and the samples of `new`. Herding needs `features` of candidates(new).

        Images are read one after another until `max_bytes` are full: no more of them are in memory than are kept, and one.
        """
        candidates = self.candidates(new)
        keep = self._choose(candidates.ids, np.asarray(candidates.y), features)
        images: list[np.ndarray] = []
        size = 0
        for row in keep:
            image = np.array(candidates.raw([row])[0])
            size += image.nbytes
            if self.max_bytes is not None and size > self.max_bytes:
                break
            images.append(image)
        self.images, keep = images, keep[: len(images)]
        self.y, self.ids = np.asarray(candidates.y)[keep].astype(np.int64), candidates.ids[keep].astype(np.int64)

    def candidates(self, new: Any) -> ImageData:
        """Stored samples followed by those of `new`."""
        old = self.data(new)
        return new if old is None else type(old).join([old, new])

    def data(self, like: Any) -> ImageData | None:
        """The stored samples as data, seen through the pipeline of `like`; None when empty."""
        return like.remembered(self.images, self.y, self.ids) if len(self) else None

    def _choose(self, ids: np.ndarray, y: np.ndarray, features: Tensor | None) -> list[int]:
        """Rows to keep. Classes take turns (rank 0 of every class, rank 1, ...), so that any front part is balanced."""
        limit = len(ids) if self.samples is None else self.samples
        if self.samples is None and self.max_bytes is None:
            return []
        priority = rng.bits(rng.key(self.seed, "memory"), ids)
        if self.policy == "reservoir":
            return np.argsort(priority, kind="stable")[:limit].tolist()
        classes = np.unique(y)
        ranked: list[tuple[int, int, int]] = []
        for c in classes:
            rows = np.flatnonzero(y == c)
            if self.policy == "balanced":
                order = rows[np.argsort(priority[rows], kind="stable")]
            else:
                assert features is not None, "herding needs features"
                order = self._herding_order(rows, ids, features, -(-limit // len(classes)))
            ranked += [(rank, int(c), int(row)) for rank, row in enumerate(order)]
        ranked.sort()
        return [row for _, _, row in ranked[:limit]]

    def _herding_order(self, rows: np.ndarray, ids: np.ndarray, features: Tensor, count: int) -> list[int]:
        """A class that only has stored samples keeps its list; any other is herded from all its candidates."""
        if len(self) and (rows < len(self)).all():
            return rows.tolist()
        return [int(rows[i]) for i in herd(features[torch.as_tensor(rows, device=features.device)], count)]

    def state_dict(self) -> dict[str, Any]:
        """Pixels (one tensor where all have one shape), labels, ids."""
        same = len({image.shape for image in self.images}) == 1
        pixels: Any = torch.from_numpy(np.stack(self.images)) if same else [torch.from_numpy(i) for i in self.images]
        return {"images": pixels, "y": torch.from_numpy(self.y), "ids": torch.from_numpy(self.ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the stored samples."""
        self.images = [image.numpy().copy() for image in state["images"]]
        self.y, self.ids = state["y"].numpy().copy(), state["ids"].numpy().copy()


def allowed_memory(runtime: Runtime, policy: str, samples: int | None, max_bytes: int | None = None) -> Memory:
    """A memory of what is wanted (None: all that the budget allows); `BudgetExceeded` where that is too much."""
    budget = runtime.budget
    size = _within("memory", samples, budget.exemplars)
    most = _within("memory_bytes", max_bytes, budget.exemplar_bytes)
    if size is None and most is None:
        raise UserError("the scenario's budget sets no limit to exemplars: say how many, learner.memory=N")
    return Memory(policy, size, most, runtime.seed)


def _within(name: str, wanted: int | None, allowed: int | None) -> int | None:
    """What is wanted where the budget allows it, else what the budget allows."""
    if wanted is not None and allowed is not None and wanted > allowed:
        raise BudgetExceeded(f"learner.{name}={wanted}, the scenario's budget allows {allowed}")
    return allowed if wanted is None else wanted


def drawn(key: int, count: int, total: int) -> np.ndarray:
    """`count` of `total` rows at random: without replacement where there are enough."""
    return rng.permutation(key, total)[:count] if total >= count else rng.integers(key, count, total)


class Mixed:
    """Batches of new samples, each joined by `size` replayed ones: a pure function of the step.

    Draws are without replacement within a batch where the memory is large enough.
    """

    def __init__(self, new: Batches, memory: ImageData | None, size: int, key: int):
        self.new, self.memory, self.size, self.key = new, memory, size, key
        self.steps = new.steps

    def __call__(self, step: int) -> ImageBatch:
        """New samples, then replayed ones."""
        batch = self.new(step)
        if self.memory is None or self.size == 0:
            return batch
        draw = rng.key(self.key, step)
        rows = drawn(draw, self.size, len(self.memory))
        joined = type(batch).cat([batch, self.memory.batch(rows, rng.key(draw, "augment"))])
        joined.replayed = len(rows)
        return joined


class Rehearsed:
    """Shuffled batches of new and stored samples together; a pure function of the step. Says how many are stored ones."""

    def __init__(self, new: ImageData, stored: ImageData | None, batch_size: int, epochs: int, key: int):
        self.first_stored = len(new)
        data = new if stored is None else ImageData.join([new, stored])
        self._batches = shuffled(data, batch_size, epochs, key)
        self.steps = self._batches.steps

    def __call__(self, step: int) -> ImageBatch:
        batch = self._batches(step)
        batch.replayed = int((self._batches.rows(step) >= self.first_stored).sum())
        return batch
