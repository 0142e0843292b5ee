"""Raw data and the scenario: what a manifest's sample ids point to. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np

from clbench.interfaces import Budget, Facts, UserError
from clbench.streams.images.decoding import decode
from clbench.streams.manifest import EvalEntry, ExperienceEntry, Manifest
from clbench.streams.manifest_text import described

AUGMENT = ("profile", "none", "shift")


class ImageSource(Protocol):
    """Stored pixels by sample id. `shape` is (H, W) where all images have the same size, else None."""

    @property
    def shape(self) -> tuple[int, int] | None:
        """(H, W), or None."""
        ...

    def __len__(self) -> int: ...

    def raw(self, ids: np.ndarray) -> list[np.ndarray]:
        """Pixels of samples by id: uint8 [H, W, 3] each."""
        ...


class ArrayImages:
    """Images in memory: array uint8 [N, H, W, 3]."""

    def __init__(self, array: np.ndarray) -> None:
        assert array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3, (array.dtype, array.shape)
        self.array = array
        self.array.flags.writeable = False

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.array.shape[1], self.array.shape[2]

    def __len__(self) -> int:
        return len(self.array)

    def raw(self, ids: np.ndarray) -> list[np.ndarray]:
        """Pixels of samples by id: uint8 [H, W, 3] each."""
        return list(self.array[np.asarray(ids, dtype=np.int64)])


class FileImages:
    """Images in files of any size, decoded to RGB when asked for. Safe to use from several threads."""

    shape = None

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def raw(self, ids: np.ndarray) -> list[np.ndarray]:
        """Pixels of samples by id: uint8 [H, W, 3] each. A file that cannot be decoded raises `UserError` with its path."""
        return [decode(self.paths[int(i)]) for i in ids]

    def opened(self, i: int) -> tuple[IO[bytes], str]:
        """The file of image i, open for reading, and its path."""
        try:
            return self.paths[i].open("rb"), str(self.paths[i])
        except OSError as error:
            raise UserError(f"cannot read image {self.paths[i]}: {error.strerror or error}") from None


@dataclass(frozen=True, eq=False)
class Dataset:
    """One pool of N samples, training and test together; a *sample id* is a position in it.

    y            [N] int64, classes 0..K-1
    split        [N] uint8, 0 training, 1 test
    domain       [N] int64 positions in `domain_names`, or None
    sha256       identity of the content, the same on every machine (see `datasets.content_sha256`)
    drawn        {"test_share", "test_seed"} where the test samples were drawn on request; else empty
    source_order sample ids of the training images in the order of the source's own list, which published positions count;
                 None where that order is not known
    """

    name: str
    images: ImageSource
    y: np.ndarray
    split: np.ndarray
    class_names: tuple[str, ...]
    sha256: str
    domain: np.ndarray | None = None
    domain_names: tuple[str, ...] = ()
    drawn: dict[str, Any] = field(default_factory=dict)
    source_order: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, eq=False)
class Scenario:
    """A stream that can be run: the manifest, the data it points into, and the rules."""

    name: str
    manifest: Manifest
    dataset: Dataset
    budget: Budget
    augment: str = "profile"
    asks: Literal["predict", "loss"] = "predict"

    def __post_init__(self) -> None:
        if self.augment not in AUGMENT:
            raise UserError(f"scenario.augment must be one of {', '.join(AUGMENT)}, got {self.augment!r}")
        expected, found = self.manifest.dataset["sha256"], self.dataset.sha256
        if expected != found:
            raise UserError(f"data set {self.dataset.name} has SHA-256 {found}, the manifest was made for {expected}")
        if self.manifest.dataset["num_samples"] != len(self.dataset):
            raise UserError(f"data set {self.dataset.name} has {len(self.dataset)} samples, the manifest says otherwise")
        for entry in (*self.manifest.experiences, *self.manifest.evals):
            present = np.unique(self.labels(entry)).tolist()
            if sorted(entry.classes) != present:
                claimed = list(entry.classes)[:9]
                raise UserError(f"manifest: {entry.name} claims the classes {claimed}, its samples have {present[:9]}")

    def labels(self, entry: ExperienceEntry | EvalEntry) -> np.ndarray:
        """Original class ids [N] of an entry's samples, in its order: the manifest's where it has its own, else the data's."""
        if entry.labels is not None:
            return entry.labels
        return self.dataset.y[entry.train if isinstance(entry, ExperienceEntry) else entry.ids]

    def budget_of(self, index: int) -> Budget:
        """The budget of one experience: the stream's, with what the experience's own says otherwise."""
        own = self.manifest.experiences[index].budget
        return replace(self.budget, **own) if own else self.budget

    def class_name(self, original: int) -> str:
        """The name of an original class id. Ids behind the data set's count its classes again (`permute` with classes=new)."""
        names = self.dataset.class_names
        again, c = divmod(original, len(names))
        return f"{names[c]} ({again + 1})" if again else names[c]

    def class_names(self) -> dict[int, str]:
        """Original class id -> name of the stream's classes, in order of appearance; empty where all are named by their ids."""
        names = {c: self.class_name(c) for c in self.manifest.class_order}
        return names if any(name != str(c) for c, name in names.items()) else {}

    def text(self) -> str:
        """The stream for people, with the names of its classes."""
        return self.manifest.text(self.class_name)

    def describe(self) -> dict[str, Any]:
        """What a record says about the stream and its evaluation sets."""
        found, evals = described(self.manifest), self.manifest.evals
        counts = [[int((y == c).sum()) for c in e.classes] for y, e in zip(map(self.labels, evals), evals, strict=True)]
        about = {"name": self.name, **found["scenario"]}
        about |= {"class_names": list(names.values())} if (names := self.class_names()) else {}
        return {**found, "scenario": about, "class_n": counts}

    def facts(self) -> Facts:
        """What is compared with a learner's capabilities."""
        seen: set[int] = set()
        brings_new, brings_old = [], []
        for entry in self.manifest.experiences:
            brings_new.append(bool(set(entry.classes) - seen))
            brings_old.append(bool(set(entry.classes) & seen))
            seen |= set(entry.classes)
        return Facts(
            name=self.name,
            asks=self.asks,
            discloses_task=self.manifest.discloses_task,
            has_boundaries=self.manifest.has_boundaries and all(e.boundary for e in self.manifest.experiences),
            every_experience_has_new_classes=all(brings_new),
            every_class_comes_once=not any(brings_old),
            budget=self._tightest(),
            every_experience_has_labels=all(e.labelled for e in self.manifest.experiences),
            has_looks=any(self.manifest.looks),
        )

    def _tightest(self) -> Budget:
        """The stream's budget with the fewest passes, and the order, that some experience asks for."""
        budgets = [self.budget_of(i) for i in range(len(self.manifest.experiences))]
        epochs, in_order = min(b.epochs for b in budgets), any(b.in_order for b in budgets)
        return replace(self.budget, epochs=1 if in_order else epochs, in_order=in_order)
