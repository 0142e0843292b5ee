"""Estimates a run without running it: state, time, disk. Nothing is trained, written, or set for later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from clbench.records import record
from clbench.run import provenance
from clbench.run.runner import DoesNotFit as DoesNotFit
from clbench.run.runner import Job, build_learner, earlier, previewed, run_id_of


@dataclass(frozen=True)
class PlanRow:
    """One job. `state` is done, new, failed, resumable or running; `seconds` is None where nothing is known."""

    scenario: str
    learner: str
    model: str
    seed: int
    run_id: str
    state: str
    seconds: float | None
    bytes: float | None
    classes: str = ""  # their names by id, where they differ


def plan_job(config: Mapping[str, Any]) -> PlanRow:
    """Build scenario, model and learner, look for earlier work, estimate cost. Raises `UserError` where they do not fit."""
    return _planned(config)[0]


class Planner:
    """`plan_job` for jobs one after another; those that differ from the one before in their seed alone are not built anew.

    Weights that are drawn from the seed are: they are part of the run's identity.
    """

    def __init__(self) -> None:
        self._known: tuple[dict[str, Any], PlanRow, Job] | None = None

    def row(self, config: Mapping[str, Any]) -> PlanRow:
        """The row of a job. Raises `UserError` where scenario, model and learner do not fit."""
        fixed = _without_seed(config)
        if self._known is not None and self._known[0] == fixed:
            return _reseeded(*self._known[1:], config)
        row, job = _planned(config)
        drawn = job.model.identity.get("source") == "none"
        self._known = None if drawn else (fixed, row, job)
        return row


def _planned(config: Mapping[str, Any]) -> tuple[PlanRow, Job]:
    with previewed(dict(config)) as job:
        row = _row(job)
        build_learner(job)  # last: a constructor may change the model, which the row is measured with
        return row, job


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "seed": None, "model": {**config["model"], "seed": None}}


def _reseeded(row: PlanRow, job: Job, config: Mapping[str, Any]) -> PlanRow:
    """The row of the same job with another seed."""
    other = replace(job, config=dict(config), run_id=run_id_of(dict(config), job))
    return replace(row, seed=config["seed"], run_id=other.run_id, state=_state(other))


def _state(job: Job) -> str:
    if (old := earlier(job)) is None:
        return "new"
    state = {"ok": "done", "failed": "failed"}.get(old["status"], "running")
    return "resumable" if state == "running" and record.is_dead(old, job.results) else state


def _row(job: Job) -> PlanRow:
    names = (job.scenario.name, provenance.learner_name(job.config), str(job.model.identity["name"]))
    state = _state(job)
    known = _seconds(str(job.results)).get((*names, job.scenario.manifest.sha256))
    seconds = sum(known) / len(known) if known else job.kind.seconds_of(job)
    names_of = getattr(job.scenario, "class_names", dict)()
    classes = " ".join(f"{c}={name}" for c, name in names_of.items())
    return PlanRow(*names, job.options.seed, job.run_id, state, seconds, job.kind.disk_of(job), classes)


@cache
def _seconds(results: str) -> dict[tuple[str, ...], list[float]]:
    """Seconds of finished runs by scenario, learner, model and manifest: of a record no more is kept."""
    found: dict[tuple[str, ...], list[float]] = {}
    for entry in record.entries(Path(results) / "records", [], details=False):
        if entry["status"] == "ok":
            names = (entry[part]["name"] for part in ("scenario", "learner", "model"))
            found.setdefault((*names, entry["scenario"]["manifest_sha256"]), []).append(entry["seconds"]["total"])
    return found
