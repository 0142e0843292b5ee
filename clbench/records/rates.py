"""Loss over updates of a pre-training record's first experience, with the rate of every update. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clbench.config import registry
from clbench.config.moved import current
from clbench.interfaces import Place, UserError
from clbench.records import loss_facts, record
from clbench.training.pretraining.law_fits import Curve

Entry = Mapping[str, Any]
SCHEDULES = ("clbench.training.schedules.", "clbench.training.schedules_infinite.")


def entries(paths: Sequence[str], scenario: str | None) -> list[Entry]:
    """Finished records of pre-training among files and in folders (of a results folder those in `records`).

    A file that is none is an error, in a folder it is left out; `scenario` chooses by name.
    """
    found: dict[str, Entry] = {}
    for text in paths:
        path = Path(text).expanduser()
        if not path.exists():
            raise UserError(f"{text} does not exist")
        folder = path / "records" if (path / "records").is_dir() else path
        for entry in record.entries(folder, [], details=False) if path.is_dir() else [record.read(path)]:
            if loss_facts.is_loss(entry) and entry["status"] == "ok" and (entry.get("curves") or {}).get("step"):
                found[entry["run_id"]] = entry
            elif not path.is_dir():
                raise UserError(f"{text} is no finished run of pre-training with looks inside its experiences")
    if scenario is not None:
        found = {name: entry for name, entry in found.items() if entry["scenario"]["name"] == scenario}
    if not found:
        of = "" if scenario is None else f" of scenario {scenario}"
        raise UserError(f"no finished run of pre-training{of} in {', '.join(paths)}")
    return list(found.values())


def check_alike(entries: Sequence[Entry]) -> None:
    """`UserError` where runs differ in what makes a rate or a loss mean another thing; names the first difference."""
    first = _facts(entries[0])
    for entry in entries[1:]:
        for name, value in _facts(entry).items():
            if value != first[name]:
                raise UserError(
                    f"records {entries[0]['run_id']} and {entry['run_id']} differ in {name}: {_short(first[name])} and "
                    f"{_short(value)}; a law holds for one stream, model, batch and optimiser (--scenario NAME chooses)"
                )


def _short(value: Any) -> str:
    text = str(value.get("name", value)) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _facts(entry: Entry) -> dict[str, Any]:
    stream, config = entry["scenario"], entry["config"]
    learner, sets = config["learner"], first_sets(entry)
    made = {name: stream.get(name) for name in ("context", "batch")}
    made |= {"evaluation sets": sets, "tokens of these": [entry["n"][stream["eval_names"].index(name)] for name in sets]}
    made |= {"floor": [(entry.get("floor") or [None] * len(entry["n"]))[stream["eval_names"].index(name)] for name in sets]}
    made |= {"model": config["model"], "precision": config.get("precision")}
    return made | {f"learner.{name}": learner.get(name) for name in ("betas", "weight_decay", "clip", "optimizer")}


def first_sets(entry: Entry) -> list[str]:
    """Names of the evaluation sets that belong to the first experience."""
    return [name for name, i in zip(entry["scenario"]["eval_names"], entry["first_seen"], strict=True) if i == 0]


def curve(entry: Entry) -> Curve:
    """Mean loss on the first experience's own sets at its looks, after some update."""
    held, sets = entry["curves"], first_sets(entry)
    at = [i for i, (k, n) in enumerate(zip(held["experience"], held["step"], strict=True)) if k == 0 and n > 0]
    at = list({held["step"][i]: i for i in at}.values())  # of two looks at a step the later one
    columns = [[held["loss"][name][i] for i in at] for name in sets]
    if not at or not sets or any(value is None or not value > 0 for column in columns for value in column):
        raise UserError(f"record {entry['run_id']} has no losses above 0 inside its first experience")
    steps = np.array([held["step"][i] for i in at])
    eta, label = rates(entry, int(steps[-1])), f"{schedule_label(entry)} n={steps[-1]}"
    return Curve(label, entry["run_id"], eta, steps, np.mean(np.array(columns, np.float64), axis=0))


def rates(entry: Entry, updates: int) -> np.ndarray:
    """The rate of the first experience's first `updates` updates.

    Of the schedule, where it is clbench's and agrees with the looks; else straight lines between those.
    """
    held = entry["curves"]
    at = [i for i, k in enumerate(held["experience"]) if k == 0 and held["lr"][i] is not None]
    steps, seen = np.array([held["step"][i] for i in at]), np.array([held["lr"][i] for i in at], float)
    lines = np.interp(np.arange(updates), steps, seen)
    schedule = entry["config"]["learner"].get("schedule") or {}
    target = current(str(schedule.get("_target_", "")))
    total = next((piece["steps"] for piece in entry.get("plan") or () if piece["experience"] == 0), None)
    if not target.startswith(SCHEDULES) or total is None:
        return lines
    options = {key: value for key, value in schedule.items() if not key.startswith("_")}
    try:
        made = functools.partial(registry.load_target(target), **options)
        base = float(entry["config"]["learner"]["lr"])
        eta = np.array([base * made(Place(0, n, total, n)) for n in range(updates)])
    except (TypeError, KeyError, ValueError):
        return lines
    inside = steps < updates
    return eta if np.allclose(eta[steps[inside]], seen[inside], rtol=1e-4, atol=1e-12) else lines


def schedule_label(entry: Entry) -> str:
    """The schedule's name with its options that are not Python's defaults, and the base rate."""
    from clbench.config.signatures import signature

    learner = entry["config"]["learner"]
    schedule = learner.get("schedule") or {}
    target = current(str(schedule.get("_target_", "constant")))
    found = signature(target) if "." in target else None
    usual = {} if found is None else {name: p.default for name, p in found.parameters.items()}
    rest = {k: v for k, v in schedule.items() if not k.startswith("_") and (k not in usual or usual[k] != v)}
    words = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={_short(v)}" for k, v in rest.items()]
    return " ".join([target.rsplit(".", 1)[-1], *words, f"lr={learner.get('lr', float('nan')):g}"])
