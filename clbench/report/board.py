"""From runs to the rows of a leaderboard: groups by setting, means over seeds, intervals, comparison with the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from clbench.report import costs, statistics
from clbench.report.columns import Leaderboard, numbers_of
from clbench.report.runs import Run
from clbench.report.statistics import mean_std

Row = dict[str, Any]


class Group(NamedTuple):
    """One row of a leaderboard, and its runs by seed, those without a result among them."""

    row: Row
    runs: list[Run]


def rank(runs: Sequence[Run], board: Leaderboard, dead: Sequence[str] = ()) -> list[Group]:
    """A group for each (scenario, learner, model, variant) of the runs of a leaderboard, the best of a scenario first.

    Runs without a result count, and are never missing. Those that other code made are groups by themselves.
    """
    held: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.leaderboard is board:
            held.setdefault(run.group, []).append(run)
    lost = set(dead)
    made = [Group(_row(g, board, lost), g) for g in (sorted(g, key=lambda r: (r.seed, r.run_id)) for g in held.values())]
    _intervals(made, board.headline)
    mean, sign = f"{board.headline}_mean", 1 if board.lower else -1

    def order(group: Group) -> tuple[Any, ...]:
        row, value = group.row, group.row[mean]
        last = (row["learner"], row["variant"], "legacy" in row["marks"])
        return (row["scenario"], row["model"], math.inf if value is None else sign * value, *last)

    made.sort(key=order)
    fields: dict[tuple[str, str], list[Group]] = {}
    for group in made:
        row, first = group.row, group.runs[0]
        contends = not first.legacy and not {"reference", "test_tuned"} & set(row["marks"].split())
        if contends and row[mean] is not None:
            fields.setdefault((row["scenario"], first.stream), []).append(group)
    for field in fields.values():
        statistics.against_best(field, board.headline, board.lower)
        if "pareto_bytes" in board.about:
            _fronts([group.row for group in field], mean)
    return made


def _row(group: Sequence[Run], board: Leaderboard, dead: set[str]) -> Row:
    done, first = [run for run in group if run.usable], group[0]
    row: Row = dict.fromkeys(board.about)
    row |= {name: getattr(first, name) for name in ("scenario", "learner", "model", "variant")} | first.options
    row |= {"manifest": first.stream[:8], "marks": " ".join(sorted({mark for run in group for mark in run.marks}))}
    row["n_seeds"], row["seeds"] = len(done), " ".join(str(run.seed) for run in done)
    others = numbers_of(name for run in done for name in run.values)
    for name in (*board.spread, *board.means, *others):
        mean, std = mean_std([run.values[name] for run in done if name in run.values])
        row |= {f"{name}_mean": mean} | ({} if name in board.means else {f"{name}_std": std})
    row |= {name: max((run.ledger[key] for run in done), default=None) for name, key in board.ledger.items()}
    row |= {name: value for name, value in costs.columns([run.costs for run in done]).items() if name in row}
    row["failed"] = sum(run.status == "failed" for run in group)
    row["dead"] = sum(run.run_id in dead for run in group)
    row["running"] = sum(run.status == "running" for run in group) - row["dead"]
    return row


def _intervals(made: Sequence[Group], headline: str) -> None:
    """Interval of the headline number of every row that has one, and its interquartile mean where there is a column for it."""
    values = [[run.values[headline] for run in group.runs if run.usable and headline in run.values] for group in made]
    known = [(group.row, v) for group, v in zip(made, values, strict=True) if v]
    for (row, _), interval in zip(known, statistics.bootstraps([[v] for _, v in known]), strict=True):
        row[f"{headline}_low"], row[f"{headline}_high"] = interval or (None, None)
    middle = f"{headline}_iqm"
    with_iqm = [(row, v) for row, v in known if middle in row]
    for (row, _), value in zip(with_iqm, statistics.iqms([v for _, v in with_iqm]), strict=True):
        row[middle] = value


def _fronts(field: Sequence[Row], mean: str) -> None:
    for name, cost in (("pareto_bytes", costs.held), ("pareto_seconds", lambda row: row["seconds_mean"])):
        found = costs.front([(cost(row), row[mean]) for row in field])
        for row, on in zip(field, found, strict=True):
            row[name] = None if cost(row) is None else on
