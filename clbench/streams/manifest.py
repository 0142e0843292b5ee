"""A scenario is a manifest: an ordered list of sample ids, class ids and visibility rules with a SHA-256.

The hash covers everything that changes the stream (samples, order, evaluation sets, disclosure, budget) and nothing else: no
path, device or version. Its text is canonical JSON (sorted keys, no spaces, ASCII), with sample ids as runs: "0-499,731", and
labels as "3*500,7" (3 for 500 samples, then a 7). A field that has its default is left out, so a stream that does not need it
has the hash that it had before there was the field.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.entries import EvalEntry, ExperienceEntry
from clbench.streams.id_runs import MAX_SAMPLES, decode_ids, decode_labels, encode_ids, encode_labels
from clbench.streams.manifest_rules import check, checked_keys

SCHEMA = 1


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


@dataclass(frozen=True, eq=False)
class Manifest:
    """The whole stream. Two manifests are equal when their hashes are.

    dataset      {"name", "sha256", "num_samples"}: what the sample ids point into. Of several data sets one after another
                 also "parts", those of each, and "classes" (see `pools.concatenated`)
    class_order  original class ids by order of first appearance: position = the id that learners see
    looks        per experience the numbers of its samples after which the learner is evaluated; empty: at its end alone
    evaluators   names of what is asked of the learner; empty: what the kind of stream asks for
    operators    what made this stream of a generator's, in order, as {name: options}
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
    looks: tuple[tuple[int, ...], ...] = ()
    evaluators: tuple[str, ...] = ()
    operators: tuple[dict[str, dict[str, Any]], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_order", tuple(int(c) for c in self.class_order))
        if isinstance(self.budget, Mapping) and self.budget.get("in_order") is False:
            object.__setattr__(self, "budget", {k: v for k, v in self.budget.items() if k != "in_order"})
        object.__setattr__(self, "looks", tuple(tuple(one) for one in self.looks))
        object.__setattr__(self, "evaluators", tuple(self.evaluators))
        object.__setattr__(self, "operators", tuple(self.operators))
        object.__setattr__(self, "experiences", tuple(self.experiences))
        object.__setattr__(self, "evals", tuple(self.evals))
        check(self)

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
        body = _written(self)
        body["experiences"] = [_written(e) for e in self.experiences]
        body["evals"] = [_written(e) for e in self.evals]
        return _canonical(body)

    def text(self, name: Callable[[int], str] = str) -> str:
        """The stream for people: a line for each experience and each evaluation set. `name` names an original class id."""
        lines = [f"{self.kind}, {self.dataset['name']}, sha256 {self.sha256}"]
        lines += [f"  operator {json.dumps(one, sort_keys=True)}" for one in self.operators]
        named = any(name(c) != str(c) for c in self.class_order)  # "10=2": id 10 is the class named 2
        classes = {c: f"{c}={name(c)}" if named else str(c) for c in self.class_order}
        for e in self.experiences:
            line = f"  {e.name:<10} {len(e.train):>7} samples  classes {' '.join(classes[c] for c in e.classes)}"
            lines.append(line + _remarks(e))
        for e in self.evals:
            line = f"  evaluate {e.name:<10} {len(e.ids):>7} samples  first seen in experience {e.first_seen}"
            lines.append(line + _remarks(e))
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


def _default(item: Field[Any]) -> Any:
    """The default of a field that is left out where it has it; MISSING for one that is always written."""
    return MISSING if item.name == "schema" else item.default


def _written(entry: Any) -> dict[str, Any]:
    """The fields of an entry for JSON, those left out that have their default."""
    body: dict[str, Any] = {}
    for item in fields(entry):
        value, default = getattr(entry, item.name), _default(item)
        if isinstance(value, np.ndarray):
            value = encode_labels(value) if item.name == "labels" else encode_ids(value)
        if default is MISSING or value != default:
            body[item.name] = value
    return body


def _remarks(entry: ExperienceEntry | EvalEntry) -> str:
    """What is out of the ordinary about an entry, for people."""
    said = [f"{name} {json.dumps(options)}" for step in entry.transform for name, options in step.items()]
    said += ["own labels"] if entry.labels is not None else []
    if isinstance(entry, EvalEntry):
        said += [f"in this order, batches of {entry.batch_size or 'any size'}"] if entry.order == "given" else []
    else:
        said += [] if entry.labelled else ["without labels"]
        said += [] if entry.boundary else ["boundary hidden"]
        said += [f"budget {json.dumps(entry.budget)}"] if entry.budget else []
    return "".join(f"; {one}" for one in said)


def _of_kind(body: Any, kind: type, where: str) -> dict[str, Any]:
    """A mapping with the fields of a dataclass; those that have a default may be missing."""
    named = {item.name: _default(item) is MISSING for item in fields(kind)}
    return checked_keys(body, [name for name, needed in named.items() if needed], where, named)


def _parse(body: Any) -> Manifest:
    """Plain JSON -> Manifest; types are checked here, meaning in `manifest_rules.check`."""
    body = _of_kind(body, Manifest, "manifest")
    if body["schema"] != SCHEMA:
        raise UserError(f"manifest schema {body['schema']!r} is not the known {SCHEMA}")
    dataset = checked_keys(body["dataset"], ("name", "sha256", "num_samples"), "dataset", ("parts", "classes"))
    total = dataset["num_samples"]
    try:
        if type(total) is not int or not 0 < total <= MAX_SAMPLES:
            raise UserError(f"dataset.num_samples must be a positive whole number, got {total!r}")
        steps = [_of_kind(e, ExperienceEntry, f"experience {i}") for i, e in enumerate(body["experiences"])]
        sets = [_of_kind(e, EvalEntry, f"evaluation set {j}") for j, e in enumerate(body["evals"])]
        entries = tuple(ExperienceEntry(**_decoded(e, "train", total)) for e in steps)
        return Manifest(
            **{**body, "experiences": entries, "evals": tuple(EvalEntry(**_decoded(e, "ids", total)) for e in sets)}
        )
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"not a manifest: {error}") from None


def _decoded(entry: dict[str, Any], key: str, total: int) -> dict[str, Any]:
    """An entry with its ids, and labels where it has its own, as arrays."""
    ids = decode_ids(entry[key], total)
    return {**entry, key: ids} | ({"labels": decode_labels(entry["labels"], len(ids))} if "labels" in entry else {})
