"""What is counted of a decoder's answers to lines of text tasks, and its loss on old text.

An answer is right where the model, left to itself, says every token of it, the end included (greedy decoding). That is the case
exactly where each token is the first choice after those before it, so one pass over prompt and answer decides, and nothing is
generated. Answers are compared token by token: nothing is stripped, lowered or trimmed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.streams.tokens.text_data import TextBatch, asked_batches
from clbench.streams.tokens.text_lines import Lines

NextToken = Callable[[TextBatch], Tensor]


def scores_of(answer: NextToken, batch: TextBatch, vocab: int) -> Tensor:
    """Scores of the token after each one but the last of a batch [B, L - 1, V] float32."""
    z, (rows, length) = answer(batch), batch.tokens.shape
    if (
        not isinstance(z, Tensor)
        or z.ndim != 3
        or z.shape[0] != rows
        or z.shape[1] not in (length, length - 1)
        or z.shape[2] < vocab
    ):
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise UserError(f"next_token must return scores {(rows, length, vocab)} of {(rows, length)} tokens, got {found}")
    return z[:, : length - 1].float()


class AskedLines:
    """The lines of one evaluation set; `task` is None unless it is disclosed. `scores` are names of `generated.SCORES`."""

    def __init__(
        self,
        name: str,
        lines: Lines,
        ids: np.ndarray,
        device: Any,
        vocab: int,
        size: int,
        task: int | None,
        scores: Sequence[str] = (),
    ):
        self.scores = scores
        self.name, self.lines, self.ids, self.task = name, lines, ids, task
        self.device, self.vocab, self.size = device, vocab, size

    def __len__(self) -> int:
        return len(self.ids)


class Answers:
    """Counts of lines, and sums over the tokens of their right answers.

    correct     the whole answer is said; `token_hits` of `tokens`: each after the right ones before it
    nats        of the right answers
    """

    name = "answers"

    def __call__(self, learner: Any, data: AskedLines) -> dict[str, int | float]:
        """Named sums over the lines of `data`."""
        sums: dict[str, int | float] = {"n": len(data), "correct": 0, "token_hits": 0, "tokens": 0, "nats": 0.0}
        for _, batch in asked_batches(data.lines, data.ids, data.size, data.device, data.task):
            z, asked = scores_of(learner.next_token, batch, data.vocab), batch.asked
            wanted = batch.tokens[:, 1:]
            hits = (z.argmax(-1) == wanted) & asked
            nats = -torch.log_softmax(z.double(), -1).gather(-1, wanted[..., None])[..., 0]
            sums["correct"] += int((hits.sum(1) == asked.sum(1)).sum())
            sums["token_hits"] += int(hits.sum())
            sums["tokens"] += int(asked.sum())
            sums["nats"] += float(nats[asked].sum())
        return sums


def old_text_sums(learner: Any, old: np.ndarray, device: Any, vocab: int, size: int) -> dict[str, int | float]:
    """Loss on rows of old text [M, L]: `nats` over `tokens`; the first token of each of `n` rows is given. Of no task."""
    sums: dict[str, int | float] = {"n": len(old), "tokens": 0, "nats": 0.0}
    for first in range(0, len(old), size):
        rows = old[first : first + size]
        batch = TextBatch.of_lines(list(rows), np.ones(len(rows), np.int64), device)
        z = torch.log_softmax(scores_of(learner.next_token, batch, vocab).double(), -1)
        sums["nats"] -= float(z.gather(-1, batch.tokens[:, 1:, None]).sum())
        sums["tokens"] += rows[:, 1:].size
    return sums
