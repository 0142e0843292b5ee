"""The next schedule from the gradient norms of a run (Defazio et al. 2023, arXiv 2310.07831). Imports no torch.

The bound on the last iterate is least, for gradients whose norms G_n do not depend on the rates, with
    eta_n ~ w_n sum_{p > n} w_p,     w = G^-2 for SGD (l2 norms), G^-1 for methods of the Adam kind (l1 norms);
norms that stay the same give linear decay, falling ones a warm-up. Run, refine, tune the base rate, run again; may be repeated.

Norms are smoothed by a median over 2 floor(floor(0.1 N) / 2) + 1 updates (the first value stands before the beginning, the end
is mirrored) after values that are not finite, the first two and the last two are left out. The released code takes the width of
10 000 updates whatever N is, right for the runs that it stretches to that length; here it is that of N, as in the paper.

Choices of this file: smoothed norms below 1e-3 of their median count as that, so that a run whose gradient vanishes has a
finite schedule; a table of fewer values is read off at equal distances, and its largest is 1 again.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from clbench.interfaces import UserError

SPAN = 0.1
FLOOR = 1e-3
LEAST = 10  # norms
Array = np.ndarray


def cleaned(norms: Array) -> Array:
    """Norms [N] without those that are not finite, and without the first and last two of the rest."""
    found = np.asarray(norms, float)
    return found[np.isfinite(found)][2:-2]


def smoothed(norms: Array, span: float = SPAN) -> Array:
    """Running median of [N], over `span` of them."""
    half = int(span * len(norms)) // 2
    if not half:
        return np.asarray(norms, float)
    padded = np.concatenate([np.full(half, norms[0]), np.pad(norms, (0, half), mode="reflect")])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def multipliers(norms: Array, kind: Literal["l1", "l2"]) -> Array:
    """The rates [N] that are best for norms [N], the largest 1, the last 0."""
    found = np.asarray(norms, float)
    weights = np.maximum(found, FLOOR * np.median(found)) ** (-1.0 if kind == "l1" else -2.0)
    later = np.cumsum(weights[::-1])[::-1] - weights
    later[-1] = 0.0
    rates = np.maximum(weights * later, 0.0)
    return rates / rates.max()


def refined(norms: Array, kind: Literal["l1", "l2"], number: int) -> Array:
    """`number` multipliers at equal distances of the next schedule; `UserError` for too few norms, or norms of 0."""
    found = cleaned(norms)
    if len(found) < LEAST:
        raise UserError(f"a schedule needs {LEAST + 4} gradient norms or more that are finite, got {len(found)} and the edges")
    if (found < 0).any() or not np.median(smoothed(found)) > 0:
        raise UserError("a schedule needs gradient norms above 0")
    made = multipliers(smoothed(found), kind)
    table = np.interp(np.linspace(0, 1, number), np.linspace(0, 1, len(made)), made)
    return table / table.max()
