"""What the page shows of pre-training: rows of the loss leaderboard with their matrices and courses, as plain values."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clbench.evaluation import loss_metrics, row_metrics
from clbench.records import loss_facts
from clbench.report.columns import extra_numbers
from clbench.report.figures import loss_data
from clbench.report.figures.loss_data import Course, LossLine, LossTrace
from clbench.report.formats import plain
from clbench.report.runs import Run

LARGEST = 900_000  # characters of courses and matrices of single runs; beyond, the largest rows give way
LONGEST = 300
POINTS = 400  # looks of a course that are kept
_RUN = ("final_loss", "retained_loss", "newest_loss", "forgetting_after", "gap_depth")


class Losses:
    """The pre-training records of a folder, taken one at a time."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.traces: dict[str, LossTrace] = {}
        self.streams: dict[tuple[str, str], dict[str, Any]] = {}
        self.first: dict[str, Mapping[str, Any]] = {}  # variant -> what a command is made of

    def add(self, entry: Mapping[str, Any], run: Run) -> None:
        """Take what is shown of a finished record whose losses can be read."""
        self.runs.append(run)
        if run.loss is None or not run.loss["usable"]:
            return
        self.traces[run.run_id] = loss_data.trace_of(entry, run)
        about = {name: entry[name] for name in ("scenario", "floor", "first_seen", "n")}
        self.streams.setdefault((run.scenario, run.stream), about)
        names = {part: {"name": entry[part]["name"]} for part in ("learner", "scenario", "model")}
        self.first.setdefault(run.variant, names | {"config": entry["config"]})

    def collect(self, command: Callable[[Mapping[str, Any], Sequence[Run]], str]) -> dict[str, Any]:
        """Everything, as plain values. `command` makes the command of a row from its first record and its runs."""
        shown = [run for run in loss_facts.join(self.runs) if run.run_id in self.traces]
        fields = loss_data.fields(shown, self.traces, self.streams)
        streams, rows, details = [], [], []
        seen: dict[str, int] = {}
        for place, field in enumerate(fields):
            full = next(s for s in self.streams if s[0] == field.scenario and s[1][:8] == field.manifest)
            sizes = self.streams[full]["n"]
            sets, floors = [_cut(name, 60) for name in field.sets], [_short(floor) for floor in field.floors]
            known = {"scenario": _cut(field.scenario), "manifest": field.manifest, "sets": sets, "n": sizes}
            known |= {"first": list(field.first_seen), "floors": floors}
            streams.append(known | {"measure": field.measure, "unit": field.unit})
            for line in field.lines:
                seen[line.row["variant"]] = number = seen.get(line.row["variant"], 0) + 1
                key = line.row["variant"] + (f"-{number}" if number > 1 else "")
                runs = [trace.run for trace in line.traces]
                lost = Counter(r.status for r in self.runs if r.status != "ok" and r.variant == line.row["variant"])
                extra = {"command": command(self.first[line.row["variant"]], runs), "lost": dict(sorted(lost.items()))}
                rows.append(_row(line, place, key) | extra)
                details.append(_levels(line))
        others = extra_numbers(line.row for field in fields for line in field.lines)
        about = loss_metrics.ABOUT | dict.fromkeys(others, row_metrics.ABOUT)
        return {"streams": streams, "rows": rows, "about": about, "details": _fit(details)}


def _row(line: LossLine, stream: int, key: str) -> dict[str, Any]:
    row = line.row
    words = {name: _cut(row[name]) for name in ("learner", "model", "variant", "marks")}
    names = [n for n in (*loss_metrics.ABOUT, *extra_numbers([row])) if row[f"{n}_mean"] is not None]
    numbers = {n: [_short(row[f"{n}_mean"]), _short(row[f"{n}_std"])] for n in names}
    ledger = {name.removeprefix("tokens_"): row[name] for name in row if name.startswith("tokens_")}
    ledger |= {"replay_bytes": row["replay_bytes"], "flops": _short(row["flops"])}
    known = {"stream": stream, "key": key, "label": _cut(line.label), "replay": row["replay"], "reference": line.reference}
    known |= {"low": _short(row["final_loss_low"]), "high": _short(row["final_loss_high"]), "vs": row["vs_best"]}
    known |= {"p": _short(row["vs_best_p"]), "seconds": _short(row["seconds_mean"]), "numbers": numbers, "ledger": ledger}
    runs = [
        [t.run.seed, t.run.run_id, *(_short(t.run.values.get(name)) for name in _RUN), _short(t.run.costs.get("seconds"))]
        for t in line.traces
    ]
    return words | known | {"runs": runs}


def _levels(line: LossLine) -> list[str]:
    """A row's details as JSON: every run; the mean matrix and the course of the first run; the mean matrix; nothing."""
    mean, courses = _grid(line.matrix()), [_course(trace.course) for trace in line.traces]
    every = {"m": mean, "r": [[_grid(t.matrix), course] for t, course in zip(line.traces, courses, strict=True)]}
    first = next((course for course in courses if course is not None), None)
    made = [every, {"m": mean, "r": [[None, first]]}, {"m": mean, "r": []}, None]
    return [json.dumps(level, separators=(",", ":"), allow_nan=False) for level in made]


def _course(course: Course | None) -> dict[str, Any] | None:
    """Looks of one run, thinned out evenly but for the first ones of each experience, which are the gap."""
    if course is None:
        return None
    keep = np.arange(len(course.tokens))
    if len(keep) > POINTS:
        late = course.step > 64
        keep = np.unique(np.concatenate([np.flatnonzero(~late)[:POINTS], np.linspace(0, len(late) - 1, POINTS).astype(int)]))
    columns = [course.tokens, course.step, course.experience]
    x, step, experience = ([int(v) for v in column[keep]] for column in columns)
    made: dict[str, Any] = {"x": x, "step": step, "experience": experience, "lr": [_short(v) for v in course.lr[keep]]}
    made["loss"] = [[_short(v) for v in column] for column in course.loss[keep].T]
    return made | {"edges": [int(edge) for edge in course.boundaries[1:]]}


def _grid(matrix: np.ndarray) -> list[list[float | None]]:
    return [[_short(v) for v in row] for row in matrix]


def _fit(details: Sequence[Sequence[str]]) -> list[Any]:
    """For each row its richest level, so that all stay under `LARGEST`: the largest row gives way first."""
    level = [0] * len(details)
    while sum(len(row[k]) for row, k in zip(details, level, strict=True)) > LARGEST:
        open_rows = [i for i, k in enumerate(level) if k + 1 < len(details[i])]
        if not open_rows:
            break
        level[max(open_rows, key=lambda i: len(details[i][level[i]]))] += 1
    return [json.loads(row[k]) for row, k in zip(details, level, strict=True)]


def _short(value: Any) -> float | None:
    """Five digits of a finite number, else None."""
    if value is None or not abs(float(value)) < 1e300:
        return None
    return float(f"{float(value):.5g}")


def _cut(text: Any, longest: int = LONGEST) -> str:
    word = plain(str(text)[: 4 * longest])
    return word if len(word) <= longest else word[: longest - 1] + "\u2026"
