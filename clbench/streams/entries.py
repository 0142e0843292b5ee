"""The entries of a manifest: experiences and evaluation sets.

Their samples are *ids* of a data set; a *span*: sequences (of autoencoders: images) of a domain, counted in the domain's order;
*edits*: ids of requests and of what is asked about them, without classes; or *texts*: ids of lines of a task. `FIELDS` says
what an entry of each form writes: always, and where it differs from the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np

from clbench.streams import transforms

Form = Literal["ids", "spans", "edits", "texts"]
Fields = dict[Form, tuple[tuple[str, ...], tuple[str, ...]]]


def written(part: Any, form: Form) -> list[str]:
    """Names of the fields of a manifest or an entry that have a place in its JSON text."""
    always, _ = part.FIELDS[form]
    return [*always, *(name for name in differing(part) if name not in always)]


def differing(part: Any) -> Iterator[str]:
    """Names of the fields that do not have their default."""
    for item in fields(part):
        value = getattr(part, item.name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if len(value) if isinstance(value, np.ndarray) else value != default:
            yield item.name


def _frozen(ids: np.ndarray) -> np.ndarray:
    ids = np.array(ids, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def _form(entry: ExperienceEntry | EvalEntry) -> Form:
    if entry.sequences or entry.classes:
        return "spans" if entry.sequences else "ids"
    return "edits" if entry.task is None else "texts"


def _no_ids() -> np.ndarray:
    return np.zeros(0, np.int64)


def _settle(entry: ExperienceEntry | EvalEntry, ids: str) -> None:
    """Arrays that nobody changes, tuples; what is no list of steps is left for `manifest_rules.check` to name."""
    steps = entry.transform
    values = {
        "classes": tuple(int(c) for c in entry.classes),
        ids: _frozen(getattr(entry, ids)),
        "labels": None if entry.labels is None else _frozen(entry.labels),
        "transform": tuple(steps) if isinstance(steps, list | tuple) else steps,
    }
    for name, value in values.items():
        object.__setattr__(entry, name, value)


@dataclass(frozen=True, eq=False)
class ExperienceEntry:
    """One step of the stream: `classes` are original ids in order of appearance, `train` [N] sample ids in stream order.

    labels     [N] original class ids where they are not the data set's own (noise, shifted concepts), else None
    labelled   whether a learner is given the labels
    budget     fields of `interfaces.Budget` in which this experience differs from the manifest's
    boundary   whether the learner is told where this experience ends
    transform  how the stored pixels are changed, see `transforms`

    Of a span: `sequences` of domain number `domain` from the one numbered `first`, read in `steps` batches. As a mapping
    (`entry["steps"]`, `dict(entry)`) it is what the manifest writes.
    """

    FIELDS: ClassVar[Fields] = {
        "ids": (("name", "task", "classes", "train"), ("labels", "labelled", "budget", "boundary", "transform")),
        "spans": (("name", "domain", "first", "sequences", "steps"), ()),
        "edits": (("name", "train"), ()),
        "texts": (("name", "task", "train"), ("budget",)),
    }
    name: str
    task: int | None = None
    classes: tuple[int, ...] = ()
    train: np.ndarray = field(default_factory=_no_ids)
    labels: np.ndarray | None = None
    labelled: bool = True
    budget: dict[str, Any] | None = None
    boundary: bool = True
    transform: transforms.Steps = ()
    domain: int = 0
    first: int = 0
    sequences: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        _settle(self, "train")

    def keys(self) -> list[str]:
        return written(self, _form(self))

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@dataclass(frozen=True, eq=False)
class EvalEntry:
    """One evaluation set: original `classes`, sample `ids` [N], and the experience that belongs to it (`first_seen`).

    labels, transform  as in `ExperienceEntry`
    order, batch_size  for learners that adapt while they are tested: "given" shows the samples in the order of `ids`, in
                       batches of `batch_size` (None: the run's); "any" leaves both to the run

    Of a span: `sequences` of domain number `domain`, spread over its validation part, with `tokens` (or images) in all.
    floor            exact loss of the true source on them, nats per token, where it is known
    bytes_per_token  of the validation text; None where tokens are no text

    Of edits: `probe` is what its samples are to the edits of their experience: edits, paraphrases, neighbours, same_subject, or
    old_text.
    """

    FIELDS: ClassVar[Fields] = {
        "ids": (("name", "task", "classes", "ids", "first_seen"), ("labels", "transform", "order", "batch_size")),
        "spans": (("name", "domain", "sequences", "first_seen", "tokens", "floor", "bytes_per_token"), ()),
        "edits": (("name", "probe", "ids", "first_seen"), ("floor",)),
        "texts": (("name", "task", "ids", "first_seen"), ()),
    }
    name: str
    task: int | None = None
    classes: tuple[int, ...] = ()
    ids: np.ndarray = field(default_factory=_no_ids)
    first_seen: int = 0
    labels: np.ndarray | None = None
    transform: transforms.Steps = ()
    order: str = "any"
    batch_size: int | None = None
    domain: int = 0
    sequences: int = 0
    tokens: int = 0
    floor: float | None = None
    bytes_per_token: float | None = None
    probe: str = ""

    def __post_init__(self) -> None:
        _settle(self, "ids")

    def keys(self) -> list[str]:
        return written(self, _form(self))

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)
