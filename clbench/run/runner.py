"""One job: a resolved configuration in, a record out. Learn, evaluate, append a row; guard, lock, resume.

The order of things is the contract: nothing of the learner is built before scenario, model and learner are known to fit;
the record says `running` from the first moment; the state after each experience is in the journal before it is evaluated.
The journal goes when the run is done, or with `force`: whatever else ends it, the same command goes on from what is saved.
"""

from __future__ import annotations

import gc
import logging
import pathlib
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from clbench.config.compose import build, load_target
from clbench.config.run_options import RunOptions
from clbench.evaluation import evaluators
from clbench.interfaces import Capabilities, UserError, declared, mismatch
from clbench.models.precision import set_precision
from clbench.records import record
from clbench.records.liveness import Heartbeat, this_process
from clbench.records.rows import rows_of
from clbench.records.tables import tables
from clbench.run import (
    artifacts,
    continued,
    edit_stream,
    image_stream,
    provenance,
    refused,
    saved_model,
    text_stream,
    token_stream,
    tracking,
)
from clbench.run.loop import KEPT_FLAGS, Loop, StreamKind
from clbench.run.terminal import bar_of, logging_to, signals
from clbench.streams.scenario import Scenario
from clbench.streams.tokens.edits import EditScenario
from clbench.streams.tokens.scenario import TokenScenario
from clbench.streams.tokens.text_lines import TextScenario
from clbench.training import arithmetic, distributed, torchrun
from clbench.training.checkpoint import Journal
from clbench.training.runtime import Interrupted

log = logging.getLogger("clbench")
KINDS: dict[type, StreamKind] = {Scenario: image_stream, TokenScenario: token_stream}
KINDS |= {EditScenario: edit_stream, TextScenario: text_stream}


class DoesNotFit(UserError):
    """This learner cannot run on this stream and model. `learner=glob(...)` leaves it out, and says why."""


@contextmanager
def _of_learner() -> Iterator[None]:
    """What a learner's checks and constructor refuse is a matter of the learner alone."""
    try:
        yield
    except UserError as error:
        raise DoesNotFit(str(error)) from error


@dataclass(frozen=True)
class Outcome:
    """How a job ended: status ok, failed, skipped, busy or interrupted; `text` is for the person at the terminal."""

    run_id: str
    status: str
    text: str
    path: pathlib.Path | None = None


@dataclass
class Job:
    """Everything that is known before the first sample is read.

    config    the composed configuration: of it the identity of the run is made; what the run reads stands in `options`
    kind      what streams of this kind do their own way
    pipeline  makes pixels of images; None for streams that ask for losses
    evaluators  what the scenario names beside what its kind asks for
    learner   built with its runtime when it is first needed, at once where it plans its training ahead
    """

    config: dict[str, Any]
    options: RunOptions
    run_id: str
    scenario: Any  # Scenario, TokenScenario or ImageScenario
    kind: StreamKind
    model: Any
    capabilities: Capabilities
    pipeline: Any
    flags: dict[str, Any]
    device: Any
    evaluators: list[Any] = field(default_factory=list)
    group: distributed.Group = distributed.ALONE
    learner: Any = None
    runtime: Any = None

    @property
    def results(self) -> pathlib.Path:
        """The folder of all records."""
        return self.options.results

    @property
    def folder(self) -> pathlib.Path:
        """Where journal, log and lock lie."""
        return self.results / "runs" / self.run_id

    @property
    def record_path(self) -> pathlib.Path:
        """Where the record lies."""
        return self.results / "records" / f"{self.run_id}.json"


def prepare(config: dict[str, Any]) -> Job:
    """Set the process's flags, build scenario and model, check that the learner fits, name the run. Raises `UserError`."""
    options, parallel, device, threads = _machine(config)
    flags = arithmetic.apply(device, threads, options.seed, wanted=options.arithmetic, precision=options.precision)
    job = _assemble(config, options, parallel, device, flags)
    job.group = distributed.init_group(parallel, device)
    job.group.shard(job.model)
    _build_ahead(job)
    job.kind.attach(job)
    return job


@contextmanager
def previewed(config: dict[str, Any]) -> Iterator[Job]:
    """The job of `prepare` for as long as the `with` block lasts: the process's flags are put back, no file is written."""
    options, parallel, device, threads = _machine(config)
    with arithmetic.borrowed(device, threads, options.seed, options.arithmetic, options.precision) as flags:
        job = _assemble(config, options, parallel, device, flags)
        _build_ahead(job)
        yield job


def _machine(config: dict[str, Any]) -> tuple[RunOptions, str, Any, int]:
    """The options, how processes train together, the device, the threads."""
    options = RunOptions.of(config)
    parallel = torchrun.choose(options.parallel)
    device = arithmetic.choose_device(options.device)
    tracking.check(options.track)
    return options, parallel, device, arithmetic.choose_threads(options.num_threads)


def _assemble(config: dict[str, Any], options: RunOptions, parallel: str, device: Any, flags: dict[str, Any]) -> Job:
    """Scenario and model under flags that are set, and whether the learner fits."""
    capabilities = declared(load_target(config["learner"]["_target_"]), config["learner"])
    scenario = build(config["scenario"])
    kind = next((kind for made, kind in KINDS.items() if isinstance(scenario, made)), None)
    if kind is None:
        raise UserError(f"{config['scenario']['_target_']} must return a Scenario, got {type(scenario).__name__}")
    _check_hash(scenario, options.manifest_sha256)
    learner = provenance.learner_name(config)
    pretrained = str(config["model"].get("weights")) not in ("none", "None")
    if why := mismatch(learner, capabilities, scenario.facts(), pretrained):
        raise DoesNotFit(why)
    with _of_learner():
        kind.check(scenario, options, parallel, learner, capabilities)
    saved_model.check(options.save_model, parallel)
    asked = evaluators.load(scenario.manifest.evaluators, config["scenario"], scenario.asks)
    model = set_precision(kind.build_model(build, config["model"], scenario), options.precision).to(device)
    model = arithmetic.pin(model, flags)
    pipeline = kind.make_pipeline(scenario, model, device)
    job = Job(config, options, "", scenario, kind, model, capabilities, pipeline, flags, device, asked)
    job.run_id = run_id_of(config, job)
    continued.check(job)
    return job


def run_id_of(config: dict[str, Any], job: Job) -> str:
    """The run id of a configuration whose stream, weights and code are those of a job."""
    identity = provenance.identity(config, job.capabilities)
    sha, weights = job.scenario.manifest.sha256, job.model.identity["state_sha256"]
    code = provenance.evaluator_versions(job.evaluators) | provenance.stream_versions(config["scenario"])
    return record.run_id(identity, sha, weights, provenance.plugin_version(config), outside=code)


def _check_hash(scenario: Any, expected: str | None) -> None:
    found = scenario.manifest.sha256
    if expected is not None and found != expected:
        raise UserError(
            f"scenario {scenario.name} has the manifest {found[:16]}, and manifest_sha256 asks for {expected[:16]}: "
            "samples, their order, the budget or the data differ from those of the frozen stream"
        )


def _build_ahead(job: Job) -> None:
    """Build a learner that plans its training: plans that cannot be carried out are refused before anything is trained."""
    if callable(getattr(load_target(job.config["learner"]["_target_"]), "plan", None)):
        build_learner(job)


def run_job(
    config: dict[str, Any],
    *,
    command: list[str] | None = None,
    progress: bool = False,
    tuning: dict[str, Any] | None = None,
) -> Outcome:
    """Run one configuration to its record; the same configuration again is a skip, one that was killed or failed goes on.

    With `on_error: record` an exception becomes a failed record; with `raise` it is raised after that. `tuning` says how the
    options were chosen: it goes into the record with its `marks`, and stays when the run is resumed or repeated.
    """
    job = prepare(config)
    with job.group.running():
        return _follow(job) if job.group.rank else _lead(job, command, progress, tuning)


def _follow(job: Job) -> Outcome:
    """A non-zero rank: trains along, writes and prints nothing."""
    status = job.group.broadcast_object()
    if status != "running":
        return Outcome(job.run_id, status, "")
    journal = Journal(job.folder / "journal", group=job.group, data=job.scenario.manifest.sha256)
    job.flags = job.group.broadcast_object()
    arithmetic.apply(job.device, job.flags["num_threads"], job.options.seed, job.flags)
    try:
        with job.group.watching():
            _run(job, journal, {"resumed": 0}, False)
    except KeyboardInterrupt:
        status = "interrupted"
    except Exception as error:
        log.error("%s", error)
        status = "failed"
    return Outcome(job.run_id, status, "")


def _lead(job: Job, command: list[str] | None, progress: bool, tuning: dict[str, Any] | None) -> Outcome:
    """The one process of a run, or the first of several."""
    from filelock import FileLock, Timeout

    options = job.options
    record.ensure_writable(job.results / "records")
    refused.path_of(job.config).unlink(missing_ok=True)
    if (done := _done(job, earlier(job))) is not None:
        return done
    record.ensure_writable(job.folder)
    try:
        held = FileLock(str(job.folder / "lock")).acquire(timeout=0)
    except Timeout:
        job.group.broadcast_object("busy")
        return Outcome(job.run_id, "busy", f"{job.run_id} is being run by another process", job.record_path)
    with held, Heartbeat(job.folder), logging_to(job.folder / "run.log"):
        old = earlier(job)
        if (done := _done(job, old)) is not None:  # another process ended it between the look and the lock
            return done
        if old is None and job.group.size == 1 and not (job.folder / "journal").exists():
            build_learner(job)  # what cannot be built is refused, and leaves no record
        journal = Journal(job.folder / "journal", options.checkpoint_seconds, job.group, job.scenario.manifest.sha256)
        if options.force:
            journal.clear()
        entry = provenance.describe(job, command or sys.argv)
        if isinstance(told := tuning or (old or {}).get("tuning"), dict):
            entry |= {"tuning": told, "marks": [*entry["marks"], *told.get("marks", ())]}
        record.write(entry | {"process": this_process()}, job.results / "records")
        job.scenario.manifest.save(job.results / "manifests" / f"{job.scenario.manifest.sha256}.json")
        job.group.broadcast_object("running")
        job.group.broadcast_object(job.flags)
        try:
            with job.group.watching():
                finished = _run(job, journal, entry, progress)
            saved = artifacts.save(job)
            path = record.write(finished, job.results / "records")
        except (Interrupted, distributed.Lost) as error:
            text = f"{str(error) or 'stopped'}; the same command goes on where {job.run_id} was"
            return Outcome(job.run_id, "interrupted", text, job.record_path)
        except Exception as error:
            outcome = _failed(job, journal, entry, error)
            if options.on_error == "raise":
                raise
            error.__traceback__ = None
            gc.collect()
            return outcome
        journal.clear()
    return Outcome(job.run_id, "ok", _closing_text(record.read(path), path) + saved, job.record_path)


def _closing_text(entry: dict[str, Any], path: pathlib.Path) -> str:
    """What is shown at the end; reports are imported for nothing earlier."""
    from clbench.report.closing import closing_text

    return closing_text(entry, path)


def earlier(job: Job) -> dict[str, Any] | None:
    """The record that is there; one that cannot be read is replaced by `force`, else it raises `UserError`."""
    if not job.record_path.exists():
        return None
    try:
        return record.read(job.record_path)
    except UserError as error:
        if job.options.force:
            return None
        raise UserError(f"{error}; force=true makes the run anew, and so does deleting the file") from None


def _done(job: Job, old: dict[str, Any] | None) -> Outcome | None:
    """That nothing is to be done, where it is so."""
    if old is None or old["status"] != "ok" or job.options.force:
        return None
    job.group.broadcast_object("skipped")
    text = f"{job.run_id} is done already (force=true repeats it)\n\n{_closing_text(old, job.record_path)}"
    text += artifacts.look(job)
    return Outcome(job.run_id, "skipped", text, job.record_path)


def _failed(job: Job, journal: Journal, entry: dict[str, Any], error: Exception) -> Outcome:
    """Write the failed record and say where the run stands. What is saved stays, but for weights that are not finite."""
    if isinstance(error, FloatingPointError):
        journal.forget_fits()
    number, done, total = journal.experience + 1, journal.finished, len(job.scenario.manifest.experiences)
    where = f"{'after' if done == number else 'in'} experience {number} of {total}" if number else "before the first experience"
    goes_on = f"goes on after experience {done}, force=true starts anew" if done else "starts anew"
    if done < number and journal.inside():
        goes_on = f"goes on inside experience {number}, force=true starts anew"
    text = f"{job.run_id} failed {where}: {type(error).__name__}: {error}; the same command {goes_on}"
    place = {"experience": journal.experience if number else None, "finished": done}
    entry |= {"status": "failed", "finished": provenance.now(), "error": refused.described(error) | place}
    try:
        record.write(entry, job.results / "records")
    except UserError as full:  # the disk that ended the run; its record still says that it is at work
        text += f"\n{full}"
    log.error("%s", text)
    return Outcome(job.run_id, "failed", text, job.record_path)


def repeat(job: Job, flags: dict[str, Any], stop_after: int) -> dict[str, Any]:
    """The first `stop_after` experiences of a job again, under the flags of a record -> its counts. Writes nothing.

    A shorter walk through the same stream: the configuration, and so the run's identity, stays what it is.
    """
    kept = {key: flags[key] for key in KEPT_FLAGS if key in flags}
    if "matmul" in kept:
        _keep(job, int(flags.get("num_threads", 1)), kept)
    return tables(rows_of(_run(job, Journal(), provenance.describe(job, []), False, stop_after)))


def _keep(job: Job, threads: int, flags: dict[str, Any]) -> None:
    """Go on with the arithmetic that a run began with, whatever this machine or the command would choose now."""
    job.flags = arithmetic.apply(job.device, threads, job.options.seed, flags)
    arithmetic.pin(job.model, job.flags)
    job.kind.attach(job)


def _run(job: Job, journal: Journal, entry: dict[str, Any], progress: bool, stop_after: int | None = None) -> dict[str, Any]:
    """Learn and evaluate every experience, or the first `stop_after` -> the finished record."""
    saved = journal.load("experience")
    if saved is not None:
        _keep(job, job.flags["num_threads"], saved["flags"])
        entry.setdefault("machine", {})["flags"] = job.flags  # not what this command would have chosen
        log.info("%s goes on after experience %d", job.run_id, saved["experience"] + 1)
    build_learner(job)
    saved = continued.snapshot(job) if saved is None else saved
    learner, runtime = job.learner, job.runtime
    runtime.journal = journal
    stream = job.kind.open_stream(job, runtime, learner)
    track = "none" if job.group.rank else job.options.track
    first = None if saved is None else saved["experience"]
    try:
        with closing(tracking.open_tracker(track, job.folder, entry, first)) as tracker:
            loop = Loop(job, runtime, learner, stream, entry, saved, tracker)
            with signals(runtime), bar_of(runtime, progress):
                loop.begin()
                for index in range(loop.first, stop_after or len(job.scenario.manifest.experiences)):
                    loop.learn(index)
                    if job.scenario.manifest.is_evaluated(index):
                        loop.evaluate(index)
    finally:
        stream.close_stream()
    return loop.finish()


def build_learner(job: Job) -> None:
    """Build the learner, once: a constructor may change the model. `UserError` where it lacks a method or has no memory."""
    if job.learner is not None:
        return
    job.runtime = job.kind.make_runtime(job)
    with _of_learner():
        job.learner = build(job.config["learner"], model=job.model, runtime=job.runtime)
    name = type(job.learner).__name__
    for method in ("learn", job.scenario.asks, "state_dict", "load_state_dict"):
        if not callable(getattr(job.learner, method, None)):
            raise UserError(f"{name} has no method {method}")
    job.kind.check_learner(job)
