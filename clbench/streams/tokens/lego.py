"""LEGO chains as domains of a stream, one skill each (after Chen et al. 2023, "Skill-it!", arXiv 2307.14430). Imports no torch.

A row is a chain of `clauses` letters with a bit each, in random order, and what one of them is:

    c = not a; a = val 1; f = val c. Output: f = val 0,

The first letter has its bit; each of the others says that it is as the one before it (`val`) or not (`not`). Bits are
independent and fair, letters distinct, every order of the clauses is equally likely. Skill i asks for number i of the chain:
i + 1 steps of reasoning. Validation rows are other draws. The bit that is asked is one of two for who cannot reason, so the
loss of a row is known exactly: `entropy` for who can, ln 2 more for who cannot.

Each row fills a window of `context` tokens (ASCII), newlines behind it; the last prediction of a window is the first letter of
the next row, which nobody knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.tokens.scenario import Domain, TokenScenario, content_sha256, scenario

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB = 128


def row(clauses: int, skill: int, key: int) -> str:
    """One row of a skill, drawn by `key`."""
    letters = [LETTERS[i] for i in rng.permutation(rng.key(key, "letters"), len(LETTERS))[:clauses]]
    bits = (rng.bits(rng.key(key, "bits"), np.arange(clauses)) >> np.uint64(63)).astype(int).tolist()
    said = [f"{letters[0]} = val {bits[0]}"]
    for i in range(1, clauses):
        said.append(f"{letters[i]} = {'val' if bits[i] == bits[i - 1] else 'not'} {letters[i - 1]}")
    order = rng.permutation(rng.key(key, "order"), clauses)
    return f"{'; '.join(said[i] for i in order)}. Output: {letters[skill]} = val {bits[skill]},"


def entropy(clauses: int) -> float:
    """Nats of a row: letters, bits, order. What is asked follows from them."""
    letters = sum(math.log(len(LETTERS) - i) for i in range(clauses))
    return letters + clauses * math.log(2) + math.lgamma(clauses + 1)


def rows(clauses: int, skill: int, number: int, context: int, key: int) -> np.ndarray:
    """So many rows, each in `context` tokens, and one token more -> [number * context + 1] uint8."""
    text = "".join(row(clauses, skill, rng.key(key, i)).ljust(context, "\n") for i in range(number))
    return np.frombuffer((text + row(clauses, skill, rng.key(key, number))[0]).encode("ascii"), np.uint8)


def lego(
    *,
    name: str,
    clauses: int = 3,
    order: Sequence[int] = (0, 1, 2),
    seed: int = 0,
    tokens: int = 400_000,
    context: int = 64,
    batch: int = 16,
    eval_tokens: int = 16_384,
    probe_sequences: int = 16,
    probe_evenly: int = 16,
    budget: Mapping[str, Any] | None = None,
    evaluators: Sequence[str] = (),
) -> TokenScenario:
    """Skills one after another: `order[i]` is the skill of experience i; the same skill again reads other rows."""
    if isinstance(clauses, bool) or not isinstance(clauses, int) or not 2 <= clauses <= len(LETTERS):
        raise UserError(f"scenario.clauses must be a whole number from 2 to {len(LETTERS)}, got {clauses!r}")
    if not order or any(type(i) is not int or not 0 <= i < clauses for i in order):
        raise UserError(f"scenario.order must name skills 0..{clauses - 1}, got {list(order)}")
    size = len(row(clauses, 0, 0))
    if context < size + 1:
        raise UserError(f"scenario.context must be at least {size + 1} for {clauses} clauses, got {context}")
    made = []
    for skill in range(max(order) + 1):
        times = max(1, list(order).count(skill))
        train = rows(clauses, skill, times * max(1, tokens // context), context, rng.key("lego", seed, skill, "train"))
        held = rows(clauses, skill, max(1, eval_tokens // context), context, rng.key("lego", seed, skill, "validation"))
        floor = round(entropy(clauses) / context, 9)  # its own first letter is given, the next one's is asked
        made.append(Domain(f"skill_{skill}", train, held, content_sha256(train, held), floor))
    options: dict[str, Any] = {"tokens": tokens, "context": context, "batch": batch, "eval_tokens": eval_tokens}
    options |= {"probe_sequences": probe_sequences, "probe_evenly": probe_evenly, "budget": budget, "evaluators": evaluators}
    return scenario(name, made, order, vocab=VOCAB, **options)
