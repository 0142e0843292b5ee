"""Levels of detail of a row, and the level of each row that keeps the page within its size.

Level 0: every run's counts, curves of loss and learning rate, evaluations inside experiences. 1: the mean matrix, and the
curves of the first run that has them, with fewer points. 2: the mean matrix. 3: the mean curve over experiences. 4: nothing.
The largest rows give way first; the page says what was left out where.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clbench.evaluation import metrics
from clbench.report.figures.data import Course, Line, mean_matrix, mean_over

LOOKS = 400  # of a course of pre-training
POINTS = 300  # of a curve; the lowest and highest of what lies between are kept
STEPS = 200  # evaluations inside experiences
FEW = 60  # of either, at level 1
LEVELS = 5


@dataclass(frozen=True, slots=True)
class Detail:
    """One run: counts or summed losses [T, E] with None, sizes, first_seen, and curves, each as JSON text to be small."""

    table: str
    n: tuple[int, ...]
    first: tuple[int, ...]
    lower: bool
    curves: str
    stability: str


def of(entry: Mapping[str, Any]) -> Detail:
    """What the page shows of one finished record; a part that is absent or of another shape is left out."""
    correct, lower = entry.get("correct"), False
    if not isinstance(correct, list):
        correct, lower = _losses(entry), True
    curves, stability = _curves(entry.get("curves")), _stability(entry.get("stability"), len(entry["n"]))
    n, first = tuple(entry["n"]), tuple(entry["first_seen"])
    return Detail(_text(correct), n, first, lower, _text(curves) if curves else "", _text(stability) if stability else "")


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _losses(entry: Mapping[str, Any]) -> list[list[float | None]]:
    given = entry.get("sum_loss")
    width = len(entry["n"])
    if not isinstance(given, list) or not all(isinstance(row, list) and len(row) == width for row in given):
        return []
    return [[short(v) for v in row] for row in given]


def short(value: Any) -> float | None:
    """Five digits of a number of moderate size, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(f"{value:.5g}")


def _numbers(value: Any, size: int | None = None) -> list[float | None] | None:
    if not isinstance(value, list) or not value or (size is not None and len(value) != size):
        return None
    made = [short(v) for v in value]
    return made if any(v is not None for v in made) else None


def _curves(given: Any) -> dict[str, Any] | None:
    """Loss and learning rate over tokens or steps, thinned out to `POINTS`."""
    if not isinstance(given, Mapping):
        return None
    unit = next((name for name in ("tokens", "step") if _numbers(given.get(name))), "")
    x = _numbers(given.get(unit)) or []
    loss = _numbers(given.get("loss"), len(x))
    if not x or loss is None:
        return None
    keep = [i for i in _thin(loss, POINTS) if x[i] is not None]
    made: dict[str, Any] = {"unit": unit, "x": [x[i] for i in keep], "loss": [loss[i] for i in keep]}
    rate = _numbers(given.get("lr"), len(x))
    if rate is not None:
        made["lr"] = [rate[i] for i in keep]
    made["edges"] = [v for v in _numbers(given.get("boundaries")) or () if v is not None][:STEPS]
    return made


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


def _stability(given: Any, width: int) -> list[list[Any]] | None:
    """Evaluations inside experiences: [experience, per mille on each set or None]; at most `STEPS`, evenly chosen."""
    trace = given.get("trace") if isinstance(given, Mapping) else None
    if not isinstance(trace, list):
        return None
    made = []
    for row in trace:
        if not isinstance(row, Mapping) or not isinstance(row.get("experience"), int):
            return None
        right, n = row.get("correct"), row.get("n")
        if not isinstance(right, list) or not isinstance(n, list) or len(right) != width or len(n) != width:
            continue
        known = [(short(a), short(b)) for a, b in zip(right, n, strict=True)]
        made.append([row["experience"], [round(1000 * a / b) if a is not None and b else None for a, b in known]])
    return [made[i] for i in _even(len(made), STEPS)] or None


def levels(runs: Sequence[Detail], values: Sequence[Any], settings: Sequence[int] | None) -> list[str]:
    """A row's details as JSON, from the richest to the poorest."""
    known = [run for run in runs if run.table != "[]"]
    if not known:
        return [_text({"v": values, "s": settings}), *["null"] * (LEVELS - 1)]
    alike = [run for run in known if run.n == known[0].n and run.lower == known[0].lower]
    stacked = [_accuracy(run) for run in alike]
    stacked = [a for a in stacked if a.shape == stacked[0].shape]
    mean = mean_over(np.stack(stacked))
    lower, scale = alike[0].lower, 1 if alike[0].lower else 1000
    own = []
    for run in runs:
        parts = [f'"c":{run.table}', f'"n":{_text(run.n)}', f'"l":{run.curves or "null"}', f'"t":{run.stability or "null"}']
        own.append("{" + ",".join(parts) + "}")
    more = f'"low":{int(lower)},"v":{_text(values)},"s":{_text(settings)}'
    matrix = _text([[_cell(v, scale) for v in row] for row in mean])
    curve = _text([_cell(v, scale) for v in metrics.macro(mean, alike[0].first)])
    made = [f'{{"r":[{",".join(own)}],{more}}}', f'{{"m":{matrix},{_one(runs)}{more}}}', f'{{"m":{matrix},{more}}}']
    return [*made, f'{{"k":{curve},"low":{int(lower)}}}', "null"]


def loss_levels(line: Line) -> list[str]:
    """The same of pre-training: every run; the mean matrix and the course of the first run; the mean matrix; nothing."""
    mean, courses = _grid(mean_matrix(line)), [_course(trace.course) for trace in line.traces]
    every = [[_grid(trace.matrix), course] for trace, course in zip(line.traces, courses, strict=True)]
    first = next((course for course in courses if course is not None), None)
    return [_text(level) for level in ({"m": mean, "r": every}, {"m": mean, "r": [[None, first]]}, {"m": mean, "r": []}, None)]


def _course(course: Course | None) -> dict[str, Any] | None:
    """Looks of one run, thinned out evenly but for the first ones of each experience, which are the gap."""
    if course is None:
        return None
    keep = np.arange(len(course.tokens))
    if len(keep) > LOOKS:
        late = course.step > 64
        keep = np.unique(np.concatenate([np.flatnonzero(~late)[:LOOKS], np.linspace(0, len(late) - 1, LOOKS).astype(int)]))
    whole = {"x": course.tokens, "step": course.step, "experience": course.experience}
    made: dict[str, Any] = {name: [int(v) for v in column[keep]] for name, column in whole.items()}
    made["lr"] = [short(v) for v in course.lr[keep]]
    return made | {"loss": _grid(course.loss[keep].T), "edges": [int(edge) for edge in course.boundaries[1:]]}


def _grid(matrix: np.ndarray) -> list[list[float | None]]:
    return [[short(v) for v in row] for row in matrix.tolist()]


def _one(runs: Sequence[Detail]) -> str:
    """The place and the thinned-out curves of the first run that has any, as a part of JSON; '' without one."""
    place = next((i for i, run in enumerate(runs) if run.curves or run.stability), None)
    if place is None:
        return ""
    curves = json.loads(runs[place].curves or "null")
    if curves:
        keep = _thin(curves["loss"], FEW)
        curves |= {name: [curves[name][i] for i in keep] for name in ("x", "loss", "lr") if name in curves}
    stability = json.loads(runs[place].stability or "null")
    if stability:
        stability = [stability[i] for i in _even(len(stability), FEW)]
    return f'"f":{_text([place, curves, stability])},'


def _even(size: int, most: int) -> list[int]:
    """At most so many places out of `size`, evenly chosen, with both ends."""
    return sorted({int(i) for i in np.linspace(0, size - 1, min(size, most))}) if size else []


def _accuracy(run: Detail) -> np.ndarray:
    return metrics.accuracy(json.loads(run.table), run.n)


def _cell(value: float, scale: int) -> float | None:
    return None if not math.isfinite(value) else round(scale * float(value)) if scale > 1 else float(f"{value:.4g}")


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
