"""Levels of detail of a row, and the level of each row that keeps the page within its size.

Level 0: the mean matrix, every run's curve, forgetting, loss and learning rate, evaluations inside experiences of one run.
1: the matrix, mean curve and forgetting, and the other curves of the first run that has them, with fewer points. 2: without
these. 3: the mean curve alone. 4: nothing. The largest rows give way first; the page says what was left out where.

A figure is kept as [nested values, where dotted lines stand, floors, words]; `figures.grids` says what the nested values are.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clbench.report.figures import grids, runs
from clbench.report.figures.data import Course, Line, mean_matrix, mean_over

LOOKS = 400  # of a course of pre-training
POINTS = 300  # of a curve; the lowest and highest of what lies between are kept
STEPS = 200  # evaluations inside experiences
FEW = 60  # of either, at level 1
LEVELS = 5


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def extra(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The curves of a record that the page shows, thinned out; a part that is absent or of another shape is left out."""
    made: dict[str, Any] = {}
    if (curves := runs.loss_curves(entry.get("curves"))) is not None:
        made["loss"] = thinned(curves, POINTS)
    if (trace := runs.trace_values(entry.get("stability"), len(entry["n"]))) is not None:
        made["stability"] = evenly(trace[0], STEPS)
    return made


def thinned(curves: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Curves of loss and learning rate with at most so many points."""
    keep = [i for i in _thin(curves["loss"], most) if curves["x"][i] is not None]
    parts = {name: [curves[name][i] for i in keep] for name in ("x", "loss", "lr") if name in curves}
    return {"unit": curves["unit"], "edges": curves["edges"][:STEPS], **parts}


def evenly(trace: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Evaluations inside experiences, at most so many."""
    return {name: [values[i] for i in _even(len(values), most)] for name, values in trace.items()}


def short(value: Any) -> float | None:
    """Five digits of a number of moderate size, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(f"{value:.5g}")


def _thin(values: Sequence[float | None], most: int) -> list[int]:
    """Places to keep: of each stretch the lowest and the highest value, and both ends."""
    size = len(values)
    if size <= most:
        return list(range(size))
    kept = {0, size - 1}
    edges = np.linspace(0, size, most // 2 + 1).astype(int)
    for start, stop in itertools.pairwise(edges.tolist()):
        known = [i for i in range(start, stop) if values[i] is not None]
        if known:
            kept |= {min(known, key=lambda i: values[i] or 0.0), max(known, key=lambda i: values[i] or 0.0)}
    return sorted(int(i) for i in kept)


def levels(line: Line | None, values: Sequence[Any], settings: Sequence[int] | None) -> list[str]:
    """A row's details as JSON, from the richest to the poorest; without a line it has no figures."""
    known = {"v": values, "s": settings}
    if line is None:
        return [_text(known), *["null"] * (LEVELS - 1)]
    first, alike = line.traces[0].sets.first_seen, [t for t in line.traces if t.matrix.shape == line.traces[0].matrix.shape]
    matrices, mean = [t.matrix for t in alike], mean_over(np.stack([t.matrix for t in alike]))
    short_curve = {"curve": [grids.curve([mean], first)], "seeds": ["mean"]}
    matrix = {"matrix": [grids.matrix(matrices)], "forgotten": [grids.forgotten([mean], first)], **short_curve}
    if time := grids.seconds(line.row):
        matrix["seconds"] = [time]
    own = {"curve": [grids.curve(matrices, first)], "forgotten": [grids.forgotten(matrices, first)]}
    own |= {"seeds": [t.run.seed for t in alike]}
    whole = [*_losses(line, False), *_trace(line, STEPS)]
    few = [*_losses(line, True), *_trace(line, FEW)]
    made = (matrix | own | dict(whole) | known | {"all": 1}, matrix | dict(few) | known, matrix | known, short_curve, None)
    return [_text(level) for level in made]


def _losses(line: Line, few: bool) -> list[tuple[str, list[Any]]]:
    """Loss and learning rate of the runs that have them in one unit; `few`: of the first, with fewer points."""
    found = [(t.run.seed, t.extra["loss"]) for t in line.traces if "loss" in t.extra]
    found = [(seed, curves) for seed, curves in found if curves["unit"] == found[0][1]["unit"]]
    if few:
        found = [(seed, thinned(curves, FEW)) for seed, curves in found[:1]]
    if not found:
        return []
    names = [name for name in ("x", "loss", "lr") if all(name in curves for _, curves in found)]
    values = {name: [curves[name] for _, curves in found] for name in names}
    words = {"unit": found[0][1]["unit"], "seeds": [f"seed {seed}" for seed, _ in found]}
    return [("loss", [values, found[0][1]["edges"], [], words])]


def _trace(line: Line, most: int) -> list[tuple[str, list[Any]]]:
    found = next((t for t in line.traces if t.extra.get("stability", {}).get("experience")), None)
    if found is None:
        return []
    values = evenly(found.extra["stability"], most)
    edges = [k + 1.5 for k, (a, b) in enumerate(itertools.pairwise(values["experience"])) if a != b]
    return [("stability", [values, edges, [], {"seed": found.run.seed}])]


def loss_levels(line: Line) -> list[str]:
    """The same of pre-training: all runs; the matrix and the looks of the first run; the matrix; nothing."""
    matrix = {"loss_matrix": [{"loss": grids.plain(mean_matrix(line))}]}
    courses = line.courses()
    every = _looks(line, courses) | {"all": 1}
    return [_text(level) for level in (matrix | every, matrix | _looks(line, courses[:1]), matrix, None)]


def _looks(line: Line, courses: Sequence[Course]) -> dict[str, list[Any]]:
    """Figures over what was trained on: losses with their floors, and the stability gaps."""
    if not courses:
        return {}
    keep = _early(courses[0])
    some = [Course(c.tokens[keep], c.lr[keep], c.experience[keep], c.step[keep], c.loss[keep], c.boundaries) for c in courses]
    floors = [None if floor is None else short(floor) for floor in line.traces[0].sets.floors]
    edges = [int(edge) for edge in courses[0].boundaries[1:]]
    made: dict[str, list[Any]] = {"losses": [grids.losses(some), edges, floors]}
    if found := grids.rises(some, line.traces[0].sets.first_seen):
        made["gaps"] = [found[0], [], [], {"start": found[1]}]
    return made


def _early(course: Course) -> np.ndarray:
    """Places of the looks to keep: evenly, but all the first ones of each experience, which are the gap."""
    keep = np.arange(len(course.tokens))
    if len(keep) > LOOKS:
        late = course.step > 64
        keep = np.unique(np.concatenate([np.flatnonzero(~late)[:LOOKS], np.linspace(0, len(late) - 1, LOOKS).astype(int)]))
    return keep


def _even(size: int, most: int) -> list[int]:
    """At most so many places out of `size`, evenly chosen, with both ends."""
    return sorted({int(i) for i in np.linspace(0, size - 1, min(size, most))}) if size else []


def fit(details: Sequence[Sequence[str]], room: int) -> tuple[list[Any], list[int]]:
    """The richest level for each row so that all fit -> (details, number of rows at each level).

    A row takes the richest level of at most `cap` characters; the largest cap that fits is found by halving.
    """

    def chosen(cap: float) -> list[int]:
        return [next((i for i, text in enumerate(row) if len(text) <= cap), len(row) - 1) for row in details]

    def size(places: Sequence[int]) -> int:
        return sum(len(row[i]) + 1 for row, i in zip(details, places, strict=True))

    low, high = 0, max((len(row[0]) for row in details), default=0)
    best = chosen(high)
    if size(best) > room:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if size(chosen(middle)) <= room else (low, middle)
        best = chosen(low)
    left = [best.count(level) for level in range(LEVELS)]
    return [json.loads(row[i]) for row, i in zip(details, best, strict=True)], left
