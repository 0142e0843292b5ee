"""A suite on the command line: which of its jobs are open, and what they will cost. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.config.compose import Composed
from clbench.config.suite import Asked, Job
from clbench.report import suites
from clbench.report.formats import Table, to_text
from clbench.report.suites import Key, Row


def _rows(composed: Composed) -> tuple[Asked, dict[Key, Row]]:
    part = composed.suite
    assert part is not None
    return part, suites.of_folder(Path(str(composed.jobs[0]["results_dir"])).expanduser(), part.suite.version)[1]


def open_jobs(composed: Composed) -> Composed:
    """The jobs without a result in the results folder; all of them with `force=true`."""
    part, made = _rows(composed)
    if composed.jobs[0]["force"]:
        return composed
    kept = set(map(id, suites.open_of(part.jobs, made)))
    places = [place for place, job in enumerate(part.jobs) if id(job) in kept]
    if done := len(part.jobs) - len(places):
        print(f"{done} of {len(part.jobs)} jobs of this part are done", flush=True)
    return composed.only(places)


def plan_text(composed: Composed) -> str:
    """Core hours by stream and by learner, of all jobs asked for and of those that are open."""
    part, made = _rows(composed)
    costs = {id(job): cost(job, made) for job in part.jobs}
    still = set(map(id, suites.open_of(part.jobs, made)))
    by_stream = _table("streams", "by stream", part.jobs, costs, still, lambda job: job.stream.name)
    learners = _table("learners", "by learner", part.jobs, costs, still, lambda job: job.entry.learner)
    hours = sum(costs[id(job)] for job in part.jobs if id(job) in still) / 3600
    default = len({job.entry.learner for job in part.jobs if job.entry.tuning is None})
    lines = [to_text(by_stream), "", to_text(learners), ""]
    lines.append(f"{part.suite.version}: {len(part.jobs)} jobs, {len(still)} open; still to do: {hours:.1f} core hours")
    lines.append(
        f"{default} learners have untuned defaults on some stream; clbench report core --part missing says who is left out"
    )
    return "\n".join(lines)


def cost(job: Job, made: Mapping[Key, Row]) -> float:
    """Core seconds of a job: the mean of its row's finished runs, else the suite's estimate."""
    known = list(made[job.stream.name, job.entry.learner].seconds.values())
    return sum(known) / len(known) if known else job.entry.seconds


def _table(
    part: str, title: str, jobs: Sequence[Job], costs: Mapping[int, float], still: set[int], name: Callable[[Job], str]
) -> Table:
    held: dict[str, dict[str, Any]] = {}
    for job in jobs:
        line = held.setdefault(
            name(job), {part[:-1]: name(job), "jobs": 0, "open": 0, "core hours": 0.0, "open core hours": 0.0}
        )
        line["jobs"] += 1
        line["core hours"] += costs[id(job)] / 3600
        if id(job) in still:
            line["open"] += 1
            line["open core hours"] += costs[id(job)] / 3600
    lines = sorted(held.values(), key=lambda line: -line["core hours"]) if part == "learners" else list(held.values())
    return Table(
        part,
        title,
        (part[:-1], "jobs", "open", "core hours", "open core hours"),
        lines,
        (),
        dict.fromkeys(("core hours", "open core hours"), 2),
    )
