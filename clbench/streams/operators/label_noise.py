"""Label noise: a share of the training samples is labelled wrongly; evaluation sets keep the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.operators.copies import chosen, whole
from clbench.streams.scenario import Scenario


def label_noise(
    stream: Scenario,
    share: float = 0.2,
    kind: Literal["symmetric", "asymmetric"] = "symmetric",
    pairs: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Scenario:
    """Wrong labels among an experience's own classes, so that no class is seen before its time.

    share  of the samples of each class in each experience, rounded to a whole number, whose label becomes another one
    kind   symmetric: any other class of the experience, uniformly. asymmetric: the next class of the experience, by id, the
           last one the first (pair flip; Han et al., NeurIPS 2018, arXiv 1804.06872); or:
    pairs  asymmetric: {cat: dog, dog: cat}, names or ids; classes without a partner in their experience keep their labels
    seed   of the draws

    On a stream with one class in every experience it would change nothing and is refused.
    """
    chosen(kind, "label_noise.kind", ("symmetric", "asymmetric"))
    whole(seed, "label_noise.seed")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(f"label_noise.share must be in (0, 1), got {share!r}")
    if pairs is not None and (kind != "asymmetric" or not isinstance(pairs, Mapping) or not pairs):
        raise UserError("label_noise.pairs must be a mapping {class: class} with label_noise.kind=asymmetric")
    named = None if pairs is None else {_class(stream, a): _class(stream, b) for a, b in pairs.items()}
    steps, moved = [], 0
    for i, entry in enumerate(stream.manifest.experiences):
        old = np.asarray(stream.labels(entry))
        new = _noisy(old, share, _partners(sorted(entry.classes), kind, named), rng.key("label_noise", seed, i))
        moved += int((new != old).sum())
        if lost := set(entry.classes) - set(new.tolist()):
            name = stream.class_name(min(lost))
            raise UserError(f"operator label_noise: no sample of experience {entry.name} is left with label {name}")
        steps.append(replace(entry, labels=new) if (new != old).any() else entry)
    if not moved:
        raise UserError(f"operator label_noise has no effect with share {share}: too few samples, or no class to change to")
    return replace(stream, manifest=replace(stream.manifest, experiences=tuple(steps)))


def _class(stream: Scenario, one: Any) -> int:
    """A class by name or id."""
    for c in stream.manifest.class_order:
        if one in (stream.class_name(c), c, str(c)):
            return c
    raise UserError(f"label_noise.pairs: {one!r} is no class of the stream")


def _partners(classes: list[int], kind: str, named: Mapping[int, int] | None) -> dict[int, list[int]]:
    """What a label can become."""
    if kind == "symmetric":
        return {c: [other for other in classes if other != c] for c in classes}
    if named is not None:
        return {c: [named[c]] if named.get(c, c) in classes and named.get(c, c) != c else [] for c in classes}
    return {c: [classes[(k + 1) % len(classes)]] if len(classes) > 1 else [] for k, c in enumerate(classes)}


def _noisy(labels: np.ndarray, share: float, partners: Mapping[int, list[int]], key: int) -> np.ndarray:
    found = labels.copy()
    for c, others in partners.items():
        rows = np.flatnonzero(labels == c)
        number = int(np.floor(share * len(rows) + 0.5))
        if others and number:
            rows = rows[rng.permutation(rng.key(key, "which", c), len(rows))[:number]]
            found[rows] = np.array(others)[rng.integers(rng.key(key, "what", c), number, len(others))]
    return found
