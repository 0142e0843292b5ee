"""Evaluation sets of published corruptions behind a stream's own: what `corrupt` makes where the pictures come from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import datasets, pools
from clbench.streams.images.published import SETS
from clbench.streams.manifest import EvalEntry
from clbench.streams.operators.copies import copied
from clbench.streams.scenario import Dataset, Scenario


def tested_on(
    stream: Scenario, published: str, steps: Sequence[tuple[str, int]], names: Sequence[str], data_root: str | None
) -> Scenario:
    """The stream as one experience; sets: its own test images, then one for each (corruption, severity), called `names`.

    A set has as many images of each class as the stream tests, the first ones of the files: other images than those of the
    clean set where that is a part of the test images. Raises `UserError` where the stream cannot have such sets.
    """
    base, manifest = stream.dataset, stream.manifest
    if "parts" in manifest.dataset:
        raise UserError("operator corrupt: published sets are of one data set, and the stream has several")
    if any(part.transform for part in (*manifest.experiences, *manifest.evals)):
        raise UserError("operator corrupt: published pictures are what they are; put corrupt before operators that change them")
    made = copied(stream, 1, "corrupt", "corrupt")
    clean = replace(made.manifest.evals[0], name="clean")
    if (base.split[clean.ids] == 0).any():
        raise UserError("corrupt.published shows test images: it needs scenario.evaluate_on=test")
    if (made.labels(clean) != base.y[clean.ids]).any():
        raise UserError("operator corrupt: published sets have the labels of the data set; put corrupt before relabel")
    distinct = list(dict.fromkeys(steps))
    parts = [base, *(datasets.load(f"{published}@{kind}{level}", data_root) for kind, level in distinct)]
    for part in parts[1:]:
        _check(base, part, published)
    first = dict(zip(distinct, np.cumsum([len(part) for part in parts]).tolist(), strict=False))
    pool = pools.concatenated(parts, "same")
    tested = {c: int((base.y[clean.ids] == c).sum()) for c in clean.classes}
    sets = [clean]
    for step, name in zip(steps, names, strict=True):
        y = parts[1 + distinct.index(step)].y
        rows = np.sort(np.concatenate([np.flatnonzero(y == c)[:number] for c, number in tested.items()]))
        sets.append(EvalEntry(name, clean.task, clean.classes, first[step] + rows, 0))
    experience = replace(made.manifest.experiences[0], name="clean")
    described = pools.described(parts, pool, "same")
    changed = replace(made.manifest, dataset=described, experiences=(experience,), evals=tuple(sets))
    return replace(made, manifest=changed, dataset=pool)


def _check(base: Dataset, part: Dataset, published: str) -> None:
    """Refuse a set that shows other images than those of the stream's data set."""
    known, name = SETS.get(published), PurePath(published).name
    if known is not None and base.name != known.of and base.name in datasets.names():
        raise UserError(f"{published} shows the test images of {known.of}, and the stream is of {base.name}")
    if part.num_classes != base.num_classes:
        raise UserError(f"{name} has {part.num_classes} classes, data set {base.name} has {base.num_classes}")
    if None not in (part.images.shape, base.images.shape) and part.images.shape != base.images.shape:
        raise UserError(f"{name} has images of {part.images.shape}, data set {base.name} of {base.images.shape} pixels")
    listed = part.images.shape is None and all(n[:1] == "n" and n[1:].isdecimal() for n in base.class_names)
    if (listed or (known is None and part.images.shape is None)) and part.class_names != base.class_names:
        lone = sorted(set(part.class_names) ^ set(base.class_names))[:3]
        raise UserError(f"{name} and data set {base.name} have other classes: {', '.join(lone)}")
