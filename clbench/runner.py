"""One job: a resolved configuration in, a record out. Learn, evaluate, append a row; guard, lock, resume.

The order of things is the contract: nothing of the learner is built before scenario, model and learner are known to fit;
the record says `running` from the first moment; the state after each experience is in the journal before it is evaluated.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from clbench import loss_stream, metrics, provenance, ranks, record
from clbench.config import build, load_target
from clbench.evaluate import SetCounts, evaluate
from clbench.interfaces import Capabilities, Experience, UserError, declared, mismatch
from clbench.streams.cpt import TokenScenario
from clbench.streams.images import open_eval, open_experience
from clbench.streams.pixels import Pipeline
from clbench.streams.scenario import Scenario
from clbench.training import arithmetic, parallel
from clbench.training.journal import Journal
from clbench.training.runtime import Interrupted, Runtime
from clbench.training.state import fingerprint, num_bytes

log = logging.getLogger("clbench")


@dataclass(frozen=True)
class Outcome:
    """How a job ended: status ok, failed, skipped, busy or interrupted; `text` is for the person at the terminal."""

    run_id: str
    status: str
    text: str
    path: pathlib.Path | None = None


@dataclass
class Job:
    """Everything that is known before the first image is read."""

    config: dict[str, Any]
    run_id: str
    scenario: Any  # Scenario, or TokenScenario with a decoder and no pipeline
    model: Any
    capabilities: Capabilities
    pipeline: Any
    results: pathlib.Path
    folder: pathlib.Path
    flags: dict[str, Any]
    device: Any
    group: parallel.Group = parallel.ALONE

    @property
    def record_path(self) -> pathlib.Path:
        """Where the record lies."""
        return self.results / "records" / f"{self.run_id}.json"


def prepare(config: dict[str, Any]) -> Job:
    """Build scenario and model, check that the learner fits, and give the run its identity. Raises `UserError`."""
    kind = ranks.choose(str(config.get("parallel", "auto")))
    device = arithmetic.choose_device(str(config["device"]))
    threads = arithmetic.choose_threads(config["num_threads"])
    if config["precision"] not in ("fp32", "bf16"):
        raise UserError(f"precision must be fp32 or bf16, got {config['precision']!r}")
    if not isinstance(config["seed"], int) or isinstance(config["seed"], bool) or config["seed"] < 0:
        raise UserError(f"seed must be a whole number from 0, got {config['seed']!r}")
    results = pathlib.Path(str(config["results_dir"])).expanduser().resolve()
    flags = arithmetic.apply(device, threads, config["seed"])
    capabilities = declared(load_target(config["learner"]["_target_"]), config["learner"])
    scenario = build(config["scenario"])
    if not isinstance(scenario, Scenario | TokenScenario):
        raise UserError(f"{config['scenario']['_target_']} must return a Scenario, got {type(scenario).__name__}")
    wanted = "none" if str(config["model"].get("weights")) in ("none", "None") else "some"
    why = mismatch(provenance.learner_name(config), capabilities, scenario.facts(), wanted == "some")
    if why:
        raise UserError(why)
    ranks.check(kind, scenario.name, scenario.asks, provenance.learner_name(config), capabilities)
    model = loss_stream.build_model(build, config, scenario).to(device)
    plugin = provenance.plugin_version(config["learner"]["_target_"])
    identity = provenance.identity(config)
    run_id = record.run_id(identity, scenario.manifest.sha256, model.identity["state_sha256"], plugin)
    pipeline = Pipeline(model.profile, device, scenario.augment) if isinstance(scenario, Scenario) else None
    group = parallel.join(kind, device)
    group.share(model)
    folder = results / "runs" / run_id
    job = Job(config, run_id, scenario, model, capabilities, pipeline, results, folder, flags, device, group)
    if isinstance(scenario, TokenScenario):
        loss_stream.rehearse(build, job)
    return job


def run_job(config: dict[str, Any], *, command: list[str] | None = None, progress: bool = False) -> Outcome:
    """Run one configuration to its record; the same configuration again is a skip, a killed one goes on.

    With `on_error: record` an exception becomes a failed record; with `raise` it is raised after that.
    """
    job = prepare(config)
    with job.group.running():
        return _follow(job) if job.group.rank else _lead(job, command, progress)


def _follow(job: Job) -> Outcome:
    """A process that trains along: it writes nothing and says nothing, the first one does."""
    status = job.group.say()
    if status != "running":
        return Outcome(job.run_id, status, "")
    journal = Journal(job.folder / "journal", group=job.group)
    job.flags = job.group.say()
    arithmetic.apply(job.device, job.flags["num_threads"], job.config["seed"], job.flags)
    try:
        with job.group.watching():
            _run(job, journal, {"resumed": 0}, False)
    except KeyboardInterrupt:
        status = "interrupted"
    except Exception as error:
        log.error("%s", error)
        status = "failed"
    return Outcome(job.run_id, status, "")


def _lead(job: Job, command: list[str] | None, progress: bool) -> Outcome:
    """The one process of a run, or the first of several."""
    from filelock import FileLock, Timeout

    config = job.config
    record.ensure_writable(job.results / "records")
    refusal_path(config).unlink(missing_ok=True)
    old = record.read(job.record_path) if job.record_path.exists() else None
    if old is not None and old["status"] == "ok" and not config["force"]:
        job.group.say("skipped")
        text = f"{job.run_id} is done already (force=true repeats it)\n\n{closing_text(old, job.record_path)}"
        return Outcome(job.run_id, "skipped", text, job.record_path)
    record.ensure_writable(job.folder)
    lock = FileLock(str(job.folder / "lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        job.group.say("busy")
        return Outcome(job.run_id, "busy", f"{job.run_id} is being run by another process", job.record_path)
    with lock, _logging_to(job.folder / "run.log"):
        seconds = config["checkpoint_seconds"]
        journal = Journal(job.folder / "journal", float("inf") if seconds is None else float(seconds), job.group)
        if config["force"] or (old is not None and old["status"] == "failed"):
            journal.clear()
        entry = provenance.describe(job, command or sys.argv)
        record.write(entry, job.results / "records")
        job.scenario.manifest.save(job.results / "manifests" / f"{job.scenario.manifest.sha256}.json")
        job.group.say("running")
        job.group.say(job.flags)
        try:
            with job.group.watching():
                entry = _run(job, journal, entry, progress)
        except (Interrupted, parallel.Lost) as error:
            text = f"{error or 'stopped'}; the same command goes on where {job.run_id} was"
            return Outcome(job.run_id, "interrupted", text, job.record_path)
        except Exception as error:
            entry |= {"status": "failed", "finished": provenance.now(), "error": _described(error)}
            record.write(entry, job.results / "records")
            journal.clear()
            log.error("%s failed: %s: %s", job.run_id, type(error).__name__, error)
            if config["on_error"] == "raise":
                raise
            error.__traceback__ = None
            gc.collect()
            text = f"{job.run_id} failed: {type(error).__name__}: {error}"
            return Outcome(job.run_id, "failed", text, job.record_path)
        record.write(entry, job.results / "records")
        journal.clear()
    return Outcome(job.run_id, "ok", closing_text(entry, job.record_path), job.record_path)


def refusal_path(config: dict[str, Any]) -> pathlib.Path:
    """Where a job that was refused before it had an identity leaves its failed record."""
    results = pathlib.Path(str(config["results_dir"])).expanduser().resolve()
    return results / "records" / f"{record.run_id(provenance.identity(config), '', '', None)}.json"


def write_refusal(config: dict[str, Any], error: UserError) -> pathlib.Path:
    """A job of a sweep that cannot even start is a failed record too; it goes when the same job starts after all."""
    path = refusal_path(config)
    entry = {
        "schema": record.SCHEMA,
        "run_id": path.stem,
        "status": "failed",
        "numbers_version": record.NUMBERS_VERSION,
        "config": provenance.identity(config),
        "scenario": {"name": str(config["scenario"].get("name", "?")), "manifest_sha256": ""},
        "learner": {"name": provenance.learner_name(config), "plugin": None},
        "model": {"name": provenance.model_name(config), "state_sha256": ""},
        "seed": config["seed"],
        "n": [],
        "first_seen": [],
        "correct": None,
        "seconds": {"total": 0.0},
        "finished": provenance.now(),
        "error": _described(error),
    }
    return record.write(entry, path.parent)


def closing_text(entry: dict[str, Any], path: pathlib.Path) -> str:
    """The matrix and the headline numbers of a finished run."""
    if "sum_loss" in entry:
        from clbench.report.losses import closing_text as losses_text

        return losses_text(entry, path)
    from clbench.report.table import accuracy_matrix_text

    values = metrics.summary(entry)
    shown = "   ".join(f"{name} {values[name]:.4f}" for name in ("step_macro", "last_macro", "forgetting") if name in values)
    return f"{accuracy_matrix_text(entry)}\n\n{shown}\nrecord {path}"


def _run(job: Job, journal: Journal, entry: dict[str, Any], progress: bool) -> dict[str, Any]:
    """Learn and evaluate every experience -> the finished record."""
    saved = journal.load("experience")
    if saved is not None:
        job.flags = arithmetic.apply(job.device, job.flags["num_threads"], job.config["seed"], saved["flags"])
        log.info("%s goes on after experience %d", job.run_id, saved["experience"] + 1)
    losses = isinstance(job.scenario, TokenScenario)
    runtime = loss_stream.make_runtime(job, journal) if losses else _runtime(job, journal)
    learner = build(job.config["learner"], model=job.model, runtime=runtime)
    for name in ("learn", "loss" if losses else "predict", "state_dict", "load_state_dict"):
        if not callable(getattr(learner, name, None)):
            raise UserError(f"{type(learner).__name__} has no method {name}")
    has_memory = losses or hasattr(getattr(learner, "memory", None), "num_bytes")
    if job.capabilities.stores_exemplars and not has_memory:
        raise UserError(
            f"{type(learner).__name__} declares stores_exemplars: its memory must be `self.memory` with num_bytes()"
        )
    stream = (loss_stream.LossStream if losses else _Stream)(job, runtime, learner, entry, saved)
    with _signals(runtime), _bar(runtime, progress):
        for index in range(stream.first, len(job.scenario.manifest.experiences)):
            stream.learn(index)
            stream.evaluate(index)
    return stream.finish()


def _runtime(job: Job, journal: Journal) -> Runtime:
    return Runtime(
        seed=job.config["seed"],
        device=job.device,
        budget=job.scenario.budget,
        precision=job.config["precision"],
        exempt=job.capabilities.stores_all_data,
        journal=journal,
    )


class _Stream:
    """The state of a run between experiences: learner, rows, log."""

    def __init__(self, job: Job, runtime: Runtime, learner: Any, entry: dict[str, Any], saved: dict[str, Any] | None):
        self.job, self.runtime, self.learner, self.entry = job, runtime, learner, entry
        self.evals = [open_eval(job.scenario, j, job.pipeline) for j in range(len(job.scenario.manifest.evals))]
        self.rows: list[list[SetCounts | None]] = []
        self.logs: list[dict[str, float | None]] = []
        self.past: list[Any] = []
        self.first, self.before = 0, 0.0
        self.start = time.perf_counter()
        if saved is not None:
            learner.load_state_dict(saved["learner"])
            job.model.passes.update(saved["passes"])
            runtime.meter.load_state_dict(saved["meter"])
            self.rows = [[None if c is None else SetCounts(**c) for c in row] for row in saved["rows"]]
            self.logs, self.before = saved["logs"], saved["seconds"]
            self.first = saved["experience"] + 1
            entry["resumed"] = saved["resumed"] + 1
            if job.capabilities.stores_all_data:
                self.past = [self._open(i).train for i in range(self.first)]
            if len(self.rows) < self.first:
                self.evaluate(self.first - 1)

    def _open(self, index: int) -> Experience:
        return open_experience(self.job.scenario, index, self.job.pipeline)

    def learn(self, index: int) -> None:
        """One experience, then the state on disk; the data is closed unless the learner declared that it keeps it."""
        experience = replace(self._open(index), past=tuple(self.past))
        self.runtime.begin(index, len(experience.train))
        self.job.model.train()
        start = time.perf_counter()
        result = self.learner.learn(experience)
        self.runtime.meter.add_seconds("learn", time.perf_counter() - start)
        numbers = {str(k): float(v) for k, v in (result or {}).items()}
        self.logs.append({k: v if math.isfinite(v) else None for k, v in numbers.items()})  # JSON knows no NaN
        if self.job.capabilities.stores_all_data:
            self.past.append(experience.train)
        else:
            experience.train.close()  # type: ignore[attr-defined]
        state = self.learner.state_dict()
        self._check_budget(index, state)
        self.runtime.journal.finish_experience(self._snapshot(index, state))

    def _snapshot(self, index: int, state: dict[str, Any]) -> dict[str, Any]:
        return {
            "experience": index,
            "learner": state,
            "passes": dict(self.job.model.passes),
            "meter": self.runtime.meter.state_dict(),
            "rows": [[None if c is None else vars(c) for c in row] for row in self.rows],
            "logs": self.logs,
            "flags": {k: self.job.flags[k] for k in ("matmul", "fused_attention")},
            "seconds": self.before + time.perf_counter() - self.start,
            "resumed": self.entry["resumed"],
        }

    def _check_budget(self, index: int, state: dict[str, Any]) -> None:
        budget = self.job.scenario.budget
        memory = getattr(self.learner, "memory", None) if self.job.capabilities.stores_exemplars else None
        count, size = (0, 0) if memory is None else (len(memory), memory.num_bytes())
        stored = num_bytes(state) - size
        self.entry |= {"exemplars": count, "exemplar_bytes": size, "stored_bytes": stored}
        used = {"exemplars": count, "exemplar_bytes": size, "stored_bytes": stored}
        for name, value in used.items():
            limit = getattr(budget, name)
            if limit is not None and value > limit:
                raise UserError(f"experience {index}: the learner holds {value} {name}, the scenario's budget allows {limit}")

    def evaluate(self, index: int) -> None:
        """Append the row of this experience and say how it went."""
        start = time.perf_counter()
        manifest = self.job.scenario.manifest
        row = evaluate(
            self.learner,
            self.evals,
            manifest.num_seen(index),
            int(self.job.config["eval_batch_size"]),
            self.runtime.autocast,
            self.runtime.check_stop,
        )
        self.runtime.meter.add_seconds("evaluate", time.perf_counter() - start)
        self.rows.append(row)
        seen = [c for c, s in zip(row, self.evals, strict=True) if c is not None and s.first_seen <= index]
        macro = sum(c.correct / c.n for c in seen) / max(1, len(seen))
        log.info(
            "experience %d/%d  %s  accuracy %.4f (macro over %d)  %.1f s",
            index + 1,
            len(manifest.experiences),
            manifest.experiences[index].name,
            macro,
            len(seen),
            self.before + time.perf_counter() - self.start,
        )

    def finish(self) -> dict[str, Any]:
        """The record with counts, costs and the hash of the final state."""
        rows, meter = self.rows, self.runtime.meter

        def table(name: str) -> list[list[Any]]:
            return [[None if c is None else copy.copy(getattr(c, name)) for c in row] for row in rows]

        last = [c for c in rows[-1] if c is not None]
        heads = {name: [[None if c is None else c.heads[name] for c in row] for row in rows] for name in last[0].heads}
        model = self.job.model
        return self.entry | {
            "status": "ok",
            "correct": table("correct"),
            "correct_masked": table("masked"),
            "correct_top5": table("top5"),
            "class_correct": table("class_correct"),
            "heads": heads,
            "experiences": self.logs,
            "seconds": {"total": self.before + time.perf_counter() - self.start, **meter.seconds},
            "peak_memory_bytes": provenance.peak_memory(self.job.device),
            "parameters": {"trained": meter.trained, "total": sum(p.numel() for p in model.parameters())},
            "passes": dict(model.passes),
            "visits": dict(meter.visits),
            "steps": meter.steps,
            "final_state_sha256": fingerprint(self.learner.state_dict()),
            "finished": provenance.now(),
        }


def _described(error: Exception) -> dict[str, str]:
    text = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "message": str(error), "traceback": text}


@contextmanager
def _signals(runtime: Runtime) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: stop after this step. Second: at once (the last snapshot stays)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        if runtime.stop:
            raise Interrupted
        runtime.stop = True

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _bar(runtime: Runtime, progress: bool) -> Iterator[None]:
    """A progress bar on the terminal while `fit` runs."""
    if not progress or not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    bar: Any = tqdm(total=1, leave=False, unit="step", dynamic_ncols=True)

    def show(name: str, step: int, steps: int, loss: float) -> None:
        bar.set_description(f"experience {runtime.experience + 1} {name}", refresh=False)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if bar.total != steps or step == 1:
            bar.reset(steps)
        bar.update(step - bar.n)

    runtime.progress = show
    try:
        yield
    finally:
        bar.close()
        runtime.progress = None


@contextmanager
def _logging_to(path: pathlib.Path) -> Iterator[None]:
    """Write the log of this job to its own folder too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.debug("pid %d starts", os.getpid())
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
