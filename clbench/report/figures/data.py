"""Data of the figures: rows of a leaderboard, each with the matrices of its runs. No drawing here."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clbench.evaluation import edit_metrics, loss_metrics, metrics
from clbench.records import loss_facts
from clbench.report.board import Group, rank
from clbench.report.columns import LEADERBOARDS, LOSS, Leaderboard
from clbench.report.folder import file_name
from clbench.report.formats import plain
from clbench.report.runs import Filter, Run, scan

LONGEST = 30  # characters of a label
SAID = {"legacy": "legacy", "test_tuned": "test-tuned"}  # marks that a label repeats
EDITED = ("reliability", "generalisation", "locality")
SERIES = ("tokens", "lr", "experience", "step")


@dataclass(frozen=True, eq=False)
class Course:
    """The looks of one run, P of them: tokens, lr, experience, step [P] each, loss [P, E]; tokens at each boundary."""

    tokens: np.ndarray
    lr: np.ndarray
    experience: np.ndarray
    step: np.ndarray
    loss: np.ndarray
    boundaries: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Sets:
    """The evaluation sets of a stream: names, samples, own experience [E], and of losses the exact floor or None.

    measure  what the losses are; unit: what is counted, tokens or images
    """

    names: tuple[str, ...]
    n: Sequence[int]
    first_seen: np.ndarray
    floors: tuple[float | None, ...] = ()
    measure: str = ""
    unit: str = ""


@dataclass(frozen=True, eq=False)
class Trace:
    """One finished run: its matrix, and of pre-training its looks, if any; `extra` holds optional parts of other records.

    matrix  accuracy after each experience [T, E], NaN where not evaluated; or losses before the first and after each [T + 1, E]
    """

    run: Run
    sets: Sets
    matrix: np.ndarray
    course: Course | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Line:
    """One row of the leaderboard with its finished runs by seed; `label` tells it from the other rows of its stream."""

    row: Mapping[str, Any]
    label: str
    traces: tuple[Trace, ...]

    @property
    def reference(self) -> bool:
        """Whether it is no contender: it keeps all data, or other code made its numbers."""
        return bool({"reference", "legacy"} & set(self.row["marks"].split()))

    @property
    def file(self) -> str:
        """A part of a file name."""
        return f"{file_name(self.row['learner'])}-{self.row['variant']}"

    @property
    def last(self) -> float:
        """Mean last_macro."""
        return float(self.row["last_macro_mean"])

    def courses(self) -> list[Course]:
        """The looks of the runs that looked at the same steps as the first one that looked at all."""
        found = [trace.course for trace in self.traces if trace.course is not None]
        return [c for c in found if np.array_equal(c.tokens, found[0].tokens)]


@dataclass(frozen=True)
class Field:
    """All rows of a leaderboard on one stream, best first."""

    board: Leaderboard
    scenario: str
    manifest: str
    lines: tuple[Line, ...]

    @property
    def sets(self) -> Sets:
        """Those of its first run."""
        return self.lines[0].traces[0].sets

    @property
    def title(self) -> str:
        """Scenario and the first digits of its stream."""
        return f"{short(self.scenario)} ({self.manifest})" if self.manifest else short(self.scenario)

    @property
    def file(self) -> str:
        """A part of a file name."""
        return "-".join(word for word in (file_name(self.scenario), self.manifest) if word)


def short(text: Any, longest: int = LONGEST) -> str:
    """A name on one line, cut in its middle where it is long."""
    word = plain(text)
    half = (longest - 1) // 2
    return word if len(word) <= longest else f"{word[: longest - 1 - half]}…{word[-half:]}"


def trace_of(entry: Mapping[str, Any], run: Run) -> Trace | None:
    """What figures need of a record; None of one without a matrix."""
    if not run.usable:
        return None
    if run.edits:
        return _edited(entry, run)
    names = entry["scenario"].get("eval_names") or range(1, len(entry["n"]) + 1)
    known = tuple(plain(name) for name in names), entry["n"], np.asarray(entry["first_seen"])
    if run.leaderboard is LOSS:
        sets = Sets(*known, tuple(entry["floor"]), loss_facts.measure_of(entry), loss_facts.unit_of(entry))
        matrix = loss_metrics.loss_matrix([entry["sum_loss_start"], *entry["sum_loss"]], entry["tokens"])
        return Trace(run, sets, matrix, course_of(entry))
    if not isinstance(entry.get("correct"), list):
        return None
    extra = {name: entry[name] for name in ("curves", "stability") if isinstance(entry.get(name), Mapping)}
    return Trace(run, Sets(*known), metrics.accuracy(entry["correct"], entry["n"]).astype(np.float32), extra=extra)


def _edited(entry: Mapping[str, Any], run: Run) -> Trace:
    """Of a run of edits: `extra["course"]` are its numbers after 1, 10, 100, ... edits; the matrix has the main three."""
    steps = edit_metrics.course(entry)
    rows = [[step.get(name, np.nan) for name in EDITED] for step in steps]
    matrix = np.array(rows, np.float32).reshape(len(steps), len(EDITED))
    return Trace(run, Sets(EDITED, [1] * len(EDITED), np.zeros(len(EDITED), int)), matrix, extra={"course": steps})


def course_of(entry: Mapping[str, Any]) -> Course | None:
    """The curves of a record as arrays; None where there are none that hold together."""
    curves = entry.get("curves")
    try:
        parts = {name: np.array(curves[name], np.float64) for name in SERIES}  # type: ignore[index]
        columns = [np.array(curves["loss"][name], np.float64) for name in entry["scenario"]["eval_names"]]  # type: ignore[index]
        edges = tuple(float(edge) for edge in curves["boundaries"])  # type: ignore[index]
        loss = np.stack(columns, axis=1)
    except (LookupError, TypeError, ValueError):
        return None
    size = len(parts["tokens"])
    if not size or len(loss) != size or any(part.shape != (size,) or not np.isfinite(part).all() for part in parts.values()):
        return None
    return Course(**parts, loss=loss, boundaries=edges)


def read(results: pathlib.Path, wanted: Filter | None = None) -> list[Field]:
    """The fields of a results folder, by leaderboard, scenario and stream; [] without a finished run."""
    traces: dict[str, Trace] = {}

    def take(entry: Mapping[str, Any], run: Run) -> None:
        if (made := trace_of(entry, run)) is not None:
            traces[run.run_id] = made

    runs = [run for run in scan(results, wanted, take).runs if run.run_id in traces]
    return [made for board in LEADERBOARDS for made in fields(rank(runs, board), board, traces)]


def fields(made: Sequence[Group], board: Leaderboard, traces: Mapping[str, Trace]) -> list[Field]:
    """The rows of a leaderboard that have traces, with the traces of their runs by run id."""
    mean, sign = f"{board.headline}_mean", 1 if board.lower else -1
    held: dict[tuple[str, str], list[tuple[Mapping[str, Any], tuple[Trace, ...]]]] = {}
    for row, runs in made:
        found = tuple(traces[run.run_id] for run in runs if run.run_id in traces)
        if found and row[mean] is not None:
            held.setdefault((row["scenario"], row["manifest"]), []).append((row, found))
    fields = []
    for (scenario, manifest), rows in sorted(held.items()):
        rows.sort(key=lambda r: (sign * r[0][mean], r[0]["learner"], r[0]["model"], r[0]["variant"]))
        labels = (_labels_by_replay if board is LOSS else _labels)([row for row, _ in rows])
        lines = (Line(row, label, found) for (row, found), label in zip(rows, labels, strict=True))
        fields.append(Field(board, scenario, manifest, tuple(lines)))
    return fields


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The learner; the model where there are several; the variant where that is not enough."""
    several = len({row["model"] for row in rows}) > 1
    words = [" ".join([row["learner"], *([row["model"]] if several else [])]) for row in rows]
    twice = _twice([short(word) for word in words])
    made = []
    for row, word in zip(rows, words, strict=True):
        if short(word) in twice:
            word = f"{short(word, LONGEST - 9)} {row['variant']}"
        marks = row["marks"].split()
        made.append(short(word) + "".join(f" ({words})" for mark, words in SAID.items() if mark in marks))
    return made


def _labels_by_replay(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The learner; its replay share, its model, its variant, each only where it is needed to tell rows apart."""

    def words(row: Mapping[str, Any], level: int) -> str:
        share = row["replay"]
        parts = [plain(row["learner"]), *([f"{100 * share:g} %"] if level > 0 and isinstance(share, int | float) else [])]
        return " ".join([*parts, *([plain(row["model"])] if level > 1 else []), *([row["variant"]] if level > 2 else [])])

    made = [words(row, 0) for row in rows]
    for level in (1, 2, 3):
        twice = _twice(made)
        made = [words(row, level) if word in twice else word for row, word in zip(rows, made, strict=True)]
    return made


def _twice(words: Sequence[str]) -> set[str]:
    return {word for word, count in Counter(words).items() if count > 1}


def mean_over(stack: np.ndarray) -> np.ndarray:
    """Mean over runs [R, T, E] -> [T, E]; NaN where no run has a value."""
    known = ~np.isnan(stack)
    total = np.where(known, stack, 0).sum(0)
    return np.divide(total, known.sum(0), out=np.full(total.shape, np.nan, total.dtype), where=known.any(0))


def mean_matrix(line: Line) -> np.ndarray:
    """Mean over runs of their matrices."""
    return mean_over(np.stack([trace.matrix for trace in line.traces]))


def steps(line: Line) -> np.ndarray:
    """Macro accuracy after each experience, a row for each run [R, T]."""
    return np.stack([metrics.macro(trace.matrix, trace.sets.first_seen) for trace in line.traces])


def forgotten(line: Line) -> np.ndarray:
    """Per set, mean over runs of what was lost [E]; NaN for sets of the last experience."""
    return np.mean([forgotten_of(trace.matrix, trace.sets.first_seen) for trace in line.traces], axis=0)


def forgotten_of(a: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Per set (best since its own experience, before the last) - last [E] of accuracies [T, E]; NaN for sets of the last."""
    row = np.full(a.shape[1], np.nan)
    for j, start in enumerate(first):
        if start < len(a) - 1:
            row[j] = a[start:-1, j].max() - a[-1, j]
    return row
