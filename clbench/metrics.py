"""Every average by name: pure NumPy functions on accuracy matrices made from counts. Values are fractions in 0..1.

a [T, E]        accuracy on evaluation set j after experience i; NaN where it was not evaluated
n [E]           samples of each set
first_seen [E]  the experience that belongs to each set; a set counts as seen from then on

What other libraries compute under these names is in `compat` (`metrics.compat`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clbench import compat

__all__ = ["compat"]

Array = np.ndarray


def accuracy(correct: Any, n: Any) -> Array:
    """Counts [T, E] (None for unevaluated) and sizes [E] -> accuracies [T, E] with NaN."""
    counts = np.array([[np.nan if c is None else c for c in row] for row in correct], dtype=np.float64)
    return counts / np.asarray(n, np.float64)


def _seen(a: Array, first_seen: Any) -> Array:
    """Cells of sets that belong to the past or present of their row [T, E] bool."""
    return np.asarray(first_seen)[None, :] <= np.arange(len(a))[:, None]


def _mean(values: Array) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def macro(a: Array, first_seen: Any) -> Array:
    """Per experience: mean accuracy over the sets seen, each set with equal weight -> [T]."""
    return np.array([_mean(row[seen]) for row, seen in zip(a, _seen(a, first_seen), strict=True)])


def micro(a: Array, n: Any, first_seen: Any) -> Array:
    """Per experience: accuracy over all samples of the sets seen -> [T]."""
    n = np.asarray(n, np.float64)
    seen = _seen(a, first_seen)
    return np.array([float((row * n)[s].sum() / n[s].sum()) if s.any() else np.nan for row, s in zip(a, seen, strict=True)])


def last_macro(a: Array, first_seen: Any) -> float:
    """`macro` after the last experience (A_B, FAA, A_N)."""
    return float(macro(a, first_seen)[-1])


def last_micro(a: Array, n: Any, first_seen: Any) -> float:
    """`micro` after the last experience."""
    return float(micro(a, n, first_seen)[-1])


def step_macro(a: Array, first_seen: Any) -> float:
    """Mean of `macro` over all experiences (A-bar)."""
    return _mean(macro(a, first_seen))


def step_micro(a: Array, n: Any, first_seen: Any) -> float:
    """Mean of `micro` over all experiences: the A-bar of PyCIL and PILOT, without their rounding."""
    return _mean(micro(a, n, first_seen))


def triangle_macro(a: Array, first_seen: Any) -> float:
    """Mean over all cells of seen sets (Diaz-Rodriguez et al. 2018: A)."""
    return _mean(a[_seen(a, first_seen)])


def own(a: Array, first_seen: Any) -> Array:
    """Accuracy of each set right after its own experience -> [E]."""
    return np.array([a[i, j] for j, i in enumerate(first_seen)])


def _old(a: Array, first_seen: Any) -> list[int]:
    return [j for j, i in enumerate(first_seen) if i < len(a) - 1]


def forgetting(a: Array, first_seen: Any) -> float:
    """Chaudhry et al. 2018: mean over old sets of (best from its own experience to the last but one) - final.

    NaN with a single experience: nothing can be forgotten yet.
    """
    return _mean(np.array([a[first_seen[j] : -1, j].max() - a[-1, j] for j in _old(a, first_seen)]))


def forgetting_diagonal(a: Array, first_seen: Any) -> float:
    """Mean over old sets of (right after its own experience) - final; may be negative."""
    return -bwt(a, first_seen)


def bwt(a: Array, first_seen: Any) -> float:
    """Backward transfer (Lopez-Paz & Ranzato 2017): mean over old sets of final - (right after its own experience)."""
    return _mean(np.array([a[-1, j] - a[first_seen[j], j] for j in _old(a, first_seen)]))


def bwt_all(a: Array, first_seen: Any) -> float:
    """Backward transfer over all later rows (Diaz-Rodriguez et al. 2018): mean over pairs i > own experience."""
    return _mean(
        np.array([a[i, j] - a[first_seen[j], j] for j in _old(a, first_seen) for i in range(first_seen[j] + 1, len(a))])
    )


def fwt_zeroshot(a: Array, first_seen: Any) -> float:
    """Mean accuracy on each set just before its own experience, no baseline subtracted; NaN where it was not evaluated."""
    return _mean(np.array([a[i - 1, j] for j, i in enumerate(first_seen) if i > 0 and not np.isnan(a[i - 1, j])]))


def fwt_init(a: Array, first_seen: Any, baseline: Any) -> float:
    """Forward transfer (Lopez-Paz & Ranzato 2017): `fwt_zeroshot` minus the accuracy [E] of the untrained model."""
    gains = [a[i - 1, j] - baseline[j] for j, i in enumerate(first_seen) if i > 0 and not np.isnan(a[i - 1, j])]
    return _mean(np.array(gains))


def plasticity(a: Array, first_seen: Any) -> float:
    """Mean accuracy of each set right after its own experience (mean diagonal, learning accuracy)."""
    return _mean(own(a, first_seen))


def intransigence(a: Array, first_seen: Any, reference: Any) -> float:
    """Chaudhry et al. 2018: mean of (a reference's accuracy [E], e.g. joint training) - (right after its own experience)."""
    return _mean(np.asarray(reference, np.float64) - own(a, first_seen))


def worst(a: Array, first_seen: Any) -> float:
    """Lowest final accuracy of a seen set."""
    return float(a[-1][_seen(a, first_seen)[-1]].min())


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number of one record that its counts allow, by name."""
    if not isinstance(record.get("correct"), list):
        return {}
    n, first = record["n"], record["first_seen"]
    a = accuracy(record["correct"], n)
    values = {
        "step_macro": step_macro(a, first),
        "step_micro": step_micro(a, n, first),
        "last_macro": last_macro(a, first),
        "last_micro": last_micro(a, n, first),
        "triangle_macro": triangle_macro(a, first),
        "forgetting": forgetting(a, first),
        "forgetting_diagonal": forgetting_diagonal(a, first),
        "bwt": bwt(a, first),
        "bwt_all": bwt_all(a, first),
        "fwt_zeroshot": fwt_zeroshot(a, first),
        "plasticity": plasticity(a, first),
        "worst": worst(a, first),
    }
    if isinstance(record.get("correct_masked"), list):
        masked = accuracy(record["correct_masked"], n)
        values["last_masked_macro"] = last_macro(masked, first)
    if isinstance(record.get("correct_top5"), list):
        values["last_top5_micro"] = last_micro(accuracy(record["correct_top5"], n), n, first)
    return values
