"""What readers ask of a leaderboard beyond its means: ranks with ties, pairs, the worst class order, win rates, what changed.

Everything is computed here once; the page shows it and computes nothing.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from clbench.interfaces import UserError
from clbench.report import statistics
from clbench.report.board import Group
from clbench.report.formats import safe
from clbench.report.runs import Run

LEAST = 5  # shared seeds: with fewer, that two rows are not told apart says little
MOST_RANKED = 200  # contenders of a stream; their pairs are all tested
METRIC = "last_macro"
ROUNDED = 6e-5  # a CSV file holds four decimals


class Pair(NamedTuple):
    """Two rows of one stream on shared seeds: second - first, its t interval and p (one pair, unadjusted)."""

    first: int
    second: int
    seeds: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    word: str


def contends(group: Group) -> bool:
    """Whether a row is ranked and tested: it has a mean, and is no reference, legacy or tuned on test data."""
    aside = group.runs[0].legacy or {"reference", "test_tuned"} & set(group.row["marks"].split())
    return group.row[f"{METRIC}_mean"] is not None and not aside


def streams(groups: Sequence[Group], every: bool = False) -> dict[tuple[str, str], list[int]]:
    """Places of the contenders of each (scenario, stream); `every`: of all rows that are not legacy."""
    held: dict[tuple[str, str], list[int]] = {}
    for i, group in enumerate(groups):
        first = group.runs[0]
        if contends(group) or (every and not first.legacy and group.row[f"{METRIC}_mean"] is not None):
            held.setdefault((first.scenario, first.stream), []).append(i)
    return held


def _values(runs: Sequence[Run]) -> dict[int, float]:
    return {run.seed: run.values[METRIC] for run in runs if run.usable and METRIC in run.values}


def pairs(groups: Sequence[Group], most: int) -> list[Pair]:
    """Pairs of rows of one stream that share a seed, at most so many in all: those of good rows before those of others."""
    chosen = []
    for places in streams(groups, every=True).values():
        order = sorted(places, key=lambda i: -groups[i].row[f"{METRIC}_mean"])
        chosen += [(b, order[a], order[b]) for b in range(len(order)) for a in range(b)]
    chosen = sorted(chosen)[:most]
    held = {i: _values(groups[i].runs) for _, *both in chosen for i in both}
    found = [(i, j, [held[j][s] - held[i][s] for s in sorted(held[i].keys() & held[j].keys())]) for _, i, j in chosen]
    found = [one for one in found if one[2]]
    rows = [d for _, _, d in found]
    made = []
    for (i, j, d), (mean, p), interval in zip(found, statistics.t_tests(rows), statistics.t_intervals(rows), strict=True):
        assert mean is not None
        word = statistics.verdict(mean, p, len(d) > 1 and statistics.is_level(d))
        made.append(Pair(i, j, len(d), mean, *(interval or (None, None)), p, word))
    return made


def ranks(groups: Sequence[Group]) -> list[tuple[int, int] | None]:
    """Rank of each contender on its stream with its ties: (1 + rows better than it, rows - rows worse than it).

    A row is better than another where its paired t-tests on shared seeds against all others of the stream, adjusted by Holm,
    say so. Rows that cannot be told apart, or not yet, share their ranks. None of other rows, and on streams of too many.
    """
    made: list[tuple[int, int] | None] = [None] * len(groups)
    for places in streams(groups).values():
        if len(places) > MOST_RANKED:
            continue
        held = [_values(groups[i].runs) for i in places]
        worse = [0] * len(places)  # than how many others
        beats = [0] * len(places)
        for y, mine in enumerate(held):
            others = [x for x in range(len(places)) if x != y]
            tests = statistics.t_tests([[mine[s] - held[x][s] for s in sorted(mine.keys() & held[x].keys())] for x in others])
            adjusted = statistics.holm([p for _, p in tests])
            for x, (mean, _), p in zip(others, tests, adjusted, strict=True):
                if statistics.verdict(mean, p) == "better":
                    worse[x] += 1
                    beats[y] += 1
        for place, low, over in zip(places, worse, beats, strict=True):
            made[place] = 1 + low, len(places) - over
    return made


def shared_with_best(groups: Sequence[Group]) -> list[int | None]:
    """Seeds that each row shares with the best of its stream; None where it was compared with nothing."""
    best = {(g.runs[0].scenario, g.runs[0].stream): _values(g.runs) for g in groups if g.row["vs_best"] == "best"}
    made: list[int | None] = []
    for group in groups:
        compared = group.row["vs_best"] not in (None, "best")
        known = best.get((group.runs[0].scenario, group.runs[0].stream), {})
        made.append(len(known.keys() & _values(group.runs).keys()) if compared else None)
    return made


def orders(groups: Sequence[Group]) -> list[dict[str, Any] | None]:
    """Of each row the class orders that its settings ran on: number, mean and t interval over them, and the worst one.

    The worst order has the lowest mean over its seeds; its interval is the bootstrap over these. None with a single order.
    """
    families: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for group in groups:
        for run in group.runs:
            if run.usable and METRIC in run.values:
                families.setdefault(_family(run), {}).setdefault(run.stream, []).append(run.values[METRIC])
    made = {key: _orders(held) for key, held in families.items() if len(held) > 1}
    return [made.get(_family(group.runs[0])) for group in groups]


def _family(run: Run) -> tuple[Any, ...]:
    return run.scenario, run.learner, run.model, run.family, run.legacy


def _orders(held: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    means = {stream: sum(values) / len(values) for stream, values in sorted(held.items())}
    worst = min(means, key=lambda stream: means[stream])
    low, high = statistics.bootstrap([held[worst]]) or (None, None)
    over = statistics.t_intervals([list(means.values())])[0] or (None, None)
    known = {"orders": len(means), "mean": sum(means.values()) / len(means), "low": over[0], "high": over[1]}
    return known | {"worst": means[worst], "worst_low": low, "worst_high": high, "worst_order": worst[:8]}


def win_rates(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Share of the other contenders of a stream that a learner is ahead of by its mean, each stream with equal weight.

    A learner (with its model) has the mean of its rows; equal means count half. Only learners on two streams or more.
    """
    shares: dict[tuple[str, str], list[float]] = {}
    for places in streams(groups).values():
        own: dict[tuple[str, str], list[float]] = {}
        for i in places:
            row = groups[i].row
            own.setdefault((row["learner"], row["model"]), []).append(row[f"{METRIC}_mean"])
        means = {key: sum(values) / len(values) for key, values in own.items()}
        for key, mean in means.items():
            others = [other for name, other in means.items() if name != key]
            if others:
                shares.setdefault(key, []).append(sum((mean > v) + 0.5 * (mean == v) for v in others) / len(others))
    made = []
    for (learner, model), found in shares.items():
        if len(found) > 1:
            known = {"learner": learner, "model": model, "streams": len(found), "rate": sum(found) / len(found)}
            made.append(known | {"lowest": min(found), "highest": max(found)})
    return sorted(made, key=lambda one: (-one["rate"], -one["streams"], one["learner"], one["model"]))


def changes(groups: Sequence[Group], since: pathlib.Path) -> list[dict[str, Any]]:
    """What differs from an earlier leaderboard.csv: rows that are new, that went, and whose mean or seeds moved.

    `since` is the file or the results folder that holds it. `UserError` where it cannot be read as one.
    """
    old = _earlier(since)
    new = {_identity(group.row): group.row for group in groups if group.row[f"{METRIC}_mean"] is not None}
    made = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        what = "new" if before is None else "gone" if after is None else ""
        values = before and before[0], after and after[f"{METRIC}_mean"]
        seeds = before and before[1], after and after["n_seeds"]
        if before and after:
            moved = abs(before[0] - after[f"{METRIC}_mean"]) > ROUNDED
            what = "moved" if moved else "seeds" if before[1] != after["n_seeds"] else ""
        if what:
            known = dict(zip(("scenario", "learner", "model", "variant", "manifest"), key, strict=True))
            made.append(known | {"what": what, "before": values[0], "after": values[1], "seeds": list(seeds)})
    return made


def _identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(safe(row[name]) for name in ("scenario", "learner", "model", "variant", "manifest"))


def _earlier(since: pathlib.Path) -> dict[tuple[str, ...], tuple[float, int]]:
    path = since / "leaderboard.csv" if since.is_dir() else since
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row[f"{METRIC}_mean"]]
        return {_identity(row): (float(row[f"{METRIC}_mean"]), int(row["n_seeds"])) for row in rows}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (KeyError, ValueError, TypeError, csv.Error):
        raise UserError(f"{path} is no leaderboard.csv as `clbench report` writes it") from None
