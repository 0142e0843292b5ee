"""What several operators do: a whole stream as one experience, several times; options checked in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.manifest import EvalEntry, ExperienceEntry
from clbench.streams.scenario import Scenario
from clbench.streams.transforms import Steps


def whole(value: Any, what: str, least: int = 0) -> int:
    """A whole number from `least`, or `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{what} must be a whole number from {least}, got {value!r}")
    return value


def chosen(value: Any, what: str, names: Sequence[str]) -> str:
    """One of `names`, or `UserError`."""
    if value not in names:
        raise UserError(f"{what} must be one of {', '.join(names)}, got {value!r}")
    return value


def flag(value: Any, what: str) -> bool:
    """True or false, or `UserError`."""
    if not isinstance(value, bool):
        raise UserError(f"{what} must be true or false, got {value!r}")
    return value


def share(value: Any, what: str, least: float = 0.0, most: float = 1.0) -> float:
    """A number in least..most, or `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(f"{what} must be a number in {least:g}..{most:g}, got {value!r}")
    return float(value)


def copied(stream: Scenario, number: int, word: str, operator: str) -> Scenario:
    """Every sample of the stream in each of `number` experiences `word`0, `word`1, ..., with an evaluation set each.

    Raises `UserError` where the stream shows a sample twice or its experiences differ in more than their samples.
    """
    manifest = stream.manifest
    hint = f"use {{{operator}: {{experiences: null}}}}, which changes the experiences there are"
    parts: Sequence[Any] = (*manifest.experiences, *manifest.evals)
    if any(part.transform != parts[0].transform for part in parts):
        raise UserError(f"operator {operator}: the experiences differ in their pictures already: {hint}")
    if any(not e.labelled or e.budget or not e.boundary for e in manifest.experiences) or manifest.looks:
        raise UserError(f"operator {operator}: the experiences have rules of their own already: {hint}")
    train = np.concatenate([e.train for e in manifest.experiences])
    test = np.concatenate([e.ids for e in manifest.evals])
    for ids in (train, test):
        if len(np.unique(ids)) != len(ids):
            raise UserError(f"operator {operator}: the stream shows samples more than once already: {hint}")
    changed = any(part.labels is not None for part in parts)
    y, test_y = (np.concatenate([stream.labels(e) for e in part]) for part in (manifest.experiences, manifest.evals))
    present = set(test_y.tolist())
    first = ExperienceEntry("", None, manifest.class_order, train, y if changed else None, transform=parts[0].transform)
    tested = tuple(c for c in manifest.class_order if c in present)
    last = EvalEntry("", None, tested, test, 0, test_y if changed else None, parts[0].transform)
    tasks = [i if manifest.discloses_task else None for i in range(number)]
    steps = tuple(replace(first, name=f"{word}{i}", task=task) for i, task in enumerate(tasks))
    sets = tuple(replace(last, name=f"{word}{i}", task=task, first_seen=i) for i, task in enumerate(tasks))
    kind = "task_incremental" if manifest.discloses_task else "domain_incremental"
    return replace(stream, manifest=replace(manifest, kind=kind, experiences=steps, evals=sets))


def with_transforms(stream: Scenario, steps: Sequence[Steps]) -> Scenario:
    """Every experience, and the evaluation sets that belong to it, under further steps: one tuple of them for each."""
    manifest = stream.manifest
    experiences = tuple(
        replace(e, transform=(*e.transform, *more)) for e, more in zip(manifest.experiences, steps, strict=True)
    )
    evals = tuple(replace(e, transform=(*e.transform, *steps[e.first_seen])) for e in manifest.evals)
    return replace(stream, manifest=replace(manifest, experiences=experiences, evals=evals))
