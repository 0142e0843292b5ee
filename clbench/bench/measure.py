"""Cases of a preset, one after another in this process: run, floor, naive version; then the sweep."""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from clbench.bench import machine, naive, needed, rates
from clbench.bench.presets import Case, Preset
from clbench.config import compose, registry
from clbench.interfaces import UserError
from clbench.records import record
from clbench.run import runner
from clbench.training import arithmetic

FIXED = ("force=true", "on_error=raise", "checkpoint_seconds=null", "track=none")
Save = Callable[[dict[str, Any]], None]
REPEATS, ENOUGH = 3, 60.0  # a run is repeated until it was made so often, or until its runs took so many seconds together


@dataclass
class Session:
    """A preset at work: where runs are written (and thrown away), what was found so far."""

    preset: Preset
    scratch: pathlib.Path
    quick: bool
    save: Save
    found: dict[str, Any] = field(default_factory=dict)

    def compose(self, case: Case, *overrides: str) -> dict[str, Any]:
        """The configuration of a case, checked. The preset's overrides, the case's, then these."""
        results = f"results_dir='{self.scratch / 'results'}'"
        job = compose.compose([*self.preset.overrides, *case.overrides, *overrides, *FIXED, results])[0]
        registry.check(job)
        return job


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def measure(name: str, preset: Preset, quick: bool, save: Save) -> dict[str, Any]:
    """Everything that the preset asks for -> the content of its file. `save` is called whenever a case is done."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="clbench-bench-") as folder:
        session = Session(preset, pathlib.Path(folder), quick, save)
        jobs = {case.name: session.compose(case, "feature_store=off") for case in preset.cases or preset.sweep[:1]}
        first = next(iter(jobs.values()))
        device = arithmetic.choose_device(str(first["device"]))
        threads = arithmetic.choose_threads(first["num_threads"])
        for case in preset.cases:
            if case.naive and case.name in jobs and jobs[case.name]["names"].get("learner") not in naive.known():
                known = ", ".join(naive.known())
                raise UserError(f"learner {case.name} has no naive version (those that have: {known}): add --no-naive")
        session.found = {"bench": name, "kind": "cases", "quick": quick, "machine": machine.describe(device, threads)}
        session.found |= {"words": list(preset.overrides), "rates": {}, "cases": []}
        models = {repr(job["model"]): job["model"] for job in jobs.values()}
        _all_rates(session, models, device, threads)
        for case in preset.cases:
            for precision in preset.precisions:
                _case(session, case, precision, device)
        if preset.sweep:
            session.found["sweep"] = sweep(session, device)
    session.found["seconds"] = round(time.perf_counter() - start, 1)
    return session.found


def _all_rates(session: Session, models: dict[str, dict[str, Any]], device: Any, threads: int) -> None:
    """Peak and images per second of every model and precision, under every accurate path."""
    for precision in session.preset.precisions:
        arithmetic.apply(device, threads, 0, precision=precision)
        paths = rates.accurate(device, precision)
        if session.quick:
            paths = paths[-1:]
        n, block = (256, 0.0) if session.quick else (0, rates.BLOCK)
        peaks = rates.peak(device, precision, paths, n, block)
        session.found.setdefault("peak_flops", {})[precision] = peaks
        for node in models.values():
            say(f"rates of {node['name']} in {precision} ({', '.join(paths)})")
            found = {path: _rates(session, node, precision, path, device) for path in paths}
            session.found["rates"].setdefault(node["name"], {})[precision] = found
    session.save(session.found)


def _rates(
    session: Session,
    node: Any,
    precision: str,
    path: str,
    device: Any,
    kinds: Sequence[str] = rates.KINDS,
    known: Mapping[str, Mapping[str, float]] | None = None,
) -> Any:
    """What `rates.images` finds: at all batch sizes, at the best of those `known`, with --quick at one of 4."""
    sizes: dict[str, Sequence[int]] | None = {kind: (4,) for kind in rates.KINDS} if session.quick else None
    if known is not None:
        sizes = {kind: (int(max(known[kind].items(), key=lambda found: found[1])[0]),) for kind in kinds}
    times, block = (1, 0.0) if session.quick else (3, rates.BLOCK)
    return rates.images(node, device, precision, path, kinds, sizes, times, block)


def _case(session: Session, case: Case, precision: str, device: Any) -> None:
    """One case in one precision between two measurements of the rates that its floor is made of; its naive version once.

    A machine with other users is faster in one minute than in the next: so the rates are taken right before and right after
    the runs, the best of both, and of runs that are short (`ENOUGH`) the fastest. The ratio to the one naive run is the mean's.
    """
    say(f"{case.name} in {precision}")
    job = session.compose(case, "feature_store=off", f"precision={precision}")
    least = least_passes(job)
    wanted = [kind for kind in rates.KINDS if least is None or getattr(least, kind)]
    known = session.found["rates"][job["model"]["name"]][precision]
    best = rates.fastest(known, wanted)
    row: dict[str, Any] = {"case": case.name, "precision": precision}
    near: dict[str, float] = {}
    seconds: list[float] = []
    for moment in ("before", "after"):
        for path, kinds in best.items():
            found = rates.best({path: _rates(session, job["model"], precision, path, device, kinds, known[path])})
            near = {kind: max(found.get(kind, 0.0), near.get(kind, 0.0)) for kind in {*found, *near}}
        while moment == "before" and (not seconds or _again(session, seconds)):
            made = run_once(job, device)
            seconds.append(made["seconds"])
            if made["seconds"] == min(seconds):
                row |= made
    row |= {"repeats": seconds, "rates": near}
    if row["needed"] is not None and all(kind in near or not n for kind, n in row["needed"].items()):
        row["floor"] = needed.Passes(**row["needed"]).seconds(near)
        row["share"] = row["floor"] / row["seconds"]
    if case.naive:
        same = next((r for r in session.found["cases"] if r["case"] == case.name and "naive" in r), None)
        row["naive"] = same["naive"] if same else run_naive(session, case, device)
        row["ratio"] = row["naive"]["seconds"] * len(seconds) / sum(seconds)
    session.found["cases"].append(row)
    session.save(session.found)


def _again(session: Session, seconds: Sequence[float]) -> bool:
    return len(seconds) < REPEATS and sum(seconds) < ENOUGH and not session.quick


def least_passes(job: dict[str, Any]) -> needed.Passes | None:
    """What its learner needs at least; None where that is not known."""
    made = needed.KNOWN.get(job["names"].get("learner", ""))
    return None if made is None else made(needed.stream_of(runner.prepare(job)))


def run_once(job: dict[str, Any], device: Any) -> dict[str, Any]:
    """A run as a user makes it -> seconds (of learning and evaluation; `whole` with data and weights), passes, memory."""
    clock = machine.Clock()
    with machine.Peak(device) as peak:
        outcome = runner.run_job(job)
    spent = clock.read()
    assert outcome.path is not None
    entry = record.read(outcome.path)
    n, right = sum(entry["n"]), sum(c for c in entry["correct"][-1] if c is not None)
    again = runner.prepare(job)
    stream = needed.stream_of(again)
    made = needed.KNOWN.get(job["names"].get("learner", ""))
    passes = None
    if made is not None:
        if job["names"]["learner"] == "mos":
            least = made(stream)
            extra = entry["passes"]["eval"] - (least.forward - (sum(stream.test) - stream.test[0]))
            stream = needed.Stream(stream.train, stream.test, stream.epochs, stream.options, visited=extra)
        passes = asdict(made(stream))
    return {
        "learner": entry["learner"]["name"],
        "model": entry["model"]["name"],
        "scenario": {"name": entry["scenario"]["name"], "train": list(stream.train), "test": list(stream.test)},
        "seconds": entry["seconds"]["total"],
        "whole": spent["wall"],
        "cpu_seconds": spent["cpu"],
        "phases": {k: v for k, v in entry["seconds"].items() if k != "total"},
        "passes": entry["passes"],
        "needed": passes,
        "peak_bytes": peak.bytes,
        "accuracy": right / n,
        "n": n,
        "flags": entry["machine"]["flags"],
    }


def run_naive(session: Session, case: Case, device: Any, *overrides: str) -> dict[str, Any]:
    """The naive version of a case, in torch's default arithmetic."""
    say(f"{case.name}, naive")
    changes = ("precision=fp32", "arithmetic=reference", "feature_store=off", *overrides)
    job = runner.prepare(session.compose(case, *changes))
    clock = machine.Clock()
    with machine.Peak(device) as peak:
        stage = naive.run(job, workers=0 if device.type == "cpu" else min(8, os.cpu_count() or 1))
    return {
        "seconds": stage.seconds["total"],
        "cpu_seconds": clock.read()["cpu"],
        "phases": {k: v for k, v in stage.seconds.items() if k != "total"},
        "passes": {k: v for k, v in job.model.passes.items() if k != "stored"},
        "peak_bytes": peak.bytes,
        "accuracy": stage.accuracy[-1],
    }


@contextmanager
def cache_in(folder: pathlib.Path) -> Iterator[None]:
    """Features kept in a folder of their own."""
    before = os.environ.get("CLBENCH_CACHE")
    os.environ["CLBENCH_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["CLBENCH_CACHE"]
        if before is not None:
            os.environ["CLBENCH_CACHE"] = before


def sweep(session: Session, device: Any) -> dict[str, Any]:
    """Learners x seeds with the feature store, from an empty one; the naive version of one seed of each, times the seeds.

    A naive run does the same work for every seed, so one is measured.
    """
    cases: Sequence[Case] = session.preset.sweep
    seeds, rows = session.preset.seeds, []
    start = time.perf_counter()
    choice = session.compose(cases[0])["arithmetic"]
    with cache_in(session.scratch / "cache"):
        for case in cases:
            for seed in range(seeds):
                overrides = ["feature_store=on", f"seed={seed}", f"scenario.order_seed={seed}", f"arithmetic={choice}"]
                begin = time.perf_counter()
                outcome = runner.run_job(session.compose(case, *overrides))
                assert outcome.path is not None
                entry = record.read(outcome.path)
                rows.append({"learner": case.name, "seed": seed, "seconds": time.perf_counter() - begin, **entry["passes"]})
            say(f"sweep: {case.name}, {seeds} seeds")
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {"learners": [c.name for c in cases], "seeds": seeds, "seconds": seconds, "runs": rows}
    if all(case.naive for case in cases):
        one = {case.name: run_naive(session, case, device) for case in cases}
        total = seeds * sum(found["seconds"] for found in one.values())
        result |= {"naive_of_one_seed": one, "naive_seconds": total, "ratio": total / seconds}
    return result
