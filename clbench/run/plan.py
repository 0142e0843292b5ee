"""Estimates a run without running it: state, time, disk. Nothing is trained, written, or set for later."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from clbench.records import record
from clbench.run import provenance
from clbench.run.runner import Job, previewed

_MEASURED: dict[str, tuple[float, float]] = {}


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


def plan_job(config: Mapping[str, Any]) -> PlanRow:
    """Build scenario and model, check that the learner fits, look for earlier work, estimate cost. Raises `UserError`."""
    with previewed(dict(config)) as job:
        return _row(job)


def _row(job: Job) -> PlanRow:
    names = (job.scenario.name, provenance.learner_name(job.config), str(job.model.identity["name"]))
    state = "new"
    if job.record_path.exists():
        old = record.read(job.record_path)
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
    losses = job.scenario.asks == "loss"
    seconds = sum(known) / len(known) if known else (estimate_losses(job) if losses else estimate(job))
    size = disk_losses(job) if losses else disk(job)
    return PlanRow(*names, job.config["seed"], job.run_id, state, seconds, size)


@cache
def _records(results: str) -> list[dict[str, Any]]:
    import pathlib

    return record.read_all(pathlib.Path(results) / "records", details=False)[0]


def estimate(job: Job) -> float:
    """Seconds from the passes that the stream asks for and this machine's measured pace (one small batch each way)."""
    sizes = [len(e.train) for e in job.scenario.manifest.experiences]
    trains = "epochs" in job.config["learner"] or "lr" in job.config["learner"]
    if job.capabilities.stores_all_data:
        visits = sum(sum(sizes[: i + 1]) for i in range(len(sizes)))
    else:
        visits = sum(sizes) * (2 if job.capabilities.stores_exemplars else 1)
    wanted = job.config["learner"].get("epochs") or job.scenario.budget.epochs
    manifest = job.scenario.manifest
    seen = sum(len(e.ids) for i in range(len(sizes)) for j, e in enumerate(manifest.evals) if manifest.evaluable(j, i))
    if not trains:
        seen = sum(len(e.ids) for e in manifest.evals)
    forward, training = pace(job)
    return (visits * wanted * training if trains else 0.0) + (sum(sizes) + seen) * forward


def pace(job: Job) -> tuple[float, float]:
    """Seconds for one image forward, and for one image forward and backward; measured once per model."""
    name = str(job.model.identity)
    if name not in _MEASURED:
        size = job.model.profile.size
        x = torch.zeros(32 if size <= 64 else 8, 3, size, size, device=job.device)
        times: dict[bool, list[float]] = {False: [], True: []}
        for train in (False, False, False, True, True, True):
            start = time.perf_counter()
            with torch.set_grad_enabled(train):
                z = job.model.net(x)
            if train:
                z.sum().backward()
            times[train].append((time.perf_counter() - start) / len(x))
        job.model.zero_grad(set_to_none=True)
        _MEASURED[name] = (min(times[False]), min(times[True]))
    return _MEASURED[name]


def disk(job: Job) -> float:
    """Bytes of the snapshots while it runs: weights and momentum, the exemplars allowed, class statistics at their largest."""
    weights = sum(p.numel() for p in job.model.parameters()) * 4
    classes = len(job.scenario.manifest.class_order)
    statistics = classes * job.model.num_features**2 * 4 if "align_epochs" in job.config["learner"] else 0
    shape = job.scenario.dataset.images.shape or (224, 224)
    exemplars = (job.scenario.budget.exemplars or 0) * math.prod(shape) * 3 if job.capabilities.stores_exemplars else 0
    return 3.0 * weights + 2 * statistics + exemplars


def estimate_losses(job: Job) -> float:
    """Seconds from the plan's tokens and this machine's pace: one batch, three times."""
    m = job.scenario.manifest
    tokens = torch.from_numpy(job.scenario.data(0).read(np.arange(m.batch))).to(job.device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        job.model.loss(tokens).mean().backward()
        times.append(time.perf_counter() - start)
    job.model.zero_grad(set_to_none=True)
    steps = sum(e["steps"] for e in m.experiences)
    if job.config["learner"].get("data") == "union":
        steps = sum(e["steps"] * (i + 1) for i, e in enumerate(m.experiences))
    seen = (len(m.experiences) + 1) * sum(e["tokens"] for e in m.evals)
    return min(times) * (steps + seen / 3 / (m.batch * m.context))


def disk_losses(job: Job) -> float:
    """Bytes of the snapshots while it runs: weights and both moments, twice where a trunk is kept aside, old and new file."""
    return 4.0 * 3 * 2 * 2 * sum(p.numel() for p in job.model.parameters())
