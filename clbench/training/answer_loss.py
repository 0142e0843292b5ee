"""The loss of a decoder on lines of text tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional

from clbench.interfaces import UserError
from clbench.streams.tokens.text_data import TextBatch

Targets = Literal["answer", "line"]
TARGETS = ("answer", "line")


def check_targets(targets: str) -> None:
    """`UserError` for a word that is none."""
    if targets not in TARGETS:
        raise UserError(f"unknown learner.targets={targets}: choose {', '.join(TARGETS)}")


def answer_loss(model: Callable[[Tensor], Tensor], batch: TextBatch, targets: Targets = "answer") -> Tensor:
    """Mean nats over the tokens of all answers of a batch, the end included; `line`: over those of prompts too -> scalar.

    A token has equal weight whatever line it is in, so long answers count more: the mean of most released code.
    """
    z, wanted = model(batch.tokens[:, :-1]), batch.tokens[:, 1:]
    counts = batch.asked if targets == "answer" else batch.real
    return functional.cross_entropy(z[counts].float(), wanted[counts])
