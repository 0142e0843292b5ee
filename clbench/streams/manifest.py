"""A scenario is a manifest: an ordered list of samples, class ids and visibility rules with a SHA-256.

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
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clbench.interfaces import Asks, UserError
from clbench.streams.entries import EvalEntry, ExperienceEntry, Fields, Form, written
from clbench.streams.id_runs import MAX_SAMPLES, decode_ids, decode_labels, encode_ids, encode_labels
from clbench.streams.manifest_rules import DATASET_KEYS, check, checked_keys, kept_rules, of_form
from clbench.streams.manifest_text import lines

SCHEMA = 1
SPANS = "continual_pretraining"  # the kind of all streams whose samples are spans of domains
EDITS = "model_editing"  # of those whose samples are requests to change what a language model says
TEXTS = "text_tasks"  # and of those whose samples are lines with a prompt and an answer


FORMS: dict[str, Form] = {SPANS: "spans", EDITS: "edits", TEXTS: "texts"}
ASKS: dict[Form, Asks] = {"ids": "predict", "spans": "loss", "edits": "logits", "texts": "next_token"}

_FIELDS: Fields = {
    "ids": (
        ("kind", "dataset", "class_order", "experiences", "evals", "discloses_task", "has_boundaries", "budget", "schema"),
        ("looks", "evaluate_every", "evaluators", "operators"),
    ),
    "spans": (
        ("kind", "vocab", "context", "batch", "domains", "experiences", "evals", "budget", "schema"),
        ("evaluators", "operators"),
    ),
    "edits": (("kind", "dataset", "vocab", "context", "experiences", "evals", "budget", "schema"), ("operators",)),
    "texts": (
        ("kind", "dataset", "vocab", "context", "experiences", "evals", "discloses_task", "budget", "schema"),
        ("operators",),
    ),
}


@dataclass(frozen=True, eq=False)
class Manifest:
    """The whole stream. Two manifests are equal when their hashes are.

    looks        per experience the numbers of its samples after which the learner is evaluated; empty: at its end alone
    evaluate_every  experiences from one evaluation to the next, the last one included; a record counts them as one
    evaluators   names of what is asked of the learner; empty: what the kind of stream asks for
    operators    what made this stream of a generator's, in order, as {name: options}

    Where samples are ids:
    dataset      {"name", "sha256", "num_samples"}: what the ids point into. Of several data sets one after another
                 also "parts", those of each, and "classes" (see `pools.concatenated`)
    class_order  original class ids by order of first appearance: position = the id that learners see

    Where they are edits, ids are of requests and of probes of a decoder of `vocab` tokens, whose texts have `context` at most;
    where they are texts, of lines.

    Where they are spans of domains (texts, or images for autoencoders):
    domains      name, sha256, number of training and validation tokens of each; of images also "unit", "side", ...
    batch        sequences in a step, with `context` predictions each, out of `vocab` tokens
    """

    FIELDS: ClassVar[Fields] = _FIELDS
    kind: str
    dataset: dict[str, Any] = field(default_factory=dict)
    class_order: tuple[int, ...] = ()
    experiences: tuple[ExperienceEntry, ...] = ()
    evals: tuple[EvalEntry, ...] = ()
    discloses_task: bool = False
    has_boundaries: bool = True
    budget: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    looks: tuple[tuple[int, ...], ...] = ()
    evaluate_every: int = 1
    evaluators: tuple[str, ...] = ()
    operators: tuple[dict[str, dict[str, Any]], ...] = ()
    domains: tuple[dict[str, Any], ...] = ()
    vocab: int = 0
    context: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        values = {name: tuple(getattr(self, name)) for name in ("experiences", "evals", "evaluators", "operators", "domains")}
        values |= {"class_order": tuple(int(c) for c in self.class_order), "looks": tuple(tuple(one) for one in self.looks)}
        for name, value in {**values, "budget": kept_rules(self.budget, self.asks)}.items():
            object.__setattr__(self, name, value)
        check(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    @property
    def form(self) -> Form:
        """What samples are: "ids" of a data set, "spans" of domains, "edits" or "texts"."""
        return FORMS.get(self.kind, "ids")

    @property
    def asks(self) -> Asks:
        """What is asked of a learner."""
        return ASKS[self.form]

    @property
    def unit(self) -> str:
        """What is counted: "tokens", or "images" (then a sequence is one image, with one loss)."""
        return str(self.domains[0].get("unit", "tokens")) if self.domains else "images"

    @property
    def iid(self) -> bool:
        """Whether all experiences are of one domain: then nothing shifts."""
        return bool(self.domains) and len({entry.domain for entry in self.experiences}) == 1

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

    def is_evaluated(self, i: int) -> bool:
        """Whether the learner is evaluated after experience i."""
        return (i + 1) % self.evaluate_every == 0 or i == len(self.experiences) - 1

    @property
    def rows(self) -> int:
        """Number of evaluations; experience i belongs to number i // evaluate_every."""
        return -(-len(self.experiences) // self.evaluate_every)

    def to_json(self) -> str:
        """Canonical JSON text, without the hash."""
        body = {name: getattr(self, name) for name in written(self, self.form)}
        return _canonical({**body, **{part: [_encoded(dict(e)) for e in body[part]] for part in ("experiences", "evals")}})

    def text(self, name: Callable[[int], str] = str) -> str:
        """The stream for people: a line for each experience and each evaluation set. `name` names an original class id."""
        return "\n".join(lines(self, name))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read `to_json`'s text; malformed text raises a one-line `UserError`."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not a manifest: {error}") from None
        return _parse(body)

    def save(self, path: str | Path, class_names: Mapping[int, str] | None = None) -> None:
        """Write the manifest with its hash to `path`, in one move: nobody ever sees half a file.

        `class_names` (original id -> name) are for people: they stand beside the hash, not under it.
        """
        head: dict[str, Any] = {"sha256": self.sha256}
        head |= {"class_names": {str(c): name for c, name in class_names.items()}} if class_names else {}
        _write(Path(path), json.dumps({**head, **json.loads(self.to_json())}, indent=1) + "\n")

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
        body.pop("class_names", None) if isinstance(body, dict) else None
        try:
            manifest = _parse(body)
        except UserError as error:
            raise UserError(f"manifest {path}: {error}") from None
        if manifest.sha256 != claimed or manifest.to_json() != _canonical(body):
            raise UserError(f"manifest {path} was changed: its content has SHA-256 {manifest.sha256}, it claims {claimed}")
        return manifest


def _write(path: Path, text: str) -> None:
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


def _canonical(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _encoded(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with its arrays as text."""
    arrays = {name: value for name, value in entry.items() if isinstance(value, np.ndarray)}
    return entry | {name: (encode_labels if name == "labels" else encode_ids)(value) for name, value in arrays.items()}


def _parse(body: Any) -> Manifest:
    """Plain JSON -> Manifest; types are checked here, meaning in `manifest_rules.check`."""
    spans = isinstance(body, dict) and (body.get("kind") == SPANS or "domains" in body)
    form: Form = "spans" if spans else FORMS.get(str(body.get("kind")), "ids") if isinstance(body, dict) else "ids"
    body = of_form(body, Manifest, form, "manifest")
    if body["schema"] != SCHEMA:
        raise UserError(f"manifest schema {body['schema']!r} is not the known {SCHEMA}")
    if spans and body["kind"] != SPANS:
        raise UserError(f"it is no manifest of kind {SPANS}, but of {body['kind']!r}")
    try:
        total = _total(body["dataset"]) if form != "spans" else 0
        parts = {"experiences": (ExperienceEntry, "experience"), "evals": (EvalEntry, "evaluation set")}
        entries = {
            part: [entry(**_decoded(of_form(e, entry, form, f"{name} {i}"), total)) for i, e in enumerate(body[part])]
            for part, (entry, name) in parts.items()
        }
        return Manifest(**{**body, **entries})
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError, KeyError, IndexError) as error:
        raise UserError(f"not a manifest: {error}") from None


def _total(dataset: Any) -> int:
    total = checked_keys(dataset, *DATASET_KEYS)["num_samples"]
    if type(total) is not int or not 0 < total <= MAX_SAMPLES:
        raise UserError(f"dataset.num_samples must be a positive whole number, got {total!r}")
    return total


def _decoded(entry: dict[str, Any], total: int) -> dict[str, Any]:
    """An entry with its ids, and labels where it has its own, as arrays."""
    found = {name: decode_ids(entry[name], total) for name in ("train", "ids") if name in entry}
    if "labels" in entry:
        found["labels"] = decode_labels(entry["labels"], sum(map(len, found.values())))
    return entry | found
