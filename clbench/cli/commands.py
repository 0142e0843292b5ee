"""The commands. Everything that loads torch is imported inside the command that needs it."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clbench.cli import suites
from clbench.config import compose, registry
from clbench.interfaces import UserError, declared
from clbench.records import record
from clbench.run import provenance
from clbench.run.subprocess_job import SubprocessJob, show_log
from clbench.training import torchrun

Launch = Callable[[Sequence[str], Sequence[list[str]] | None, Any], None]
GO_ON = "clbench: stopped; the same command goes on where it was"


def run(args: Namespace, command: list[str], launch: Launch) -> int:
    """Compose and check every job, then run: one in this process, a sweep through Hydra's launchers."""
    composed = compose.read(args.overrides, args.multirun)
    torchrun.check_single_run("run", composed.multirun)
    if args.cfg:
        print("---\n".join(compose.to_yaml(job) for job in composed.jobs), end="")
        return 0
    if composed.suite is not None:
        composed = suites.open_jobs(composed)
        if not composed.jobs:
            print("all jobs of this part are done (clbench report core shows them)")
            return 0
    for folder in _check_all(composed.jobs):
        record.ensure_writable(Path(folder).expanduser() / "records")
    if composed.multirun:
        return sweep(composed, command, launch)
    first = torchrun.rank() == 0
    show_log(first)
    from clbench.run.runner import run_job

    outcome = run_job(composed.jobs[0], command=command, progress=first)
    if not first:
        return {"interrupted": 130, "failed": 1}.get(outcome.status, 0)
    if outcome.status == "interrupted":
        print(f"clbench: {outcome.text}", file=sys.stderr)
        return 130
    print(f"record {outcome.path} holds the traceback" if outcome.status == "failed" else outcome.text)
    return 0 if outcome.status in ("ok", "skipped", "busy") else 1


def _check_all(jobs: Sequence[dict[str, Any]]) -> list[str]:
    """`registry.check` on every job -> their results folders; one `UserError` with the distinct lines of all of them."""
    lines: dict[str, None] = {}
    folders: dict[str, None] = {}
    for job in jobs:
        folders[str(job["results_dir"])] = None
        try:
            registry.check(job)
        except UserError as error:
            lines |= dict.fromkeys(str(error).splitlines())
    if lines:
        raise UserError("\n".join(lines))
    return list(folders)


def sweep(composed: compose.Composed, command: list[str], launch: Launch) -> int:
    """Run all jobs, show a line for each that ends and a summary -> 0, also with failures: those are in the records."""
    first = composed.jobs[0]
    runs = Path(str(first["results_dir"])).expanduser().resolve() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    log = runs / f".sweep-{os.getpid()}-{time.time_ns()}.jsonl"
    log.touch()
    one_by_one = composed.launcher.endswith("BasicLauncher")
    progress = one_by_one and sys.stderr.isatty()
    job = SubprocessJob(str(log), command, list(sys.path), composed.varying, progress, composed.by_pattern)
    tail = Tail(log, len(composed.jobs))
    tail.start()
    code = 0
    # a terminated sweep stops its jobs as Ctrl-C does, and a script's background job, which shells make deaf to it, listens too
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        launch(composed.overrides, composed.words, job)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        tail.stop()
        log.unlink(missing_ok=True)
    print(summary(tail.counts, len(composed.jobs), first))
    if code == 130:
        print(GO_ON, file=sys.stderr)
    return code


def summary(counts: Counter[str], total: int, job: dict[str, Any]) -> str:
    """How a sweep ended, in one line or two."""
    parts = [f"{counts[s]} {s}" for s in ("ok", "skipped", "left out", "failed", "died", "busy", "interrupted") if counts[s]]
    left = total - sum(counts.values())
    text = f"{total} jobs: {', '.join([*parts, *([f'{left} not run'] if left > 0 else [])])}"
    if counts["failed"] or counts["died"]:
        where = "" if job["results_dir"] == "results" else f" --results-dir '{job['results_dir']}'"
        text += f"\nclbench report --strict{where} names them and exits 1"
    return text


class Tail(threading.Thread):
    """Shows a line for each job that the sweep's log says has ended, whoever ran it."""

    def __init__(self, path: Path, total: int):
        super().__init__(daemon=True)
        self.path, self.total, self.counts = path, total, Counter[str]()
        self._read, self._done = 0, threading.Event()

    def run(self) -> None:
        """Look five times a second."""
        while not self._done.wait(0.2):
            self._show()

    def stop(self) -> None:
        """Show what is left."""
        self._done.set()
        self.join()
        self._show()

    def _show(self) -> None:
        with open(self.path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._one(json.loads(line))

    def _one(self, ended: dict[str, Any]) -> None:
        self.counts[ended["status"]] += 1
        number = sum(self.counts.values())
        lines = ended["text"].splitlines()
        if ended["status"] == "ok":
            text = next((line for line in lines if line.startswith(("step_macro", "final_loss"))), "")
        else:
            text = lines[0] if lines else ""
        head = f"[{number}/{self.total}] {ended['status']:<11} {ended['label']}"
        print(f"{head}  {ended['seconds']:.0f} s  {text}".rstrip(), flush=True)


def plan(args: Namespace) -> int:
    """A row for each job; all errors together -> 0, or 2 if a job cannot run.

    What `learner=glob(...)` leaves out is no error.
    """
    composed = compose.read(args.overrides, args.multirun)
    if composed.suite is not None:
        print(suites.plan_text(composed))
        return 0
    counted, errors, left_out = Plan(), {}, {}
    planner = None
    for job in composed.jobs:
        try:
            registry.check(job)
        except UserError as error:
            errors |= dict.fromkeys(str(error).splitlines())
            continue
        from clbench.run.plan import DoesNotFit, Planner

        planner = planner or Planner()
        try:
            counted.add(planner.row(job))
        except UserError as error:
            found = left_out if composed.by_pattern and isinstance(error, DoesNotFit) else errors
            found |= dict.fromkeys(str(error).splitlines())
    print(plan_text(counted))
    for line in left_out:
        print(f"left out: {line}")
    for line in errors:
        print(f"clbench: {line}", file=sys.stderr)
    return 2 if errors else 0


class Plan:
    """Rows of a plan: the first ones, and totals of all of them."""

    MOST = 200

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.states, self.number = Counter[str](), 0
        self.seconds, self.bytes, self.known = 0.0, 0.0, True

    def add(self, row: Any) -> None:
        """Count a row; `seconds`, `bytes` and `known` are of what is not done yet."""
        self.number += 1
        self.states[row.state] += 1
        if row.state != "done":
            self.seconds += row.seconds or 0
            self.bytes += row.bytes or 0
            self.known &= row.seconds is not None
        if len(self.rows) < self.MOST:
            self.rows.append(row)


def plan_text(counted: Plan) -> str:
    """A plan as a table, with totals of what is not done yet."""
    rows = counted.rows
    head = ("scenario", "learner", "model", "seed", "run", "state", "about", "disk")
    cells = [
        (r.scenario, r.learner, r.model, str(r.seed), r.run_id, r.state, _duration(r.seconds), _size(r.bytes)) for r in rows
    ]
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *cells]]
    lines += [f"and {left} jobs more, which are counted below"] if (left := counted.number - len(rows)) else []
    time_text = _duration(counted.seconds) + ("" if counted.known else " and what is unknown")
    done = ", ".join(f"{n} {state}" for state, n in sorted(counted.states.items())) or "none can run"
    lines += [f"classes of {name}: {textwrap.shorten(text, 400, placeholder=' ...')}" for name, text in _named_classes(rows)]
    total = f"{counted.number} jobs: {done}; still to do: {time_text} one after another, {_size(counted.bytes)} of disk"
    return "\n".join([*lines, "", total])


def _named_classes(rows: Sequence[Any]) -> list[tuple[str, str]]:
    """(scenario, names of its classes by id) of every stream whose classes have names, once each."""
    return list(dict.fromkeys((r.scenario, r.classes) for r in rows if r.classes))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: float | None) -> str:
    return "?" if count is None else f"{count / 1e6:.1f} MB"


def show_choices(args: Namespace) -> int:
    print(registry.listing(args.groups))
    return 0


def check(args: Namespace) -> int:
    """The contract suite on the learner or the scenario that the overrides name -> 0, or 1 if something failed."""
    groups = {one.lstrip("+~").split("=")[0].split(".")[0] for one in args.overrides}
    wanted = [group for group in ("learner", "scenario") if group in groups]
    if not wanted:
        raise UserError("say what to check: learner=NAME or scenario=NAME")
    found = compose.compose(args.overrides)[0]
    registry.check(found)
    from clbench.testing import contract

    failed = False
    for group in wanted:
        work = contract.check_learner if group == "learner" else contract.check_scenario
        for name, passed, message in work(found):
            failed |= not passed
            print(f"{'ok    ' if passed else 'FAILED'}  {name}" + (f": {message}" if message else ""), flush=True)
    return 1 if failed else 0


def measure(args: Namespace) -> int:
    """Print `registry.stored` of the learners named: experiences of two classes and of three tell what grows with which."""
    rows, jobs = {}, compose.compose(args.overrides, multirun=True)
    _check_all(jobs)
    for job in jobs:
        small, large = (_held(job, size) for size in (2, 3))
        grown, more = small[2] - small[1], large[2] - large[1]
        row = {"class": more - grown, "experience": 3 * grown - 2 * more}
        rows[provenance.learner_name(job)] = row | {"besides": small[2] - 6 * row["class"] - 3 * row["experience"]}
    print("{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items())) + "\n}")
    return 0


def _held(job: dict[str, Any], size: int) -> list[int]:
    """Bytes without exemplars after each of three experiences of `size` classes."""
    from clbench.testing import contract
    from clbench.training.state import num_bytes

    can = declared(registry.load_target(job["learner"]["_target_"]), job["learner"])
    kind = "task_incremental" if can.needs_task_id else "class_incremental"
    budget = {"epochs": max(2, can.needs_passes), "exemplars": 12}
    trial = contract.Trial(job, contract.small_stream(kind, sizes=[size] * 3, num_classes=3 * size, budget=budget), can)
    learner, runtime, pipeline = trial.start()
    held = []
    for index in range(3):
        trial.learn(learner, runtime, pipeline, index)
        held.append(num_bytes(learner.state_dict()) - (learner.memory.num_bytes() if can.stores_exemplars else 0))
    return held


def report(args: Namespace) -> int:
    """Leaderboard and cards from a folder of records, or one of the pages."""
    from clbench.report import subcommands

    text, code = subcommands.run(args, registry.conf_dir())
    print(text)
    return code


def verify(args: Namespace) -> int:
    from clbench.cli import verify_command

    text, code = verify_command.run(args)
    print(text)
    return code


def new(args: Namespace) -> int:
    """Write a package and say what to do with it."""
    from clbench.cli.scaffold import write

    print(write(args.kind, args.name, Path(args.to)))
    return 0
