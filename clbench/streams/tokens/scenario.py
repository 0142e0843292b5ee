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

from clbench.interfaces import Budget, Experience, Facts, UserError
from clbench.streams import rng
from clbench.streams.manifest import Manifest
from clbench.streams.manifest_text import described
from clbench.streams.tokens import questions, sequences
from clbench.streams.tokens.data import Source, TokenData, text_source
from clbench.streams.tokens.layout import laid_out


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

    def source(self, context: int, first: int, key: int) -> Source:
        """Training sequences of all experiences."""
        return text_source(self.train, context)

    def evaluation(self, number: int, context: int) -> np.ndarray:
        """Sequences of the validation text -> [number, context + 1] int64."""
        return eval_windows(self.validation, number, context)


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


@dataclass(frozen=True, eq=False)
class TokenScenario:
    """A stream of domains that can be run: the manifest, the tokens, the rules."""

    name: str
    manifest: Manifest
    domains: tuple[Any, ...]  # Domain, or what has its `source` and `evaluation`
    probing: Probing = field(default_factory=Probing)
    asks: ClassVar[Literal["loss"]] = "loss"

    @property
    def budget(self) -> Budget:
        """Tokens (images) and bytes that a learner may use."""
        return Budget(**self.manifest.budget)

    @property
    def iid(self) -> bool:
        """Whether all experiences are of one domain: then nothing shifts."""
        return self.manifest.iid

    def facts(self) -> Facts:
        """What is compared with a learner's capabilities."""
        text = self.manifest.unit != "images"
        return Facts(self.name, "loss", False, True, False, self.budget, one_domain=self.iid, has_text=text)

    def data(self, index: int) -> TokenData:
        """The training text of experience `index`. Order, masks and views depend on the stream, not on the seed of the run."""
        m, entry = self.manifest, self.manifest.experiences[index]
        domain = self.domains[entry.domain]
        key = rng.key("order", int(domain.sha256[:16], 16))
        return TokenData.of(entry, domain.source(m.context, entry.first, key), m.context, m.batch, key)

    def experience(self, index: int, past: bool) -> Experience:
        """What a learner sees of experience `index`; `past`: the texts of earlier ones, too."""
        data: list[Any] = [self.data(i) for i in range(index * (not past), index + 1)]
        return Experience(index, data[-1].name, data[-1], (), (), (), 0, None, self.budget, tuple(data[:-1]))

    def evaluation(self, j: int) -> np.ndarray:
        """Sequences of evaluation set j -> [N, context + 1] int64."""
        entry = self.manifest.evals[j]
        return self.domains[entry.domain].evaluation(entry.sequences, self.manifest.context)

    @property
    def of_bytes(self) -> bool:
        """Whether every token is a byte of text."""
        return self.manifest.vocab == 256 and all(entry.bytes_per_token == 1 for entry in self.manifest.evals)

    def text(self) -> str:
        """The stream for people."""
        return self.manifest.text()

    def describe(self) -> dict[str, Any]:
        """What a record says about the stream and its evaluation sets."""
        found = described(self.manifest)
        return {**found, "scenario": {"name": self.name, **found["scenario"], "probing": asdict(self.probing)}}


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
    evaluators: Sequence[str] = (),
) -> TokenScenario:
    """Lay experiences over domains: `order[i]` is read in experience i, for `tokens` (of all, or of each) tokens.

    A text that is too short for its experiences is read several times; the record's ledger says so.
    `evaluators` names what is asked of a learner beside its loss.
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
    asked = evaluator_names(evaluators)
    parts = []
    for i, d in enumerate(order):
        steps = amounts[i] // (batch * context)
        held = sequences.count(len(domains[d].train), context) // list(order).count(d)
        size = min(steps * batch, held)
        if size < batch:
            raise UserError(f"the text of {domains[d].name} is too short: {held} sequences for a batch of {batch}")
        parts.append((size, steps))
    number = {}
    for d in dict.fromkeys(order):
        number[d] = min(max(1, eval_tokens // context), sequences.count(len(domains[d].validation), context))
        if number[d] < 1:
            raise UserError(f"the validation text of {domains[d].name} is shorter than a context of {context} tokens")
    made = laid_out(domains, order, parts, number, vocab=vocab, context=context, batch=batch, budget=budget, evaluators=asked)
    stream = TokenScenario(name, made, tuple(domains), Probing(probe_sequences, probe_evenly))
    if asked:
        sets = [(entry.name, stream.evaluation(j)) for j, entry in enumerate(made.evals)]
        questions.check(asked, sets, stream.of_bytes)
    return stream


def evaluator_names(names: Any) -> tuple[str, ...]:
    """`scenario.evaluators`, each once; `UserError` where it is no list of names."""
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names or ()):
        raise UserError(f"scenario.evaluators must be a list of names, got {names!r}")
    return tuple(dict.fromkeys(names or ()))
