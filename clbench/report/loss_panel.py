"""The panel of a pre-training scenario: every row by learner and share of replay, each number with its interval over seeds."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from clbench.records import record
from clbench.report import statistics
from clbench.report.formats import Table, to_csv
from clbench.report.losses import board
from clbench.report.runs import Run
from clbench.report.statistics import mean_std
from clbench.report.table import file_name

NAMES = (
    *("final_loss", "retained_loss", "newest_loss", "learned_loss", "forgetting_after", "regret", "recovery_ratio"),
    *("gap_depth", "rate_share", "anneal_gain_new", "anneal_gain_old", "final_bpb"),
)
KNOWN = ("manifest", "learner", "replay", "model", "variant", "marks", "n_seeds", "seeds")
COLUMNS = (*KNOWN, *(f"{name}_{part}" for name in NAMES for part in ("mean", "low", "high")))


def panels(runs: Sequence[Run]) -> dict[str, Table]:
    """Scenario -> its panel, by learner and replay. Intervals: 95 % bootstrap of the mean over seeds, None with one."""
    groups: dict[tuple[str, str, str, str, bool], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.scenario, run.learner, run.model, run.variant, run.legacy), []).append(run)
    made: dict[str, list[dict[str, Any]]] = {}
    for row in board(runs):
        key = (row["scenario"], row["learner"], row["model"], row["variant"], "legacy" in row["marks"].split())
        line: dict[str, Any] = {name: row[name] for name in KNOWN}
        every = [[run.values[name] for run in groups[key] if name in run.values] for name in NAMES]
        for name, values, interval in zip(NAMES, every, statistics.bootstraps([[values] for values in every]), strict=True):
            low, high = interval or (None, None)
            numbers = zip(("mean", "low", "high"), (mean_std(values)[0], low, high), strict=True)
            line |= {f"{name}_{part}": v for part, v in numbers}
        if row["n_seeds"]:
            made.setdefault(row["scenario"], []).append(line)
    for lines in made.values():
        lines.sort(key=lambda line: (line["manifest"], line["learner"], line["replay"] or 0.0, line["variant"]))
    return {scenario: Table(scenario, "", COLUMNS, lines) for scenario, lines in made.items()}


def write(runs: Sequence[Run], results: pathlib.Path) -> list[pathlib.Path]:
    """Write `losses/<scenario>.csv`; files there of scenarios that are gone are removed -> the folder, if there is any."""
    made = {file_name(scenario): table for scenario, table in panels(runs).items()}
    folder = results / "losses"
    for name, table in made.items():
        record.write_text(folder / f"{name}.csv", to_csv(table) + "\n")
    for path in folder.glob("*.csv"):
        if path.stem not in made and path.read_bytes().startswith(",".join(KNOWN).encode()):
            path.unlink(missing_ok=True)
    return [folder] if made else []
