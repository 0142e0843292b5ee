"""How well streams tell methods apart, from records: `python -m clbench.studies.core_choice RESULTS [--suite core_v1]`.

For each stream, over the learners that have two runs at least:

    between    standard deviation of the learners' means
    within     standard deviation over runs of one learner, pooled over learners
    ratio      between / within
    told apart share of the pairs of learners whose paired difference over shared seeds has a t test with p < 0.05 (unadjusted)
    rho        Spearman's rank correlation of the learners' means with their mean standing on all other streams
    shared     learners that this is made of: those that have a result on another stream
    core s     core seconds of a run, mean over learners

A stream is worth its cost if `ratio` and `told apart` are high; `rho` near 1 says that other streams tell the same, near 0 that
it tells something of its own. Streams are those of a suite, and with `--all` every stream of the folder with one model.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics as plain_statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.config import suite
from clbench.records import record
from clbench.report import statistics, suites
from clbench.report.formats import Table, csv_text, fraction, to_text
from clbench.report.runs import Run, scan

Values = dict[str, dict[int, float]]  # learner -> seed -> value
COLUMNS = ("stream", "learners", "runs", "between", "within", "ratio", "told apart", "rho", "shared", "core s")
LEAST = 5  # learners that a rank correlation needs


def of_suite(of: suite.Suite, results: Path) -> tuple[dict[str, Values], dict[str, float]]:
    """Values by stream (of losses the negative, so that more is better), and core seconds of a run."""
    made = suites.rows(of, record.entries(results / "records", []))
    values: dict[str, Values] = {}
    seconds: dict[str, list[float]] = {}
    for (name, learner), row in made.items():
        if not row.values or row.reference:
            continue
        sign = -1 if row.stream.lower else 1
        seeds = {order.name: order.seed for order in row.stream.orders}
        values.setdefault(name, {})[learner] = {seeds[order]: sign * value for order, value in row.values.items()}
        seconds.setdefault(name, []).append(plain_statistics.fmean(row.seconds.values()))
    return values, {name: plain_statistics.fmean(found) for name, found in seconds.items()}


def of_folder(runs: Sequence[Run], metric: str = "last_macro") -> tuple[dict[str, Values], dict[str, float]]:
    """The same for every stream of a folder by scenario, manifest and model; of several rows of a learner the best one."""
    rows: dict[tuple[str, str, str], dict[int, float]] = {}
    seconds: dict[str, list[float]] = {}
    for run in runs:
        if run.loss is not None or run.edits or not run.usable or run.legacy or metric not in run.values:
            continue
        if {"reference", "test_tuned"} & set(run.marks):
            continue
        name = f"{run.scenario} {run.stream[:8]} {run.model}"
        rows.setdefault((name, run.learner, run.variant), {})[run.seed] = run.values[metric]
        seconds.setdefault(name, []).append(run.costs.get("seconds", math.nan))
    values: dict[str, Values] = {}
    for (name, learner, _), found in sorted(rows.items()):
        best = values.setdefault(name, {}).get(learner)
        if best is None or (len(found), plain_statistics.fmean(found.values())) > (
            len(best),
            plain_statistics.fmean(best.values()),
        ):
            values[name][learner] = found
    return values, {name: plain_statistics.fmean(found) for name, found in seconds.items()}


def measured(values: Mapping[str, Values], seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """A line for each stream that has two learners with two runs."""
    standing = {name: _standing(of_stream) for name, of_stream in values.items()}
    lines = []
    for name, of_stream in values.items():
        several = {learner: list(found.values()) for learner, found in of_stream.items() if len(found) > 1}
        if len(several) < 2:
            continue
        means = [plain_statistics.fmean(found) for found in several.values()]
        between = plain_statistics.stdev(means)
        free = sum(len(found) - 1 for found in several.values())
        within = math.sqrt(sum(plain_statistics.variance(found) * (len(found) - 1) for found in several.values()) / free)
        line: dict[str, Any] = {"stream": name, "learners": len(several), "runs": sum(map(len, several.values()))}
        line |= {"between": between, "within": within, "ratio": between / within if within else None}
        line |= {"told apart": told_apart(of_stream), "core s": seconds.get(name)}
        lines.append(line | rank_correlation(name, standing))
    return lines


def told_apart(of_stream: Values) -> float | None:
    """Share of the pairs of learners with two shared seeds that a paired t test tells apart."""
    differences = []
    for a, b in itertools.combinations(of_stream.values(), 2):
        shared = sorted(a.keys() & b.keys())
        if len(shared) > 1:
            differences.append([a[seed] - b[seed] for seed in shared])
    tests = statistics.t_tests(differences)
    return sum(p is not None and p < 0.05 for _, p in tests) / len(tests) if tests else None


def _standing(of_stream: Values) -> dict[str, float]:
    """Learner -> share of the other learners of the stream with a lower mean (ties count half)."""
    means = {learner: plain_statistics.fmean(found.values()) for learner, found in of_stream.items()}
    made = {}
    for learner, mine in means.items():
        others = [value for name, value in means.items() if name != learner]
        if others:
            made[learner] = sum((mine > value) + 0.5 * (mine == value) for value in others) / len(others)
    return made


def rank_correlation(name: str, standing: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Spearman's rho of a stream's standing with the mean standing on all others, and the learners it is made of."""
    elsewhere: dict[str, list[float]] = {}
    for other, found in standing.items():
        for learner, value in found.items() if other != name else ():
            elsewhere.setdefault(learner, []).append(value)
    shared = [learner for learner in standing[name] if learner in elsewhere]
    here = [standing[name][learner] for learner in shared]
    there = [plain_statistics.fmean(elsewhere[learner]) for learner in shared]
    if len(shared) < LEAST or len(set(here)) < 2 or len(set(there)) < 2:
        return {"rho": None, "shared": len(shared)}
    from scipy import stats

    found: Any = stats.spearmanr(here, there)
    return {"rho": float(found.statistic), "shared": len(shared)}


def main(argv: Sequence[str]) -> int:
    """Print the table and write RESULTS/core/choice.csv -> exit code."""
    parser = argparse.ArgumentParser("python -m clbench.studies.core_choice")
    parser.add_argument("results", nargs="?", default="results")
    parser.add_argument("--suite", default="core_v1")
    parser.add_argument("--all", action="store_true", help="every stream of the folder, not those of the suite")
    args = parser.parse_args(argv)
    results = Path(args.results).expanduser()
    values, seconds = of_folder(scan(results).runs) if args.all else of_suite(suite.load(args.suite), results)
    lines = measured(values, seconds)
    print(
        to_text(Table("choice", "how well streams tell methods apart", COLUMNS, lines, (), {"ratio": 1, "rho": 2, "core s": 1}))
    )
    path = results / "core" / ("choice_all.csv" if args.all else "choice.csv")
    record.write_text(path, csv_text(COLUMNS, lines, _formatted))
    print(f"written {path}")
    return 0


def _formatted(name: str, value: Any) -> str:
    return "" if value is None else fraction(value, 1 if name == "core s" else 4) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
