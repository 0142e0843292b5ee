"""What only the evaluation sees: labelled sets, and batches of them without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clbench.streams import rng
from clbench.streams.images.data import ImageBatch, ImageData, bound
from clbench.streams.images.pixels import Pipeline
from clbench.streams.scenario import Scenario


@dataclass(frozen=True)
class EvalSet:
    """One of them. `classes` are renumbered, in the order of the manifest's entry.

    batch_size  where the manifest says in which batches, in the order of its ids, the samples come; None: the run decides
    """

    name: str
    data: ImageData
    classes: tuple[int, ...]
    task: int | None
    first_seen: int
    batch_size: int | None = None

    def batches(self, batch_size: int) -> Iterator[tuple[ImageBatch, Tensor]]:
        """Batches without labels, and the labels [B] on the CPU."""
        return ((batch, y) for batch, y, _ in eval_batches([self], batch_size, False))


def eval_batches(
    sets: Sequence[EvalSet], batch_size: int, joined: bool
) -> Iterator[tuple[ImageBatch, Tensor, list[tuple[int, slice]]]]:
    """Every sample of every set, in order -> batches without labels, labels [B] on the CPU, and whose samples these are.

    The last is a list of (place in `sets`, slice of the batch). Each set is cut as `test_batches` does, or as its own
    `batch_size` says; where `joined`, neighbouring pieces without one that fit into one batch (and disclose the same task) are
    answered together. A batch can be decoded until the next one is asked for.
    """
    pieces: list[tuple[int, np.ndarray]] = []
    size = 0
    for i, one in enumerate(sets):
        step = one.batch_size or batch_size
        for first in range(0, len(one.data), step):
            rows = np.arange(first, min(first + step, len(one.data)))
            before = sets[pieces[0][0]] if pieces else one
            alike = before.task == one.task and before.batch_size is one.batch_size is None
            if pieces and not (joined and alike and size + len(rows) <= batch_size):
                yield from _issued(sets, pieces)
                pieces, size = [], 0
            pieces.append((i, rows))
            size += len(rows)
    if pieces:
        yield from _issued(sets, pieces)


def _issued(
    sets: Sequence[EvalSet], pieces: Sequence[tuple[int, np.ndarray]]
) -> Iterator[tuple[ImageBatch, Tensor, list[tuple[int, slice]]]]:
    """One batch behind handles of its own, which end when it was answered.

    Its ids are numbers of their own: places in a data set that is sorted by class would name the class.
    """
    ends = np.cumsum([len(rows) for _, rows in pieces]).tolist()
    owners = [(i, slice(end - len(rows), end)) for (i, rows), end in zip(pieces, ends, strict=True)]
    parts = [sets[i].data if len(rows) == len(sets[i].data) else sets[i].data.subset(rows) for i, rows in pieces]
    data = ImageData.join(parts).cut()
    batch = data.batch(np.arange(len(data)))
    batch.y = None
    batch.ids = opaque(data.ids)
    batch.begins = any(rows[0] == 0 for _, rows in pieces)
    yield batch, torch.from_numpy(data.y.copy()), owners
    data.stored.end()


def opaque(ids: np.ndarray) -> Tensor:
    """Sample ids [B] -> other numbers [B] int64, the same on every machine, that say nothing of where a sample lies."""
    return torch.from_numpy((rng.bits(rng.key("test ids"), ids) >> np.uint64(1)).astype(np.int64))


def open_eval(scenario: Scenario, index: int, pipeline: Pipeline) -> EvalSet:
    """Evaluation set `index`."""
    entry = scenario.manifest.evals[index]
    task = entry.task if scenario.manifest.discloses_task else None
    classes = tuple(scenario.manifest.renumber[c] for c in entry.classes)
    data = bound(scenario, entry, pipeline, task, f"evaluation set {entry.name}")
    return EvalSet(entry.name, data, classes, task, entry.first_seen, entry.batch_size)
