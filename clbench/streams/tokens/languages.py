"""Families of synthetic languages with a known entropy and an adjustable shift between them. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.tokens.markov import Hmm, Markov, Source

Kind = Literal["markov", "hmm"]
# Row sum of the counts over the vocabulary size, before rounding to a power of two; the rarest word has count 1.
_COUNTS_PER_WORD = 64
_MOST_COUNTS = 1 << 25


def synthetic(states: int, vocab: int, kind: Kind, shift: float, index: int, seed: int) -> Source:
    """Language number `index` of a family.

    states  hidden states, or for kind "markov" vocab ** m: the next word depends on the last m words
    shift   0: all languages of the family are the same; 1: language `index` shares nothing with language 0. In between, of a
            chain: the share of states (rounded up) with successors of their own, the rest as in language 0, which keeps
            the entropy. Of an HMM: every probability is interpolated linearly from language 0's to its own, which raises the
            entropy on the way; replaced states would not do, the divergence could fall where the shift grows.
    The divergence from language 0 grows with the shift. Raises `UserError` for numbers out of range.
    """
    if kind not in ("markov", "hmm"):
        raise UserError(f"kind of language must be markov or hmm, got {kind!r}")
    for name, value, least, most in (
        ("states", states, 2, 1 << 20),
        ("vocab", vocab, 2, 1 << 16),
        ("index", index, 0, 1 << 30),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UserError(f"{name} of a language must be a whole number from {least} to {most}, got {value!r}")
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 <= shift <= 1:
        raise UserError(f"shift between languages must be from 0 to 1, got {shift!r}")
    order = next(m for m in range(1, 64) if vocab**m >= states)
    if kind == "markov" and vocab**order != states:
        raise UserError(f"a markov language of {vocab} words has {vocab}, {vocab**2}, ... states, not {states}")
    if states * _row_sum(max(vocab, states if kind == "hmm" else 0)) > _MOST_COUNTS:
        raise UserError(f"a {kind} language of {states} states and {vocab} words is too large to be tabulated")
    if kind == "markov":
        own = math.ceil(shift * states) if index else 0
        rows = rng.permutation(rng.key("language", seed, "rows"), states)[:own]
        counts = _table(states, vocab, 0, seed, "successors")
        counts[rows] = _table(states, vocab, index, seed, "successors")[rows]
        return Markov(counts)
    tables = []
    for what, words in (("moves", states), ("words", vocab)):
        first, last = (_table(states, words, i, seed, what) for i in (0, index))
        tables.append(_between(first, last, float(shift)))
    return Hmm(*tables)


def _row_sum(words: int) -> int:
    return 1 << (_COUNTS_PER_WORD * words - 1).bit_length()


def _table(states: int, words: int, index: int, seed: int, what: str) -> np.ndarray:
    """Counts [states, words] of language `index`."""
    table = np.empty((states, words), np.int64)
    shapes = [_zipf(words, exponent) for exponent in (1, 2, 3)]
    for row in range(states):
        key = rng.key("language", seed, what, index, row)
        # random ranking biased to low ids, Gumbel-like: frequent words come early in many rows, as in natural text
        race = (rng.bits(key, np.arange(words)) >> np.uint64(40)).astype(np.int64) * (np.arange(words) + words // 4 + 1)
        table[row, np.argsort(race, kind="stable")] = shapes[rng.key(key, "shape") % 3]
    return table


def _between(first: np.ndarray, last: np.ndarray, shift: float) -> np.ndarray:
    """Linear interpolation of two count tables; the rounding remainder goes to the largest count of each row."""
    part = round(shift * (1 << 20))
    mixed = (first * ((1 << 20) - part) + last * part) >> 20
    mixed[np.arange(len(mixed)), mixed.argmax(1)] += first.sum(1) - mixed.sum(1)
    return mixed


def _zipf(words: int, exponent: int) -> np.ndarray:
    """Counts by rank: at least 1, the rest in proportion to 1 / rank ** exponent, the remainder to the first."""
    size = _row_sum(words)
    weights = [(1 << 60) // rank**exponent for rank in range(1, words + 1)]
    total = sum(weights)
    counts = [1 + (size - words) * weight // total for weight in weights]
    counts[0] += size - sum(counts)
    return np.array(counts, np.int64)
