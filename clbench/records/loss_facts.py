"""What tables need of a pre-training record: its numbers, its ledger, and what pairs it with other runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from clbench.evaluation import loss_metrics, metrics
from clbench.records import record

KIND = "continual_pretraining"
OPTIONS = ("replay", "branch", "accounting", "boundary")
LEDGER = ("trunk_new", "trunk_replay", "branch_new", "branch_replay", "unique", "repeated", "probe", "replay_bytes")
TOKEN_LOSS, IMAGE_LOSS = "nats per token", "mean squared error"
Entry = Mapping[str, Any]


def is_loss(entry: Entry) -> bool:
    """Whether a record is of a pre-training run, finished or not."""
    return entry["scenario"].get("kind") == KIND


def numbers_of(entry: Entry) -> tuple[dict[str, float] | None, dict[str, Any] | None]:
    """Numbers of a record, also those that are not finite (None: not finished, or of no use), and what pre-training adds."""
    if not is_loss(entry):
        return (metrics.summary(entry) if entry["status"] == "ok" else None), None
    found = _summary_of(entry)
    return found, _facts_of(entry, found is not None)


def _summary_of(entry: Entry) -> dict[str, float] | None:
    try:
        if entry["status"] != "ok" or not all(isinstance(entry["ledger"][name], int) for name in LEDGER):
            return None
        found = metrics.summary(entry) if isinstance(entry["ledger"]["flops"], int | float) else {}
        return found if "final_loss" in found else None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError):
        return None


def measure_of(entry: Entry) -> str:
    """What the losses of a record are: of masked autoencoders no likelihoods."""
    return IMAGE_LOSS if unit_of(entry) == "images" else TOKEN_LOSS


def unit_of(entry: Entry) -> str:
    """What is counted where a language model counts tokens."""
    return "images" if entry["scenario"].get("unit") == "images" else "tokens"


def _facts_of(entry: Entry, is_usable: bool) -> dict[str, Any]:
    """Options, ledger (where there are numbers: `is_usable`), digests that the runs to compare with share."""
    learner = entry["config"].get("learner", {})
    made: dict[str, Any] = {"options": _options(entry), "usable": is_usable, "iid": bool(entry["scenario"].get("iid"))}
    if not made["usable"]:
        return made
    alone = not made["options"]["replay"] and learner.get("data", "new") == "new"
    but_replay, model, sha = _without(learner, "replay"), _model(entry), entry["scenario"]["manifest_sha256"]
    made |= {"ledger": {name: entry["ledger"][name] for name in LEDGER} | {"flops": float(entry["ledger"]["flops"])}}
    made |= {"alone": alone, "union": learner.get("data") == "union"}
    made |= {"but_replay": record.digest([but_replay, model, entry["seed"], sha]), "stream": record.digest([sha, model])}
    rise = loss_metrics.first_rise(entry["curves"], entry["scenario"]["eval_names"][0])
    return made | {"first": _first_set(entry), "rise": rise}


def _options(entry: Entry) -> dict[str, Any]:
    """The options of a learner that the literature compares, where it has them."""
    learner = entry["config"].get("learner", {})
    replay = learner.get("replay")
    share = replay.get("share") if isinstance(replay, Mapping) else None
    return {"replay": share, **{name: learner.get(name) for name in OPTIONS[1:]}}


def _model(entry: Entry) -> list[Any]:
    """The model and the code that computed with it: precisions and versions of numbers are not compared with each other."""
    return [entry["config"]["model"], entry["numbers_version"], str(entry["config"].get("precision"))]


def _without(learner: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in learner.items() if key != name}


def _first_set(entry: Entry) -> str:
    """The same learner, model and seed, and the same first evaluation set under the same budget."""
    stream = entry["scenario"]
    shape = [stream["context"], stream["batch"], stream["experiences"][0]["steps"], stream["eval_names"][0]]
    first = [entry["n"][0], entry["floor"][0], *shape]
    return record.digest([entry["config"]["learner"], _model(entry), entry["seed"], first])


def join(runs: Sequence[Any]) -> list[Any]:
    """Runs with what only two or three of them say together: `recovery_ratio`, and `rate_share` against the IID control."""
    known = [run for run in runs if run.loss is not None and run.loss["usable"]]
    plain = {run.loss["but_replay"]: run.values["final_loss"] for run in known if run.loss["alone"]}
    unions: dict[str, list[float]] = {}
    for run in known:
        if run.loss["union"]:
            unions.setdefault(run.loss["stream"], []).append(run.values["final_loss"])
    same = {run.loss["first"]: run.loss["rise"] for run in known if run.loss["iid"]}

    def more(run: Any) -> dict[str, float]:
        loss, made = run.loss, {}
        without, union = plain.get(loss["but_replay"]), unions.get(loss["stream"])
        if without is not None and union and loss["options"]["replay"]:
            final = run.values["final_loss"]
            made["recovery_ratio"] = loss_metrics.recovery_ratio(without, final, sum(union) / len(union))
        if not loss["iid"] and loss["first"] in same and loss["rise"] > 0:
            made["rate_share"] = same[loss["first"]] / loss["rise"]
        return {k: v for k, v in made.items() if math.isfinite(v)}

    chosen = {id(run) for run in known}
    return [replace(run, values={**run.values, **more(run)}) if id(run) in chosen else run for run in runs]
