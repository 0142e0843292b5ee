"""Accuracies of a record by name: pure NumPy functions on accuracy matrices made from counts. Values are fractions in 0..1.

`FORMULAS` lists them with the formula each implements (`clbench report explain` prints it); `DETAILS` does so for the numbers
of calibration, confusion and continual evaluation, which a record has only where its run wrote them. `ABOUT` has the names that
`summary` gives.

a [T, E]        accuracy on evaluation set j after experience i; NaN where it was not evaluated
n [E]           samples of each set
first_seen [E]  the experience that belongs to each set; a set counts as seen from then on

What other libraries compute under these names is in `peer_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Formula:
    """What a function computes, in symbols, and the names that others give it."""

    text: str
    also: str
    function: Callable[..., float]


FORMULAS: dict[str, Formula] = {}
DETAILS: dict[str, str] = {
    "ece": "sum over 15 equal bins of confidence of the distance of summed confidence and right answers / samples",
    "nll": "mean of -log p(true class); natural logarithm, 0 is best, no upper bound",
    "brier": "mean over samples of the squared distance of the probabilities from the one-hot truth; 0 to 2",
    "task_identity": "share of samples whose prediction lies among the classes of their own experience",
    "within_task": "share of samples predicted wrongly, within the classes of their own experience",
    "between_task": "share of samples predicted into the classes of another experience (1 - task_identity)",
    "old_to_new": "share of samples of old experiences predicted into the newest one's classes (bias to the new)",
    "new_to_old": "share of samples of the newest experience predicted into older ones' classes (bias to the old)",
    "a_auc": "mean of the micro accuracy over the sets seen, over all evaluations inside experiences (Koh et al. 2022: A_AUC)",
    "stability_gap": "mean over experiences and old sets of accuracy before - lowest accuracy inside the experience",
    "min_acc": "mean over old sets of the lowest accuracy at any evaluation after their own experience (De Lange et al. 2023)",
    "wc_acc": "last accuracy of the newest sets / T + (1 - 1 / T) min_acc (De Lange et al. 2023: WC-ACC)",
}
INSIDE = ("a_auc", "stability_gap", "min_acc", "wc_acc")  # of looks inside experiences: one number of the whole stream
UNBOUNDED = ("last_nll", "step_nll", "last_brier", "step_brier")  # everything else is a fraction, or a difference of fractions


def formula(text: str, also: str = "") -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Enter a function into `FORMULAS`: `text` in symbols, `also` the names it has elsewhere."""

    def enter(function: Callable[..., float]) -> Callable[..., float]:
        FORMULAS[function.__name__] = Formula(text, also, function)
        return function

    return enter


def accuracy(correct: Any, n: Any) -> Array:
    """Counts [T, E] (None for unevaluated) and sizes [E] -> accuracies [T, E] with NaN."""
    return np.array(correct, np.float64) / np.asarray(n, np.float64)


def _seen(a: Array, first_seen: Any) -> Array:
    """Cells of sets that belong to the past or present of their row [T, E] bool."""
    return np.asarray(first_seen)[None, :] <= np.arange(len(a))[:, None]


def _mean(values: Array) -> float:
    return float(values.sum() / len(values)) if len(values) else float("nan")


def _share(part: Array, whole: Array) -> Array:
    """Shares, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole != 0)


def macro(a: Array, first_seen: Any) -> Array:
    """Per experience: mean accuracy over the sets seen, each set with equal weight -> [T]."""
    seen = _seen(a, first_seen)
    return _share(np.where(seen, a, 0).sum(1), seen.sum(1))


def micro(a: Array, n: Any, first_seen: Any) -> Array:
    """Per experience: accuracy over all samples of the sets seen -> [T]."""
    seen = _seen(a, first_seen)
    return _share(np.where(seen, a * np.asarray(n, np.float64), 0).sum(1), (seen * np.asarray(n, np.float64)).sum(1))


@formula("mean_j a[T-1][j]", 'A_B, FAA, A_N, ACC; "average accuracy" of GEM')
def last_macro(a: Array, first_seen: Any) -> float:
    """`macro` after the last experience (A_B, FAA, A_N)."""
    return float(macro(a, first_seen)[-1])


@formula("sum_j n[j] a[T-1][j] / sum_j n[j]", "top-1 after the last task")
def last_micro(a: Array, n: Any, first_seen: Any) -> float:
    """`micro` after the last experience."""
    return float(micro(a, n, first_seen)[-1])


@formula("mean_i mean_{j seen by i} a[i][j]", "A-bar, CAA, average incremental accuracy")
def step_macro(a: Array, first_seen: Any) -> float:
    """Mean of `macro` over all experiences (A-bar)."""
    return _mean(macro(a, first_seen))


@formula("mean_i (sum_{j seen by i} n[j] a[i][j] / sum n[j])", "A-bar, average incremental accuracy, of class-balanced sets")
def step_micro(a: Array, n: Any, first_seen: Any) -> float:
    """Mean of `micro` over all experiences: the A-bar of PyCIL and PILOT, without their rounding."""
    return _mean(micro(a, n, first_seen))


@formula("mean over all cells i, j with j seen by i of a[i][j]", "A of Diaz-Rodriguez et al. 2018")
def triangle_macro(a: Array, first_seen: Any) -> float:
    """Mean over all cells of seen sets (Diaz-Rodriguez et al. 2018: A)."""
    return _mean(a[_seen(a, first_seen)])


def own(a: Array, first_seen: Any) -> Array:
    """Accuracy of each set right after its own experience -> [E]."""
    return a[np.asarray(first_seen), np.arange(a.shape[1])]


def _old(a: Array, first_seen: Any) -> Array:
    """Sets that belong to an experience before the last [E] bool."""
    return np.asarray(first_seen) < len(a) - 1


@formula("mean_{j old} (max_{own(j) <= i <= T-2} a[i][j] - a[T-1][j])", "F, average forgetting, of Chaudhry et al. 2018")
def forgetting(a: Array, first_seen: Any) -> float:
    """Chaudhry et al. 2018: mean over old sets of (best from its own experience to the last but one) - final.

    NaN with a single experience: nothing can be forgotten yet.
    """
    old, seen = _old(a, first_seen), _seen(a, first_seen)[:-1]
    if not old.any():
        return float("nan")
    return _mean(np.where(seen, a[:-1], -np.inf)[:, old].max(0) - a[-1, old])


@formula("mean_{j old} (a[own(j)][j] - a[T-1][j])", "-BWT")
def forgetting_diagonal(a: Array, first_seen: Any) -> float:
    """Mean over old sets of (right after its own experience) - final; may be negative."""
    return -bwt(a, first_seen)


@formula("mean_{j old} (a[T-1][j] - a[own(j)][j])", "BWT of GEM")
def bwt(a: Array, first_seen: Any) -> float:
    """Backward transfer (Lopez-Paz & Ranzato 2017): mean over old sets of final - (right after its own experience)."""
    return _mean((a[-1] - own(a, first_seen))[_old(a, first_seen)])


@formula("mean over pairs j old, i > own(j) of (a[i][j] - a[own(j)][j])", "BWT of Diaz-Rodriguez et al. 2018")
def bwt_all(a: Array, first_seen: Any) -> float:
    """Backward transfer over all later rows (Diaz-Rodriguez et al. 2018): mean over pairs i > own experience."""
    later = np.asarray(first_seen)[None, :] < np.arange(len(a))[:, None]
    return _mean((a - own(a, first_seen))[later])


@formula("mean_{own(j) > 0} a[own(j)-1][j]", "FWT without a baseline")
def fwt_zeroshot(a: Array, first_seen: Any) -> float:
    """Mean accuracy on each set just before its own experience, no baseline subtracted; NaN where it was not evaluated."""
    before = _before(a, first_seen)
    return _mean(before[~np.isnan(before)])


@formula("mean_{own(j) > 0} (a[own(j)-1][j] - untrained[j])", "FWT of GEM")
def fwt_init(a: Array, first_seen: Any, baseline: Any) -> float:
    """Forward transfer (Lopez-Paz & Ranzato 2017): `fwt_zeroshot` minus the accuracy [E] of the untrained model."""
    gains = _before(a, first_seen) - np.asarray(baseline, np.float64)
    return _mean(gains[~np.isnan(gains)])


def _before(a: Array, first_seen: Any) -> Array:
    """Accuracy of each set just before its own experience [E]; NaN for sets of the first, and where it was not evaluated."""
    first = np.asarray(first_seen)
    return np.where(first > 0, a[first - 1, np.arange(a.shape[1])], np.nan)


@formula("mean_j a[own(j)][j]", "learning accuracy, mean diagonal")
def plasticity(a: Array, first_seen: Any) -> float:
    """Mean accuracy of each set right after its own experience (mean diagonal, learning accuracy)."""
    return _mean(own(a, first_seen))


@formula("mean_j (reference[j] - a[own(j)][j])", "I of Chaudhry et al. 2018")
def intransigence(a: Array, first_seen: Any, reference: Any) -> float:
    """Chaudhry et al. 2018: mean of (a reference's accuracy [E], e.g. joint training) - (right after its own experience)."""
    return _mean(np.asarray(reference, np.float64) - own(a, first_seen))


@formula("min_{j seen} a[T-1][j]", "worst-task accuracy")
def worst(a: Array, first_seen: Any) -> float:
    """Lowest final accuracy of a seen set."""
    return float(a[-1][_seen(a, first_seen)[-1]].min())


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number of one record that its counts allow, by name; {} for a record without."""
    if not isinstance(record.get("correct"), list):
        return {}
    n, first = np.asarray(record["n"], np.float64), np.asarray(record["first_seen"])
    a = accuracy(record["correct"], n)
    given = {"n": n, "first_seen": first}
    each, sample = macro(a, first), micro(a, n, first)  # shared by two formulas each
    values = {"last_macro": float(each[-1]), "last_micro": float(sample[-1])}
    values |= {"step_macro": _mean(each), "step_micro": _mean(sample)}
    known = {*values, *_OF_OTHERS}
    values |= {name: _call(FORMULAS[name].function, a, given) for name in FORMULAS if name not in known}
    if isinstance(record.get("correct_masked"), list):
        masked = accuracy(record["correct_masked"], n)
        values["last_masked_macro"] = last_macro(masked, first)
    if isinstance(record.get("correct_top5"), list):
        values["last_top5_micro"] = last_micro(accuracy(record["correct_top5"], n), n, first)
    with np.errstate(all="ignore"):
        for part in (calibration, confusion, stability):
            values |= part(record)
    return values


def _call(function: Callable[..., float], a: Array, given: Mapping[str, Any]) -> float:
    """A formula with the arguments that its signature names."""
    names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    return function(a, **{name: given[name] for name in names})


def _last_and_step(per_step: list[dict[str, float]]) -> dict[str, float]:
    """Values of each experience -> `last_NAME` and `step_NAME`, its mean over the experiences that have one."""
    last = {f"last_{name}": value for name, value in per_step[-1].items()} if per_step else {}
    names = dict.fromkeys(name for values in per_step for name in values)
    found = {name: [v[name] for v in per_step if name in v] for name in names}
    return last | {f"step_{name}": sum(values) / len(values) for name, values in found.items()}


def calibration(record: Mapping[str, Any]) -> dict[str, float]:
    """`last_` and `step_` of ece, nll, brier over all sets seen, from `calibration.table` (one row for each experience)."""
    steps: list[dict[str, float]] = []
    for row in (record.get("calibration") or {}).get("table") or ():
        steps.append({})
        if row:
            gap = sum(abs(conf - right) for conf, right in zip(row["bin_conf"], row["bin_correct"], strict=True))
            steps[-1] = {"ece": gap / row["n"], "nll": row["nll"] / row["n"], "brier": row["brier"] / row["n"]}
    return _last_and_step(steps)


def confusion(record: Mapping[str, Any]) -> dict[str, float]:
    """`last_` and `step_` of the confusions between experiences, from `task_confusion` [T, E, T] (columns are experiences).

    Only where all classes of a set were brought by its own experience: elsewhere a prediction does not say which it means.
    """
    tables, first = record.get("task_confusion") or (), np.asarray(record["first_seen"])
    sets = record.get("eval_classes") or ()
    if not tables or not sets:
        return {}
    steps = (record.get("scenario") or {}).get("experiences") or [{"classes": row} for row in sets]
    brought = {c: i for i, step in reversed(list(enumerate(steps))) for c in step["classes"]}
    if any(brought.get(c) != i for i, row in zip(first, sets, strict=True) for c in row):
        return {}
    size, each = len(tables), np.arange(len(tables))
    empty, at = [0] * size, each[:, None]
    t = np.array([[row or empty for row in table] if table else [empty] * len(first) for table in tables], np.float64)
    seen, old, new = first <= at, first < at, first == at
    rows, newest, older = t.sum(2), t[each, :, each], (t * (each < at)[:, None, :]).sum(2)  # [T, E] each
    total = (rows * seen).sum(1)
    right = np.array([[c or 0 for c in row] for row in record["correct"]], np.float64)
    identity = _share((t[:, np.arange(len(first)), first] * seen).sum(1), total)
    parts = {"task_identity": identity, "within_task": identity - _share((right * seen).sum(1), total)}
    parts["between_task"] = 1 - identity
    parts["old_to_new"] = _share((newest * old).sum(1), (rows * old).sum(1))
    parts["new_to_old"] = _share((older * new).sum(1), (rows * new).sum(1) * old.any(1))
    lists = {name: values.tolist() for name, values in parts.items()}
    return _last_and_step([{k: v[i] for k, v in lists.items() if v[i] == v[i]} for i in range(len(t))])  # NaN is not itself


def stability(record: Mapping[str, Any]) -> dict[str, float]:
    """a_auc, stability_gap, min_acc, wc_acc from `stability.trace`: {experience, correct [E] or null, n [E]} in order."""
    trace = (record.get("stability") or {}).get("trace") or ()
    if not trace:
        return {}
    first, ends = record["first_seen"], accuracy(record["correct"], record["n"])
    steps = np.array([row["experience"] for row in trace])
    a = np.concatenate([accuracy([row["correct"]], row["n"]) for row in trace])
    sizes = np.array([row["n"] for row in trace], np.float64)
    seen = (np.array(first)[None, :] <= steps[:, None]) & ~np.isnan(a)
    values = {
        "a_auc": _mean(np.array([(x[s] * n[s]).sum() / n[s].sum() for x, n, s in zip(a, sizes, seen, strict=True) if s.any()]))
    }
    old = np.flatnonzero(_old(ends, first))
    inside = [(i, j, a[(steps == i) & seen[:, j], j]) for j in old for i in range(first[j] + 1, len(ends))]
    values["stability_gap"] = _mean(np.array([ends[i - 1, j] - x.min() for i, j, x in inside if len(x)]))
    lowest = [min([*ends[first[j] + 1 :, j], *(float(x.min()) for _, k, x in inside if k == j and len(x))]) for j in old]
    values["min_acc"] = _mean(np.array(lowest))
    newest = [ends[-1, j] for j, i in enumerate(first) if i == len(ends) - 1]
    now, t = _mean(np.array(newest)), len(ends)
    values["wc_acc"] = now / t + (1 - 1 / t) * values["min_acc"] if t > 1 else now  # of one experience nothing is old
    return values


_OF_OTHERS = ("fwt_init", "intransigence")  # which need an untrained model or a joint run
ABOUT: dict[str, str] = {name: found.text for name, found in FORMULAS.items() if name not in _OF_OTHERS} | {
    "last_masked_macro": "last_macro with the arg-max among the set's own classes only",
    "last_top5_micro": "last_micro with the class within the five largest scores",
    **{name: DETAILS[name] for name in INSIDE},
    **{f"{part}_{name}": text for name, text in DETAILS.items() if name not in INSIDE for part in ("last", "step")},
}
