"""Runs a learner over evaluation sets -> counts. The only place where a learner's answers meet the labels.

Legend: B batch, N samples of a set, K classes seen, T experiences. One pass over each set serves every count.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.streams.eval_sets import EvalSet, eval_batches

BINS = 15
EDGES = np.arange(1, BINS) / BINS  # bin b holds confidences in (b / 15, (b + 1) / 15]
EACH = ("y", "predicted", "is_correct", "confidence", "nll", "brier")  # what is known of every sample
LEAST = float(np.finfo(np.float32).tiny)  # probabilities below it count as it: nll stays finite


@dataclass
class SetCounts:
    """Counts on one evaluation set; `class_correct` follows the set's classes.

    by_experience  [T] predictions by the experience that brought the predicted class
    calibration    n, nll, brier, bin_n, bin_conf, bin_correct (see `calibration`)
    spent          what the answers on this set cost, by name, of a learner that counts it in whole numbers in `spent`
    The first two are None in the snapshot of a run that began before they were counted.
    """

    n: int = 0
    correct: int = 0
    masked: int = 0
    top5: int = 0
    class_correct: list[int] = field(default_factory=list)
    class_n: list[int] = field(default_factory=list)
    heads: dict[str, int] = field(default_factory=dict)
    by_experience: list[int] | None = None
    calibration: dict[str, Any] | None = None
    spent: dict[str, int] = field(default_factory=dict)


def evaluate(
    learner: Any,
    evals: Sequence[EvalSet],
    num_seen: int,
    batch_size: int,
    check_stop: Callable[[], None] = lambda: None,
    class_to_experience: Sequence[int] = (),
    joined: bool = True,
    kept: dict[int, list[tuple[Tensor, Tensor]]] | None = None,
) -> list[SetCounts | None]:
    """Count right answers on every set whose classes have all been seen; None for the others.

    `correct` is the arg-max over all seen classes, or over the task's classes where the set discloses its task; `masked`
    is always over the set's own classes. `class_to_experience` [K] names the experience that brought each class. `joined`:
    small sets may share a batch, which is for learners whose answers do not depend on it. `kept` is filled with the answers
    and labels of each set by its place in `evals`, for other evaluators. Raises `UserError` when predictions have a wrong
    shape or are not finite.
    """
    asked = [i for i, one in enumerate(evals) if max(one.classes) < num_seen]
    own = [torch.tensor(sorted(evals[i].classes)) for i in asked]
    found: list[list[_Answers]] = [[] for _ in asked]
    spent: list[Counter[str]] = [Counter() for _ in asked]
    for batch, y, owners in eval_batches([evals[i] for i in asked], batch_size, joined):
        check_stop()
        before = dict(getattr(learner, "spent", {}))
        with torch.no_grad():
            answer = learner.predict(batch)
        for i, _ in owners[:1]:  # learners that count are asked about one set at a time
            spent[i].update({name: count - before[name] for name, count in getattr(learner, "spent", {}).items()})
        heads = answer if isinstance(answer, Mapping) else {"": answer}
        scores = {name: checked(z, len(y), num_seen, type(learner).__name__) for name, z in heads.items()}
        for i, part in owners:
            mine = {name: z[part] for name, z in scores.items()}
            found[i].append(_answers(mine, y[part], own[i], evals[asked[i]].task is not None))
            if kept is not None:
                kept.setdefault(asked[i], []).append((next(iter(mine.values())), y[part]))
    row: list[SetCounts | None] = [None] * len(evals)
    for i, parts, costs in zip(asked, found, spent, strict=True):
        counts = _counts(evals[i].classes, parts, num_seen, np.asarray(class_to_experience, np.int64))
        row[i] = replace(counts, spent=dict(costs))
    return row


@dataclass(frozen=True)
class _Answers:
    """Results of a batch on one set: the arrays are [B], one value a sample; the rest are sums, `heads` by name."""

    y: np.ndarray
    predicted: np.ndarray
    is_correct: np.ndarray
    confidence: np.ndarray
    nll: np.ndarray
    brier: np.ndarray
    masked: int
    top5: int
    heads: dict[str, int]


def _answers(scores: Mapping[str, Tensor], y: Tensor, own: Tensor, among_own: bool) -> _Answers:
    """Scores [B, K] by head, the answer first; `own` are the set's classes, the only ones to choose from if `among_own`."""
    z, *others = scores.values()
    inside = z[:, own]
    within = own[inside.argmax(1)]
    predicted = within if among_own else z.argmax(1)
    asked = (inside, torch.searchsorted(own, y)) if among_own else (z, y)
    is_correct = predicted == y
    hits = [is_correct, *(((own[o[:, own].argmax(1)] if among_own else o.argmax(1)) == y) for o in others)]
    return _Answers(
        y.numpy(),
        predicted.numpy(),
        is_correct.numpy(),
        *of_samples(asked[0].numpy(), asked[1].numpy()),
        masked=int((within == y).sum()),
        top5=int((z.topk(min(5, z.shape[1]), dim=1).indices == y[:, None]).any(1).sum()),
        heads={name: int(right.sum()) for name, right in zip(scores, hits, strict=True) if name},
    )


def _counts(classes: Sequence[int], parts: Sequence[_Answers], num_seen: int, class_to_experience: np.ndarray) -> SetCounts:
    """The counts of one set from those of its batches."""
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in EACH}
    y, predicted, is_correct = (joined[name] for name in ("y", "predicted", "is_correct"))
    order = np.asarray(classes)
    return SetCounts(
        n=len(y),
        correct=int(is_correct.sum()),
        masked=sum(part.masked for part in parts),
        top5=sum(part.top5 for part in parts),
        class_correct=np.bincount(y[is_correct], minlength=num_seen)[order].tolist(),
        class_n=np.bincount(y, minlength=num_seen)[order].tolist(),
        heads={name: sum(part.heads[name] for part in parts) for name in parts[0].heads},
        by_experience=np.bincount(class_to_experience[predicted], minlength=int(class_to_experience.max()) + 1).tolist()
        if len(class_to_experience)
        else None,
        calibration=calibration(joined["confidence"], joined["nll"], joined["brier"], is_correct),
    )


def of_samples(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [B, K], labels [B] -> confidence, -log p(true) and squared distance from the one-hot truth, [B] float64 each.

    p is the softmax of the scores as the learner returned them. Row by row, so batch mates do not matter.
    """
    z = z.astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    true = p[np.arange(len(y)), y]
    return p.max(1), -np.log(np.maximum(true, LEAST)), np.maximum((p * p).sum(1) - 2 * true + 1, 0.0)


def calibration(confidence: np.ndarray, nll: np.ndarray, brier: np.ndarray, is_correct: np.ndarray) -> dict[str, Any]:
    """Sums over the samples of a set [N], in 15 equal bins of confidence; exactly rounded, so their order does not matter."""
    bins = np.searchsorted(EDGES, confidence)
    bin_n = np.bincount(bins, minlength=BINS).tolist()
    return {
        "n": len(confidence),
        "nll": math.fsum(nll),
        "brier": math.fsum(brier),
        "bin_n": bin_n,
        "bin_conf": [math.fsum(confidence[bins == b]) if n else 0.0 for b, n in enumerate(bin_n)],
        "bin_correct": np.bincount(bins[is_correct], minlength=BINS).tolist(),
    }


def sums_of(counts: Sequence[SetCounts | None], seen: Sequence[bool], experiences: int) -> dict[str, Any]:
    """{sums, total} of a record's row: every sum has a value for each set, null where it was not evaluated.

    `seen` says which sets belong to the past: the calibration of these, as one, is `total`. `experiences` is the width of the
    table of predictions by the experience that brought the predicted class.
    """

    def column(value: Callable[[SetCounts], Any]) -> list[Any]:
        return [None if c is None else value(c) for c in counts]

    names = {"correct": "correct", "correct_masked": "masked", "correct_top5": "top5", "class_correct": "class_correct"}
    sums = {name: column(lambda c, field=field: copy.copy(getattr(c, field))) for name, field in names.items()}
    known = [c for c in counts if c is not None]
    for head in known[-1].heads if known else ():
        sums[f"heads/{head}"] = column(lambda c, head=head: c.heads[head])
    if all(c.by_experience is not None for c in known):
        sums["task_confusion"] = column(lambda c: (c.by_experience or []) + [0] * (experiences - len(c.by_experience or [])))
    total = together([c.calibration for c, one in zip(counts, seen, strict=True) if one and c is not None])
    return {"sums": sums} | ({} if total is None else {"total": total})


def spent_of(counts: Sequence[SetCounts | None]) -> dict[str, list[int | None]]:
    """What answers cost, by name, a value for each set, null where it was not evaluated; empty where nothing is counted."""
    names = sorted({name for c in counts if c is not None for name in c.spent})
    return {name: [None if c is None else c.spent.get(name, 0) for c in counts] for name in names}


def together(sets: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """`calibration` of several sets as one; None where there is none, or one of them was not measured."""
    known = [one for one in sets if one is not None]
    if not known or len(known) < len(sets):
        return None
    total: dict[str, Any] = {"n": sum(one["n"] for one in known)}
    total |= {name: math.fsum(one[name] for one in known) for name in ("nll", "brier")}
    total["bin_n"] = [sum(one["bin_n"][b] for one in known) for b in range(BINS)]
    total["bin_conf"] = [math.fsum(one["bin_conf"][b] for one in known) for b in range(BINS)]
    return total | {"bin_correct": [sum(one["bin_correct"][b] for one in known) for b in range(BINS)]}


def checked(scores: Any, batch: int, num_seen: int, learner: str) -> Tensor:
    """A prediction as float32 [B, num_seen] on the CPU, or `UserError`."""
    if not isinstance(scores, Tensor) or scores.shape != (batch, num_seen):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"{learner}.predict must return [{batch}, {num_seen}] scores, got {shape}")
    z = scores.detach().float().cpu()
    if not torch.isfinite(z).all():
        raise UserError(f"{learner}.predict returned NaN or infinite scores")
    return z
