"""Several data sets one after another in one stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import datasets as stored
from clbench.streams import pools
from clbench.streams.manifest import EvalEntry, ExperienceEntry
from clbench.streams.operators.copies import chosen, whole
from clbench.streams.scenario import Dataset, Scenario


def concatenate(
    stream: Scenario,
    datasets: Sequence[str],
    increment: int | None = None,
    classes: Literal["disjoint", "named", "same"] = "disjoint",
    limit_train: int | None = None,
    limit_test: int | None = None,
    data_root: str | None = None,
    download: bool = False,
) -> Scenario:
    """Append data sets to the stream, in the order given, in experiences of their own.

    datasets                 names or paths, as in scenario.dataset; images of any size
    increment                classes of an experience; null: each data set is one
    classes                  disjoint: a data set's classes are its own. named: classes of one name are one (then experiences
                             bring the same classes from other sources). same: class k is class k in all of them
    limit_train, limit_test  samples kept of each class of the data sets appended, from the front

    It comes before operators that change pictures or make new classes: they take what there is.
    """
    chosen(classes, "concatenate.classes", pools.CLASSES)
    _check_place(stream, datasets)
    parts = [stream.dataset, *(stored.load(name, data_root, download) for name in datasets)]
    pool = pools.concatenated(parts, classes)
    limits = []
    for option, number in (("limit_train", limit_train), ("limit_test", limit_test)):
        limits.append(None if number is None else whole(number, f"concatenate.{option}", 1))
    steps, sets = list(stream.manifest.experiences), list(stream.manifest.evals)
    begin = len(stream.dataset)
    for k, part in enumerate(parts[1:], 1):
        for number, (train, test) in enumerate(_dealt(part, begin, increment, limits)):
            name = part.name if increment is None else f"{part.name}{number}"
            name = name if all(name != e.name for e in steps) else f"{name}#{k}"
            task = len(steps) if stream.manifest.discloses_task else None
            sets.append(EvalEntry(name, task, _present(pool, test), test, len(steps)))
            steps.append(ExperienceEntry(name, task, _present(pool, train), train))
        begin += len(part)
    manifest = replace(
        stream.manifest,
        dataset=pools.described(parts, pool, classes),
        class_order=tuple(dict.fromkeys(c for e in steps for c in e.classes)),
        experiences=tuple(steps),
        evals=tuple(sets),
    )
    return replace(stream, manifest=manifest, dataset=pool)


def _check_place(stream: Scenario, datasets: Any) -> None:
    """Refuse a list that is none, and a stream to which nothing can be appended."""
    if isinstance(datasets, str) or not isinstance(datasets, Sequence) or not datasets:
        raise UserError(f"concatenate.datasets must be a list of data sets, got {datasets!r}")
    if max(stream.manifest.class_order) >= stream.dataset.num_classes:
        raise UserError("operator concatenate: an earlier operator made new classes; put concatenate before it")
    if "parts" in stream.manifest.dataset:
        raise UserError("operator concatenate: the stream has several data sets; put it first, and name all data sets in one")


def _present(pool: Dataset, ids: np.ndarray) -> tuple[int, ...]:
    return tuple(int(c) for c in np.unique(pool.y[ids]))


def _dealt(
    part: Dataset, begin: int, increment: int | None, limits: Sequence[int | None]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and test ids of each experience of one data set, whose samples start at `begin` of the pool."""
    size = part.num_classes if increment is None else whole(increment, "concatenate.increment", 1)
    found = []
    for first in range(0, part.num_classes, size):
        sides = []
        for side, limit in enumerate(limits):
            rows = [
                np.flatnonzero((part.y == c) & (part.split == side))[:limit]
                for c in range(first, min(first + size, part.num_classes))
            ]
            sides.append(begin + np.sort(np.concatenate(rows)))
        found.append((sides[0], sides[1]))
    return found
