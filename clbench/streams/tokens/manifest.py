"""The manifest of a stream of texts: canonical JSON with the checksums of all tokens, and a SHA-256 of its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from clbench.interfaces import UserError
from clbench.streams.manifest import Manifest, save_json
from clbench.streams.tokens import sequences

SCHEMA = 1
KIND = "continual_pretraining"


@dataclass(frozen=True)
class TokenBudget:
    """What a learner may use in one experience or hold between two. None means unlimited.

    processed       tokens trained on, trunk, branch and replay together
    exemplar_bytes  old text held for replay
    """

    processed: int | None = None
    exemplar_bytes: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise UserError(f"budget.{item.name} must be a whole number from 0 or null, got {value!r}")


@dataclass(frozen=True)
class TokenManifest:
    """The whole stream in plain values. Two manifests are equal when their hashes are.

    domains      name, sha256, number of training and validation tokens of each
    experiences  name, domain (position in `domains`), first and number of training sequences, steps
    evals        name, domain, sequences, first_seen (the experience that reads this domain first), tokens predicted, floor
    """

    kind: str
    vocab: int
    context: int
    batch: int
    domains: tuple[dict[str, Any], ...]
    experiences: tuple[dict[str, Any], ...]
    evals: tuple[dict[str, Any], ...]
    budget: dict[str, Any]
    schema: int = SCHEMA

    @property
    def unit(self) -> str:
        """What is counted: "tokens", or "images" (then a sequence is one image, with one loss)."""
        return str(self.domains[0].get("unit", "tokens"))

    @property
    def iid(self) -> bool:
        """Whether all experiences are of one domain: then nothing shifts."""
        return len({entry["domain"] for entry in self.experiences}) == 1

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON text."""
        return hashlib.sha256(self.to_json().encode("ascii")).hexdigest()

    def to_json(self) -> str:
        """Sorted keys, no spaces, ASCII."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    def save(self, path: Path) -> None:
        """Write it with its hash in one move: nobody ever sees half a file."""
        save_json(Path(path), self.sha256, self.to_json())

    def text(self) -> str:
        """The stream for people: experiences with their tokens, evaluation sets with their floors."""
        unit, words = self.unit, f"{self.vocab} tokens in the vocabulary"
        words = f"images of {self.domains[0]['side']} pixels" if unit == "images" else words
        lines = [f"{self.kind}, {len(self.domains)} domains, {words}, sha256 {self.sha256}"]
        size = self.batch * self.context
        for e in self.experiences:
            times = e["steps"] * size / (e["sequences"] * self.context)
            lines.append(f"  {e['name']:<14} {e['steps'] * size:>11} {unit}, {e['steps']} steps of {size}, {times:.2f} passes")
        for e in self.evals:
            known = "" if e["floor"] is None else f", floor {e['floor']:.4f} nats a token"
            first = f"first read in experience {e['first_seen']}{known}"
            lines.append(f"  evaluate {e['name']:<14} {e['tokens']:>7} {unit}, {first}")
        return "\n".join(lines)

    @classmethod
    def load(cls, path: Path) -> TokenManifest:
        """Read what `save` wrote and compare it with the hash it carries; anything else raises `UserError`."""
        try:
            body = json.loads(Path(path).read_text(encoding="ascii"))
            claimed = body.pop("sha256", None)
            made = cls.parse(body)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except UserError as error:
            raise UserError(f"manifest {path}: {error}") from None
        except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"{path} is not a manifest: {error}") from None
        if made.sha256 != claimed:
            raise UserError(f"manifest {path} was changed: its content has SHA-256 {made.sha256}, it claims {claimed}")
        return made

    @classmethod
    def parse(cls, body: Any) -> TokenManifest:
        """Plain JSON -> manifest, with its numbers checked."""
        wanted = {item.name for item in fields(cls)}
        if not isinstance(body, dict) or set(body) != wanted or body["kind"] != KIND or body["schema"] != SCHEMA:
            raise UserError(f"it is no manifest of kind {KIND}, schema {SCHEMA}")
        parts = {name: tuple(body[name]) for name in ("domains", "experiences", "evals")}
        made = cls(**{**body, **parts})
        check(made)
        return made


def check(m: TokenManifest) -> None:
    """Refuse a stream that contradicts itself."""
    for name in ("vocab", "context", "batch"):
        if type(getattr(m, name)) is not int or getattr(m, name) < 1:
            raise UserError(f"manifest: {name} must be a whole number from 1")
    if not m.domains or not m.experiences or not m.evals:
        raise UserError("manifest has no domains, no experiences or no evaluation sets")
    TokenBudget(**m.budget)
    for i, entry in enumerate(m.experiences):
        domain = m.domains[entry["domain"]]
        if entry["first"] < 0 or entry["sequences"] < 1 or entry["steps"] < 1:
            raise UserError(f"manifest: experience {i} has no sequences or no steps")
        whole = domain["train_tokens"] if m.unit == "images" else sequences.count(domain["train_tokens"], m.context)
        if entry["first"] + entry["sequences"] > whole:
            raise UserError(f"manifest: experience {i} reads past the end of domain {domain['name']}")
    for j, entry in enumerate(m.evals):
        if entry["tokens"] != entry["sequences"] * m.context or entry["sequences"] < 1:
            raise UserError(f"manifest: evaluation set {j} has {entry['tokens']} tokens for {entry['sequences']} sequences")
        if m.experiences[entry["first_seen"]]["domain"] != entry["domain"]:
            raise UserError(f"manifest: evaluation set {j} is of another domain than experience {entry['first_seen']}")


def load_any(path: Path) -> TokenManifest | Manifest:
    """A saved manifest of either kind; a file that is none raises `UserError`."""
    try:
        kind = json.loads(path.read_text(encoding="ascii")).get("kind")
    except (OSError, ValueError, RecursionError, AttributeError):
        kind = None
    return TokenManifest.load(path) if kind == KIND else Manifest.load(path)
