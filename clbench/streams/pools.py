"""Several data sets as one: sample ids counted through, class ids one behind the other or joined by name. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.scenario import Dataset

CLASSES = ("disjoint", "named", "same")


class JoinedPools:
    """Images of several sources, one behind the other; implements `scenario.ImageSource`. They may differ in size."""

    def __init__(self, sources: Sequence[Any]):
        self.sources = list(sources)
        self.first = np.cumsum([0, *(len(source) for source in sources)])
        shapes = {source.shape for source in sources}
        self.shape: tuple[int, int] | None = shapes.pop() if len(shapes) == 1 else None

    def __len__(self) -> int:
        return int(self.first[-1])

    def raw(self, ids: np.ndarray) -> list[np.ndarray]:
        """Pixels of samples by id: uint8 [H, W, 3] each."""
        ids = np.asarray(ids, np.int64)
        owners = np.searchsorted(self.first, ids, side="right") - 1
        out: list[Any] = [None] * len(ids)
        for p in np.unique(owners).tolist():
            places = np.flatnonzero(owners == p)
            for place, image in zip(places.tolist(), self.sources[p].raw(ids[places] - self.first[p]), strict=True):
                out[place] = image
        return out

    def part(self, ids: np.ndarray) -> tuple[Any, np.ndarray]:
        """The source and the rows in it where all ids [N] lie in one, which is read the faster; else this and the ids."""
        owners = np.unique(np.searchsorted(self.first, ids, side="right") - 1)
        if len(owners) != 1:
            return self, ids
        return self.sources[owners[0]], ids - self.first[owners[0]]


def concatenated(parts: Sequence[Dataset], classes: str = "disjoint") -> Dataset:
    """Data sets one behind the other as one, with an identity made of theirs.

    classes  "disjoint": every data set's classes are its own, ids counted through in the order given; names that occur twice
             are written "data set/class". "named": classes of one name are one class (the same objects in other pictures).
             "same": class k is class k in all of them, and has its name in the first

    Domains are dropped: a stream has one evaluation set for each experience anyway.
    """
    if classes not in CLASSES:
        raise UserError(f"classes must be one of {', '.join(CLASSES)}, got {classes!r}")
    names: list[str] = []
    labels = []
    every = [name for part in parts for name in part.class_names]
    for k, part in enumerate(parts):
        if classes == "named":
            names += [name for name in dict.fromkeys(part.class_names) if name not in names]
            table = np.array([names.index(name) for name in part.class_names], np.int64)
        elif classes == "same":
            if part.num_classes != parts[0].num_classes:
                sizes = f"{parts[0].name} has {parts[0].num_classes} classes, {part.name} has {part.num_classes}"
                raise UserError(f"classes=same needs as many classes in every data set: {sizes}")
            names, table = list(parts[0].class_names), np.arange(part.num_classes)
        else:
            table = len(names) + np.arange(part.num_classes)
            label = part.name if sum(p.name == part.name for p in parts) == 1 else f"{part.name}#{k}"
            names += [name if every.count(name) == 1 else f"{label}/{name}" for name in part.class_names]
        labels.append(table[part.y])
    identity = "\n".join(["clbench data sets 1", classes, *(part.sha256 for part in parts)])
    return Dataset(
        name="+".join(part.name for part in parts),
        images=JoinedPools([part.images for part in parts]),
        y=np.concatenate(labels),
        split=np.concatenate([part.split for part in parts]),
        class_names=tuple(names),
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
    )


def described(parts: Sequence[Dataset], whole: Dataset, classes: str) -> dict[str, Any]:
    """`Manifest.dataset` of several data sets in one."""
    return {
        "name": whole.name,
        "sha256": whole.sha256,
        "num_samples": len(whole),
        "parts": [{"name": p.name, "sha256": p.sha256, "num_samples": len(p), **p.drawn} for p in parts],
        "classes": classes,
    }
