"""Data of the pre-training figures: rows of the loss leaderboard with the matrices and curves of their runs."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clbench.evaluation import loss_metrics
from clbench.records import loss_facts
from clbench.report import losses
from clbench.report.formats import plain
from clbench.report.runs import Filter, Run, entries, summarize

SERIES = ("tokens", "lr", "experience", "step")
Key = tuple[str, str, str, str, bool]


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
class LossTrace:
    """One finished run: nats per token before the first and after each experience [T + 1, E], and its looks, if any."""

    run: Run
    matrix: np.ndarray
    course: Course | None


@dataclass(frozen=True, eq=False)
class LossLine:
    """One row of the leaderboard with its runs by seed; `label` tells it from the other rows of its stream."""

    row: Mapping[str, Any]
    label: str
    traces: tuple[LossTrace, ...]

    @property
    def reference(self) -> bool:
        """Whether it is no contender."""
        return bool({"reference", "legacy"} & set(self.row["marks"].split()))

    def matrix(self) -> np.ndarray:
        """Mean over runs [T + 1, E]."""
        return np.mean([trace.matrix for trace in self.traces], axis=0)

    def courses(self) -> list[Course]:
        """The looks of the runs that looked at the same steps as the first one that looked at all."""
        found = [trace.course for trace in self.traces if trace.course is not None]
        return [c for c in found if np.array_equal(c.tokens, found[0].tokens)]


@dataclass(frozen=True, eq=False)
class LossField:
    """All rows on one stream, lowest final loss first: names, own experience and exact floor (or None) of its sets.

    measure  what the losses are; unit: what is counted, tokens or images
    """

    scenario: str
    manifest: str
    sets: tuple[str, ...]
    first_seen: tuple[int, ...]
    floors: tuple[float | None, ...]
    lines: tuple[LossLine, ...]
    measure: str
    unit: str


def trace_of(entry: Mapping[str, Any], run: Run) -> LossTrace:
    """A usable record as arrays."""
    rows = [entry["sum_loss_start"], *entry["sum_loss"]]
    return LossTrace(run, loss_metrics.loss_matrix(rows, entry["tokens"]), course_of(entry))


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


def read(results: pathlib.Path, wanted: Filter | None = None) -> list[LossField]:
    """The fields of a results folder, by scenario and stream; [] without a finished run of pre-training."""
    keep, known = wanted or Filter(), {}
    runs: list[Run] = []
    traces: dict[str, LossTrace] = {}
    streams: dict[tuple[str, str], Mapping[str, Any]] = {}
    for entry in entries(results / "records", []):
        if not loss_facts.is_loss(entry) or not loss_facts.usable(entry):
            continue
        runs.append(summarize(entry, known))
        if keep(entry):
            traces[entry["run_id"]] = trace_of(entry, runs[-1])
            streams.setdefault((runs[-1].scenario, runs[-1].stream), {name: entry[name] for name in ("scenario", "floor")})
            streams[runs[-1].scenario, runs[-1].stream] |= {"first_seen": entry["first_seen"]}  # type: ignore[operator]
    shown = [run for run in loss_facts.join(runs) if run.run_id in traces]
    return fields(shown, traces, streams)


def fields(runs: Sequence[Run], traces: Mapping[str, LossTrace], streams: Mapping[tuple[str, str], Any]) -> list[LossField]:
    """Runs that are joined, their traces, and {scenario, floor, first_seen} of each (scenario, stream)."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.scenario, run.learner, run.model, run.variant, run.legacy), []).append(run)
    made: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in losses.board(runs):
        made.setdefault((row["scenario"], _group(row, groups)[0].stream), []).append(row)
    found = []
    for (scenario, stream), rows in sorted(made.items()):
        about = streams[scenario, stream]
        labels = labels_of(rows)
        lines = []
        for row, label in zip(rows, labels, strict=True):
            group = sorted(_group(row, groups), key=lambda r: (r.seed, r.run_id))
            lines.append(LossLine(row, label, tuple(traces[run.run_id] for run in group)))
        names = tuple(plain(name) for name in about["scenario"]["eval_names"])
        levels = tuple(about["first_seen"]), tuple(about["floor"])
        kind = loss_facts.measure_of(about), loss_facts.unit_of(about)
        found.append(LossField(scenario, stream[:8], names, *levels, tuple(lines), *kind))
    return found


def _group(row: Mapping[str, Any], groups: Mapping[Key, list[Run]]) -> list[Run]:
    key = (row["scenario"], row["learner"], row["model"], row["variant"])
    return groups[*key, "legacy" in row["marks"].split()]


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
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


def _twice(words: Iterable[str]) -> set[str]:
    return {word for word, count in Counter(words).items() if count > 1}
