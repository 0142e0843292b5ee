"""A stream dealt anew: samples by class, experiences of chosen samples, an evaluation set for the classes that each brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.manifest import EvalEntry, ExperienceEntry
from clbench.streams.scenario import Scenario
from clbench.streams.transforms import Steps


@dataclass(frozen=True)
class Pool:
    """All samples of a stream. `classes` are in order of appearance; ids by class ascend.

    labels  [samples of the data set] what a training sample is called; None: as in the data set
    """

    stream: Scenario
    classes: tuple[int, ...]
    train: Mapping[int, np.ndarray]
    test: Mapping[int, np.ndarray]
    labels: np.ndarray | None
    transform: Steps

    def shuffled(self, c: int, *key: int | str) -> np.ndarray:
        """The training ids of a class in an order of `key` and the class."""
        return self.train[c][rng.permutation(rng.key(*key, c), len(self.train[c]))]


def pool(stream: Scenario, operator: str) -> Pool:
    """The samples of a stream by class; `UserError` where its experiences differ in more than their samples."""
    manifest = stream.manifest
    parts: Sequence[Any] = (*manifest.experiences, *manifest.evals)
    if any(part.transform != parts[0].transform for part in parts):
        raise UserError(f"operator {operator}: experiences differ in their pictures; put {operator} before what changes them")
    if any(e.labels is not None for e in manifest.evals):
        raise UserError(f"operator {operator}: evaluation sets have labels of their own; put {operator} before relabel")
    if any(not e.labelled or e.budget or not e.boundary for e in manifest.experiences) or manifest.looks:
        raise UserError(f"operator {operator}: the experiences have rules of their own; put {operator} before what made them")
    train = np.concatenate([e.train for e in manifest.experiences])
    test = np.concatenate([e.ids for e in manifest.evals])
    if any(len(np.unique(ids)) < len(ids) for ids in (train, test)):
        raise UserError(f"operator {operator}: the stream shows samples more than once already")
    labels = None
    if any(e.labels is not None for e in manifest.experiences):
        labels = np.array(stream.dataset.y)
        for entry in manifest.experiences:
            labels[entry.train] = stream.labels(entry)
    y, test_y = stream.dataset.y if labels is None else labels, stream.dataset.y
    train, test = np.sort(train), np.sort(test)
    return Pool(
        stream=stream,
        classes=manifest.class_order,
        train={c: train[y[train] == c] for c in manifest.class_order},
        test={c: test[test_y[test] == c] for c in manifest.class_order},
        labels=labels,
        transform=parts[0].transform,
    )


def dealt(
    found: Pool,
    parts: Sequence[np.ndarray],
    names: Sequence[str],
    operator: str,
    order: Sequence[int] = (),
    kind: str = "class_incremental",
) -> Scenario:
    """A stream of the training ids `parts`, one array for each experience; an experience without samples is left out.

    order  of classes that appear together (none: the stream's); every experience that brings classes has an evaluation set of
           their test samples, so that the sets seen so far hold the classes seen so far
    """
    stream, manifest = found.stream, found.stream.manifest
    y = stream.dataset.y if found.labels is None else found.labels
    rank = {c: i for i, c in enumerate(order or found.classes)}
    steps: list[ExperienceEntry] = []
    sets: list[EvalEntry] = []
    seen: set[int] = set()
    for ids, name in zip(parts, names, strict=True):
        if len(ids) == 0:
            continue
        task = len(steps) if manifest.discloses_task else None
        present = sorted(np.unique(y[ids]).tolist(), key=rank.__getitem__)
        labels = None if found.labels is None else y[ids]
        new = [c for c in present if c not in seen and len(found.test[c])]
        seen |= set(present)
        if new:
            tested = np.sort(np.concatenate([found.test[c] for c in new]))
            sets.append(EvalEntry(name, task, tuple(new), tested, len(steps), transform=found.transform))
        steps.append(ExperienceEntry(name, task, tuple(present), ids, labels, transform=found.transform))
    if not sets:
        raise UserError(f"operator {operator}: no experience is left that can be evaluated")
    made = replace(
        manifest,
        kind="task_incremental" if manifest.discloses_task else kind,
        class_order=tuple(dict.fromkeys(c for e in steps for c in e.classes)),
        experiences=tuple(steps),
        evals=tuple(sets),
    )
    return replace(stream, manifest=made)


def without_tasks(stream: Scenario, operator: str) -> None:
    """`UserError` where tasks are disclosed and classes would come back in other tasks."""
    if stream.manifest.discloses_task:
        raise UserError(f"operator {operator} shows classes in several experiences, and scenario {stream.name} discloses tasks")


def split(number: int, parts: int) -> list[int]:
    """`number` in `parts` whole parts that differ by one at most, the larger ones first."""
    return [number // parts + (i < number % parts) for i in range(parts)]
