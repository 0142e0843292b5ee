"""Seconds and memory against the number of experiences and of classes, on images made for it, and the exponent.

The work is the same in every row of a table: against experiences, 100 classes with as many images come in 5, 10, 20, ... parts;
against classes, as many images in 10 experiences belong to 10, 30, ... classes. The exponent p of seconds ~ size^p is that of
the straight line through the logarithms. It is shown for the whole run, for learning and for evaluation; a learner whose
network changes must test again every class seen after every experience, so its evaluation may grow with the experiences (p up
to 1), and the passes beside it say so. Nothing may grow faster than the work does.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from clbench.bench import machine, options, stand_ins
from clbench.bench.table import aligned, machine_text, number
from clbench.config import compose, registry
from clbench.interfaces import UserError
from clbench.records import record
from clbench.run import runner
from clbench.training import arithmetic

LEARNERS = "ncm,ranpac,slca,ease,mos"
PER_CLASS, TEST_PER_CLASS, PIECES = 6, 3, 10
FIXED = ("force=true", "on_error=raise", "checkpoint_seconds=null", "track=none", "feature_store=off")
OWN = {"ranpac": ("learner.projection=500",), "slca": ("learner.align_epochs=1",), "mos": ("learner.align_epochs=1",)}


def measure(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Both tables for every learner -> the content of the file."""
    learners = options.listed(args.learners or LEARNERS, "--learners")
    steps = options.numbers(args.experiences or ("2,4" if args.quick else options.STEPS), "--experiences")
    classes = options.numbers(args.classes or ("4,8" if args.quick else options.CLASSES), "--classes")
    if any(k < 2 for k in classes):
        raise UserError("--classes takes numbers from 2: one class is no question")
    rows = []
    with tempfile.TemporaryDirectory(prefix="clbench-bench-") as folder:
        where = pathlib.Path(folder)
        most = max(steps)
        whole = -(-(8 if args.quick else 100) // most) * most  # as many classes as every number of experiences divides
        while any(whole % t for t in steps):
            whole += most
        jobs = [
            ("experiences", t, name, job_of(where, name, whole, whole // t, whole, overrides))
            for name in learners
            for t in steps
        ]
        images = max(classes)
        jobs += [
            ("classes", k, name, job_of(where, name, k, -(-k // PIECES), images, overrides))
            for name in learners
            for k in classes
        ]
        device = arithmetic.choose_device(str(jobs[0][3]["device"]))
        found = {"bench": args.name or "scaling", "kind": "scaling", "quick": bool(args.quick), "words": list(overrides)}
        found |= {"machine": machine.describe(device, arithmetic.choose_threads(jobs[0][3]["num_threads"])), "rows": rows}
        runner.run_job(jobs[0][3])  # libraries load and choose their kernels
        for against, size, name, job in jobs:
            print(f"{name}, {size} {against}", file=sys.stderr, flush=True)
            rows.append({"learner": name, "against": against, "size": size, **one(job, device)})
    found["exponents"] = exponents(rows)
    return found


def job_of(
    where: pathlib.Path, learner: str, classes: int, increment: int, images: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """A stream of `classes` with about PER_CLASS x `images` training images in all, in pieces of `increment` classes."""
    train, test = max(2, PER_CLASS * images // classes), max(1, TEST_PER_CLASS * images // classes)
    path = where / f"images-{classes}-{train}-{test}.npz"
    if not path.exists():
        stand_ins.noise(path, classes, train, test, 32)
    own = [f"learner={learner}", *OWN.get(learner, ()), "scenario=cil_npz", f"scenario.dataset='{path}'"]
    shape = [f"scenario.increment={increment}", "scenario.budget.epochs=1", "scenario.augment=none"]
    job = compose.compose([*own, *shape, *overrides, *FIXED, f"results_dir='{where / 'results'}'"])[0]
    registry.check(job)
    return job


def one(job: dict[str, Any], device: Any) -> dict[str, Any]:
    """Seconds by part, passes, memory at its peak, bytes that the learner holds at the end."""
    clock = machine.Clock()
    with machine.Peak(device) as peak:
        outcome = runner.run_job(job)
    spent = clock.read()
    assert outcome.path is not None
    entry = record.read(outcome.path)
    seconds = entry["seconds"]
    return {
        "seconds": seconds["total"],
        "learn": seconds["learn"],
        "evaluate": seconds["evaluate"],
        "cpu_seconds": spent["cpu"],
        "passes": entry["passes"]["train"] + entry["passes"]["eval"],
        "peak_bytes": peak.bytes,
        "stored_bytes": entry["stored_bytes"] + entry["exemplar_bytes"],
        "experiences": entry["scenario"]["num_experiences"],
    }


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Exponent p of value ~ size^p by least squares of logarithms; None of fewer than two sizes, or a value not above 0."""
    if len(set(sizes)) < 2 or min(values) <= 0:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def exponents(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each learner and table: exponents of the parts, of seconds per pass, and bytes that an experience or a class adds."""
    out = []
    for learner, against in dict.fromkeys((r["learner"], r["against"]) for r in rows):
        part = [r for r in rows if (r["learner"], r["against"]) == (learner, against)]
        sizes = [r["size"] for r in part]
        found: dict[str, Any] = {"learner": learner, "against": against}
        found |= {
            name: slope(sizes, [r[name] for r in part]) for name in ("seconds", "learn", "evaluate", "cpu_seconds", "passes")
        }
        span = sizes[-1] - sizes[0]
        for name in ("stored_bytes", "peak_bytes"):
            ends = part[0][name], part[-1][name]
            found[f"{name}_each"] = (ends[1] - ends[0]) / span if span and None not in ends else None
        out.append(found)
    return out


def text(found: Mapping[str, Any]) -> str:
    """Both tables and their exponents."""
    parts = [machine_text(found)]
    for against in ("experiences", "classes"):
        rows: list[tuple[str, ...]] = [
            ("learner", against, "seconds", "learn", "evaluate", "cpu", "passes", "peak MB", "stored MB")
        ]
        for r in found["rows"]:
            if r["against"] == against:
                times = [number(r[n], 2) for n in ("seconds", "learn", "evaluate", "cpu_seconds")]
                memory = [number(r[n], 2, 1e6) for n in ("peak_bytes", "stored_bytes")]
                rows.append((r["learner"], str(r["size"]), *times, str(r["passes"]), *memory))
        parts.append(aligned(rows))
        rows = [(f"exponent, {against}", "seconds", "learn", "evaluate", "cpu", "passes", "stored kB each", "peak kB each")]
        for e in found["exponents"]:
            if e["against"] == against:
                powers = [number(e[n], 2) for n in ("seconds", "learn", "evaluate", "cpu_seconds", "passes")]
                each = [number(e[n], 1, 1e3) for n in ("stored_bytes_each", "peak_bytes_each")]
                rows.append((e["learner"], *powers, *each))
        parts.append(aligned(rows))
    return "\n\n".join(parts)
