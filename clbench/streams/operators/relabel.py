"""Concept shift: the same images, whose classes change places from experience to experience."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.operators.copies import copied, flag, whole
from clbench.streams.scenario import Scenario


def relabel(
    stream: Scenario, experiences: int | None = None, rate: float = 1.0, seed: int = 0, identity_first: bool = True
) -> Scenario:
    """Permute labels within every experience, by a permutation of its own; its evaluation sets follow it.

    experiences     so many, each with all samples of the stream and an evaluation set; null: those that there are
    rate            share of the experience's classes that move, rounded to a whole number; none of them keeps its label
    seed            of the permutations: classes in a seeded order, each of the first rate * K takes the label of the next
    identity_first  the first experience keeps the labels that it has

    After experience i an evaluation set that belongs to an earlier one still asks for the earlier concept.
    """
    whole(seed, "relabel.seed")
    flag(identity_first, "relabel.identity_first")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise UserError(f"relabel.rate must be in (0, 1], got {rate!r}")
    if experiences is not None:
        stream = copied(stream, whole(experiences, "relabel.experiences", 1), "concept", "relabel")
    if identity_first and len(stream.manifest.experiences) == 1:
        raise UserError("operator relabel has no effect on a stream of one experience: say relabel.experiences, a number")
    tables = [
        {} if identity_first and i == 0 else _moved(entry.classes, rate, rng.key("relabel", seed, i), entry.name)
        for i, entry in enumerate(stream.manifest.experiences)
    ]
    steps = tuple(_renamed(stream, entry, tables[i]) for i, entry in enumerate(stream.manifest.experiences))
    sets = tuple(_renamed(stream, entry, tables[entry.first_seen]) for entry in stream.manifest.evals)
    return replace(stream, manifest=replace(stream.manifest, experiences=steps, evals=sets))


def _moved(classes: tuple[int, ...], rate: float, key: int, name: str) -> dict[int, int]:
    """Old label -> new label of the classes that move."""
    ordered = np.sort(np.array(classes, np.int64))
    number = int(np.floor(rate * len(ordered) + 0.5))
    if number < 2:
        raise UserError(f"operator relabel: rate {rate} moves {number} of the {len(ordered)} classes of {name}, it needs two")
    chosen = ordered[rng.permutation(key, len(ordered))[:number]].tolist()
    return dict(zip(chosen, [*chosen[1:], chosen[0]], strict=True))


def _renamed(stream: Scenario, entry: Any, table: dict[int, int]) -> Any:
    if not table:
        return entry
    labels = np.array([table.get(c, c) for c in stream.labels(entry).tolist()], np.int64)
    present = set(labels.tolist())
    order = [c for c in dict.fromkeys((*entry.classes, *sorted(present))) if c in present]
    return replace(entry, labels=labels, classes=tuple(order))
