"""Long-tailed class sizes: classes keep ever fewer training samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.operators.copies import chosen, whole
from clbench.streams.scenario import Scenario


def long_tail(
    stream: Scenario,
    kind: Literal["exp", "step"] = "exp",
    ratio: float = 0.01,
    order: Literal["ordered", "shuffled"] = "ordered",
    subset: Literal["first", "seeded"] = "first",
    largest: int | None = None,
    seed: int = 0,
) -> Scenario:
    """Long-tailed class sizes: every class in turn keeps fewer training samples; test sets stay.

    The class in place j of K keeps n_j = floor(n_0 * ratio^(j / (K - 1))) samples, at least 1.

    kind     exp: the formula above (Liu et al., ECCV 2022, arXiv 2210.00266). step: the first half of the classes (of an odd
             number the larger half) keeps n_0, the others floor(n_0 * ratio)
    ratio    size of the smallest class over that of the largest, in (0, 1)
    order    ordered: j is the place in which a class appears, so early experiences are large. shuffled: places are drawn
    subset   which samples stay: the first in the order of the data, or a draw
    largest  n_0; null: the size of the stream's smallest class, so that every class has as many as it should keep
    seed     of both draws
    """
    chosen(kind, "long_tail.kind", ("exp", "step"))
    chosen(order, "long_tail.order", ("ordered", "shuffled"))
    chosen(subset, "long_tail.subset", ("first", "seeded"))
    whole(seed, "long_tail.seed")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(f"long_tail.ratio must be in (0, 1), got {ratio!r}")
    if seed and order == "ordered" and subset == "first":
        raise UserError(f"long_tail.seed={seed} has no effect: nothing is drawn")
    if largest is not None:
        whole(largest, "long_tail.largest", 1)
    ids = _by_class(stream)
    classes = stream.manifest.class_order
    most = min(len(v) for v in ids.values()) if largest is None else largest
    sizes = counts(most, len(classes), ratio, kind)
    if order == "shuffled":
        sizes = np.array(sizes)[rng.permutation(rng.key("long_tail order", seed), len(sizes))].tolist()
    if sizes == [most] * len(sizes):
        least = stream.class_name(min(ids, key=lambda c: len(ids[c])))
        of = f"{len(classes)} classes of {most} samples" + (
            f", as many as the smallest, {least}, has" if largest is None else ""
        )
        raise UserError(f"operator long_tail has no effect with ratio {ratio} on {of}; scenario.classes leaves classes out")
    kept = np.zeros(len(stream.dataset), bool)
    for c, size in zip(classes, sizes, strict=True):
        if len(ids[c]) < size:
            raise UserError(f"long_tail.largest={largest}: class {stream.class_name(c)} has {len(ids[c])} samples, not {size}")
        own = ids[c] if subset == "first" else ids[c][rng.permutation(rng.key("long_tail", seed, c), len(ids[c]))]
        kept[own[:size]] = True
    return _filtered(stream, kept)


def counts(largest: int, classes: int, ratio: float, kind: str) -> list[int]:
    """Samples of the class in each place [K]."""
    if kind == "step":
        half = (classes + 1) // 2
        return [largest] * half + [max(1, int(largest * ratio + 1e-9))] * (classes - half)
    places = np.arange(classes) / max(1, classes - 1)
    return [max(1, int(largest * ratio**place + 1e-9)) for place in places.tolist()]


def _by_class(stream: Scenario) -> dict[int, np.ndarray]:
    """Training ids by class, ascending; `UserError` where a sample has several labels or experiences have looks."""
    if stream.manifest.looks:
        raise UserError("operator long_tail: the stream has looks already; put long_tail before looks")
    labels = np.full(len(stream.dataset), -1, np.int64)
    for entry in stream.manifest.experiences:
        own = stream.labels(entry)
        if ((labels[entry.train] >= 0) & (labels[entry.train] != own)).any():
            raise UserError("operator long_tail: samples change their classes; put long_tail before what relabels them")
        labels[entry.train] = own
    return {c: np.flatnonzero(labels == c) for c in stream.manifest.class_order}


def _filtered(stream: Scenario, kept: np.ndarray) -> Scenario:
    steps: list[Any] = []
    for entry in stream.manifest.experiences:
        stay = kept[entry.train]
        present = set(stream.labels(entry)[stay].tolist())
        if not present:
            raise UserError(f"operator long_tail: no sample of experience {entry.name} is left")
        labels = None if entry.labels is None else entry.labels[stay]
        classes = tuple(c for c in entry.classes if c in present)
        steps.append(replace(entry, classes=classes, train=entry.train[stay], labels=labels))
    order = tuple(dict.fromkeys(c for e in steps for c in e.classes))
    made = replace(stream.manifest, experiences=tuple(steps), class_order=order)
    late = next((e.name for j, e in enumerate(made.evals) if not made.evaluable(j, e.first_seen)), None)
    if late is not None:
        raise UserError(f"operator long_tail: a class of evaluation set {late} is not left in the experiences before it")
    return replace(stream, manifest=made)
