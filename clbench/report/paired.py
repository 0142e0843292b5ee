"""Numbers that two runs on images give together: a contender and its reference, a noisy stream and the clean one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

ALONE = "isolated"  # the learner that trains a network for each problem


def join(runs: Sequence[Any]) -> list[Any]:
    """The runs with `intransigence`, `noise_robustness` and `transfer` where the folder holds what they are compared with.

    intransigence     plasticity of the reference on the same stream, model and version of numbers (of the same seed, else the
                      mean of its seeds; of several references the best) - the run's own
    transfer          final_problem - that of `isolated` on the same stream, model and version of numbers (seeds as above)
    noise_robustness  last_macro / that of the same run, seed included, without the operator `label_noise`
    """
    done = [run for run in runs if run.loss is None and run.usable]
    known: dict[tuple[Any, ...], dict[int, float]] = {}
    apart: dict[tuple[Any, ...], dict[int, float]] = {}
    clean: dict[str, float] = {}
    for run in done:
        if "reference" in run.marks and "plasticity" in run.values:
            of_seeds = known.setdefault(_stream(run), {})
            of_seeds[run.seed] = max(run.values["plasticity"], of_seeds.get(run.seed, -math.inf))
        if run.learner == ALONE and "final_problem" in run.values:
            of_seeds = apart.setdefault(_stream(run), {})
            of_seeds[run.seed] = max(run.values["final_problem"], of_seeds.get(run.seed, -math.inf))
        if not _noise(run) and "last_macro" in run.values:
            clean[_key(run)] = run.values["last_macro"]

    def more(run: Any) -> dict[str, float]:
        made, of_seeds = {}, known.get(_stream(run), {})
        if of_seeds and "reference" not in run.marks and "plasticity" in run.values:
            made["intransigence"] = _of_seed(of_seeds, run.seed) - run.values["plasticity"]
        alone = apart.get(_stream(run), {})
        if alone and run.learner != ALONE and "final_problem" in run.values:
            made["transfer"] = run.values["final_problem"] - _of_seed(alone, run.seed)
        if _noise(run) and clean.get(_key(run), 0.0) > 0 and "last_macro" in run.values:
            made["noise_robustness"] = run.values["last_macro"] / clean[_key(run)]
        return {name: value for name, value in made.items() if math.isfinite(value)}

    chosen = {id(run) for run in done}
    return [replace(run, values={**run.values, **more(run)}) if id(run) in chosen else run for run in runs]


def _of_seed(values: Mapping[int, float], seed: int) -> float:
    """The value of a seed, else the mean of those there are."""
    return values.get(seed, sum(values.values()) / len(values))


def _stream(run: Any) -> tuple[Any, ...]:
    """What a reference shares with the runs that it is the reference of; a legacy run is compared with legacy ones alone."""
    return run.stream, run.model, run.legacy, run.settings.get("weights"), run.settings.get("precision")


def _operators(run: Any) -> list[Any]:
    found = run.settings.get("scenario.operators")
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else []


def _is_noise(one: Any) -> bool:
    return one == "label_noise" or (isinstance(one, Mapping) and "label_noise" in one)


def _noise(run: Any) -> bool:
    return any(_is_noise(one) for one in _operators(run))


def _key(run: Any) -> str:
    """Everything that a run was given, but for label noise."""
    settings = {**run.settings, "scenario.operators": [one for one in _operators(run) if not _is_noise(one)]}
    return json.dumps([settings, run.seed, run.legacy], sort_keys=True, default=str)
