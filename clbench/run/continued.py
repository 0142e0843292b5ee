"""`continues=RECORD`: a run goes on from the learner that an earlier one left, in a stream that begins as that one's did.

It is what the earlier run would have become, had its stream been longer: the experiences that it learned are not learned again,
their rows are taken over, and random numbers go on where they would have been. Costs are those of the new experiences alone.
The earlier run kept its learner (`save_model=true`); a longer stream is more classes of the same data, or other data
behind it (operator `concatenate`).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench.interfaces import UserError
from clbench.records.rows import rows_of
from clbench.run.loop import KEPT_FLAGS, Row
from clbench.run.saved_learner import found, kept
from clbench.streams.manifest import Manifest

if TYPE_CHECKING:
    from clbench.run.runner import Job

log = logging.getLogger("clbench")
RULES = ("kind", "discloses_task", "has_boundaries", "evaluate_every", "evaluators")  # of a manifest: the same in both


def check(job: Job) -> None:
    """`UserError` where `continues` names no learner that can go on in this stream. Reads no sample."""
    path = job.options.continues
    if path is None:
        return
    if job.scenario.asks != "predict":
        raise UserError(f"continues has no effect in scenario {job.scenario.name}: it is for labelled images")
    for option, plain in (("optimizer_state", "fresh"), ("save_predictions", False)):
        if getattr(job.options, option) != plain:
            raise UserError(f"{option}={getattr(job.options, option)} does not go with continues: {path} did not keep them")
    entry, _ = found(path)
    target = job.config["learner"]["_target_"]
    if entry["learner"]["target"] != target:
        raise UserError(f"continues={path} has learner {entry['learner']['name']}, this run another: {target}")
    if entry["model"]["state_sha256"] != job.model.identity["state_sha256"]:
        hint = f"choose its model and its seed, {entry['seed']}"
        raise UserError(f"continues={path} began with other weights than this run: {hint}")
    _check_stream(path, _manifest(path, entry), job.scenario.manifest)


def _manifest(path: Path, entry: dict[str, Any]) -> Manifest:
    sha = entry["scenario"]["manifest_sha256"]
    return Manifest.load(path.resolve().parent.parent / "manifests" / f"{sha}.json")


def _check_stream(path: Path, old: Manifest, new: Manifest) -> None:
    """The new stream begins as the old one, and goes on."""
    a, b = json.loads(old.to_json()), json.loads(new.to_json())
    steps, sets = len(a["experiences"]), len(a["evals"])
    if (has := len(b["experiences"])) <= steps:
        raise UserError(f"continues={path} has learned {steps} experiences, this stream has {has}: nothing is left to learn")
    first = b["dataset"].get("parts", [b["dataset"]])[: len(a["dataset"].get("parts", [0]))]
    same = {
        "data": [one["sha256"] for one in a["dataset"].get("parts", [a["dataset"]])] == [one["sha256"] for one in first],
        "experiences": a["experiences"] == b["experiences"][:steps],
        "evaluation sets": a["evals"] == b["evals"][:sets] and all(e["first_seen"] >= steps for e in b["evals"][sets:]),
        "class order": a["class_order"] == b["class_order"][: len(a["class_order"])],
        "looks": a.get("looks", [[]] * steps) == b.get("looks", [[]] * steps)[:steps],
        **{rule: a.get(rule) == b.get(rule) for rule in RULES},
    }
    if wrong := [name for name, fits in same.items() if not fits]:
        hint = "choose its scenario and options, then more classes, or operators=[{concatenate: {datasets: [...]}}]"
        raise UserError(f"continues={path}: this stream begins in another way ({', '.join(wrong)}); {hint}")
    if steps % (every := new.evaluate_every):
        raise UserError(f"continues={path} has {steps} experiences, no multiple of the {every} of operator evaluate")


def snapshot(job: Job) -> dict[str, Any] | None:
    """What the loop goes on from, in the form of its own snapshots; None where a run begins anew.

    `UserError` where the learner is not there.
    """
    if job.options.continues is None:
        return None
    entry, state = kept(job.options.continues)
    rows = _widened(entry, job.scenario.manifest)
    done = len(entry["experiences"])
    log.info("%s goes on after experience %d of %s", job.run_id, done, job.options.continues)
    return {
        "experience": done - 1,
        "evaluated": done,
        "learner": state,
        "stream": {"passes": dict(job.model.passes)},
        "meter": job.runtime.meter.state_dict(),
        "optimizers": {},
        "rows": [json.dumps(row) for row in rows],
        "logs": entry["experiences"],
        "flags": {key: job.flags[key] for key in KEPT_FLAGS if key in job.flags},
        "seconds": 0.0,
        "resumed": -1,
    }


def _widened(entry: dict[str, Any], manifest: Manifest) -> list[Row]:
    """The rows of a record with a place for every evaluation set of a longer stream."""
    form = rows_of(entry)
    sets, made = len(form["sets"]), []
    for row in form["rows"]:
        sums = dict(row["sums"])
        if "task_confusion" in sums:
            more = [0] * (manifest.rows - max(len(one) for one in sums["task_confusion"] if one is not None))
            sums["task_confusion"] = [None if one is None else [*one, *more] for one in sums["task_confusion"]]
        wide = {key: [*v, *[None] * (len(manifest.evals) - sets)] if len(v) == sets else v for key, v in sums.items()}
        made.append(row | {"sums": wide})
    return made
