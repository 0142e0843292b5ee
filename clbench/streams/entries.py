"""The entries of a manifest: experiences and evaluation sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clbench.streams import transforms


def _frozen(ids: np.ndarray) -> np.ndarray:
    ids = np.array(ids, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def _steps(steps: Any) -> Any:
    """Steps of a transform as a tuple; what is none is left for `manifest_rules.check` to name."""
    return tuple(steps) if isinstance(steps, list | tuple) else steps


@dataclass(frozen=True, eq=False)
class ExperienceEntry:
    """One step of the stream: `classes` are original ids in order of appearance, `train` [N] sample ids in stream order.

    labels     [N] original class ids where they are not the data set's own (noise, shifted concepts), else None
    labelled   whether a learner is given the labels
    budget     fields of `interfaces.Budget` in which this experience differs from the manifest's
    boundary   whether the learner is told where this experience ends
    transform  how the stored pixels are changed, see `transforms`
    """

    name: str
    task: int | None
    classes: tuple[int, ...]
    train: np.ndarray
    labels: np.ndarray | None = None
    labelled: bool = True
    budget: dict[str, Any] | None = None
    boundary: bool = True
    transform: transforms.Steps = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(int(c) for c in self.classes))
        object.__setattr__(self, "train", _frozen(self.train))
        object.__setattr__(self, "labels", None if self.labels is None else _frozen(self.labels))
        object.__setattr__(self, "transform", _steps(self.transform))


@dataclass(frozen=True, eq=False)
class EvalEntry:
    """One evaluation set: original `classes`, sample `ids` [N], and the experience that belongs to it (`first_seen`).

    labels, transform  as in `ExperienceEntry`
    order, batch_size  for learners that adapt while they are tested: "given" shows the samples in the order of `ids`, in
                       batches of `batch_size` (None: the run's); "any" leaves both to the run
    """

    name: str
    task: int | None
    classes: tuple[int, ...]
    ids: np.ndarray
    first_seen: int
    labels: np.ndarray | None = None
    transform: transforms.Steps = ()
    order: str = "any"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(int(c) for c in self.classes))
        object.__setattr__(self, "ids", _frozen(self.ids))
        object.__setattr__(self, "labels", None if self.labels is None else _frozen(self.labels))
        object.__setattr__(self, "transform", _steps(self.transform))
