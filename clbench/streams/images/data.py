"""What learners are handed: labelled images, batches of them, and pure functions from step to batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import Experience, UserError
from clbench.streams import rng
from clbench.streams.images.pixels import Pipeline
from clbench.streams.in_order import StreamData
from clbench.streams.manifest import EvalEntry, ExperienceEntry
from clbench.streams.pools import JoinedPools
from clbench.streams.scenario import ArrayImages, ImageSource, Scenario
from clbench.streams.stored import Stored
from clbench.streams.transforms import TransformedImages, picture_ids


class ImageBatch:
    """Some images; implements `interfaces.Batch`. `x` is made when it is first asked for: `UserError` once their data is gone.

    plain     seen under the test transform (features of frozen backbones may be remembered)
    replayed  how many of the samples come from a memory
    begins    the first samples of an evaluation set are among them
    stored    the handles that the samples were issued with; None for a batch made by hand, whose features are not remembered
    """

    def __init__(
        self,
        ids: Tensor,
        y: Tensor | None,
        task: int | None,
        make: Callable[[], Tensor],
        plain: bool,
        stored: Stored | None = None,
    ):
        self.ids, self.y, self.task, self.plain, self.stored = ids, y, task, plain, stored
        self.replayed, self.begins = 0, False
        self._make: Callable[[], Tensor] | None = make
        self._x: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def x(self) -> Tensor:
        """Normalised images [B, 3, S, S] float32 on the device."""
        if self._x is None:
            assert self._make is not None
            self._x, self._make = self._make(), None
        return self._x

    def select(self, rows: Tensor) -> ImageBatch:
        """Some of the samples, by position or mask, in that order; the images are decoded once for both."""
        on_cpu = rows.to(self.ids.device)
        if len(rows) == len(self) and torch.equal(on_cpu, torch.arange(len(self))):
            return self
        y = None if self.y is None else self.y[rows.to(self.y.device)]
        stored = None if self.stored is None else self.stored.take(on_cpu.numpy())
        return ImageBatch(self.ids[on_cpu], y, self.task, lambda: self.x[rows.to(self.x.device)], self.plain, stored)

    @staticmethod
    def of(x: Tensor, y: Tensor | None = None, ids: Tensor | None = None, task: int | None = None) -> ImageBatch:
        """A batch of ready images."""
        return ImageBatch(torch.arange(len(x)) if ids is None else ids, y, task, lambda: x, False)

    @staticmethod
    def cat(parts: Sequence[ImageBatch]) -> ImageBatch:
        """Several batches as one; labels are kept when all have them, the task when it is the same."""
        labels = [p.y for p in parts if p.y is not None]
        y = torch.cat(labels) if len(labels) == len(parts) else None
        task = parts[0].task if len({p.task for p in parts}) == 1 else None
        stored = [p.stored for p in parts if p.stored is not None]
        joined = ImageBatch(
            torch.cat([p.ids for p in parts]),
            y,
            task,
            lambda: torch.cat([p.x for p in parts]),
            all(p.plain for p in parts),
            Stored.join(stored) if len(stored) == len(parts) else None,
        )
        joined.replayed = sum(p.replayed for p in parts)
        return joined


class ImageData:
    """Labelled images bound to a pipeline; implements `interfaces.Data`. `ids` and `y` are [N] int64.

    It holds handles, not pixels. After `close` of the data that they were issued with (an experience's, when it is over) this
    data, every subset, join and batch of it that is not decoded yet raise `UserError` where they are asked for pixels.
    """

    def __init__(
        self,
        source: ImageSource,
        rows: np.ndarray,
        ids: np.ndarray,
        y: np.ndarray,
        pipeline: Pipeline,
        task: int | None,
        name: str,
    ):
        assert len(rows) == len(ids) == len(y)
        self.stored, self.issued = Stored.issue(source, rows, ids, name), True
        self.ids, self.y, self.pipeline, self.task, self.name = ids, y, pipeline, task, name

    def _derived(self, stored: Stored, ids: np.ndarray, y: np.ndarray, name: str) -> ImageData:
        """Data of images that were issued already."""
        made = ImageData.__new__(ImageData)
        made.stored, made.issued = stored, False
        made.ids, made.y, made.pipeline, made.task, made.name = ids, y, self.pipeline, self.task, name
        return made

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int] | np.ndarray, key: int | None = None) -> ImageBatch:
        """Samples by row; `key` chooses the random augmentation, None gives the test transform."""
        rows = np.asarray(rows, np.int64)
        ids, pipeline = self.ids[rows], self.pipeline
        stored = self.stored.take(rows)
        stored.check()
        y = torch.from_numpy(self.y[rows]).to(pipeline.device, non_blocking=True)
        make = partial(stored.pixels, pipeline, ids, key)
        return ImageBatch(torch.from_numpy(ids), y, self.task, make, key is None, stored)

    def test_batches(self, batch_size: int) -> Iterator[ImageBatch]:
        """All samples in order under the test transform."""
        for first in range(0, len(self), batch_size):
            yield self.batch(np.arange(first, min(first + batch_size, len(self))))

    def raw(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Stored pixels, uint8 [H, W, 3] each."""
        return self.stored.take(np.asarray(rows, np.int64)).raw()

    def subset(self, rows: Sequence[int] | np.ndarray) -> ImageData:
        rows = np.asarray(rows, np.int64)
        stored = self.stored.take(rows)
        stored.check()
        return self._derived(stored, self.ids[rows], self.y[rows], self.name)

    def cut(self) -> ImageData:
        """The same samples behind handles that open no other ones."""
        return self._derived(self.stored.cut(self.name), self.ids, self.y, self.name)

    def close(self) -> None:
        """Let go of the pixels: the experience is over."""
        if self.issued:
            self.stored.end()
        self.stored = self.stored.closed(self.name)

    def remembered(self, stored: Sequence[np.ndarray], y: np.ndarray, ids: np.ndarray) -> ImageData:
        """What was kept of samples of such data, as data."""
        return ImageData.of_arrays(stored, y, ids, self.pipeline, self.task)

    @staticmethod
    def of_arrays(
        images: Sequence[np.ndarray], y: np.ndarray, ids: np.ndarray, pipeline: Pipeline, task: int | None = None
    ) -> ImageData:
        """Images held in memory, uint8 [H, W, 3] each, of any sizes."""
        same = len({image.shape for image in images}) == 1
        source: Any = ArrayImages(np.stack(images)) if same else ListImages(list(images))
        return ImageData(source, np.arange(len(y)), np.asarray(ids), np.asarray(y), pipeline, task, "memory")

    @staticmethod
    def join(parts: Sequence[Any]) -> ImageData:
        """Several data sets one after another."""
        if len(parts) == 1:
            return parts[0]
        stored = Stored.join([part.stored for part in parts])
        stored.check()
        ids, y = (np.concatenate([getattr(p, k) for p in parts]) for k in ("ids", "y"))
        return parts[0]._derived(stored, ids, y, "joined data")


class ListImages:
    """Images of any sizes in memory."""

    shape = None

    def __init__(self, images: list[np.ndarray]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def raw(self, ids: np.ndarray) -> list[np.ndarray]:
        return [self.images[int(i)] for i in ids]


class ShuffledBatches:
    """Shuffled batches over some epochs; a pure function of the step, so a run can go on from any of them."""

    def __init__(self, data: ImageData, batch_size: int, epochs: int, key: int, augment: bool, drop_last: bool):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.data, self.batch_size, self.key, self.augment = data, batch_size, key, augment
        whole = len(data) // batch_size
        self.per_epoch = max(1, whole) if drop_last else -(-len(data) // batch_size)
        self.steps = epochs * self.per_epoch
        self.visits = epochs * min(len(data), self.per_epoch * batch_size)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __call__(self, step: int) -> ImageBatch:
        """The batch of a step, 0 <= step < steps."""
        key = rng.key(self.key, "augment", step // self.per_epoch)
        return self.data.batch(self.rows(step), key if self.augment else None)

    def rows(self, step: int) -> np.ndarray:
        """Which samples of the data the batch of a step holds."""
        epoch, i = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, rng.permutation(rng.key(self.key, "order", epoch), len(self.data)))
        return self._order[1][i * self.batch_size : (i + 1) * self.batch_size]


class Streamed(ShuffledBatches):
    """Batches of one pass in the order of the data; a pure function of the step."""

    def __init__(self, data: Any, batch_size: int, key: int, augment: bool, drop_last: bool):
        super().__init__(data, batch_size, 1, key, augment, drop_last)

    def rows(self, step: int) -> np.ndarray:
        """Which samples of the data the batch of a step holds."""
        return np.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(self.data)))


def shuffled(
    data: Any, batch_size: int, epochs: int, key: int, augment: bool = True, drop_last: bool = False
) -> ShuffledBatches:
    """Batches of `data` in an order of `key` and the epoch; the last partial batch is kept unless `drop_last`.

    Samples that come once, in stream order (budget `in_order`), keep that order: the stream has been shuffled by whoever made
    it, and no learner gets to choose. More than one epoch of them raises `UserError`.
    """
    if isinstance(data, StreamData):
        if epochs != 1:
            raise UserError(f"samples of {data.name} come once: {epochs} epochs of them cannot be had")
        return Streamed(data, batch_size, key, augment, drop_last)
    return ShuffledBatches(data, batch_size, epochs, key, augment, drop_last)


def streamed(data: Any, batch_size: int, key: int, augment: bool = True, drop_last: bool = False) -> ShuffledBatches:
    """One pass over `data` in its own order, whatever the budget allows; `key` is for the augmentation."""
    return Streamed(data, batch_size, key, augment, drop_last)


def bound(scenario: Scenario, entry: ExperienceEntry | EvalEntry, pipeline: Pipeline, task: int | None, name: str) -> ImageData:
    """Samples of an experience or an evaluation set, as the manifest states them: labels renumbered, pixels transformed."""
    manifest, images = scenario.manifest, scenario.dataset.images
    table = np.full(max(scenario.dataset.num_classes, *manifest.class_order) + 1, -1, np.int64)
    for original, position in manifest.renumber.items():
        table[original] = position
    rows = entry.train if isinstance(entry, ExperienceEntry) else entry.ids
    unlabelled = isinstance(entry, ExperienceEntry) and not entry.labelled
    y = np.full(len(rows), -1, np.int64) if unlabelled else table[scenario.labels(entry)]
    ids = np.array(picture_ids(rows, entry.transform), np.int64)
    first = int(rows[0])
    if isinstance(images, JoinedPools):
        images, rows = images.part(rows)
    source = TransformedImages(images, entry.transform, first - int(rows[0])) if entry.transform else images
    return ImageData(source, rows, ids, y, pipeline, task, name)


def open_experience(scenario: Scenario, index: int, pipeline: Pipeline, exempt: bool = False) -> Experience:
    """Experience `index` as a learner sees it; one that is `exempt` (it stores all data) has it in any order."""
    manifest = scenario.manifest
    entry = manifest.experiences[index]
    before = manifest.num_seen(index - 1) if index else 0
    ordered = sorted((manifest.renumber[c], c) for c in entry.classes)
    task = entry.task if manifest.discloses_task else None
    budget = scenario.budget_of(index)
    data: Any = bound(scenario, entry, pipeline, task, f"experience {index} ({entry.name})")
    data = StreamData(data) if budget.in_order and not exempt else data
    return Experience(
        index=index,
        name=entry.name,
        train=data,
        classes=tuple(c for c, _ in ordered),
        new_classes=tuple(c for c, _ in ordered if c >= before),
        original_classes=tuple(original for _, original in ordered),
        num_seen=manifest.num_seen(index),
        task=task,
        budget=budget,
    )
