"""Data of the figures: rows of the leaderboard, each with the accuracies of its runs. No drawing here."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clbench.evaluation import metrics
from clbench.report import table
from clbench.report.formats import plain
from clbench.report.runs import Filter, Run, entries, summarize

LONGEST = 30  # characters of a label
SAID = {"legacy": "legacy", "test_tuned": "test-tuned"}  # marks that a label repeats


@dataclass(frozen=True, eq=False)
class Trace:
    """One finished run: accuracy [T, E] (NaN where not evaluated), first_seen [E]; `entry` holds its optional parts."""

    run: Run
    accuracy: np.ndarray
    first_seen: np.ndarray
    extra: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Line:
    """One row of the leaderboard with its runs, and the short name that figures give it."""

    row: Mapping[str, Any]
    label: str
    traces: tuple[Trace, ...]
    set_names: tuple[str, ...]

    @property
    def reference(self) -> bool:
        """Whether it is no contender: it keeps all data, or other code made its numbers."""
        return bool({"reference", "legacy"} & set(self.row["marks"].split()))

    @property
    def file(self) -> str:
        """A part of a file name."""
        return f"{table.file_name(self.row['learner'])}-{self.row['variant']}"

    @property
    def last(self) -> float:
        """Mean last_macro."""
        return float(self.row["last_macro_mean"])


@dataclass(frozen=True)
class Field:
    """All rows on one stream, best first."""

    scenario: str
    manifest: str
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """Scenario and the first digits of its stream."""
        return f"{short(self.scenario)} ({self.manifest})" if self.manifest else short(self.scenario)

    @property
    def file(self) -> str:
        """A part of a file name."""
        return "-".join(word for word in (table.file_name(self.scenario), self.manifest) if word)


def short(text: Any, longest: int = LONGEST) -> str:
    """A name on one line, cut in its middle where it is long."""
    word = plain(text)
    half = (longest - 1) // 2
    return word if len(word) <= longest else f"{word[: longest - 1 - half]}…{word[-half:]}"


def read(results: pathlib.Path, wanted: Filter | None = None) -> list[Field]:
    """The fields of a results folder, by scenario and stream; [] without a finished run."""
    keep, known = wanted or Filter(), {}
    traces: dict[tuple[str, str, str, str, bool], list[Trace]] = {}
    names: dict[tuple[str, str, str, str, bool], tuple[str, ...]] = {}
    for entry in entries(results / "records", []):
        if not keep(entry) or entry["status"] != "ok" or not isinstance(entry.get("correct"), list):
            continue
        run = summarize(entry, known)
        key = (run.scenario, run.learner, run.model, run.variant, run.legacy)
        accuracy = metrics.accuracy(entry["correct"], entry["n"]).astype(np.float32)
        extra = {name: entry[name] for name in ("curves", "stability") if isinstance(entry.get(name), Mapping)}
        traces.setdefault(key, []).append(Trace(run, accuracy, np.asarray(entry["first_seen"]), extra))
        listed = entry["scenario"].get("eval_names") or range(1, len(entry["n"]) + 1)
        names.setdefault(key, tuple(plain(name) for name in listed))
    rows = table.board([trace.run for group in traces.values() for trace in group])
    rows = [row for row in rows if row["last_macro_mean"] is not None]
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["scenario"], row["manifest"]), []).append(row)
    made = []
    for (scenario, manifest), held in sorted(grouped.items()):
        held.sort(key=lambda r: (-r["last_macro_mean"], r["learner"], r["model"], r["variant"]))
        lines = [_line(row, label, traces, names) for row, label in zip(held, _labels(held), strict=True)]
        made.append(Field(scenario, manifest, tuple(lines)))
    return made


def _line(row: Mapping[str, Any], label: str, traces: Mapping[Any, list[Trace]], names: Mapping[Any, Any]) -> Line:
    key = (row["scenario"], row["learner"], row["model"], row["variant"], "legacy" in row["marks"].split())
    group = sorted(traces[key], key=lambda t: (t.run.seed, t.run.run_id))
    return Line(row, label, tuple(group), names[key])


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The learner; the model where there are several; the variant where that is not enough."""
    several = len({row["model"] for row in rows}) > 1
    words = [" ".join([row["learner"], *([row["model"]] if several else [])]) for row in rows]
    twice = {word for word, count in Counter(short(word) for word in words).items() if count > 1}
    made = []
    for row, word in zip(rows, words, strict=True):
        if short(word) in twice:
            word = f"{short(word, LONGEST - 9)} {row['variant']}"
        marks = row["marks"].split()
        made.append(short(word) + "".join(f" ({words})" for mark, words in SAID.items() if mark in marks))
    return made


def mean_matrix(line: Line) -> np.ndarray:
    """Mean accuracy over runs [T, E]; NaN where no run evaluated."""
    stack = np.stack([trace.accuracy for trace in line.traces])
    known = ~np.isnan(stack)
    total = np.where(known, stack, 0).sum(0)
    return np.divide(total, known.sum(0), out=np.full(total.shape, np.nan, np.float32), where=known.any(0))


def steps(line: Line) -> np.ndarray:
    """Macro accuracy after each experience, a row for each run [R, T]."""
    return np.stack([metrics.macro(trace.accuracy, trace.first_seen) for trace in line.traces])


def forgotten(line: Line) -> np.ndarray:
    """Per set, mean over runs of (best since its own experience, before the last) - last [E]; NaN for sets of the last."""
    rows = []
    for trace in line.traces:
        a, first = trace.accuracy, trace.first_seen
        row = np.full(a.shape[1], np.nan)
        for j, start in enumerate(first):
            if start < len(a) - 1:
                row[j] = a[start:-1, j].max() - a[-1, j]
        rows.append(row)
    return np.mean(rows, axis=0)
