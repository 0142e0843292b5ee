"""Statistics over runs, by `scipy.stats`: pure functions on numbers. Nothing here reads a record or a global random state.

A *stratum* holds the runs of one class order (one manifest); within it runs differ by training seed. Intervals resample runs
within their stratum (stratified bootstrap, percentiles), so they speak of the orders at hand and of no others.
Functions with a plural name answer many questions in one call, as fast as one: those of equal sizes share their resamples.
Sources: Agarwal et al. 2021 (rliable: interquartile mean, profiles, probability of improvement), Holm 1979, Searle 1971.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Strata = Sequence[Sequence[float]]
Interval = tuple[float, float] | None
LEVEL = 0.95
RESAMPLES = 2000
_BATCH = 200  # resamples in memory at once; a constant, because the draws depend on it
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
    """Interquartile mean along the last axis [..., n] -> [...]: the floor(n / 4) lowest and highest are left out."""
    from scipy import stats  # loaded where it is used: it takes as long as the rest of a report of a hundred records

    return stats.trim_mean(np.asarray(values, np.float64), 0.25, axis=-1)


def iqms(rows: Sequence[Sequence[float]]) -> list[float]:
    """`iqm` of every row; rows have one value at least."""
    return _by_shape(rows, len, lambda group, _: iqm(group).tolist())


def mean(values: Any) -> Any:
    """Mean along the last axis [..., n] -> [...]."""
    return np.asarray(values, np.float64).mean(-1)


def _by_shape(rows: Sequence[Any], shape: Callable[[Any], Any], answer: Callable[[list[Any], Any], Sequence[Any]]) -> list[Any]:
    """The answers for all rows in their order: `answer(rows of one shape, the shape)` is called once for each shape."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(shape(row), []).append(i)
    out: list[Any] = [None] * len(rows)
    for key, group in groups.items():
        for i, found in zip(group, answer([rows[i] for i in group], key), strict=True):
            out[i] = found
    return out


def merged(strata: Strata) -> list[list[float]]:
    """Strata without empty ones; those of a single run cannot be resampled alone and become one stratum together."""
    single = [v for s in strata if len(s) == 1 for v in s]
    return [list(s) for s in strata if len(s) > 1] + ([single] if single else [])


def bootstrap(strata: Strata, statistic: Callable[[Any], Any] = mean, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """95 % percentile interval of a statistic by stratified resampling -> (low, high), or None with fewer than two runs.

    `statistic` maps runs [..., n] to [...]. Values that are not finite must be left out before. Invariant to the order of runs.
    """
    return bootstraps([strata], statistic, resamples=resamples, seed=seed)[0]


def bootstraps(
    rows: Sequence[Strata], statistic: Callable[[Any], Any] = mean, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """`bootstrap` of every row of strata. A row's interval does not depend on the rows beside it."""

    def answer(group: list[list[list[float]]], sizes: tuple[int, ...]) -> Sequence[Interval]:
        if sum(sizes) < 2:
            return [None] * len(group)
        samples = [np.sort(np.array([row[k] for row in group], np.float64), axis=-1) for k in range(len(sizes))]
        return _intervals(samples, lambda *drawn: statistic(np.concatenate(drawn, axis=-1)), resamples, seed)

    return _by_shape([merged(row) for row in rows], lambda row: tuple(map(len, row)), answer)


def _intervals(samples: Sequence[Array], statistic: Callable[..., Any], resamples: int, seed: int) -> list[Interval]:
    """Percentile intervals of `statistic(*samples)` for samples [G, n_k], each resampled by itself; n_k = 1 stays as it is."""
    from scipy import stats

    drawn = [k for k, s in enumerate(samples) if s.shape[-1] > 1]

    def of(*parts: Array, axis: int) -> Any:  # [G, R, n_k] each
        assert axis == -1
        every = {k: np.broadcast_to(s[:, None], (*parts[0].shape[:-1], 1)) for k, s in enumerate(samples) if k not in drawn}
        every |= zip(drawn, parts, strict=True)
        return statistic(*(every[k] for k in range(len(samples))))

    found = stats.bootstrap(
        [samples[k] for k in drawn],
        of,
        n_resamples=resamples,
        batch=_BATCH,
        vectorized=True,
        axis=-1,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return list(zip(np.atleast_1d(found.low).tolist(), np.atleast_1d(found.high).tolist(), strict=True))


@dataclass(frozen=True)
class Paired:
    """Differences of paired runs: number, mean, bootstrap interval, p of the paired t-test and of the sign-flip test.

    `level`: all differences are one and the same number, as identical runs of deterministic learners give it. They are a single
    observation then: there is no interval, and no p unless all are zero. Nor is there with fewer than two pairs.
    `p_least` is the smallest p that flipping so many signs can give.
    """

    differences: tuple[float, ...]
    n: int
    mean: float | None
    low: float | None
    high: float | None
    p_t: float | None
    p_least: float | None
    level: bool

    @functools.cached_property
    def p_flip(self) -> float | None:
        """The p of the sign-flip test, computed when it is asked for."""
        return None if self.p_t is None else sign_flip(self.differences)


def paired(strata: Strata) -> Paired:
    """Two-sided tests of differences (one list per stratum) against zero; all pairs weigh the same."""
    return pairs([strata])[0]


def pairs(rows: Sequence[Strata]) -> list[Paired]:
    """`paired` of every row of strata."""
    flat = [tuple(float(v) for s in strata for v in s) for strata in rows]
    made = []
    for d, (centre, p), interval in zip(flat, t_tests(flat), bootstraps(rows), strict=True):
        level = len(d) > 1 and is_level(d)
        low, high = (None, None) if interval is None or level else interval
        made.append(Paired(d, len(d), centre, low, high, p, min(1.0, 2.0 ** (1 - len(d))) if len(d) > 1 else None, level))
    return made


def is_level(differences: Sequence[float]) -> bool:
    """Whether all differences are one and the same number, up to rounding."""
    return max(differences) - min(differences) <= 1e-12 * max(1.0, *map(abs, differences))


def t_test(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean of paired differences and two-sided p of the paired t-test -> (mean, p).

    p is None with fewer than two differences, and where they are all the same, which is no spread to test with, however many
    they are; but 1 where all are zero.
    """
    return t_tests([differences])[0]


def t_tests(rows: Sequence[Sequence[float]]) -> list[tuple[float | None, float | None]]:
    """`t_test` of every row."""

    def kind(row: Sequence[float]) -> tuple[int, bool]:
        return len(row), len(row) > 1 and not is_level(row)

    def answer(group: list[Sequence[float]], shape: tuple[int, bool]) -> Sequence[float | None]:
        n, spread = shape
        if not spread:
            return [1.0 if n > 1 and max(map(abs, row)) <= 1e-12 else None for row in group]
        from scipy import stats

        _, p = stats.ttest_1samp(np.array(group, np.float64), 0.0, axis=-1)
        return np.asarray(p).tolist()

    return list(zip((mean_std(row)[0] for row in rows), _by_shape(rows, kind, answer), strict=True))


def t_intervals(rows: Sequence[Sequence[float]]) -> list[Interval]:
    """95 % t interval of the mean of every row; None with fewer than two values, and where they are all the same."""

    def answer(group: list[Sequence[float]], size: int) -> Sequence[Interval]:
        if size < 2:
            return [None] * len(group)
        from scipy import special

        values = np.array(group, np.float64)
        half = special.stdtrit(size - 1, 0.5 + LEVEL / 2) * values.std(-1, ddof=1) / math.sqrt(size)
        ends = zip(group, (values.mean(-1) - half).tolist(), (values.mean(-1) + half).tolist(), strict=True)
        return [None if is_level(row) else (low, high) for row, low, high in ends]

    return _by_shape(rows, len, answer)


def verdict(mean: float | None, p: float | None, level: bool = False, alpha: float = 0.05) -> str:
    """What a difference with an (adjusted) p says: `better`, `worse`, `not distinguishable`, `too few seeds` or `no spread`.

    The last where the difference is the same on every shared seed (`level`) and not zero: nothing can be tested.
    """
    if mean is None or p is None:
        return "no spread" if level else "too few seeds"
    return "not distinguishable" if p >= alpha else "better" if mean > 0 else "worse"


LETTERS = {"best": "*", "not distinguishable": "=", "too few seeds": "?", "no spread": "!", "better": "+"}
LEGEND = {
    "best": "best mean on its stream among contenders",
    "not distinguishable": "not distinguishable from it on shared seeds (paired t-test, Holm-adjusted p >= 0.05)",
    "too few seeds": "cannot be told: fewer than two seeds shared with it",
    "no spread": "cannot be told: the same difference on every shared seed; identical runs (deterministic learners) count once",
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
    found = [
        [sign * (r.values[metric] - base[r.seed]) for r in runs if r.seed in base and metric in r.values] for _, runs in others
    ]
    tests = t_tests(found)
    best["vs_best"] = "best"
    for (row, _), d, (mean, _), p in zip(others, found, tests, holm([p for _, p in tests]), strict=True):
        row["vs_best_p"] = p
        row["vs_best"] = verdict(mean, p, len(d) > 1 and is_level(d))


def sign_flip(differences: Sequence[float], *, seed: int = 0, draws: int = 20_000) -> float:
    """Two-sided p of a sign-flip permutation test of the mean [n]: the share of sign patterns with a mean as far from zero.

    Exact (every pattern) up to 14 differences; beyond, `draws` random patterns with the observed one counted in. Means that are
    equal up to rounding (12 digits of the largest difference) count as equal.
    """
    from scipy import stats

    d = np.asarray(differences, np.float64)
    largest = np.abs(d).max()
    if largest == 0:
        return 1.0

    def statistic(x: Array, axis: int) -> Any:
        return np.abs(x.mean(axis=axis)).round(12)

    count, rng = np.inf if len(d) <= _EXACT else draws, np.random.default_rng(seed)
    options: dict[str, Any] = {"permutation_type": "samples", "alternative": "greater", "n_resamples": count, "rng": rng}
    return float(stats.permutation_test((d / largest,), statistic, vectorized=True, batch=4096, **options).pvalue)


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


def improvement_interval(x: Strata, y: Strata, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """95 % bootstrap percentile interval of `improvement`: runs of both sides are drawn anew within each stratum.

    None where no stratum has two runs on a side: there is nothing to draw from.
    """
    sides = [side for both in zip(x, y, strict=True) if all(map(len, both)) for side in both]
    if not any(len(side) > 1 for side in sides):
        return None

    def statistic(*drawn: Array) -> Any:
        return np.mean([_above(a, b) for a, b in zip(drawn[::2], drawn[1::2], strict=True)], axis=0)

    return _intervals([np.array([side], np.float64) for side in sides], statistic, resamples, seed)[0]


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
