"""Concept shift: the same images, whose classes change places from experience to experience."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.operators.copies import copied, flag, whole
from clbench.streams.scenario import Scenario


def relabel(
    stream: Scenario,
    experiences: int | None = None,
    rate: float | Sequence[float] = 1.0,
    seed: int = 0,
    identity_first: bool = True,
) -> Scenario:
    """Permute labels within every experience, by a permutation of its own; its evaluation sets follow it.

    experiences     so many, each with all samples of the stream and an evaluation set; null: those that there are
    rate            share of the experience's classes that move, rounded to a whole number; none of them keeps its label. A list
                    has a rate for each experience that moves (all, or with identity_first all but the first): a concept that
                    shifts faster or slower over time, 0 where it rests
    seed            of the permutations: classes in a seeded order, each of the first rate * K takes the label of the next
    identity_first  the first experience keeps the labels that it has

    After experience i an evaluation set that belongs to an earlier one still asks for the earlier concept.
    """
    whole(seed, "relabel.seed")
    flag(identity_first, "relabel.identity_first")
    listed = _listed(rate)
    if experiences is not None and not isinstance(rate, int | float):
        _check_number(len(listed), experiences, identity_first)
    if experiences is not None:
        stream = copied(stream, whole(experiences, "relabel.experiences", 1), "concept", "relabel")
    if identity_first and len(stream.manifest.experiences) == 1:
        raise UserError("operator relabel has no effect on a stream of one experience: say relabel.experiences, a number")
    entries = stream.manifest.experiences
    if not isinstance(rate, int | float):
        _check_number(len(listed), len(entries), identity_first)
    moving = len(entries) - identity_first
    rates = [*[0.0] * identity_first, *(listed * moving if isinstance(rate, int | float) else listed)]
    tables = [
        _moved(entry.classes, r, rng.key("relabel", seed, i), entry.name) if r else {}
        for i, (entry, r) in enumerate(zip(entries, rates, strict=True))
    ]
    steps = tuple(_renamed(stream, entry, tables[i]) for i, entry in enumerate(stream.manifest.experiences))
    sets = tuple(_renamed(stream, entry, tables[entry.first_seen]) for entry in stream.manifest.evals)
    return replace(stream, manifest=replace(stream.manifest, experiences=steps, evals=sets))


def _listed(rate: Any) -> list[float]:
    """The rates as a list: one number is one."""
    several = isinstance(rate, Sequence) and not isinstance(rate, str)
    given: list[Any] = list(rate) if several else [rate]
    for one in given:
        if isinstance(one, bool) or not isinstance(one, int | float) or not (0 <= one <= 1 if several else 0 < one <= 1):
            raise UserError(f"relabel.rate must be in (0, 1], or a list of rates in 0..1, got {rate!r}")
    if not any(given):
        raise UserError("relabel.rate has no effect: all rates are 0")
    return [float(one) for one in given]


def _check_number(rates: int, experiences: Any, identity_first: bool) -> None:
    """As many rates as experiences that move."""
    if isinstance(experiences, int) and rates != experiences - identity_first:
        moving, which = experiences - identity_first, "after the first" if identity_first else "of the stream"
        raise UserError(f"relabel.rate must have a rate for each of the {moving} experiences {which}, got {rates}")


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
