"""Runs a learner over evaluation sets -> counts. The only place where a learner's answers meet the labels.

Legend: B batch, N samples of a set, K classes seen, T experiences. One pass over each set serves every count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import UserError

BINS = 15
EDGES = np.arange(1, BINS) / BINS  # bin b holds confidences in (b / 15, (b + 1) / 15]
LEAST = float(np.finfo(np.float32).tiny)  # probabilities below it count as it: nll stays finite


@dataclass
class SetCounts:
    """Counts on one evaluation set; `class_correct` follows the set's classes.

    into         [T] predictions by the experience that brought the predicted class
    calibration  n, nll, brier, bin_n, bin_conf, bin_correct (see `calibration`)
    Both are None in the snapshot of a run that began before they were counted.
    """

    n: int = 0
    correct: int = 0
    masked: int = 0
    top5: int = 0
    class_correct: list[int] = field(default_factory=list)
    class_n: list[int] = field(default_factory=list)
    heads: dict[str, int] = field(default_factory=dict)
    into: list[int] | None = None
    calibration: dict[str, Any] | None = None


def evaluate(
    learner: Any,
    evals: Sequence[Any],
    num_seen: int,
    batch_size: int,
    autocast: Callable[[], Any],
    check_stop: Callable[[], None] = lambda: None,
    origin: Sequence[int] = (),
) -> list[SetCounts | None]:
    """Count right answers on every set whose classes have all been seen; None for the others.

    `correct` is the arg-max over all seen classes, or over the task's classes where the set discloses its task; `masked`
    is always over the set's own classes. `origin` names the experience that brought each class. Raises `UserError` when
    predictions have a wrong shape or are not finite.
    """
    row: list[SetCounts | None] = []
    for eval_set in evals:
        if max(eval_set.classes) >= num_seen:
            row.append(None)
            continue
        row.append(_one_set(learner, eval_set, num_seen, batch_size, autocast, check_stop, np.asarray(origin, np.int64)))
    return row


def _one_set(
    learner: Any, eval_set: Any, num_seen: int, batch_size: int, autocast: Any, check_stop: Any, origin: np.ndarray
) -> SetCounts:
    own = torch.tensor(sorted(eval_set.classes))
    counts = SetCounts(class_correct=[0] * len(own), class_n=[0] * len(own))
    place = {int(c): i for i, c in enumerate(eval_set.classes)}
    parts, answers = [], np.zeros(num_seen, np.int64)
    for batch, y in eval_set.batches(batch_size):
        check_stop()
        with torch.no_grad(), autocast():
            answer = learner.predict(batch)
        heads = answer if isinstance(answer, Mapping) else {"": answer}
        for i, (name, scores) in enumerate(heads.items()):
            z = checked(scores, len(y), num_seen, type(learner).__name__)
            within = own[z[:, own].argmax(1)]
            right = within == y
            given = within if eval_set.task is not None else z.argmax(1)
            hit = given == y
            if name:
                counts.heads[name] = counts.heads.get(name, 0) + int(hit.sum())
            if i > 0:
                continue
            counts.n += len(y)
            counts.correct += int(hit.sum())
            counts.masked += int(right.sum())
            counts.top5 += int((z.topk(min(5, num_seen), dim=1).indices == y[:, None]).any(1).sum())
            for c in y.unique().tolist():
                counts.class_n[place[c]] += int((y == c).sum())
                counts.class_correct[place[c]] += int(hit[y == c].sum())
            answers += np.bincount(given.numpy(), minlength=num_seen)
            asked = (z[:, own], torch.searchsorted(own, y)) if eval_set.task is not None else (z, y)
            parts.append((*of_samples(asked[0].numpy(), asked[1].numpy()), hit.numpy()))
    counts.calibration = calibration(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    if len(origin):
        totals = np.bincount(origin[:num_seen], weights=answers, minlength=int(origin.max()) + 1)
        counts.into = [int(total) for total in totals]
    return counts


def of_samples(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [B, K], labels [B] -> confidence, -log p(true) and squared distance from the one-hot truth, [B] float64 each.

    p is the softmax of the scores as the learner returned them. Row by row, so batch mates do not matter.
    """
    z = z.astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    true = p[np.arange(len(y)), y]
    return p.max(1), -np.log(np.maximum(true, LEAST)), np.maximum((p * p).sum(1) - 2 * true + 1, 0.0)


def calibration(confidence: np.ndarray, nll: np.ndarray, brier: np.ndarray, hit: np.ndarray) -> dict[str, Any]:
    """Sums over the samples of a set [N], in 15 equal bins of confidence; exactly rounded, so their order does not matter."""
    bins = np.searchsorted(EDGES, confidence)
    return {
        "n": len(confidence),
        "nll": math.fsum(nll),
        "brier": math.fsum(brier),
        "bin_n": np.bincount(bins, minlength=BINS).tolist(),
        "bin_conf": [math.fsum(confidence[bins == b]) for b in range(BINS)],
        "bin_correct": np.bincount(bins[hit], minlength=BINS).tolist(),
    }


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
