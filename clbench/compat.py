"""What other libraries report on the same matrix, so that old tables can be quoted honestly.

Each function takes accuracies a [T, T] in percent (`percent` makes them from counts; set j belongs to experience j; cells
above the diagonal are zero-shot values where the library uses them, NaN where there are none) and sizes n [T], and returns
the library's averages in percent under its own names. A value that the matrix does not give is NaN: forgetting with one
experience, or a number that needs zero-shot cells. Nothing here is used for clbench's own numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Values = dict[str, float]


def _lower(a: Any) -> np.ndarray:
    return np.tril(np.asarray(a, np.float64))


def percent(correct: Any, n: Any) -> np.ndarray:
    """Counts [T, E] (None for unevaluated) and sizes [E] -> percent [T, E] with NaN: what the functions below take."""
    cells = np.array([[np.nan if c is None else c for c in row] for row in correct], np.float64)
    return 100 * cells / np.asarray(n, np.float64)


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _micro(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.array([(a[i, : i + 1] * n[: i + 1]).sum() / n[: i + 1].sum() for i in range(len(a))])


def pilot(a: Any, n: Any) -> Values:
    """PILOT and PyCIL: micro; cells and steps rounded to two decimals before averaging; the maximum includes the last row."""
    low = _lower(a)
    steps, cells = np.round(_micro(low, np.asarray(n, np.float64)), 2), np.round(low, 2)
    drops = cells[:, :-1].max(0) - cells[-1, :-1]
    return {"average": _mean(steps), "last": float(steps[-1]), "forgetting": _mean(drops)}


def mammoth(a: Any, n: Any) -> Values:
    """Mammoth: macro; row j - 1 also holds the accuracy on task j before it is trained, and the maximum may pick it."""
    full = np.asarray(a, np.float64)
    kept = np.tril(full, 1)
    t = len(full)
    drops = kept[:, :-1].max(0) - kept[-1, :-1]
    last = full[-1]
    before = np.array([full[j - 1, j] for j in range(1, t)])
    return {
        "average": _mean([full[i, : i + 1].mean() for i in range(t)]),
        "last": float(last.mean()),
        "forgetting": _mean(drops),
        "bwt": _mean(last[:-1] - np.diag(full)[:-1]),
        "fwt": _mean(before - before),
    }


def avalanche(a: Any, n: Any, init: Any = None) -> Values:
    """Avalanche: forgetting against the value right after a task's own training; FWT against random initialisation `init`."""
    full = np.asarray(a, np.float64)
    drops = np.diag(full)[:-1] - full[-1, :-1]
    start = np.zeros(len(full)) if init is None else np.asarray(init, np.float64)
    forward = _mean([full[j - 1, j] - start[j] for j in range(1, len(full))])
    stream = float((full[-1] * np.asarray(n)).sum() / np.sum(n))
    return {"last": stream, "forgetting": _mean(drops), "bwt": -_mean(drops), "fwt": forward}


def continuum(a: Any, n: Any) -> Values:
    """Continuum: A over the whole lower triangle, textbook forgetting, BWT over all pairs, FWT without a baseline."""
    full, t = np.asarray(a, np.float64), len(a)
    drops = [full[j:-1, j].max() - full[-1, j] for j in range(t - 1)]
    pairs = [full[i, j] - full[j, j] for i in range(t) for j in range(i)]
    return {
        "average": float(full[np.tril_indices(t)].mean()),
        "forgetting": _mean(drops),
        "bwt": _mean(pairs),
        "fwt": _mean([full[j - 1, j] for j in range(1, t)]),
    }


def libcontinual(a: Any, n: Any) -> Values:
    """LibContinual: drops the newest old task from the sum but divides by T - 1; BWT over pairs j <= i - 2."""
    full, t = np.asarray(a, np.float64), len(a)
    drops = sum(full[j, j] - full[-1, j] for j in range(t - 2))
    pairs = [full[i, j] - full[j, j] for i in range(t) for j in range(i - 1)]
    low = _micro(full, np.asarray(n, np.float64))
    return {
        "average_batch": float(low.mean()),
        "average_task": _mean([full[i, : i + 1].mean() for i in range(t)]),
        "forgetting": float(drops / (t - 1)) if t > 1 else float("nan"),
        "bwt": float(sum(pairs) / (t * (t - 1) / 2)) if t > 1 else float("nan"),
    }


def renate(a: Any, n: Any, init: Any = None) -> Values:
    """Renate: the maximum also runs over rows before a task is learned; BWT and FWT as GEM, `init` measured at the start."""
    full, t = np.asarray(a, np.float64), len(a)
    drops = full[:-1, :-1].max(0, initial=0.0) - full[-1, :-1]
    start = np.zeros(t) if init is None else np.asarray(init, np.float64)
    return {
        "last": float(full[-1].mean()),
        "last_micro": float((full[-1] * np.asarray(n)).sum() / np.sum(n)),
        "forgetting": _mean(drops),
        "bwt": _mean(full[-1, :-1] - np.diag(full)[:-1]),
        "fwt": _mean([full[j - 1, j] - start[j] for j in range(1, t)]),
    }


def coda_prompt(a: Any, n: Any) -> Values:
    """CODA-Prompt's script: mean over steps of the mean one-step drop on old tasks; gains cancel losses."""
    full, t = np.asarray(a, np.float64), len(a)
    drops = [np.mean([full[i - 1, j] - full[i, j] for j in range(i)]) for i in range(1, t)]
    return {"last": float(full[-1].mean()), "forgetting": _mean(drops)}
