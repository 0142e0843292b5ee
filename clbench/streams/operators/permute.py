"""Permuted pixels: the same images under another fixed order of their pixels in every experience."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.operators.copies import chosen, copied, flag, whole, with_transforms
from clbench.streams.scenario import Scenario
from clbench.streams.transforms import LARGEST


def permute(
    stream: Scenario,
    experiences: int | None = 10,
    seed: int = 0,
    identity_first: bool = True,
    classes: Literal["shared", "new"] = "shared",
    size: int | None = None,
) -> Scenario:
    """All images in every experience, their pixels in an order of its own ("Permuted MNIST").

    experiences     so many, each with all samples of the stream and an evaluation set; null: those that there are
    seed            of the orders; order `i` does not depend on how many there are
    identity_first  the first experience has the images as they are (Goodfellow et al. 2013, arXiv 1312.6211; Kirkpatrick et
                    al. 2017). Mammoth, GEM and Avalanche permute the first as well: false
    classes         shared: the same classes each time (domain-incremental). new: class c of experience t is a class of its own
    size            bring all images to this side first; null: as stored. Images of several sizes have an order for each size

    Channels of a pixel move together. Pixels are permuted as stored, before the model's preprocessing.
    """
    whole(seed, "permute.seed")
    flag(identity_first, "permute.identity_first")
    chosen(classes, "permute.classes", ("shared", "new"))
    if size is not None and whole(size, "permute.size", 1) > LARGEST:
        raise UserError(f"permute.size must be a whole number in 1..{LARGEST}, got {size}")
    if experiences is None and classes == "new":
        raise UserError("permute.classes=new needs permute.experiences: a number of them")
    if experiences is not None:
        stream = copied(stream, whole(experiences, "permute.experiences", 1), "permuted", "permute")
    if classes == "new":
        stream = _apart(stream)
    first: tuple[Any, ...] = () if size is None else ({"resize": {"size": size}},)
    number = len(stream.manifest.experiences)
    if identity_first and number == 1:
        raise UserError("operator permute has no effect on one experience: say permute.experiences, or identity_first: false")
    steps = [(*first, {"permute": {"seed": seed, "number": i}}) for i in range(number)]
    return with_transforms(stream, [first if identity_first and i == 0 else one for i, one in enumerate(steps)])


def _apart(stream: Scenario) -> Scenario:
    """Copies of one experience with classes of their own: class c of copy t is t * K + c, K the classes of the data set."""
    manifest, step = stream.manifest, stream.dataset.num_classes
    if max(manifest.class_order) >= step:
        raise UserError("permute.classes=new: an earlier operator made new classes already")

    def moved(entry: Any, t: int) -> Any:
        labels = np.asarray(stream.labels(entry)) + t * step
        return replace(entry, classes=tuple(c + t * step for c in entry.classes), labels=labels if t else entry.labels)

    steps = tuple(moved(e, t) for t, e in enumerate(manifest.experiences))
    sets = tuple(moved(e, e.first_seen) for e in manifest.evals)
    order = tuple(c for e in steps for c in e.classes)
    kind = manifest.kind if manifest.discloses_task else "class_incremental"
    return replace(stream, manifest=replace(manifest, kind=kind, class_order=order, experiences=steps, evals=sets))
