"""`clbench report statistics`: every row over class orders and seeds, every pair of learners, profiles across scenarios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from clbench.report import numbers, statistics
from clbench.report.columns import ACCURACY
from clbench.report.compare import Side, sides
from clbench.report.formats import Table, plain
from clbench.report.runs import Run

ROWS = ("scenario", "model", "learner", "variants", "orders", "runs", "mean", "std", "iqm", "low", "high")
SPLIT = ("order_std", "noise_std", "order_share", "split")
PAIRS = ("scenario", "model", "a", "b", "pairs", "difference", "low", "high", "p", "p_holm", "p_a_better", "verdict")
MOST = 2000
WORDS = {"too few seeds": "not distinguishable: 1 shared seed", "no spread": "no test: the same difference on every seed"}
THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(1, 10))


def tables(runs: Sequence[Run], metric: str | None = None) -> list[Table]:
    """Three tables: `rows`, `pairs`, `profiles`. Legacy runs have rows and are tested against nothing.

    `metric` None: `last_macro`, and `final_loss` of pre-training runs.
    """
    groups = [(name, key, side) for name, held in sorted(sides(runs).items()) for key, side in sorted(held.items())]
    made = _rows([(name, side, metric or side.first.leaderboard.headline) for name, _, side in groups])
    title = numbers.said(metric, [side.first for _, _, side in groups])
    note = "variance: one-way random effects, class orders are the groups; a negative share of the order is given as 0 and said"
    return [
        Table("rows", f"{title} over class orders and seeds", (*ROWS, *SPLIT), made, (note, _interval_note())),
        _pairs(groups, metric, title),
        *([_profiles(groups, metric)] if any(side.first.leaderboard.per_cent for _, _, side in groups) or not groups else []),
    ]


def _interval_note() -> str:
    return (
        "low, high: 95 % bootstrap of the mean, stratified by class order, 2,000 resamples; too narrow with fewer than 5 runs"
    )


def strata(side: Side, metric: str) -> list[list[float]]:
    """Values of one side, a list for each class order."""
    made: dict[str, list[float]] = {}
    for run in sorted(side.runs, key=lambda r: (r.stream, r.seed, r.run_id)):
        if metric in run.values:
            made.setdefault(run.stream, []).append(run.values[metric])
    return [made[stream] for stream in sorted(made)]


def _rows(sides: Sequence[tuple[tuple[str, str, str], Side, str]]) -> list[dict[str, Any]]:
    groups = [strata(side, metric) for _, side, metric in sides]
    intervals = statistics.bootstraps(groups)
    return [_row(name, side, held, interval) for (name, side, _), held, interval in zip(sides, groups, intervals, strict=True)]


def _row(name: tuple[str, str, str], side: Side, groups: list[list[float]], interval: statistics.Interval) -> dict[str, Any]:
    flat = [v for group in groups for v in group]
    mean, std = statistics.mean_std(flat)
    low, high = interval or (None, None)
    split = statistics.variance_split(groups)
    known = {"scenario": name[0], "learner": name[1], "model": name[2], "variants": len({r.variant for r in side.runs})}
    known["learner"] += " (legacy)" if side.first.legacy else ""
    known |= {"orders": len(groups), "runs": len(flat), "mean": mean, "std": std, "low": low, "high": high}
    known["iqm"] = float(statistics.iqm(flat)) if flat else None
    if isinstance(split, str):
        return known | {"split": split if flat else "no run has it"}
    parts = {"order_std": split.order**0.5, "noise_std": split.noise**0.5, "order_share": split.share}
    return known | parts | {"split": "negative estimate for the order, given as 0" if split.truncated else ""}


def _pairs(groups: Sequence[tuple[tuple[str, str, str], tuple[str, bool], Side]], given: str | None, title: str) -> Table:
    """All pairs of settings on one scenario and model; Holm over all of them."""
    several = {name for name, count in Counter(name for name, _, _ in groups).items() if count > 1}
    made: list[dict[str, Any]] = []
    held: list[list[list[float]]] = []
    sizes = Counter((name[0], name[2]) for name, _, _ in groups)
    if sum(n * (n - 1) // 2 for n in sizes.values()) > MOST:
        why = f"more than {MOST} pairs: choose with --scenario, --learner, --where"
        return Table("pairs", f"{title}: pairs of learners", PAIRS, [], (why,))
    for (name, _, one), (other, _, two) in combinations(groups, 2):
        if (name[0], name[2]) != (other[0], other[2]) or one.first.legacy or two.first.legacy:
            continue
        metric = given or one.first.leaderboard.headline
        less = numbers.lower(metric)
        have = [{(r.stream, r.seed): r.values[metric] for r in side.runs if metric in r.values} for side in (one, two)]
        shared = sorted(have[0].keys() & have[1].keys())
        if not shared:
            continue
        streams = sorted({stream for stream, _ in shared})
        x, y = ([[side[k] for k in shared if k[0] == s] for s in streams] for side in have)
        held.append([[a - b for a, b in zip(*both, strict=True)] for both in zip(x, y, strict=True)])
        row = {"scenario": name[0], "model": name[2], "less": less}
        row |= {"p_a_better": statistics.improvement(*((y, x) if less else (x, y)))}
        labels = (f"{n[1]}@{s.first.variant}" if n in several else n[1] for n, s in ((name, one), (other, two)))
        made.append(row | dict(zip("ab", labels, strict=True)))
    for row, pair in zip(made, statistics.pairs(held), strict=True):
        row |= {"pairs": pair.n, "difference": pair.mean, "low": pair.low, "high": pair.high}
        row |= {"p": pair.p_t, "level": pair.level}
    for row, p in zip(made, statistics.holm([row["p"] for row in made]), strict=True):
        gain = None if row["difference"] is None else -row["difference"] if row["less"] else row["difference"]
        word = statistics.verdict(gain, p, row["level"])
        row["p_holm"] = p
        row["verdict"] = {"better": f"{plain(row['a'])} better", "worse": f"{plain(row['b'])} better"}.get(word, word)
        row["verdict"] = WORDS.get(word, row["verdict"])
    note = f"paired t-test on shared streams and seeds, Holm over {len(made)} pairs; p_a_better = P(A > B) + P(A = B) / 2"
    return Table("pairs", f"{title}: pairs of learners", PAIRS, made, (note,), {"p": 6, "p_holm": 6})


def _profiles(groups: Sequence[tuple[tuple[str, str, str], Any, Side]], given: str | None) -> Table:
    """Share of runs above each threshold, each scenario with equal weight; of several settings on one scenario all count."""
    metric = given or ACCURACY.headline
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (scenario, learner, model), _, side in groups:
        if not side.first.legacy and side.first.leaderboard.per_cent:
            values = [v for group in strata(side, metric) for v in group]
            scores.setdefault((learner, model), {}).setdefault(scenario, []).extend(values)
    made: list[Mapping[str, Any]] = []
    for (learner, model), held in sorted(scores.items()):
        shares = statistics.profile(held, THRESHOLDS)
        names = {f">{t}": share for t, share in zip(THRESHOLDS, shares, strict=True)}
        made.append({"learner": learner, "model": model, "scenarios": len(held), **names})
    columns = ("learner", "model", "scenarios", *(f">{t}" for t in THRESHOLDS))
    note = "compare only rows with the same scenarios: a row speaks of those that its learner was run on"
    return Table("profiles", f"{metric}: share of runs above a threshold, mean over scenarios", columns, made, (note,))
