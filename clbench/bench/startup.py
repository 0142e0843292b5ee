"""Start-up latency: each command as a new process, the minimum of several."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from clbench.bench import machine
from clbench.bench.table import aligned, machine_text, number
from clbench.config import compose
from clbench.records import record
from clbench.records.rows import rows_of
from clbench.run import runner

TIMES = 5
LEARNERS, SEEDS = ("ncm", "slca", "mos", "lae", "ranpac", "ease", "aper", "fecam"), 10
ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMANDS: dict[str, tuple[list[str], int, float]] = {
    "import clbench": (["-c", "import clbench"], 0, 0.3),
    "clbench --help": (["-m", "clbench", "--help"], 0, 1.0),
    "clbench run --help": (["-m", "clbench", "run", "--help"], 0, 1.0),
    "clbench run learner.lrr=1": (["-m", "clbench", "run", "learner.lrr=1"], 2, 1.0),
    "clbench run --sede": (["-m", "clbench", "run", "--sede"], 2, 1.0),
}
REPORT_SECONDS = 10.0


def measure(records: int, quick: bool = False) -> dict[str, Any]:
    """Seconds of the wall and of the processor for each command -> the content of the file.

    `python` alone is measured too: below it nothing can go. Targets are met by the wall, or where other work held the machine
    up, by the processor's time.
    """
    times = 2 if quick else TIMES
    found: dict[str, Any] = {"bench": "startup", "kind": "startup", "quick": quick, "times": times, "records": records}
    found["machine"] = machine.describe(torch.device("cpu"), torch.get_num_threads())
    rows = [{"command": "python", "most": None, **shortest(["-c", "pass"], 0, times)}]
    for name, (argv, code, most) in COMMANDS.items():
        rows.append({"command": name, "most": most, **shortest(argv, code, times)})
    with tempfile.TemporaryDirectory(prefix="clbench-bench-") as folder:
        where = pathlib.Path(folder)
        synthetic(where, records)
        argv = ["-m", "clbench", "report", "--results-dir", str(where)]
        name = f"clbench report, {records} records"
        rows.append({"command": name, "most": REPORT_SECONDS, **shortest(argv, 0, 1 if quick else 2)})
    for row in rows:
        row["met"] = None if row["most"] is None else min(row["seconds"], row["cpu_seconds"]) < row["most"]
    return found | {"rows": rows}


def shortest(argv: Sequence[str], code: int, times: int) -> dict[str, float]:
    """Least wall and processor seconds of `python WORDS`, which must exit with `code`."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    walls, cpus = [], []
    with tempfile.TemporaryDirectory(prefix="clbench-bench-") as folder:
        for _ in range(times):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run([sys.executable, *argv], cwd=folder, env=env, capture_output=True, text=True)
            walls.append(time.perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert done.returncode == code, f"{argv} exited with {done.returncode}: {done.stderr}"
    return {"seconds": min(walls), "cpu_seconds": min(cpus)}


def synthetic(results: pathlib.Path, count: int) -> None:
    """`count` records as runs write them: one real run, its counts and names varied."""
    options = ["learner=ncm", "scenario.limit_train=4", f"results_dir='{results / 'one'}'", "feature_store=off", "track=none"]
    outcome = runner.run_job(compose.compose([*options, "on_error=raise"])[0])
    assert outcome.path is not None
    pattern, rng = record.read(outcome.path), np.random.default_rng(0)
    pattern.pop("checksum", None)
    folder = results / "records"
    folder.mkdir(parents=True)
    for i in range(count):
        entry = copy.deepcopy(pattern)
        name, seed, variant = LEARNERS[i % len(LEARNERS)], i // len(LEARNERS) % SEEDS, i // (len(LEARNERS) * SEEDS)
        entry["learner"]["name"], entry["seed"] = name, seed
        entry["config"]["seed"], entry["config"]["learner"]["batch_size"] = seed, 16 + variant
        for row, tables in enumerate(entry["class_correct"]):
            for j, classes in enumerate(tables):
                if classes is not None:
                    counted = [int(rng.integers(0, n + 1)) for n in entry["class_n"][j]]
                    entry["class_correct"][row][j], entry["correct"][row][j] = counted, sum(counted)
        sha = entry["scenario"]["manifest_sha256"]
        entry["run_id"] = record.run_id(entry["config"] | {"of": name}, sha, entry["model"]["state_sha256"], None)
        form = rows_of(entry) | {"schema": record.SCHEMA}
        form["checksum"] = record.checksum(json.loads(json.dumps(form)))
        (folder / f"{entry['run_id']}.json").write_text(json.dumps(form), encoding="utf-8")


def text(found: Mapping[str, Any]) -> str:
    """A row for each command."""
    rows = [("command", "seconds", "of processor", "most", "met")]
    for r in found["rows"]:
        met = {None: "", True: "yes", False: "NO"}[r["met"]]
        rows.append((r["command"], number(r["seconds"], 2), number(r["cpu_seconds"], 2), number(r["most"], 1), met))
    return f"{machine_text(found)}\n\n{aligned(rows)}\n\nshortest of {found['times']}"
