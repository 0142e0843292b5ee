"""The loss of a decoder on lines of text tasks, and what may be trained in place of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from clbench.interfaces import UserError
from clbench.models.pet import Factory, Pet
from clbench.streams.tokens.text_data import TextBatch
from clbench.training.runtime import Runtime

Targets = Literal["answer", "line"]
TARGETS = ("answer", "line")


def check_targets(targets: str) -> None:
    """`UserError` for a word that is none."""
    if targets not in TARGETS:
        raise UserError(f"unknown learner.targets={targets}: choose {', '.join(TARGETS)}")


def attach(pet: Factory, model: Any, runtime: Runtime) -> Pet | None:
    """Attach a module to a decoder; None where all weights are meant. `UserError` for kinds that images guide."""
    made = pet(model, runtime)
    if made is not None and made.guide is not None:
        raise UserError(f"pet={made.kind} is chosen by data or steps of its training, which learners of texts do not tell it")
    return made


def answer_loss(model: Callable[[Tensor], Tensor], batch: TextBatch, targets: Targets = "answer") -> Tensor:
    """Mean nats over the tokens of all answers of a batch, the end included; `line`: over those of prompts too -> scalar.

    A token has equal weight whatever line it is in, so long answers count more: the mean of most released code.
    """
    z, wanted = model(batch.tokens[:, :-1]), batch.tokens[:, 1:]
    counts = batch.asked if targets == "answer" else batch.real
    return functional.cross_entropy(z[counts].float(), wanted[counts])
