"""What other libraries report on the same matrix, so that old tables can be quoted honestly.

Each function takes accuracies a [T, T] in percent (`percent` makes them from counts; set j belongs to experience j; cells
above the diagonal are zero-shot values where the library uses them, NaN where there are none) and sizes n [T], and returns
the library's averages in percent under its own names. A value that the matrix does not give is NaN: forgetting with one
experience, or a number that needs zero-shot cells. Nothing here is used for clbench's own numbers.

`PEERS` lists the functions with what each library calls its values and how it computes them (`clbench report explain`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Values = dict[str, float]


@dataclass(frozen=True)
class Peer:
    """A library: its name, and for each value its own name and formula."""

    library: str
    values: dict[str, tuple[str, str]]
    function: Callable[..., Values]


PEERS: dict[str, Peer] = {}


def peer(library: str, **values: tuple[str, str]) -> Callable[[Callable[..., Values]], Callable[..., Values]]:
    """Enter a function into `PEERS`; `values` has, for each key that it returns, the library's name and the formula."""

    def enter(function: Callable[..., Values]) -> Callable[..., Values]:
        PEERS[function.__name__] = Peer(library, values, function)
        return function

    return enter


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


@peer(
    "PILOT, PyCIL, RevisitingCIL, SLCA",
    average=("Average Accuracy (CNN)", "mean_i round2(micro_i)"),
    last=("CNN top1 curve, last entry", "round2(micro_{T-1})"),
    forgetting=("Forgetting (CNN)", "mean_{j<T-1} (max_i b[i][j] - b[T-1][j]), all i, b rounded to 2 decimals, 0 before j"),
)
def pilot(a: Any, n: Any) -> Values:
    """PILOT and PyCIL: micro; cells and steps rounded to two decimals before averaging; the maximum includes the last row."""
    low = _lower(a)
    steps, cells = np.round(_micro(low, np.asarray(n, np.float64)), 2), np.round(low, 2)
    drops = cells[:, :-1].max(0) - cells[-1, :-1]
    return {"average": _mean(steps), "last": float(steps[-1]), "forgetting": _mean(drops)}


@peer(
    "Mammoth",
    average=("mean of the accuracies per task (left to the user)", "mean_i mean_{j<=i} a[i][j]"),
    last=("Accuracy for T task(s) [Class-IL]", "mean_j a[T-1][j]"),
    forgetting=("forgetting", "mean_{j<T-1} (max_i b[i][j] - b[T-1][j]), row j-1 also holds task j before it is trained"),
    bwt=("backward_transfer", "mean_{j<T-1} (a[T-1][j] - a[j][j])"),
    fwt=("forward_transfer", "mean_{j>0} (a[j-1][j] - r[j]), r[j] measured with the same weights"),
)
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


@peer(
    "Avalanche",
    last=("Top1_Acc_Stream", "sum_j n[j] a[T-1][j] / sum n, over the stream that is passed"),
    forgetting=("StreamForgetting", "mean_{j<T-1} (a[j][j] - a[T-1][j])"),
    bwt=("StreamBWT", "-StreamForgetting"),
    fwt=("StreamForwardTransfer", "mean_{j>0} (a[j-1][j] - init[j])"),
)
def avalanche(a: Any, n: Any, init: Any = None) -> Values:
    """Avalanche: forgetting against the value right after a task's own training; FWT against random initialisation `init`."""
    full = np.asarray(a, np.float64)
    drops = np.diag(full)[:-1] - full[-1, :-1]
    start = np.zeros(len(full)) if init is None else np.asarray(init, np.float64)
    forward = _mean([full[j - 1, j] - start[j] for j in range(1, len(full))])
    stream = float((full[-1] * np.asarray(n)).sum() / np.sum(n))
    return {"last": stream, "forgetting": _mean(drops), "bwt": -_mean(drops), "fwt": forward}


@peer(
    "Continuum",
    average=("accuracy_A", "mean over all i >= j of a[i][j]"),
    forgetting=("forgetting", "mean_{j<T-1} (max_{j<=i<=T-2} a[i][j] - a[T-1][j])"),
    bwt=("backward_transfer", "mean over all pairs i > j of (a[i][j] - a[j][j])"),
    fwt=("forward_transfer", "mean_{j>0} a[j-1][j], no baseline"),
)
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


@peer(
    "LibContinual",
    average_batch=("average accuracy [Batch]", "mean_i micro_i"),
    average_task=("average accuracy [Task]", "mean_i mean_{j<=i} a[i][j]"),
    forgetting=("Forgetting", "sum_{j<=T-3} (a[j][j] - a[T-1][j]) / (T-1)"),
    bwt=("backward transfer", "sum over pairs j <= i-2 of (a[i][j] - a[j][j]) / (T (T-1) / 2)"),
)
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


@peer(
    "Renate",
    last=("average_accuracy", "mean_j a[T-1][j]"),
    last_micro=("micro_average_accuracy", "sum_j n[j] a[T-1][j] / sum n"),
    forgetting=("forgetting", "mean_{j<T-1} (max_{i<=T-2} a[i][j] - a[T-1][j]), rows before j included"),
    bwt=("backward_transfer", "mean_{j<T-1} (a[T-1][j] - a[j][j])"),
    fwt=("forward_transfer", "mean_{j>0} (a[j-1][j] - init[j])"),
)
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


@peer(
    "CODA-Prompt",
    last=("A_N", "mean_j a[T-1][j]"),
    forgetting=("F_N", "mean_{i>0} mean_{j<i} (a[i-1][j] - a[i][j])"),
)
def coda_prompt(a: Any, n: Any) -> Values:
    """CODA-Prompt's script: mean over steps of the mean one-step drop on old tasks; gains cancel losses."""
    full, t = np.asarray(a, np.float64), len(a)
    drops = [np.mean([full[i - 1, j] - full[i, j] for j in range(i)]) for i in range(1, t)]
    return {"last": float(full[-1].mean()), "forgetting": _mean(drops)}


@peer(
    "FACIL",
    last=("TAg Acc, Avg", "mean_j a[T-1][j]"),
    forgetting=("TAg Forg, Avg", "mean_{j<T-1} (max_{i<T-1} a[i][j] - a[T-1][j]), 0 before j"),
)
def facil(a: Any, n: Any) -> Values:
    """FACIL, task-agnostic: the maximum runs over earlier rows of the lower triangle, so it may be negative."""
    low = _lower(a)
    drops = low[:-1, :-1].max(0, initial=0.0) - low[-1, :-1]
    return {"last": float(low[-1].mean()), "forgetting": _mean(drops)}


@peer(
    "l2p-pytorch, dualprompt-pytorch",
    last=("Acc@1, average accuracy till the last task", "mean_j a[T-1][j]"),
    forgetting=("Forgetting", "mean_{j<T-1} (max_i a[i][j] - a[T-1][j]), all i, 0 before j"),
    bwt=("Backward", "mean_{j<T-1} (a[T-1][j] - a[j][j])"),
)
def prompt_pytorch(a: Any, n: Any) -> Values:
    """The PyTorch ports of L2P and DualPrompt: PILOT's forgetting without its rounding."""
    low = _lower(a)
    drops, gains = low[:, :-1].max(0) - low[-1, :-1], low[-1, :-1] - np.diag(low)[:-1]
    return {"last": float(low[-1].mean()), "forgetting": _mean(drops), "bwt": _mean(gains)}


@peer("GMvandeVen/continual-learning", last=("average accuracy over contexts", "mean_j a[T-1][j]"))
def gmvandeven(a: Any, n: Any) -> Values:
    """GMvandeVen/continual-learning: macro over contexts at the end, nothing else."""
    return {"last": float(np.asarray(a, np.float64)[-1].mean())}
