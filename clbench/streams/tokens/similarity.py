"""How alike texts are, and orders of them from near to near or from far to far. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST = 1 << 20  # tokens of a text that are counted
BUCKETS = 1 << 16  # of pairs of tokens; with a vocabulary above 256 several pairs share one
STEP = 1e-4  # distances are counted in it, so that ties are the same on every machine


def pair_shares(text: np.ndarray, vocab: int) -> np.ndarray:
    """How often each pair of neighbours occurs in the front of a text [M] -> [min(vocab^2, BUCKETS)] float64, sum 1."""
    tokens = np.asarray(text[:MOST]).astype(np.int64)
    size = min(vocab * vocab, BUCKETS)
    counts = np.bincount((tokens[:-1] * vocab + tokens[1:]) % size, minlength=size)
    return counts / counts.sum()


def distances(texts: Sequence[np.ndarray], vocab: int) -> np.ndarray:
    """Jensen-Shannon divergences of the texts' pairs of tokens, in steps of 1e-4 nats -> [K, K] int64, 0 .. 6931."""
    shares = [pair_shares(text, vocab) for text in texts]
    found = np.zeros((len(texts), len(texts)), np.int64)
    for i, p in enumerate(shares):
        for j in range(i):
            middle = (p + shares[j]) / 2
            nats = _entropy(middle) - (_entropy(p) + _entropy(shares[j])) / 2
            found[i, j] = found[j, i] = round(max(nats, 0.0) / STEP)
    return found


def _entropy(p: np.ndarray) -> float:
    some = p[p > 0]
    return float(-(some * np.log(some)).sum())


def chain(d: np.ndarray, kept: int, near: bool) -> list[int]:
    """The first `kept` (at least one) as they stand, then always the nearest, or farthest, of those that are left."""
    order = list(range(max(1, kept)))
    left = list(range(len(order), len(d)))
    while left:
        row = d[order[-1], left]
        order.append(left.pop(int(row.argmin() if near else row.argmax())))
    return order


def closeness(d: np.ndarray, every: np.ndarray) -> np.ndarray:
    """Minus the mean distance of neighbours in orders [P, K], in nats -> [P]: the higher, the more gradual the stream."""
    return -d[every[:, :-1], every[:, 1:]].mean(1) * STEP
