"""Compares two sides: paired difference, its test, costs. Old results against new, or two learners.

Runs are paired where they share the stream and the seed. Intervals are stratified by class order; p values are adjusted by Holm
over the rows of the answer. Too few pairs are never called a difference, and never called equality either.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clbench.config.signatures import nearest
from clbench.interfaces import UserError
from clbench.report import numbers, statistics
from clbench.report.formats import Table, fraction, plain
from clbench.report.runs import Filter, Run, scan

SHORT = ("scenario", "model", "row", "pairs", "a", "b", "difference", "95 %", "p", "verdict", "seconds", "bytes")
FULL = (
    *("scenario", "model", "learner_a", "learner_b", "variant_a", "variant_b", "metric", "pairs", "orders", "mean_a", "mean_b"),
    *("difference", "low", "high", "test", "p", "p_holm", "p_t", "p_sign_flip", "verdict", "p_b_better", "p_b_better_low"),
    *("p_b_better_high", "seconds_ratio", "bytes_ratio", "differs"),
)
TESTS = {"t": "paired t-test", "sign-flip": "sign-flip permutation test"}


@dataclass(frozen=True)
class Side:
    """Runs of one set of settings, over class orders and seeds."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run that stands for the names and settings."""
        return self.runs[0]

    def label(self) -> str:
        """Variants that it holds."""
        return " ".join(sorted({run.variant for run in self.runs}))


Match = tuple[Side, Side]


def sides(runs: Sequence[Run]) -> dict[tuple[str, str, str], dict[tuple[str, bool], Side]]:
    """Finished runs by (scenario, learner, model), then by (family, legacy)."""
    groups: dict[tuple[str, str, str], dict[tuple[str, bool], list[Run]]] = {}
    for run in runs:
        if run.status == "ok" and run.values:
            rows = groups.setdefault((run.scenario, run.learner, run.model), {})
            rows.setdefault((run.family, run.legacy), []).append(run)
    return {name: {key: Side(tuple(group)) for key, group in rows.items()} for name, rows in groups.items()}


def compare(a: str, b: str, results: str, wanted: Filter, metric: str | None = None, test: str = "t") -> list[Table]:
    """The answer as tables: `rows` to read (short) and `full` (every column). `UserError` if nothing can be compared.

    `metric` None: `last_macro`, and `final_loss` of pre-training runs.
    """
    if metric is not None:
        numbers.check_metric(metric)
    folders = [(pathlib.Path(word).expanduser() / "records").is_dir() for word in (a, b)]
    if all(folders):
        matches, notes = _folders(pathlib.Path(a).expanduser(), pathlib.Path(b).expanduser(), wanted)
        names = ("A", "B")
    elif any(folders):
        raise UserError(f"{a if folders[0] else b} is a results folder, {b if folders[0] else a} is not (it has no records/)")
    else:
        matches, notes = _learners(a, b, pathlib.Path(results).expanduser(), wanted)
        names = (plain(a), plain(b))
    full = [_row(match, metric or match[0].first.leaderboard.headline, test) for match in matches]
    name = numbers.said(metric, [one.first for one, _ in matches])
    for row, p in zip(full, statistics.holm([row["p"] for row in full]), strict=True):
        row["p_holm"] = p
        row["verdict"] = _verdict(row, names)
    if not any(row["pairs"] for row in full):
        raise UserError(f"nothing to compare: {_why_nothing(full, name)}")
    return _tables(full, f"A = {plain(a)}, B = {plain(b)}: {name}, difference = B - A", notes, test)


def _why_nothing(full: Sequence[Mapping[str, Any]], metric: str) -> str:
    if all(row["mean_a"] is None or row["mean_b"] is None for row in full):
        return f"the records have no {metric} on both sides"
    return "no seed is shared (" + "; ".join(dict.fromkeys(row["seeds"] for row in full)) + ")"


def _folders(a: pathlib.Path, b: pathlib.Path, wanted: Filter) -> tuple[list[Match], list[str]]:
    """Rows of two results folders by scenario, learner and model; settings are allowed to differ, and are named."""
    if a.resolve() == b.resolve():
        raise UserError(f"{a} and {b} are the same folder")
    found = [sides(scan(path, Filter(wanted.scenario, wanted.learner, wanted.model, wanted.where)).runs) for path in (a, b)]
    for path, groups in zip((a, b), found, strict=True):
        if not groups:
            raise UserError(f"{path / 'records'} holds no finished run")
    matches: list[Match] = []
    notes: list[str] = []
    for name in sorted(found[0].keys() & found[1].keys()):
        old, new = dict(found[0][name]), dict(found[1][name])
        for key in [key for key in old if key in new]:
            matches.append((old.pop(key), new.pop(key)))
        for one in list(old):
            same = [k for k in new if not _changes(old[one], new[k], code=False)]
            if len(same) == 1:
                matches.append((old.pop(one), new.pop(same[0])))
        if len(old) == len(new) == 1:
            matches.append((old.popitem()[1], new.popitem()[1]))
        elif old or new:
            what = " ".join(plain(word) for word in name)
            notes.append(f"{what}: {len(old)} settings in A and {len(new)} in B have no partner; pick with --where KEY=VALUE")
    alone = [
        [" ".join(plain(word) for word in name) for name in sorted(one.keys() - two.keys())]
        for one, two in (found, found[::-1])
    ]
    notes += [f"only in {side}: {', '.join(names)}" for side, names in zip("AB", alone, strict=True) if names]
    if not matches:
        raise UserError(f"nothing to compare: {a} and {b} share no scenario, learner and model\n" + "\n".join(notes))
    return matches, notes


def _learners(a: str, b: str, results: pathlib.Path, wanted: Filter) -> tuple[list[Match], list[str]]:
    """Every pair of settings of two learners that were run on the same streams with the same model."""
    if a == b:
        raise UserError(f"A and B are both {a!r}; say two learners, or two settings of one as NAME@VARIANT")
    groups = sides(scan(results, wanted).runs)
    if not groups:
        raise UserError(f"{results / 'records'} holds no finished run")
    chosen = [_chosen(word, groups, results) for word in (a, b)]
    matches = [
        (one, two)
        for one in chosen[0]
        for two in chosen[1]
        if (one.first.scenario, one.first.model, one.first.legacy) == (two.first.scenario, two.first.model, two.first.legacy)
        and {run.stream for run in one.runs} & {run.stream for run in two.runs}
    ]
    if not matches:
        where = [", ".join(sorted({f"{plain(s.first.scenario)} with {plain(s.first.model)}" for s in side})) for side in chosen]
        raise UserError(f"nothing to compare: {a} was run on {where[0]}; {b} on {where[1]}; they share no stream")
    return sorted(matches, key=lambda m: (m[0].first.scenario, m[0].first.model, m[0].label(), m[1].label())), []


def _chosen(word: str, groups: Mapping[tuple[str, str, str], Mapping[Any, Side]], results: pathlib.Path) -> list[Side]:
    """The sides that NAME or NAME@VARIANT means."""
    names = sorted({name[1] for name in groups})
    learner, at, prefix = (word, "", "") if word in names else word.rpartition("@") if "@" in word else (word, "", "")
    if learner not in names:
        shown = ", ".join(plain(name) for name in names[:40])
        raise UserError(f"no learner or results folder {word!r}{nearest(learner, names)} ({results} has: {shown})")
    found = [side for name, rows in groups.items() if name[1] == learner for side in rows.values()]
    if not at:
        return found
    kept = [Side(tuple(r for r in side.runs if r.variant.startswith(prefix))) for side in found]
    kept = [side for side in kept if side.runs]
    if not kept:
        have = " ".join(sorted({run.variant for side in found for run in side.runs}))
        raise UserError(f"no variant {prefix!r} of {learner} (there are: {have})")
    return kept


def _changes(a: Side, b: Side, code: bool = True) -> list[str]:
    """Settings in which two sides differ, class orders left out; without `code` only those that a user chooses."""
    one, two = a.first.settings, b.first.settings
    skip = {"scenario.order", "scenario.order_seed"} | (set() if code else {"numbers_version", "weights", "plug-in"})
    keys = sorted((one.keys() | two.keys()) - skip)
    return [f"{k} {plain(one.get(k, '-'))} → {plain(two.get(k, '-'))}" for k in keys if one.get(k) != two.get(k)]


def _row(match: Match, metric: str, test: str) -> dict[str, Any]:
    """All numbers of a pair of sides. Means and costs are over the shared runs, where there are any."""
    one, two = match
    have, differs = _paired(one, two, metric)
    shared = sorted(have[0].keys() & have[1].keys())
    streams = sorted({stream for stream, _ in shared})
    values = [[[side[k].values[metric] for k in shared if k[0] == s] for s in streams] for side in have]
    runs = [[side[k] for k in shared] or list(side.values()) for side in have]
    means = [_mean([run.values[metric] for run in side]) for side in runs]
    pair = statistics.paired([[y - x for x, y in zip(a, b, strict=True)] for a, b in zip(*values, strict=True)])
    lower = numbers.lower(metric)
    x, y = values[::-1] if lower else values
    low, high = statistics.improvement_interval(y, x) or (None, None)
    names = {f"{part}_{side}": v for side, s in (("a", one), ("b", two)) for part, v in _names(s).items()}
    counted = {"pairs": pair.n, "orders": len(streams), "mean_a": means[0], "mean_b": means[1], "difference": pair.mean}
    tested = {"low": pair.low, "high": pair.high, "test": TESTS[test], "p": pair.p_t if test == "t" else pair.p_flip}
    tested |= {"p_t": pair.p_t, "p_sign_flip": pair.p_flip, "p_least": pair.p_least}
    chance = {"p_b_better": statistics.improvement(y, x), "p_b_better_low": low, "p_b_better_high": high}
    ratios = {"seconds_ratio": _ratio(runs, ("seconds",)), "bytes_ratio": _ratio(runs, ("stored_bytes", "exemplar_bytes"))}
    known = {"scenario": one.first.scenario, "model": one.first.model, "metric": metric, "differs": "; ".join(differs)}
    same = all(len(set(group)) == 1 for side in values for group in side)
    marks = {"lower": lower, "level": pair.level, "identical": same, "seeds": f"A has {_seeds(one)}, B has {_seeds(two)}"}
    return known | names | counted | tested | chance | ratios | marks


def _names(side: Side) -> dict[str, str]:
    return {"learner": side.first.learner, "variant": side.label()}


def _paired(one: Side, two: Side, metric: str) -> tuple[list[dict[tuple[str, int], Run]], list[str]]:
    """Runs of both sides by (stream, seed), and the settings in which they differ besides the learner."""
    have = [{(r.stream, r.seed): r for r in side.runs if metric in r.values} for side in (one, two)]
    differs = _changes(one, two)
    if one.first.learner != two.first.learner:
        differs = [text for text in differs if not text.startswith(("learner.", "plug-in"))]
    streams = [{stream for stream, _ in side} for side in have]
    if not streams[0] & streams[1] and len(streams[0]) == len(streams[1]) == 1:
        have = [{("", seed): run for (_, seed), run in side.items()} for side in have]
        differs.append("streams differ: paired by seed alone")
    return have, differs


def _seeds(side: Side) -> str:
    return " ".join(str(seed) for seed in sorted({run.seed for run in side.runs})[:20])


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean_std(values)[0]


def _ratio(runs: Sequence[Sequence[Run]], names: Sequence[str]) -> float | None:
    """B / A of a cost, over runs that say it."""
    sums = [_mean([sum(r.costs.get(n, 0) for n in names) for r in side if names[0] in r.costs]) for side in runs]
    return sums[1] / sums[0] if sums[0] and sums[1] is not None else None


def _verdict(row: Mapping[str, Any], names: tuple[str, str]) -> str:
    if row["pairs"] == 0:
        return "no shared seeds"
    if row["pairs"] == 1:
        return "identical" if row["difference"] == 0 else "not distinguishable: 1 shared seed"
    if row["level"] and row["difference"] == 0:
        return "identical"
    gain = -row["difference"] if row["lower"] else row["difference"]
    what = statistics.verdict(gain, row["p_holm"], row["level"])
    if what == "no spread":
        return "no test: each side's runs are identical" if row["identical"] else "no test: the same difference on every seed"
    return what if what == "not distinguishable" else f"{names[1] if what == 'better' else names[0]} better"


def _tables(full: Sequence[Mapping[str, Any]], title: str, notes: Sequence[str], test: str) -> list[Table]:
    short = []
    for i, row in enumerate(full):
        mark = f" [{i + 1}]" if row["differs"] else ""
        names = list(dict.fromkeys((row["learner_a"], row["learner_b"])))
        variants = list(dict.fromkeys((row["variant_a"], row["variant_b"])))
        short.append(
            {
                **{name: row[name] for name in ("scenario", "model", "pairs", "difference", "verdict")},
                "row": f"{' → '.join(names)} {' → '.join(v if len(v) < 18 else v[:8] + '…' for v in variants)}{mark}",
                "a": row["mean_a"],
                "b": row["mean_b"],
                "95 %": "" if row["low"] is None else f"{fraction(row['low'])} .. {fraction(row['high'])}",
                "p": None if row["p_holm"] is None else f"{row['p_holm']:.2g}",
                "seconds": None if row["seconds_ratio"] is None else f"x{row['seconds_ratio']:.2f}",
                "bytes": None if row["bytes_ratio"] is None else f"x{row['bytes_ratio']:.2f}",
            }
        )
    said = [f"[{i + 1}] {row['differs']}" for i, row in enumerate(full) if row["differs"]]
    said += [
        f"p: {TESTS[test]} on runs that share stream and seed, Holm-adjusted over {sum(r['p'] is not None for r in full)} rows;"
        " seconds and bytes held are B / A",
        "95 %: bootstrap of the pairs, stratified by class order, 2,000 resamples; the verdict follows p",
    ]
    if any(0 < row["pairs"] < 5 for row in full):
        said.append("fewer than 5 pairs: the interval is too narrow, and the t-test rests on differences being normal")
    least = [row["p_least"] for row in full if row["p_least"] is not None and row["p_least"] >= 0.05]
    if test == "sign-flip" and least:
        said.append(f"a sign-flip test of so few pairs cannot go below p = {min(least):.2g}: more seeds are needed")
    return [Table("rows", title, SHORT, short, tuple([*said, *notes])), Table("full", title, FULL, full, tuple(notes))]
