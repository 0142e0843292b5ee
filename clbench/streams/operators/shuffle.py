"""Samples in another order within their experience."""

from __future__ import annotations

from dataclasses import replace

from clbench.streams import rng
from clbench.streams.operators.copies import whole
from clbench.streams.scenario import Scenario


def shuffle(stream: Scenario, seed: int = 0) -> Scenario:
    """The samples of every experience in an order of `seed`; nothing else changes.

    It matters to learners that take samples in stream order: those of a single pass, which shuffles by itself unless it is
    told not to (`{single_pass: {shuffle: false}}`).
    """
    whole(seed, "shuffle.seed")
    steps = []
    for i, entry in enumerate(stream.manifest.experiences):
        rows = rng.permutation(rng.key("shuffle", seed, i), len(entry.train))
        labels = None if entry.labels is None else entry.labels[rows]
        steps.append(replace(entry, train=entry.train[rows], labels=labels))
    return replace(stream, manifest=replace(stream.manifest, experiences=tuple(steps)))
