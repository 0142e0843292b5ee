"""One pass in stream order: samples come once, and what a learner did not keep is gone."""

from __future__ import annotations

from dataclasses import replace

from clbench.streams import rng
from clbench.streams.operators.copies import flag, whole
from clbench.streams.scenario import Scenario


def single_pass(stream: Scenario, seed: int = 0, shuffle: bool = True) -> Scenario:
    """Every experience once, in the order in which the manifest lists its samples.

    seed     of the order of samples within each experience
    shuffle  false: the order that they have (a generator lists them by class, then by id)

    The budget becomes one pass `in_order`. Learners that train with `shuffled` get the stream's order; those that ask for
    samples again, or out of turn, are refused before they start (capability `needs_random_access`).
    """
    whole(seed, "single_pass.seed")
    flag(shuffle, "single_pass.shuffle")
    steps = []
    for i, entry in enumerate(stream.manifest.experiences):
        rules = {key: value for key, value in (entry.budget or {}).items() if key not in ("epochs", "in_order")}
        entry = replace(entry, budget=rules or None)
        if shuffle:
            rows = rng.permutation(rng.key("single_pass", seed, i), len(entry.train))
            labels = None if entry.labels is None else entry.labels[rows]
            entry = replace(entry, train=entry.train[rows], labels=labels)
        steps.append(entry)
    budget = replace(stream.budget, epochs=1, in_order=True)
    return replace(stream, budget=budget, manifest=replace(stream.manifest, experiences=tuple(steps), budget=budget.rules()))
