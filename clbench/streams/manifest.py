"""A scenario is a manifest: an ordered list of sample ids, class ids and visibility rules with a SHA-256.

The hash covers everything that changes the stream (samples, order, evaluation sets, disclosure, budget) and nothing else: no
path, device or version. Its text is canonical JSON (sorted keys, no spaces, ASCII), with sample ids as runs: "0-499,731".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import Budget, UserError

SCHEMA = 1
MAX_SAMPLES = 1 << 27  # a forged file must not be able to ask for more memory than this
_RUN = re.compile(r"(\d{1,12})(?:-(\d{1,12}))?")


def encode_ids(ids: np.ndarray) -> str:
    """Write ids [N] as ascending runs in their own order: [0, 1, 2, 7, 4] -> "0-2,7,4"."""
    ids = np.asarray(ids, dtype=np.int64)
    if len(ids) == 0:
        return ""
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    first, last = ids[np.r_[0, cuts]], ids[np.r_[cuts - 1, len(ids) - 1]]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first.tolist(), last.tolist(), strict=True))


def decode_ids(text: str, limit: int) -> np.ndarray:
    """Read what `encode_ids` wrote -> [N] int64, all below `limit`; anything else raises `UserError`."""
    runs, total = [], 0
    for part in text.split(",") if text else []:
        match = _RUN.fullmatch(part)
        if match is None:
            raise UserError(f"sample ids must look like '0-499,731', got {part[:40]!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        total += last - first + 1
        if last < first or last >= limit or total > limit:
            raise UserError(f"sample ids {part!r} do not fit a data set of {limit} samples")
        runs.append(np.arange(first, last + 1, dtype=np.int64))
    return np.concatenate(runs) if runs else np.zeros(0, np.int64)


def save_json(path: Path, sha256: str, body: str) -> None:
    """Write a manifest's canonical text with its hash, indented, in one move; what cannot be written raises `UserError`."""
    text = json.dumps({"sha256": sha256, **json.loads(body)}, indent=1) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write manifest {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _frozen(ids: np.ndarray) -> np.ndarray:
    ids = np.array(ids, dtype=np.int64)
    ids.flags.writeable = False
    return ids


@dataclass(frozen=True, eq=False)
class ExperienceEntry:
    """One step of the stream: `classes` are original ids in order of appearance, `train` [N] sample ids in stream order."""

    name: str
    task: int | None
    classes: tuple[int, ...]
    train: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(int(c) for c in self.classes))
        object.__setattr__(self, "train", _frozen(self.train))


@dataclass(frozen=True, eq=False)
class EvalEntry:
    """One evaluation set: original `classes`, sample `ids` [N], and the experience that belongs to it (`first_seen`)."""

    name: str
    task: int | None
    classes: tuple[int, ...]
    ids: np.ndarray
    first_seen: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(int(c) for c in self.classes))
        object.__setattr__(self, "ids", _frozen(self.ids))


@dataclass(frozen=True, eq=False)
class Manifest:
    """The whole stream. Two manifests are equal when their hashes are.

    dataset      {"name", "sha256", "num_samples"}: what the sample ids point into
    class_order  original class ids by order of first appearance: position = the id that learners see
    """

    kind: str
    dataset: dict[str, Any]
    class_order: tuple[int, ...]
    experiences: tuple[ExperienceEntry, ...]
    evals: tuple[EvalEntry, ...]
    discloses_task: bool
    has_boundaries: bool
    budget: dict[str, Any]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_order", tuple(int(c) for c in self.class_order))
        object.__setattr__(self, "experiences", tuple(self.experiences))
        object.__setattr__(self, "evals", tuple(self.evals))
        _check(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON text."""
        return hashlib.sha256(self.to_json().encode("ascii")).hexdigest()

    @cached_property
    def renumber(self) -> dict[int, int]:
        """Original class id -> position in the order of appearance."""
        return {original: position for position, original in enumerate(self.class_order)}

    @cached_property
    def _seen(self) -> tuple[int, ...]:
        seen: set[int] = set()
        return tuple(len(seen := seen | set(entry.classes)) for entry in self.experiences)

    def num_seen(self, i: int) -> int:
        """Classes seen up to and including experience i."""
        return self._seen[i]

    def evaluable(self, j: int, i: int) -> bool:
        """Whether all classes of evaluation set j have been seen after experience i."""
        return all(self.renumber[c] < self.num_seen(i) for c in self.evals[j].classes)

    def to_json(self) -> str:
        """Canonical JSON text, without the hash."""
        body = {item.name: getattr(self, item.name) for item in fields(self)}
        body["experiences"] = [{**vars(e), "train": encode_ids(e.train)} for e in self.experiences]
        body["evals"] = [{**vars(e), "ids": encode_ids(e.ids)} for e in self.evals]
        return _canonical(body)

    def text(self) -> str:
        """The stream for people: a line for each experience and each evaluation set."""
        lines = [f"{self.kind}, {self.dataset['name']}, sha256 {self.sha256}"]
        for e in self.experiences:
            lines.append(f"  {e.name:<10} {len(e.train):>7} samples  classes {' '.join(map(str, e.classes))}")
        for e in self.evals:
            lines.append(f"  evaluate {e.name:<10} {len(e.ids):>7} samples  first seen in experience {e.first_seen}")
        return "\n".join(lines)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read `to_json`'s text; malformed text raises a one-line `UserError`."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not a manifest: {error}") from None
        return _parse(body)

    def save(self, path: str | Path) -> None:
        """Write the manifest with its hash to `path`, in one move: nobody ever sees half a file."""
        save_json(Path(path), self.sha256, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a saved manifest and compare it with the hash it carries; any difference raises `UserError`."""
        try:
            body = json.loads(Path(path).read_text(encoding="ascii"))
        except OSError as error:
            raise UserError(f"cannot read manifest {path}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"manifest {path} is not JSON: {error}") from None
        claimed = body.pop("sha256", None) if isinstance(body, dict) else None
        try:
            manifest = _parse(body)
        except UserError as error:
            raise UserError(f"manifest {path}: {error}") from None
        if manifest.sha256 != claimed or manifest.to_json() != _canonical(body):
            raise UserError(f"manifest {path} was changed: its content has SHA-256 {manifest.sha256}, it claims {claimed}")
        return manifest


def _canonical(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _keys(body: Any, expected: Iterable[str], where: str) -> dict[str, Any]:
    expected = set(expected)
    if not isinstance(body, dict):
        raise UserError(f"{where} must be a mapping, got {type(body).__name__}")
    if set(body) != expected:
        raise UserError(f"{where}: missing keys {sorted(expected - set(body))}, unknown keys {sorted(set(body) - expected)}")
    return body


def _parse(body: Any) -> Manifest:
    """Plain JSON -> Manifest; types are checked here, meaning in `_check`."""
    body = _keys(body, (item.name for item in fields(Manifest)), "manifest")
    if body["schema"] != SCHEMA:
        raise UserError(f"manifest schema {body['schema']!r} is not the known {SCHEMA}")
    dataset = _keys(body["dataset"], ("name", "sha256", "num_samples"), "dataset")
    total = dataset["num_samples"]
    try:
        if type(total) is not int or not 0 < total <= MAX_SAMPLES:
            raise UserError(f"dataset.num_samples must be a positive whole number, got {total!r}")
        names = [item.name for item in fields(ExperienceEntry)]
        experiences = [_keys(e, names, f"experience {i}") for i, e in enumerate(body["experiences"])]
        steps = tuple(ExperienceEntry(**{**e, "train": decode_ids(e["train"], total)}) for e in experiences)
        names = [item.name for item in fields(EvalEntry)]
        evals = [_keys(e, names, f"evaluation set {j}") for j, e in enumerate(body["evals"])]
        sets = tuple(EvalEntry(**{**e, "ids": decode_ids(e["ids"], total)}) for e in evals)
        return Manifest(**{**body, "experiences": steps, "evals": sets})
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"not a manifest: {error}") from None


def _check_entry(where: str, entry: ExperienceEntry | EvalEntry, ids: np.ndarray, total: int) -> None:
    if not isinstance(entry.name, str) or not (entry.task is None or type(entry.task) is int):
        raise UserError(f"{where}: the name must be text and the task a whole number or null")
    if len(ids) == 0 or not entry.classes:
        raise UserError(f"{where} has no samples or no classes")
    if len(np.unique(ids)) != len(ids) or ids.min() < 0 or ids.max() >= total:
        raise UserError(f"{where} names a sample twice, or one outside the data set of {total} samples")


def _check(manifest: Manifest) -> None:
    """Refuse a stream that contradicts itself."""
    total = manifest.dataset["num_samples"]
    if not all(isinstance(manifest.dataset[key], str) for key in ("name", "sha256")):
        raise UserError("manifest: dataset.name and dataset.sha256 must be text")
    if not isinstance(manifest.kind, str) or type(manifest.discloses_task) is not bool:
        raise UserError("manifest: kind must be text, discloses_task and has_boundaries true or false")
    if type(manifest.has_boundaries) is not bool or not isinstance(manifest.budget, Mapping):
        raise UserError("manifest: has_boundaries must be true or false, budget a mapping")
    _keys(dict(manifest.budget), asdict(Budget()), "budget")
    Budget(**manifest.budget)
    if not manifest.experiences or not manifest.evals:
        raise UserError("manifest has no experiences or no evaluation sets")
    trained = np.zeros(total, bool)
    for i, entry in enumerate(manifest.experiences):
        _check_entry(f"experience {i}", entry, entry.train, total)
        trained[entry.train] = True
    if tuple(dict.fromkeys(c for e in manifest.experiences for c in e.classes)) != manifest.class_order:
        raise UserError("manifest: class_order is not the order in which the classes first appear")
    for j, entry in enumerate(manifest.evals):
        _check_entry(f"evaluation set {j}", entry, entry.ids, total)
        if type(entry.first_seen) is not int or not 0 <= entry.first_seen < len(manifest.experiences):
            raise UserError(f"evaluation set {j}: first_seen {entry.first_seen!r} is no experience")
        if not set(entry.classes) <= set(manifest.class_order):
            raise UserError(f"evaluation set {j} holds classes that no experience teaches")
        if trained[entry.ids].any():
            raise UserError(f"evaluation set {j}: sample {entry.ids[trained[entry.ids]][0]} is also a training sample")
