"""Estimates a run without running it: state, time, disk. Nothing is trained, written, or set for later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from clbench.records import record
from clbench.run import provenance
from clbench.run.runner import DoesNotFit as DoesNotFit
from clbench.run.runner import Job, build_learner, earlier, previewed


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
    with previewed(dict(config)) as job:
        row = _row(job)
        build_learner(job)  # last: a constructor may change the model, which the row is measured with
        return row


def _row(job: Job) -> PlanRow:
    names = (job.scenario.name, provenance.learner_name(job.config), str(job.model.identity["name"]))
    state = "new"
    if (old := earlier(job)) is not None:
        state = {"ok": "done", "failed": "failed"}.get(old["status"], "running")
        if state == "running" and record.is_dead(old, job.results):
            state = "resumable"
    known = [
        entry["seconds"]["total"]
        for entry in _records(str(job.results))
        if (entry["scenario"]["name"], entry["learner"]["name"], entry["model"]["name"]) == names
        and entry["status"] == "ok"
        and entry["scenario"]["manifest_sha256"] == job.scenario.manifest.sha256
    ]
    seconds = sum(known) / len(known) if known else job.kind.seconds_of(job)
    names_of = getattr(job.scenario, "class_names", dict)()
    classes = " ".join(f"{c}={name}" for c, name in names_of.items())
    return PlanRow(*names, job.options.seed, job.run_id, state, seconds, job.kind.disk_of(job), classes)


@cache
def _records(results: str) -> list[dict[str, Any]]:
    import pathlib

    return record.read_all(pathlib.Path(results) / "records", details=False)[0]
