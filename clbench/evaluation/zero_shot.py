"""Zero-shot questions to a language model: of several options the one with the lowest loss is its answer.

The questions are those of `streams.tokens.questions`, made of the evaluation sets themselves. The score of an option is the
summed loss of its tokens and of those behind it (of a cloze), given what stands before; a right answer is strictly the lowest.
Long options lose more, so there are two normalisations beside the sum (as `acc` and `acc_norm` in Gao et al. 2024, lm-eval):

    correct            lowest sum of nats
    correct_per_token  lowest nats per token that is scored
    correct_per_byte   lowest nats per byte; where tokens are bytes, and there equal to the one before
    nats, tokens       of the right options with what stands behind them

Guessing gets a quarter, of `answer` half. Rows are padded at their ends, which changes nothing of the losses of a causal model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from clbench.streams.tokens import questions
from clbench.streams.tokens.questions import Question

Loss = Callable[[Any, np.ndarray], np.ndarray]


class Texts:
    """Windows [N, L + 1] of a validation text as an evaluation set of a stream of tokens.

    of_bytes  whether a token is a byte
    ask       (learner, tokens [B, M + 1]) -> nats of every token after the first [B, M] float64
    """

    def __init__(self, name: str, windows: np.ndarray, of_bytes: bool, ask: Loss, batch: int):
        self.name, self.windows, self.of_bytes = name, windows, of_bytes
        self._ask, self._batch = ask, batch

    def __len__(self) -> int:
        return len(self.windows)

    def nats(self, learner: Any, rows: Sequence[np.ndarray], starts: Sequence[int]) -> np.ndarray:
        """Summed loss of each row's tokens from number `start` (at least 1) on -> [N] float64."""
        found = np.empty(len(rows))
        order = np.array(sorted(range(len(rows)), key=lambda i: len(rows[i])), np.int64)
        sizes, firsts = np.array([len(row) for row in rows]), np.asarray(starts)
        for at in range(0, len(order), self._batch):
            some = order[at : at + self._batch]
            width = int(sizes[some].max())
            tokens = np.stack([np.pad(rows[i], (0, width - len(rows[i])), mode="edge") for i in some])
            place = np.arange(1, width)
            counted = (place >= firsts[some, None]) & (place < sizes[some, None])
            found[some] = np.where(counted, self._ask(learner, tokens), 0.0).sum(1)
        return found


class _Choice:
    """Asks the questions of one kind."""

    asks: ClassVar[Literal["loss"]] = "loss"
    name: ClassVar[str]

    def __call__(self, learner: Any, data: Texts) -> dict[str, int | float]:
        """Named sums over the questions of `data`."""
        return counted(learner, data, questions.KINDS[self.name](data.windows, data.of_bytes))


class Cloze(_Choice):
    """Evaluator `cloze`: what stands in a gap."""

    name = "cloze"


class Answer(_Choice):
    """Evaluator `answer`: which of two bits a LEGO chain ends with; guessing gets half."""

    name = "answer"


class Completion(_Choice):
    """Evaluator `completion`: which continuation follows."""

    name = "completion"


def counted(learner: Any, data: Texts, asked: Sequence[Question]) -> dict[str, int | float]:
    """Named sums over questions, each with as many options, the right one first."""
    rows = [np.concatenate([q.before, option, q.after]) for q in asked for option in q.options]
    starts = [len(q.before) for q in asked for _ in q.options]
    nats = data.nats(learner, rows, starts).reshape(len(asked), -1)
    tokens = (np.array([len(row) for row in rows]) - starts).reshape(nats.shape)

    def right(score: np.ndarray) -> int:
        return int((score[:, 0] < score[:, 1:].min(1)).sum())

    sums: dict[str, int | float] = {"n": len(asked), "correct": right(nats), "correct_per_token": right(nats / tokens)}
    sums |= {"correct_per_byte": sums["correct_per_token"]} if data.of_bytes else {}
    return sums | {"nats": float(nats[:, 0].sum()), "tokens": int(tokens[:, 0].sum())}
