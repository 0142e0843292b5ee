"""Runs a learner over evaluation sets -> counts. The only place where a learner's answers meet the labels.

Legend: B batch, K classes seen, E evaluation sets. One pass over each set serves every count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clbench.interfaces import UserError


@dataclass
class SetCounts:
    """Counts on one evaluation set; `class_correct` follows the set's classes."""

    n: int = 0
    correct: int = 0
    masked: int = 0
    top5: int = 0
    class_correct: list[int] = field(default_factory=list)
    class_n: list[int] = field(default_factory=list)
    heads: dict[str, int] = field(default_factory=dict)


def evaluate(
    learner: Any,
    evals: Sequence[Any],
    num_seen: int,
    batch_size: int,
    autocast: Callable[[], Any],
    check_stop: Callable[[], None] = lambda: None,
) -> list[SetCounts | None]:
    """Count right answers on every set whose classes have all been seen; None for the others.

    `correct` is the arg-max over all seen classes, or over the task's classes where the set discloses its task; `masked`
    is always over the set's own classes. Raises `UserError` when predictions have a wrong shape or are not finite.
    """
    row: list[SetCounts | None] = []
    for eval_set in evals:
        if max(eval_set.classes) >= num_seen:
            row.append(None)
            continue
        row.append(_one_set(learner, eval_set, num_seen, batch_size, autocast, check_stop))
    return row


def _one_set(learner: Any, eval_set: Any, num_seen: int, batch_size: int, autocast: Any, check_stop: Any) -> SetCounts:
    own = torch.tensor(sorted(eval_set.classes))
    counts = SetCounts(class_correct=[0] * len(own), class_n=[0] * len(own))
    place = {int(c): i for i, c in enumerate(eval_set.classes)}
    for batch, y in eval_set.batches(batch_size):
        check_stop()
        with torch.no_grad(), autocast():
            answer = learner.predict(batch)
        heads = answer if isinstance(answer, Mapping) else {"": answer}
        for i, (name, scores) in enumerate(heads.items()):
            z = checked(scores, len(y), num_seen, type(learner).__name__)
            right = own[z[:, own].argmax(1)] == y
            hit = right if eval_set.task is not None else z.argmax(1) == y
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
    return counts


def checked(scores: Any, batch: int, num_seen: int, learner: str) -> Tensor:
    """A prediction as float32 [B, num_seen] on the CPU, or `UserError`."""
    if not isinstance(scores, Tensor) or scores.shape != (batch, num_seen):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"{learner}.predict must return [{batch}, {num_seen}] scores, got {shape}")
    z = scores.detach().float().cpu()
    if not torch.isfinite(z).all():
        raise UserError(f"{learner}.predict returned NaN or infinite scores")
    return z
