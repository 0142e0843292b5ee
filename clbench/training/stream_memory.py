"""A memory of raw samples that takes them one by one, as the stream brings them. Every draw is a pure function of its visit.

reservoir  a uniform sample of all visits so far (Vitter 1985, algorithm R). Visit v has a random key of its own; the memory
           holds the M visits with the smallest keys. Same distribution, exact at every step, no generator to be saved
balanced   GDumb's greedy sampler (Prabhu, Torr & Dokania, ECCV 2020, algorithm 1): with K classes stored, a sample enters where
           its class is new or has fewer than floor(M / K) samples; a full memory gives up a random one of its largest class
ring       the newest samples of every cell, which is a class of an experience (A-GEM): a cell that has its share, floor(M /
           cells), replaces its oldest sample; a smaller one takes the place of the oldest sample of the largest cell
task_ring  the same where an experience is a cell (GEM)

A sample that is visited twice (several epochs) may be stored twice, as in Mammoth.

Legend: M stored samples, B samples of a batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch, ImageData, shuffled
from clbench.training.memory import allowed_memory, drawn
from clbench.training.runtime import Runtime

Policy = Literal["reservoir", "balanced", "ring", "task_ring"]
POLICIES = ("reservoir", "balanced", "ring", "task_ring")
FIELDS = ("y", "ids", "visits", "experience")


class StreamMemory:
    """At most `samples` raw samples; slot by slot: labels `y`, sample `ids`, numbers of `visits`, `experience`, all [M] int64.

    share  most samples of a cell of a ring; None: what an equal division gives
    """

    def __init__(self, policy: Policy, samples: int, seed: int, share: int | None = None):
        if policy not in POLICIES:
            raise UserError(f"unknown memory policy {policy!r}: choose {', '.join(POLICIES)}")
        self.policy, self.samples, self.seed, self.share = policy, samples, seed, share
        self.images: list[np.ndarray] = []
        self.y, self.ids, self.visits, self.experience = (np.zeros(0, np.int64) for _ in FIELDS)
        self.visited = 0
        self._keys_M = np.zeros(0, np.uint64)

    def __len__(self) -> int:
        return len(self.y)

    def num_bytes(self) -> int:
        """Bytes of the stored pixels."""
        return sum(image.nbytes for image in self.images)

    def insert(self, data: Any, rows: np.ndarray, batch: Any, experience: int) -> list[tuple[int, int]]:
        """Offer the samples of `batch`, whose pixels are `rows` [B] of `data`, in their order.

        -> (slot, position in the batch) of those that entered, in their order; a later one may have replaced an earlier one
        """
        ids, y = batch.ids.numpy(), batch.y.cpu().numpy()
        entered: list[tuple[int, int]] = []
        keys = self._keys(self.visited + np.arange(len(ids)))
        for i, visit in enumerate(range(self.visited, self.visited + len(ids))):
            slot = self._slot(visit, keys[i], int(y[i]), experience)
            if slot is None:
                continue
            if slot == len(self):
                self.y, self.ids, self.visits, self.experience = (np.append(getattr(self, name), 0) for name in FIELDS)
                self._keys_M = np.append(self._keys_M, keys[i])
                self.images.append(np.zeros(0, np.uint8))
            self.y[slot], self.ids[slot], self.visits[slot], self.experience[slot] = y[i], ids[i], visit, experience
            self._keys_M[slot] = keys[i]
            entered.append((slot, i))
        for slot, i in dict(entered).items():  # the last one of each slot
            self.images[slot] = np.array(data.raw([int(rows[i])])[0])
        self.visited += len(ids)
        return entered

    def _keys(self, visits: np.ndarray) -> np.ndarray:
        return rng.bits(rng.key(self.seed, "reservoir"), visits)

    def _slot(self, visit: int, key: np.uint64, y: int, experience: int) -> int | None:
        """Where a sample goes: a slot, the next one, or None."""
        full = len(self) >= self.samples
        if self.samples == 0:
            return None
        if self.policy == "reservoir":
            if not full:
                return len(self)
            worst = int(self._keys_M.argmax())
            return worst if key < self._keys_M[worst] else None
        if self.policy == "balanced":
            count = np.bincount(self.y, minlength=y + 1)
            if count[y] and count[y] >= self.samples // np.count_nonzero(count):
                return None
            if not full:
                return len(self)
            rows = np.flatnonzero(self.y == count.argmax())
            return int(rows[rng.key(self.seed, "remove", visit) % len(rows)])
        return self._ring_slot(y, experience, full)

    def _ring_slot(self, y: int, experience: int, full: bool) -> int | None:
        by_class = self.policy == "ring"
        cells, own = self.experience * (1 << 32) + self.y * by_class, experience * (1 << 32) + y * by_class
        names, count = np.unique(np.append(cells, own), return_counts=True)
        size = int(count[names == own][0]) - 1
        share = max(1, self.samples // len(names))
        oldest_of = own
        if size < (share if self.share is None else min(share, self.share)):
            if not full:
                return len(self)
            count[names == own] -= 1
            oldest_of = names[count.argmax()]
        rows = np.flatnonzero(cells == oldest_of)
        return int(rows[self.visits[rows].argmin()])

    def rows(self, key: int, size: int | None, among: np.ndarray | None = None) -> np.ndarray:
        """Slots of a draw without replacement -> [min(size, number of them)]; `among` [M] says which take part.

        `size` None takes all of them, in the order of the slots.
        """
        places = np.arange(len(self)) if among is None else np.flatnonzero(among)
        return places if size is None else places[drawn(key, min(size, len(places)), len(places))]

    def batch(self, rows: np.ndarray, like: Any, key: int | None) -> ImageBatch:
        """Stored samples by slot, through the pipeline of `like`; `key` chooses the augmentation, None the test transform."""
        images, ids, pipeline = [self.images[row] for row in rows], self.ids[rows], like.pipeline
        same = len({image.shape for image in images}) == 1
        pixels: Any = np.stack(images) if same else [partial(np.asarray, image) for image in images]
        y = torch.from_numpy(self.y[rows]).to(pipeline.device, non_blocking=True)
        made = ImageBatch(torch.from_numpy(ids), y, like.task, partial(pipeline, pixels, ids, key), False)
        made.replayed = len(rows)
        return made

    def data(self, like: Any, by_id: bool = False) -> ImageData | None:
        """All stored samples as data, seen through the pipeline of `like`; None when empty. `by_id`: sorted, not by slot."""
        if not len(self):
            return None
        rows = np.lexsort((self.visits, self.ids)) if by_id else np.arange(len(self))
        images = [self.images[row] for row in rows]
        return ImageData.of_arrays(images, self.y[rows], self.ids[rows], like.pipeline, like.task)

    def state_dict(self) -> dict[str, Any]:
        """Pixels (one tensor where all have one shape), what is known of every slot, the number of visits."""
        same = len({image.shape for image in self.images}) == 1
        pixels: Any = torch.from_numpy(np.stack(self.images)) if same else [torch.from_numpy(i) for i in self.images]
        known = {name: torch.from_numpy(getattr(self, name).copy()) for name in FIELDS}
        return {"images": pixels, "visited": self.visited, **known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the stored samples."""
        self.images = [image.numpy().copy() for image in state["images"]]
        for name in FIELDS:
            setattr(self, name, state[name].numpy().copy())
        self.visited, self._keys_M = state["visited"], self._keys(self.visits)


def allowed_stream_memory(runtime: Runtime, policy: Policy, samples: int | None, share: int | None = None) -> StreamMemory:
    """A memory of what is wanted (None: all that the budget allows); `BudgetExceeded` where that is too much.

    `UserError` where neither says a number of samples: what is limited in bytes alone has none before its images come.
    """
    found = allowed_memory(runtime, "reservoir", samples)
    if found.samples is None or found.samples < 0:
        raise UserError(f"a memory that is filled step by step holds a number of samples: learner.memory=N, got {samples}")
    return StreamMemory(policy, found.samples, runtime.seed, share)


class Remembered:
    """Shuffled batches of stored samples alone, in an order of `key` and of the samples, not of their slots."""

    def __init__(self, memory: StreamMemory, like: Any, batch_size: int, epochs: int, key: int, augment: bool):
        data = memory.data(like, by_id=True)
        assert data is not None, "the memory is empty"
        self._batches = shuffled(data, batch_size, epochs, key, augment)
        self.steps = self._batches.steps

    def __call__(self, step: int) -> ImageBatch:
        """The batch of a step; all of its samples count as replayed."""
        batch = self._batches(step)
        batch.replayed = len(batch)
        return batch
