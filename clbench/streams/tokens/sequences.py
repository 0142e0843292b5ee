"""Sequence order: keyed permutations of any length in constant memory, and windows of a token array.

No shuffle is stored and none is replayed: position p of a stream of n sequences is a pure function of a key, so a batch can be
asked for at any step, on any machine, in any order.
"""

from __future__ import annotations

import mmap

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng

_ROUNDS = 4
_HELD = 16 << 20  # bytes of a mapped file that may stay resident
_FAULT = 1 << 16  # what a read of one byte makes resident: the system maps the pages around it as well


def permuted(key: int, n: int, positions: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of range(n) sends `positions` [...] in 0..n-1 -> [...] int64; no table of n entries is made.

    A Feistel network over the smallest even number of bits that hold n; values outside are sent on until they fall inside
    (cycle walking), which keeps it a bijection of range(n). Black & Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    assert n > 0
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = [rng.key(key, i) for i in range(_ROUNDS)]
    x = np.asarray(positions).astype(np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = x[outside] >> shift, x[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (rng.bits(round_key, right) & mask)
        x[outside] = (left << shift) | right
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


def passes(key: int, n: int, positions: np.ndarray, first_in_order: bool = False) -> np.ndarray:
    """Endless passes over range(n), each in an order of its own: positions [B] from 0 -> [B] int64 in 0..n-1.

    `first_in_order`: the first pass is 0, 1, 2, ...
    """
    positions = np.asarray(positions, np.int64)
    number, inside = np.divmod(positions, n)
    found = np.empty_like(positions)
    for one in np.unique(number):
        rows = number == one
        plain = first_in_order and one == 0
        found[rows] = inside[rows] if plain else permuted(rng.key(key, "pass", int(one)), n, inside[rows])
    return found


def own(numbers: np.ndarray, size: int, name: str) -> np.ndarray:
    """Numbers of sequences that a part of `size` has; `UserError` where one lies outside: it belongs to somebody else."""
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < size:
        raise UserError(f"{name} has the sequences 0..{size - 1}, asked for {numbers.min()}..{numbers.max()}")
    return numbers


def count(num_tokens: int, context: int) -> int:
    """Sequences of `context` predictions that `num_tokens` tokens hold: each needs one token more, shared with the next."""
    return max(0, (num_tokens - 1) // context)


def windows(tokens: np.ndarray, ids: np.ndarray, context: int) -> np.ndarray:
    """Sequences by id -> [B, context + 1] int64; sequence i starts at token i * context."""
    found = tokens[np.asarray(ids, np.int64)[:, None] * context + np.arange(context + 1)].astype(np.int64)
    if isinstance(tokens, np.memmap):
        _release(tokens, len(found) * (max(mmap.PAGESIZE, _FAULT) + context * tokens.itemsize))
    return found


def _release(tokens: np.memmap, touched: int) -> None:
    """Give back the pages of a mapped file from time to time: they stay in the system's cache, not in this process.

    Without this a run that reads all over a corpus grows until it is as large as the corpus; and without the other advice the
    system reads megabytes around each sequence that is not in its cache.
    """
    mapped, seen = getattr(tokens, "_mmap", None), vars(tokens)
    if not isinstance(mapped, mmap.mmap) or tokens.mode != "r" or not hasattr(mmap, "MADV_DONTNEED"):
        return
    if "touched" not in seen:
        mapped.madvise(mmap.MADV_RANDOM)
    seen["touched"] = seen.get("touched", 0) + touched
    if seen["touched"] > _HELD:
        mapped.madvise(mmap.MADV_DONTNEED)
        seen["touched"] = 0
