"""Numbers that one kind of stream has beside those of every stream: few-shot, long tails, looks, domains, test time, ...

`SETTINGS` says which numbers an operator of the stream adds to a record, to leaderboards and to the page; `ABOUT` has their
formulas. Values are fractions in 0..1, or differences of fractions, but for losses of text tasks in nats. Legend as in
`accuracy_metrics`; S the sets of the first experience, novel ones are those of later experiences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clbench.evaluation.accuracy_metrics import Array, accuracy, fwt_init, macro, micro

ABOUT: dict[str, str] = {
    "performance_drop": "micro accuracy on the sets seen after the first experience - after the last (PD of few-shot learning)",
    "base_accuracy": "micro accuracy after the last experience on the sets of the first",
    "novel_accuracy": "micro accuracy after the last experience on the sets of all later ones",
    "harmonic_mean": "2 base novel / (base + novel) of these two; 0 where one is 0",
    "class_recall": "mean over classes of right answers / samples after the last experience (average per-class recall)",
    "worst_recall": "lowest recall of a class after the last experience",
    "average_anytime": "mean over looks and ends of experiences of the macro accuracy on the sets seen (Caccia et al. 2022)",
    "last_anytime": "macro accuracy on the sets seen at the last look before the stream ends",
    "in_domain": "mean_i a[i][i], sets in the order of their experiences (CLEAR, Lin et al. 2021)",
    "next_domain": "mean_i a[i][i+1]",
    "forward_domain": "mean over j > i of a[i][j]",
    "backward_domain": "mean over j < i of a[i][j]",
    "knowledge_accumulation": "accuracy on all classes, those not seen counted as wrong: last tenth of evaluations - first",
    "all_classes": "right answers on all sets after the last experience, those of classes not seen counted as wrong / samples",
    "plasticity_loss": "accuracy on the newest sets: mean over the first tenth of the experiences - mean over the last tenth",
    "mean_error": "mean over the shifted sets of 1 - accuracy, answers as given while the learner adapts",
    "clean_forgetting": "accuracy on the clean set before adaptation - after it",
    "final_problem": "accuracy on the last experience's own set after it",
    "forward_gain": "mean_{own(j) > 0} (a[own(j)-1][j] - a[-1][j]), a[-1] before the first task (FWT of GEM)",
    "answer_loss": "text tasks: nats per token of right answers after the last task, mean over the tasks",
    "answer_loss_rise": "text tasks: the same - right after the own task, mean over old tasks",
    "old_text_rise": "text tasks: loss on old text after the last task - before the first, nats per token",
}
PAIRED = {  # of two runs, see `report.paired`
    "intransigence": "plasticity of the reference (joint training) on the same stream - the run's (Chaudhry et al. 2018: I)",
    "transfer": "final_problem - that of the learner isolated (one network for each problem) on the same stream",
    "noise_robustness": "last_macro under label noise / last_macro of the same run without",
}
ABOUT |= PAIRED
_DOMAINS = ("in_domain", "next_domain", "forward_domain", "backward_domain")
SETTINGS: dict[str, tuple[str, ...]] = {
    "shots": ("performance_drop", "base_accuracy", "novel_accuracy", "harmonic_mean"),
    "long_tail": ("class_recall", "worst_recall"),
    "looks": ("average_anytime", "last_anytime"),
    "repeat": ("knowledge_accumulation", "all_classes", "plasticity_loss"),
    "permute": ("plasticity_loss",),
    "relabel": ("plasticity_loss",),
    "bell": ("final_problem",),
}
CLEAN = ("clean", "clean after")  # names of the sets of `test_time` that are not shifted
_TEXTS = ("forward_gain", "answer_loss", "answer_loss_rise", "old_text_rise")
KINDS: dict[str, tuple[str, ...]] = {
    "domain_incremental": _DOMAINS,
    "test_time": ("mean_error", "clean_forgetting"),
    "text_tasks": _TEXTS,
}
ANSWERS, OLD_TEXT = "answers", "old_text"  # evaluators of text tasks


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the settings that a record's stream has, where its counts allow them; {} for a record without counts."""
    names = named(record)
    if not names or not isinstance(record.get("correct"), list):
        return {}
    values = {name: FORMULAS[name](record) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def named(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the numbers that belong to the kind of a record's stream and to its operators."""
    stream = record.get("scenario") or {}
    found = [
        *KINDS.get(str(stream.get("kind")), ()),
        *(n for one in stream.get("operators", ()) for n in SETTINGS.get(one, ())),
    ]
    return tuple(dict.fromkeys(found))


def _matrix(record: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """Accuracies [T, E], sizes [E] and first_seen [E]."""
    n = np.asarray(record["n"], np.float64)
    return accuracy(record["correct"], n), n, np.asarray(record["first_seen"])


def performance_drop(record: Mapping[str, Any]) -> float | None:
    """Few-shot: how far the accuracy on all that was seen has fallen since the base session."""
    a, n, first = _matrix(record)
    seen = micro(a, n, first)
    return float(seen[0] - seen[-1])


def _split(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Final micro accuracy on the sets of the first experience, and on later ones."""
    a, n, first = _matrix(record)
    parts = [first == 0, first > 0]
    found = [float((a[-1] * n)[part].sum() / n[part].sum()) if part.any() else None for part in parts]
    return found[0], found[1]


def harmonic_mean(record: Mapping[str, Any]) -> float | None:
    """Few-shot: what exposes a learner that never learns novel classes."""
    base, novel = _split(record)
    if base is None or novel is None:
        return None
    return 2 * base * novel / (base + novel) if base and novel else 0.0


def _recalls(record: Mapping[str, Any]) -> list[float]:
    """Recall of each class after the last experience, its samples of all sets together."""
    right: dict[int, int] = {}
    size: dict[int, int] = {}
    rows = zip(record["eval_classes"], record["class_correct"][-1], record["class_n"], strict=True)
    for classes, correct, n in rows:
        for c, r, m in zip(classes, correct or [0] * len(classes), n, strict=True):
            right[c], size[c] = right.get(c, 0) + r, size.get(c, 0) + m
    return [right[c] / size[c] for c in size if size[c]]


def class_recall(record: Mapping[str, Any]) -> float | None:
    """Long tails: every class has equal weight, however many samples it has."""
    found = _recalls(record)
    return sum(found) / len(found) if found else None


def _points(record: Mapping[str, Any]) -> list[tuple[bool, float]]:
    """Looks and ends of experiences in order -> (whether it is a look, macro accuracy on the sets seen)."""
    a, _, first = _matrix(record)
    ends, found = macro(a, first), []
    trace = (record.get("stability") or {}).get("trace") or ()
    for i, end in enumerate(ends):
        for row in trace:
            if row["experience"] == i:
                one = accuracy([row["correct"]], row["n"])[0]
                seen = (first <= i) & ~np.isnan(one)
                found += [(True, float(one[seen].mean()))] if seen.any() else []
        found.append((False, float(end)))
    return found


def average_anytime(record: Mapping[str, Any]) -> float | None:
    """Online: the mean of the curve that looks and ends of experiences make."""
    return float(np.mean([value for _, value in _points(record)]))


def last_anytime(record: Mapping[str, Any]) -> float | None:
    """Online: the last point of the curve before the end."""
    looks = [value for is_look, value in _points(record) if is_look]
    return looks[-1] if looks else None


def _domains(record: Mapping[str, Any]) -> Array | None:
    """Accuracies [T, T] where there is one set for each experience, else None."""
    a, _, first = _matrix(record)
    return a[:, np.argsort(first)] if sorted(first.tolist()) == list(range(len(a))) else None


def _over(record: Mapping[str, Any], cells: Callable[[int], Array]) -> float | None:
    """Mean over chosen cells of the matrix of domains that were evaluated."""
    a = _domains(record)
    if a is None:
        return None
    chosen = a[cells(len(a)).astype(bool)]
    known = chosen[~np.isnan(chosen)]
    return float(known.mean()) if len(known) else None


def _all_classes(record: Mapping[str, Any]) -> Array:
    """Accuracy on all sets after each experience that was evaluated: what was not asked counts as wrong."""
    a, n, _ = _matrix(record)
    rows = a[~np.isnan(a).all(1)]
    return np.nan_to_num(rows, nan=0.0) @ n / n.sum()


def _tenths(values: Sequence[float] | Array) -> tuple[float, float]:
    """Mean over the first and over the last tenth of some values, one value at least."""
    size = max(1, len(values) // 10)
    return float(np.mean(values[:size])), float(np.mean(values[-size:]))


def knowledge_accumulation(record: Mapping[str, Any]) -> float | None:
    """SCoLe (Lesort et al. 2023): what a long stream of small tasks adds to the accuracy on all classes."""
    first, last = _tenths(_all_classes(record))
    return last - first


def plasticity_loss(record: Mapping[str, Any]) -> float | None:
    """What a learner has lost of its ability to learn: accuracy right after learning, early - late."""
    a, _, first = _matrix(record)
    newest = [a[i, first == i] for i in range(len(a))]
    own = [float(np.mean(row[~np.isnan(row)])) for row in newest if len(row) and not np.isnan(row).all()]
    if len(own) < 2:
        return None
    early, late = _tenths(own)
    return early - late


def mean_error(record: Mapping[str, Any]) -> float | None:
    """Test-time adaptation: each set has equal weight (Hendrycks & Dietterich 2019; Wang et al. 2022)."""
    last, names = _matrix(record)[0][-1], record["scenario"].get("eval_names") or [""] * len(record["n"])
    shifted = [value for name, value in zip(names, last, strict=True) if name not in CLEAN]
    return float(1 - np.mean(shifted)) if shifted and not np.isnan(shifted).any() else None


def clean_forgetting(record: Mapping[str, Any]) -> float | None:
    """Test-time adaptation: what the source's own data lose; None where they are not tested before and after."""
    last: dict[str, Any] = dict(zip(record["scenario"].get("eval_names") or (), _matrix(record)[0][-1], strict=False))
    return float(last[CLEAN[0]] - last[CLEAN[1]]) if set(CLEAN) <= set(last) else None


def final_problem(record: Mapping[str, Any]) -> float | None:
    """Sequences of problems: the one that the others are there for."""
    a, _, first = _matrix(record)
    own = a[-1, first == len(a) - 1]
    return float(own.mean()) if len(own) and not np.isnan(own).any() else None


def _answers(record: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Sums of the answers to text tasks by experience, -1 before the first."""
    return {row["experience"]: row["sums"] for row in record.get("rows") or () if row["evaluator"] == ANSWERS}


def forward_gain(record: Mapping[str, Any]) -> float | None:
    """Text tasks: what was learned before a task is worth to it, before it is learned itself."""
    a, n, first = _matrix(record)
    found = _answers(record)
    if -1 not in found or len(a) < 2:
        return None
    return fwt_init(a, first, accuracy([found[-1]["correct"]], n)[0])


def _answer_losses(record: Mapping[str, Any]) -> tuple[Array, Array] | None:
    """Nats per token of right answers after each task [T, E], and first_seen [E]."""
    found = _answers(record)
    ends = [found[i] for i in sorted(found) if i >= 0]
    if not ends:
        return None
    return np.array([np.divide(s["nats"], s["tokens"]) for s in ends], np.float64), np.asarray(record["first_seen"])


def answer_loss(record: Mapping[str, Any]) -> float | None:
    """Text tasks: finer than exact matches, which may all be missed by one token."""
    found = _answer_losses(record)
    return None if found is None else float(found[0][-1].mean())


def answer_loss_rise(record: Mapping[str, Any]) -> float | None:
    """Text tasks: forgetting in nats."""
    found = _answer_losses(record)
    if found is None or len(found[0]) < 2:
        return None
    loss, first = found
    rise = loss[-1] - loss[first, np.arange(len(first))]
    return float(rise[first < len(loss) - 1].mean())


def old_text_rise(record: Mapping[str, Any]) -> float | None:
    """Text tasks: what the stream cost of that which pre-training knew."""
    rows = {row["experience"]: row["total"] for row in record.get("rows") or () if row["evaluator"] == OLD_TEXT}
    if -1 not in rows or len(rows) < 2:
        return None
    last, start = (rows[i]["nats"] / rows[i]["tokens"] for i in (max(rows), -1))
    return float(last - start)


FORMULAS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "performance_drop": performance_drop,
    "base_accuracy": lambda record: _split(record)[0],
    "novel_accuracy": lambda record: _split(record)[1],
    "harmonic_mean": harmonic_mean,
    "class_recall": class_recall,
    "worst_recall": lambda record: min(_recalls(record), default=None),
    "average_anytime": average_anytime,
    "last_anytime": last_anytime,
    "in_domain": lambda record: _over(record, np.eye),
    "next_domain": lambda record: _over(record, lambda t: np.eye(t, k=1)),
    "forward_domain": lambda record: _over(record, lambda t: np.triu(np.ones((t, t)), 1)),
    "backward_domain": lambda record: _over(record, lambda t: np.tril(np.ones((t, t)), -1)),
    "knowledge_accumulation": knowledge_accumulation,
    "all_classes": lambda record: float(_all_classes(record)[-1]),
    "plasticity_loss": plasticity_loss,
    "mean_error": mean_error,
    "clean_forgetting": clean_forgetting,
    "final_problem": final_problem,
    "forward_gain": forward_gain,
    "answer_loss": answer_loss,
    "answer_loss_rise": answer_loss_rise,
    "old_text_rise": old_text_rise,
}
