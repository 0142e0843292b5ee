"""Statistics over runs: pure functions on numbers, with a generator of their own. Nothing here reads a record.

A *stratum* holds the runs of one class order (one manifest); within it runs differ by training seed. Intervals resample runs
within their stratum (stratified bootstrap, percentiles), so they speak of the orders at hand and of no others.
Sources: Agarwal et al. 2021 (rliable: interquartile mean, profiles, probability of improvement), Holm 1979, Searle 1971.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Strata = Sequence[Sequence[float]]
LEVEL = 0.95
RESAMPLES = 2000
_EXACT = 14  # up to 2**14 sign patterns are counted one by one


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and unbiased standard deviation; None where there is no value, or no spread to measure (fewer than two)."""
    found = [v for v in values if math.isfinite(v)]
    if not found:
        return None, None
    mean = math.fsum(found) / len(found)
    if len(found) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (len(found) - 1))


def iqm(values: Any) -> Any:
    """Interquartile mean along the last axis [..., n] -> [...]: the floor(n / 4) lowest and highest are left out.

    Whole runs only, as rliable and `scipy.stats.trim_mean(., 0.25)` do it: with fewer than four runs it is the mean.
    """
    ordered = np.sort(np.asarray(values, np.float64), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def mean(values: Any) -> Any:
    """Mean along the last axis [..., n] -> [...]."""
    return np.asarray(values, np.float64).mean(-1)


def merged(strata: Strata) -> list[list[float]]:
    """Strata without empty ones; those of a single run cannot be resampled alone and become one stratum together."""
    single = [v for s in strata if len(s) == 1 for v in s]
    return [list(s) for s in strata if len(s) > 1] + ([single] if single else [])


def generator(seed: int) -> np.random.Generator:
    """The own generator: no global state is read or changed."""
    return np.random.Generator(np.random.PCG64(seed))


@functools.lru_cache(maxsize=64)
def _draws(sizes: tuple[int, ...], resamples: int, seed: int) -> Array:
    """Indices [R, n] into the runs of all strata one after another: each stratum is drawn from itself, with its own size."""
    random, start, parts = generator(seed), 0, []
    for size in sizes:
        parts.append(start + random.integers(0, size, (resamples, size)))
        start += size
    drawn = np.concatenate(parts, axis=1)
    drawn.setflags(write=False)
    return drawn


def bootstrap(
    strata: Strata,
    statistic: Callable[[Any], Any] = mean,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of a statistic by stratified resampling -> (low, high), or None with fewer than two runs.

    `statistic` maps runs [R, n] to [R]. Values that are not finite must be left out before. The order of the runs is no matter.
    """
    kept = merged(strata)
    values = np.concatenate([np.sort(np.asarray(s, np.float64)) for s in kept]) if kept else np.zeros(0)
    if len(values) < 2:
        return None
    made = statistic(values[_draws(tuple(len(s) for s in kept), resamples, seed)])
    low, high = np.quantile(made, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Differences of paired runs: number, mean, bootstrap interval, p of the paired t-test and of the sign-flip test.

    `p_t` and `p_flip` are None with fewer than two pairs; `p_least` is the smallest p that flipping that many signs can give.
    `level` is True where all differences are one and the same number, so that there is no spread to test with.
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p_t: float | None
    p_flip: float | None
    p_least: float | None
    level: bool


def paired(strata: Strata, *, seed: int = 0) -> Paired:
    """Two-sided tests of differences (one list per stratum) against zero; all pairs weigh the same.

    The t-test is that of `scipy.stats.ttest_1samp`. Without any spread it has no answer: then p is 1 for differences of zero
    and 0 otherwise, and `level` says so. The sign-flip test is exact up to 14 pairs, and drawn 20,000 times from there on.
    """
    flat = np.array([v for s in strata for v in s], np.float64)
    n = len(flat)
    if n == 0:
        return Paired(0, None, None, None, None, None, None, False)
    centre, p = t_test(flat.tolist())
    if n == 1:
        return Paired(1, centre, None, None, None, None, None, False)
    low, high = bootstrap(strata, seed=seed) or (None, None)
    level = bool(np.ptp(flat) <= 1e-12 * max(1.0, float(np.abs(flat).max())))
    return Paired(n, centre, low, high, p, sign_flip(flat, seed=seed), min(1.0, 2.0 ** (1 - n)), level)


def t_test(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean of paired differences and two-sided p of the paired t-test -> (mean, p); p is None with fewer than two.

    Without any spread p is 1 for differences of zero and 0 otherwise.
    """
    mean, std = mean_std(differences)
    if mean is None or std is None:
        return mean, None
    if std <= 1e-12 * max(1.0, abs(mean)):
        return mean, 1.0 if abs(mean) <= 1e-12 else 0.0
    from scipy import special  # `scipy.stats` gives the same number after a second of imports

    return mean, float(2 * special.stdtr(len(differences) - 1, -abs(mean) / (std / math.sqrt(len(differences)))))


def verdict(mean: float | None, p: float | None, alpha: float = 0.05) -> str:
    """What a difference with an (adjusted) p says: `better`, `worse`, `not distinguishable` or `too few seeds`."""
    if mean is None or p is None:
        return "too few seeds"
    return "not distinguishable" if p >= alpha else "better" if mean > 0 else "worse"


LETTERS = {"best": "*", "not distinguishable": "=", "too few seeds": "?", "better": "+"}
LEGEND = {
    "best": "best mean on its stream among contenders",
    "not distinguishable": "not distinguishable from it on shared seeds (paired t-test, Holm-adjusted p >= 0.05)",
    "too few seeds": "cannot be told: fewer than two seeds shared with it",
}


def legend(words: Iterable[str | None]) -> list[str]:
    """What the letters mean that stand for these verdicts."""
    used = set(words)
    return [f"  {letter}  {LEGEND[name]}" for name, letter in LETTERS.items() if name in used and name in LEGEND]


def against_best(field: Sequence[tuple[dict[str, Any], Sequence[Any]]], metric: str, lower: bool = False) -> None:
    """Fill `vs_best` and `vs_best_p` of the contenders on one stream: (row, its runs) each, the best by its mean.

    Holm's adjustment runs over all that share two seeds with the best. `lower`: lower is better.
    """
    sign = -1.0 if lower else 1.0
    best, best_runs = max(field, key=lambda pair: sign * pair[0][f"{metric}_mean"])
    others = [(row, runs) for row, runs in field if row is not best]
    base = {run.seed: run.values[metric] for run in best_runs if metric in run.values}
    tests = []
    for _, runs in others:
        tests.append(t_test([sign * (r.values[metric] - base[r.seed]) for r in runs if r.seed in base and metric in r.values]))
    best["vs_best"] = "best"
    for (row, _), (mean, _), p in zip(others, tests, holm([p for _, p in tests]), strict=True):
        row["vs_best_p"] = p
        row["vs_best"] = verdict(mean, p)


def sign_flip(differences: Any, *, seed: int = 0, draws: int = 20_000) -> float:
    """Two-sided p of a sign-flip permutation test of the mean [n]: the share of sign patterns with a mean as far from zero.

    Exact (every pattern) up to 14 differences; beyond, `draws` random patterns with the observed one counted in.
    """
    d = np.asarray(differences, np.float64)
    n = len(d)
    seen = abs(d.sum()) * (1 - 1e-12) - 1e-15
    if n <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
        return float((np.abs(signs @ d) >= seen).mean())
    signs = generator(seed).choice((-1.0, 1.0), (draws, n))
    return float(((np.abs(signs @ d) >= seen).sum() + 1) / (draws + 1))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment over the tests that were made; None stays None."""
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i] or 0.0)
    out: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * float(ps[i] or 0.0)))
        out[i] = highest
    return out


def improvement(x: Strata, y: Strata) -> float | None:
    """P(X > Y) + P(X = Y) / 2 over all pairs of runs within a stratum, averaged over strata with equal weight."""
    parts = [
        _above(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(x, y, strict=True) if len(a) and len(b)
    ]
    return float(np.mean(parts)) if parts else None


def _above(a: Array, b: Array) -> Any:
    """[..., n], [..., m] -> [...]."""
    gap = a[..., :, None] - b[..., None, :]
    return ((gap > 0) + 0.5 * (gap == 0)).mean((-1, -2))


def improvement_interval(
    x: Strata, y: Strata, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap percentile interval of `improvement`: runs of both sides are drawn anew within each stratum.

    None where no stratum has two runs on a side: there is nothing to draw from.
    """
    random, parts = generator(seed), []
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(x, y, strict=True) if len(a) and len(b)]
    if not any(max(len(a), len(b)) > 1 for a, b in pairs):
        return None
    for a, b in pairs:
        drawn = [v[random.integers(0, len(v), (resamples, len(v)))] for v in (a, b)]
        parts.append(_above(*drawn))
    low, high = np.quantile(np.mean(parts, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def profile(scores: Mapping[str, Sequence[float]], thresholds: Sequence[float]) -> list[float]:
    """Performance profile: for each threshold the share of runs above it, averaged over scenarios with equal weight -> [K]."""
    shares = [[float(np.mean(np.asarray(v) > t)) for t in thresholds] for _, v in sorted(scores.items()) if len(v)]
    return [float(v) for v in np.mean(shares, axis=0)] if shares else [math.nan] * len(thresholds)


@dataclass(frozen=True)
class Split:
    """Variance of a run's result, in squares of its unit: between class orders and between seeds of one order.

    `truncated`: the estimate of `order` was negative and is given as 0. `share` is order / (order + noise), None if both are 0.
    """

    order: float
    noise: float
    truncated: bool
    share: float | None
    orders: int
    runs: int


def variance_split(strata: Strata) -> Split | str:
    """One-way random-effects analysis of variance (orders are the groups), also for unequal groups -> the split, or why not.

    noise = MS_within; order = (MS_between - MS_within) / n0, n0 = (N - sum n_k^2 / N) / (k - 1).
    """
    groups = [np.asarray(s, np.float64) for s in strata if len(s)]
    k, total = len(groups), sum(len(g) for g in groups)
    if k < 2:
        return "one class order: its share cannot be told from training noise"
    if total == k:
        return "one seed in each class order: order and training noise cannot be told apart"
    grand = sum(float(g.sum()) for g in groups) / total
    within = sum(float(((g - g.mean()) ** 2).sum()) for g in groups) / (total - k)
    between = sum(len(g) * float(g.mean() - grand) ** 2 for g in groups) / (k - 1)
    n0 = (total - sum(len(g) ** 2 for g in groups) / total) / (k - 1)
    order = (between - within) / n0
    kept = max(0.0, order)
    return Split(kept, within, order < 0, kept / (kept + within) if kept + within > 0 else None, k, total)
