"""What a run leaves beside its record where it is asked to: its learner, its network, its predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clbench.run import saved_learner, saved_model, saved_predictions

if TYPE_CHECKING:
    from clbench.run.runner import Job


def save(job: Job) -> str:
    """Write learner and network of a finished run -> a line for each thing that was kept, with its place."""
    wanted = _wanted(job)
    for _, _, module in wanted:
        if module is not saved_predictions:  # the loop writes these as they come
            module.save(job)
    return "".join(f"\n{what} {module.place(job)}" for what, _, module in wanted)


def look(job: Job) -> str:
    """The same lines for a run that was done before: where things are, or that they are not there."""
    lines = []
    for what, option, module in _wanted(job):
        missing = f"no {what} saved: force=true {option}=true repeats the run"
        lines.append(f"\n{what} {module.place(job)}" if module.place(job).exists() else f"\n{missing}")
    return "".join(lines)


def _wanted(job: Job) -> list[tuple[str, str, Any]]:
    """(what, option, module) of what the options ask for. A saved learner is one that answers for images."""
    found: list[tuple[str, str, Any]] = [
        ("network", "save_model", saved_model),
        ("predictions", "save_predictions", saved_predictions),
    ]
    if job.scenario.asks == "predict":
        found.insert(0, ("learner", "save_model", saved_learner))
    return [one for one in found if getattr(job.options, one[1])]
