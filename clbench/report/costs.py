"""Costs of a result, from records, and the Pareto front of result against cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

PHASES = ("learn", "fit", "extract", "evaluate")
COLUMNS: dict[str, str] = {
    "seconds_learn_mean": "seconds in `learn`, all experiences together",
    "seconds_fit_mean": "of these, in optimisation (`fit:*`)",
    "seconds_extract_mean": "seconds reading features and statistics without training",
    "seconds_evaluate_mean": "seconds evaluating",
    "exemplar_bytes": "bytes of kept samples, largest over the runs",
    "parameters_trained": "parameters that were ever trained, largest over the runs",
    "parameters_total": "parameters of the model without a learner's own (heads, prompts), largest over the runs",
    "passes_train_mean": "images through the backbone while learning",
    "passes_eval_mean": "images through the backbone without gradients",
    "visits_new_mean": "training visits to samples of the current experience",
    "visits_replayed_mean": "training visits to kept samples",
    "steps_mean": "optimiser steps",
}
_LARGEST = ("stored_bytes", "exemplars", "exemplar_bytes", "parameters_trained", "parameters_total")


def of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The costs of a finished record by name; what it does not say is left out."""
    seconds = entry.get("seconds") or {}
    found: dict[str, Any] = {"seconds": seconds.get("total"), "steps": entry.get("steps")}
    found |= {f"seconds_{phase}": seconds.get(phase) for phase in PHASES}
    fits = [v for k, v in seconds.items() if k.split(":")[0] == "fit"]
    found["seconds_fit"] = math.fsum(fits) if fits else None
    if entry.get("peak_memory_bytes") is not None:
        found["peak_memory_mb"] = entry["peak_memory_bytes"] / 1e6
    found |= {name: entry.get(name) for name in ("stored_bytes", "exemplars", "exemplar_bytes")}
    for group, names in (("parameters", ("trained", "total")), ("passes", ("train", "eval")), ("visits", ("new", "replayed"))):
        part = entry.get(group)
        if isinstance(part, Mapping):
            found |= {f"{group}_{name}": part.get(name) for name in names}
    return {k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)}


def columns(runs: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Costs of the runs of one row -> its columns: means of what varies, the largest of what was held."""
    made: dict[str, float | None] = {}
    for name in ("seconds_mean", "peak_memory_mb_mean", "stored_bytes", "exemplars", *COLUMNS):
        stem = name.removesuffix("_mean")
        found = [run[stem] for run in runs if stem in run]
        made[name] = None if not found else max(found) if name in _LARGEST else math.fsum(found) / len(found)
    return made


def held(row: Mapping[str, Any]) -> float | None:
    """Bytes that a learner holds in all: its state and its exemplars."""
    return None if row["stored_bytes"] is None else row["stored_bytes"] + (row["exemplar_bytes"] or 0)


def front(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Pareto front of (cost, gain) pairs -> whether no other point is as cheap and as good, and better in one of them.

    A point without a cost or a gain is not on the front. Equal points are on it together.
    """
    known = sorted({(c, -g) for c, g in points if c is not None and g is not None})
    kept, best = set(), math.inf
    for cost, loss in known:
        if loss < best:
            kept.add((cost, loss))
            best = loss
    return [c is not None and g is not None and (c, -g) in kept for c, g in points]
