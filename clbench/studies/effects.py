"""`clbench effects`: what the literature says a setting does, shown on small streams, its sign checked over seeds.

An effect is a file of `conf/effect/`: runs under names, each a list of overrides, and claims about their numbers. A claim that
does not hold is no error of a run; it is printed as it is. Everything is paired by seed.

    {number, more, less}    the number of run `more` exceeds that of run `less`; each may be a pair, [run, reference], and is
                            then the run's number minus the reference's, for numbers of streams that do not compare
    {number, run, above}    the number of one run exceeds a value; `below`: is less
    {number, orders}        the spread of a run over orders of its experiences exceeds that over seeds (`orders.N` of the file)
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import statistics as plain_statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.config import compose, registry
from clbench.evaluation import metrics
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import statistics
from clbench.report.formats import Table, csv_text, fraction, to_text
from clbench.run import provenance
from clbench.studies.jobs import record_of
from clbench.studies.orders import Order, chosen, in_order

KINDS: dict[str, set[str]] = {"more": {"less"}, "above": {"run"}, "below": {"run"}, "orders": set()}
Values = dict[str, dict[int, dict[str, float]]]  # run -> seed (with orders: seed and order) -> numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="EFFECT | NAME=VALUE", help="effects (all), and options of every run")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 .. N - 1 of every run (5)")
    parser.add_argument("--list", action="store_true", help="what there is, with a line each")


def names() -> list[str]:
    """Every effect there is."""
    return sorted(path.stem for path in (registry.conf_dir() / "effect").glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    """The file of an effect, checked; `UserError` in one line where it is wrong."""
    import yaml

    if name not in names():
        near = difflib.get_close_matches(name, names(), 1, 0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"no effect '{name}'{hint} (one of: {', '.join(names())})")
    path = registry.conf_dir() / "effect" / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    if not isinstance(found, dict) or set(found) - {"common", "runs", "claims", "orders"} or not found.get("runs"):
        raise UserError(f"{path}: an effect has common, runs, claims and, where it is about orders, orders")
    for claim in found["claims"]:
        kind = next((kind for kind in KINDS if kind in claim), None)
        pairs = [claim[key] for key in ("more", "less") if isinstance(claim.get(key), list)]
        if kind is None or set(claim) != {"number", kind, *KINDS[kind]} or any(len(pair) != 2 for pair in pairs):
            raise UserError(f"{path}: a claim has number and more, less; run, above or below; or orders: {claim}")
        for run in (run for key in ("more", "less", "run", "orders") if key in claim for run in _pair(claim[key])):
            if not isinstance(run, str) or run not in found["runs"]:
                raise UserError(f"{path}: a claim is about run {run!r}, which is not there")
    return {"name": name, "about": text.splitlines()[0].removeprefix("# "), "orders": None, "common": [], **found}


def run(args: argparse.Namespace) -> int:
    """Run what is not done; write effects/DATASET/NAME.csv and .json; print every claim with its verdict -> exit code."""
    if args.list:
        print("\n".join(f"{name:<24} {load(name)['about']}" for name in names()))
        return 0
    if args.seeds < 1:
        raise UserError(f"--seeds must be a whole number from 1, got {args.seeds}")
    overrides = [word for word in args.names if "=" in word]
    effects = [load(name) for name in [word for word in args.names if "=" not in word] or names()]
    for effect in effects:
        _jobs(effect, overrides, 0)
    code = 0
    for effect in effects:
        code = max(code, _one(effect, overrides, args.seeds, args.command_line))
    return code


def _jobs(effect: Mapping[str, Any], overrides: Sequence[str], seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The resolved and checked configuration of every run -> (its name, configuration)."""
    made = []
    for name, own in effect["runs"].items():
        words = [*effect["common"], *(own or ()), f"seed={seed}", *overrides]
        try:
            job = compose.compose(words)[0]
            registry.check(job)
        except UserError as error:
            raise UserError(f"effect {effect['name']}, run {name}: {str(error).splitlines()[0]}") from None
        made.append((name, job))
    return iter(made)


def _one(effect: Mapping[str, Any], overrides: Sequence[str], seeds: int, command: list[str]) -> int:
    values: Values = {name: {} for name in effect["runs"]}
    rows, lost = [], 0
    for seed in range(seeds):
        for name, job in _jobs(effect, overrides, seed):
            for place, (order, one) in enumerate(_orders(effect, job)):
                entry = record_of(one, command)
                if isinstance(entry, str):
                    lost += 1
                    print(f"{effect['name']}: {name}, seed {seed}: {entry}", file=sys.stderr, flush=True)
                    continue
                found = {k: v for k, v in metrics.summary(entry).items() if math.isfinite(v)}
                values[name][seed + place * seeds] = found
                row = {
                    "run": name,
                    "seed": seed,
                    "order": order,
                    "seconds": entry["seconds"]["total"],
                    "run_id": entry["run_id"],
                }
                rows.append(row | {c["number"]: found.get(c["number"]) for c in effect["claims"]})
    _, first = next(_jobs(effect, overrides, 0))
    results = Path(str(first["results_dir"])).expanduser().resolve()
    made = [judged(claim, values, seeds) for claim in effect["claims"]]
    file = results / "effects" / Path(str(first["scenario"].get("dataset", first["scenario"]["name"]))).stem / effect["name"]
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    record.write_text(file.with_suffix(".csv"), csv_text(columns, rows, lambda _, v: "" if v is None else str(v)))
    given = [word for word in overrides if word.split("=")[0] not in provenance.MACHINE]
    body = {"effect": effect["name"], "about": effect["about"], "overrides": given}
    body |= {"seeds": seeds, "lost": lost, "claims": made}
    record.write_text(file.with_suffix(".json"), json.dumps(body, indent=1) + "\n")
    seconds = sum(row["seconds"] for row in rows) / max(1, seeds)
    notes = (f"{len(rows)} runs, {seconds:.0f} s a seed; holds, fails: the 95 % interval over seeds lies on one side",)
    columns = ("number", "claim", "value", "95 %", "verdict")
    print(to_text(Table(effect["name"], f"{effect['name']}: {effect['about']}", columns, made, notes)), flush=True)
    return 1 if lost else 0


def _orders(effect: Mapping[str, Any], job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A run in each order of its experiences, where the effect is about orders; else as it is."""
    if effect["orders"] is None:
        yield "", job
        return
    listed: list[Order] = chosen(compose.build(job["scenario"]), str(effect["orders"]), 0)
    for order in listed:
        yield " ".join(map(str, order.places)), in_order(job, order)


def judged(claim: Mapping[str, Any], values: Values, seeds: int) -> dict[str, Any]:
    """A claim -> its row: what is compared, the mean, the bootstrap interval over seeds, the verdict.

    holds: the whole interval is above 0; fails: below or at 0; not shown: it holds 0; no value: a run is missing.
    """
    number = claim["number"]
    text, differences = _differences(claim, values, seeds)
    row: dict[str, Any] = {"number": number, "claim": text, "value": None, "95 %": None, "verdict": "no value"}
    if not differences:
        return row
    mean, _ = statistics.mean_std(differences)
    low, high = statistics.bootstrap([differences]) or (mean, mean)
    assert low is not None and high is not None
    verdict = "holds" if low > 0 else "fails" if high <= 0 else "not shown"
    several = len(differences) > 1
    row |= {"value": mean, "verdict": verdict if several else f"{verdict} (1 seed)", "seeds": len(differences)}
    return row | ({"95 %": f"{fraction(low)} .. {fraction(high)}"} if several else {})


def _pair(runs: str | list[str]) -> list[str]:
    """A run, or a run and its reference."""
    return [runs] if isinstance(runs, str) else runs


def _differences(claim: Mapping[str, Any], values: Values, seeds: int) -> tuple[str, list[float]]:
    """A claim in words, and for each seed by how much it is met."""
    number = claim["number"]

    def of(run: str) -> dict[int, float]:
        return {seed: found[number] for seed, found in values[run].items() if number in found}

    def gain(pair: list[str]) -> dict[int, float]:
        first, *rest = [of(run) for run in pair]
        return {seed: value - sum(one[seed] for one in rest) for seed, value in first.items() if all(seed in r for r in rest)}

    if "more" in claim:
        more, less = gain(_pair(claim["more"])), gain(_pair(claim["less"]))
        text = " > ".join(" - ".join(_pair(claim[key])) for key in ("more", "less"))
        return text, [more[seed] - less[seed] for seed in more if seed in less]
    if "orders" in claim:
        return f"{claim['orders']}: spread over orders > over seeds", spread(of(claim["orders"]), seeds)
    sign, limit = (1, claim["above"]) if "above" in claim else (-1, claim["below"])
    word = f"{claim['run']} {'>' if sign > 0 else '<'} {limit:g}"
    return word, [sign * (value - limit) for value in of(claim["run"]).values()]


def spread(found: Mapping[int, float], seeds: int) -> list[float]:
    """Values by seed + order x seeds -> for each seed, standard deviation over orders - mean standard deviation over seeds."""
    by_seed = [[value for key, value in found.items() if key % seeds == seed] for seed in range(seeds)]
    by_order: dict[int, list[float]] = {}
    for key, value in found.items():
        by_order.setdefault(key // seeds, []).append(value)
    over_seeds = [plain_statistics.stdev(group) for group in by_order.values() if len(group) > 1]
    if not over_seeds:
        return []
    rest = plain_statistics.fmean(over_seeds)
    return [plain_statistics.stdev(group) - rest for group in by_seed if len(group) > 1]
