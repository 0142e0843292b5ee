"""Continual pre-training on tokens: domains one after another, evaluated by the loss on all of them. Imports no torch.

A *domain* is a training text and a validation text as token ids. An experience is a budget of tokens of one domain, cut into
steps of `batch` sequences with `context` predictions each. Experiences of the same domain read disjoint parts of it, so a
stream of one domain is the IID control. Manifest: canonical JSON with the checksums of all tokens, and a SHA-256 of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from clbench.interfaces import Budget, Facts, UserError
from clbench.streams import rng
from clbench.streams.handles import Handle, end, opened
from clbench.streams.tokens import sequences
from clbench.streams.tokens.manifest import KIND, TokenBudget, TokenManifest, check


@dataclass(frozen=True, eq=False)
class Domain:
    """One text: `train` [M] and `validation` [V] token ids, uint8, uint16 or uint32.

    floor            exact loss of the true source on the validation windows, nats per token, where it is known
    bytes_per_token  length of the validation text in bytes over its tokens; None where tokens are no text
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    sha256: str
    floor: float | None = None
    bytes_per_token: float | None = None


def content_sha256(*arrays: np.ndarray) -> str:
    """SHA-256 over token arrays: lengths and little-endian uint32 values, whatever the stored width."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(len(array).to_bytes(8, "little"))
        for start in range(0, len(array), 1 << 20):
            found.update(np.ascontiguousarray(array[start : start + (1 << 20)], "<u4").tobytes())
    return found.hexdigest()


def eval_windows(validation: np.ndarray, number: int, context: int) -> np.ndarray:
    """Sequences that a validation text is judged on, spread over all of it in a fixed order -> [N, context + 1] int64."""
    whole = sequences.count(len(validation), context)
    ids = sequences.permuted(rng.key("evaluation"), whole, np.arange(min(number, whole)))
    return sequences.windows(validation, ids, context)


@dataclass(frozen=True, eq=False)
class _Text:
    """What the handle of a `TokenData` opens: sequences first..first+size-1 of a domain's text, in the order of `key`.

    Those are spread over the whole text, so it is held whole (a mapped corpus stays mapped once); numbers outside are refused.
    """

    name: str
    tokens: np.ndarray
    context: int
    first: int
    size: int
    key: int

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Own sequences by number 0..size-1 -> [B] int64 places in the domain."""
        whole = sequences.count(len(self.tokens), self.context)
        inside = sequences.own(numbers, self.size, self.name)
        return sequences.permuted(rng.key(self.key, "domain"), whole, self.first + inside)


@dataclass(frozen=True, eq=False)
class TokenData:
    """The training text of one experience: `size` sequences of a domain, in an order drawn once by `key`.

    positions count sequences from 0; past `size` the same sequences come again in other orders. `text` is a handle: arrays come
    from `read` and `take` alone, which give this experience's own sequences, until `close`.
    """

    name: str
    domain: int
    text: Handle
    context: int
    batch: int
    steps: int
    first: int
    size: int
    key: int
    itemsize: int

    @staticmethod
    def of(
        name: str,
        domain: int,
        tokens: np.ndarray,
        context: int,
        batch: int,
        steps: int,
        first: int,
        size: int,
        key: int,
    ) -> TokenData:
        """Sequences first..first+size-1 of a domain's `tokens`, counted in the domain's order."""
        text = Handle(f"experience {name}", _Text(f"experience {name}", tokens, context, first, size, key))
        return TokenData(name, domain, text, context, batch, steps, first, size, key, tokens.dtype.itemsize)

    def __len__(self) -> int:
        return self.size

    @property
    def sequence_bytes(self) -> int:
        """What one stored sequence takes."""
        return self.context * self.itemsize

    def numbers(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Own sequences by position -> [B] int64 in 0..size-1; `size`: only the first so many are used."""
        return sequences.passes(self.key, size or self.size, positions, first_in_order=True)

    def ids(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Sequences by position -> [B] int64 places in the domain; `size`: only the first so many are used."""
        return opened(self.text).places(self.numbers(positions, size))

    def read(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Sequences by position -> [B, context + 1] int64."""
        return self.take(self.numbers(positions, size), "new", positions)

    def take(self, numbers: np.ndarray, role: str, positions: np.ndarray) -> np.ndarray:
        """Own sequences by number -> [B, context + 1] int64; why and when they are read does not matter here.

        Raises `UserError` for a number outside 0..size-1, and after `close`.
        """
        text: _Text = opened(self.text)
        return sequences.windows(text.tokens, text.places(numbers), text.context)

    def close(self) -> None:
        """Let go of the text: the experience is over."""
        end(self.text)


@dataclass(frozen=True)
class Probing:
    """How often the loss is looked at while training: at steps 0, 1, 2, 4, 8, ... of an experience, then evenly.

    sequences  of each validation text, the first ones
    evenly     looks spread over the experience besides the geometric ones
    """

    sequences: int = 16
    evenly: int = 16

    def steps(self, total: int) -> list[int]:
        """The steps before which to look, and `total` for the end."""
        geometric = [0, *(1 << i for i in range(total.bit_length()) if 1 << i < total)]
        even = [round(i * total / self.evenly) for i in range(1, self.evenly + 1)] if self.evenly else []
        return sorted({*geometric, *even, total})


def described(name: str, m: TokenManifest, probing: Probing) -> dict[str, Any]:
    """What a record says about a stream of tokens or images and its evaluation sets."""
    about = {
        "name": name,
        "kind": m.kind,
        "unit": m.unit,
        "manifest_sha256": m.sha256,
        "num_experiences": len(m.experiences),
        "eval_names": [e["name"] for e in m.evals],
        "experiences": [dict(e) for e in m.experiences],
        "context": m.context,
        "batch": m.batch,
        "vocab": m.vocab,
        "iid": m.iid,
        "probing": asdict(probing),
        "budget": dict(m.budget),
    }
    columns = ("tokens", "floor", "bytes_per_token", "first_seen")
    return {"scenario": about, "n": [e["tokens"] for e in m.evals], **{name: [e[name] for e in m.evals] for name in columns}}


@dataclass(frozen=True, eq=False)
class TokenScenario:
    """A stream of texts that can be run: the manifest, the tokens, the rules."""

    name: str
    manifest: TokenManifest
    domains: tuple[Domain, ...]
    probing: Probing = field(default_factory=Probing)
    asks: ClassVar[Literal["loss"]] = "loss"

    @property
    def budget(self) -> TokenBudget:
        """Tokens and bytes that a learner may use."""
        return TokenBudget(**self.manifest.budget)

    @property
    def iid(self) -> bool:
        """Whether all experiences are of one domain: then nothing shifts."""
        return self.manifest.iid

    def facts(self) -> Facts:
        """What is compared with a learner's capabilities."""
        limits = Budget(exemplar_bytes=self.budget.exemplar_bytes)
        return Facts(self.name, "loss", False, True, False, limits)

    def data(self, index: int) -> TokenData:
        """The training text of experience `index`. Its order depends on the stream, not on the seed of the run."""
        m, entry = self.manifest, self.manifest.experiences[index]
        domain = self.domains[entry["domain"]]
        key = rng.key("order", int(domain.sha256[:16], 16))
        shape = (m.context, m.batch, entry["steps"], entry["first"], entry["sequences"])
        return TokenData.of(entry["name"], entry["domain"], domain.train, *shape, key)

    def evaluation(self, j: int) -> np.ndarray:
        """Sequences of evaluation set j -> [N, context + 1] int64."""
        entry = self.manifest.evals[j]
        return eval_windows(self.domains[entry["domain"]].validation, entry["sequences"], self.manifest.context)

    def describe(self) -> dict[str, Any]:
        """What a record says about the stream and its evaluation sets."""
        return described(self.name, self.manifest, self.probing)


def scenario(
    name: str,
    domains: Sequence[Domain],
    order: Sequence[int],
    *,
    vocab: int,
    tokens: int | Sequence[int],
    context: int,
    batch: int,
    eval_tokens: int,
    budget: Mapping[str, Any] | None = None,
    probe_sequences: int = 16,
    probe_evenly: int = 16,
) -> TokenScenario:
    """Lay experiences over domains: `order[i]` is read in experience i, for `tokens` (of all, or of each) tokens.

    A text that is too short for its experiences is read several times; the record's ledger says so.
    """
    amounts = [tokens] * len(order) if isinstance(tokens, int) else list(tokens)
    fewest = min(amounts, default=0)
    for key, value, least in (("tokens", fewest, batch * context), ("context", context, 2), ("batch", batch, 1)):
        if value < least:
            raise UserError(f"scenario.{key} must be at least {least}, got {value}")
    if not order or any(type(d) is not int or not 0 <= d < len(domains) for d in order):
        raise UserError(f"scenario.order must name domains 0..{len(domains) - 1}, got {list(order)}")
    if len(amounts) != len(order):
        raise UserError(f"scenario.tokens has {len(amounts)} numbers for {len(order)} experiences")
    experiences, first = [], dict.fromkeys(order, 0)
    for i, d in enumerate(order):
        steps = amounts[i] // (batch * context)
        held = sequences.count(len(domains[d].train), context) // list(order).count(d)
        size = min(steps * batch, held)
        if size < batch:
            raise UserError(f"the text of {domains[d].name} is too short: {held} sequences for a batch of {batch}")
        label = domains[d].name if list(order).count(d) == 1 else f"{domains[d].name}_{list(order)[: i + 1].count(d)}"
        experiences.append({"name": label, "domain": d, "first": first[d], "sequences": size, "steps": steps})
        first[d] += size
    evals = []
    for d in dict.fromkeys(order):
        number = min(max(1, eval_tokens // context), sequences.count(len(domains[d].validation), context))
        if number < 1:
            raise UserError(f"the validation text of {domains[d].name} is shorter than a context of {context} tokens")
        evals.append(_eval(domains[d], d, number, context, list(order).index(d)))
    limits = asdict(TokenBudget(**(budget or {})))
    plain = tuple(map(_domain, domains))
    made = TokenManifest(KIND, vocab, context, batch, plain, tuple(experiences), tuple(evals), limits)
    check(made)
    return TokenScenario(name, made, tuple(domains), Probing(probe_sequences, probe_evenly))


def _domain(d: Domain) -> dict[str, Any]:
    return {"name": d.name, "sha256": d.sha256, "train_tokens": len(d.train), "validation_tokens": len(d.validation)}


def _eval(domain: Domain, d: int, number: int, context: int, first_seen: int) -> dict[str, Any]:
    return {
        "name": domain.name,
        "domain": d,
        "sequences": number,
        "first_seen": first_seen,
        "tokens": number * context,
        "floor": domain.floor,
        "bytes_per_token": domain.bytes_per_token,
    }
