"""O-LoRA, orthogonal low-rank adaptation (Wang, Chen, Ge, Xia, Bao, Zheng, Zhang, Gui & Huang, Findings of EMNLP 2023,
arXiv 2310.14152; code: github.com/cmnfriend/O-LoRA).

Every task gets low-rank terms of its own; those of earlier tasks are frozen. With A_<t [(t-1) r, I] and B_<t [O, (t-1) r] the
earlier pairs one after another, the layer of a task t computes

    W x + s (B_<t A_<t + B_t A_t) x,    s = alpha / r

and the loss of a batch is

    CE + lambda_1 sum_layers |A_<t A_t'|  +  lambda_2 sum_layers (||A_t||_F + ||B_t||_F)

so that the new rows of A look at other directions of the input than the old ones do. All pairs are summed at test time: no
task is asked for. B is free, and nothing is orthogonal any more from (t - 1) r >= I on.

orthogonal, norm   lambda_1 and |.|: "l1_sum", the entries' absolute values added up, as in the code; "l1_mean", their mean;
                   "fro2", the squared Frobenius norm, which is how the loss is written elsewhere
shrink             lambda_2, of norms that are not squared, as in the code

orthogonal=0 is a new pair for every task and nothing more, "IncLoRA"; one pair that is trained on is `text_lora`.

From the code: r 8, alpha 32, targets q and v, lambda_1 0.5, lambda_2 0, a constant rate, A from U(+-1/sqrt(I)), B from 0. Its
scripts for fifteen tasks set both lambdas task by task; here they are the same for all. In a decoder's joint layer of q, k and
v the terms are rows of each head, so that k stays what it was. Deviations: no dropout in front of A (0.1 in the code); the
rate and the number of passes are for small decoders. The released layer and penalty, run beside this file on the same weights
of a decoder of width 16 for 30 steps of a second and of a third task, give the same loss (largest relative difference 1.6e-7)
and the same gradients (9.1e-7). Published number: none read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.models.decoder import Decoder
from clbench.models.pet import State
from clbench.models.pet_modules import lora
from clbench.streams.images.data import shuffled
from clbench.streams.tokens.text_data import TextBatch
from clbench.training.answer_loss import Targets, answer_loss, check_targets
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, detached, groups_of, restore

NORMS = ("l1_sum", "l1_mean", "fro2")


class OLora:
    """Low-rank terms of each task, whose A avoids the earlier ones'. State: the pair in training, those of all tasks."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="next_token")

    def __init__(
        self,
        model: Decoder,
        runtime: Runtime,
        *,
        orthogonal: float = 0.5,
        norm: Literal["l1_sum", "l1_mean", "fro2"] = "l1_sum",
        shrink: float = 0.0,
        rank: int = 8,  # of each task
        layers: Sequence[str] = ("q", "v"),  # of q, k, v, qkv, proj, fc1, fc2
        scale: float = 4.0,
        targets: Targets = "answer",
        lr: float = 3e-3,
        epochs: int | None = None,
        batch_size: int = 16,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        schedule: Schedule = constant,
    ):
        check_targets(targets)
        if norm not in NORMS:
            raise UserError(f"unknown learner.norm={norm}: choose {', '.join(NORMS)}")
        if orthogonal < 0 or shrink < 0:
            raise UserError(f"learner.orthogonal and learner.shrink must be at least 0, got {orthogonal:g} and {shrink:g}")
        self.model, self.runtime, self.lr = model, runtime, lr
        self.targets: Targets = targets
        self.orthogonal, self.norm, self.shrink = orthogonal, norm, shrink
        self.pet = lora(model, runtime, rank=rank, targets=layers, scale=scale)
        self.past: State = {}
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("adamw", weight_decay=weight_decay, schedule=schedule, clip=clip)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train a new pair beside the earlier ones, then freeze it."""
        if self.past:
            self.pet.reset(self.runtime.generator("pet"))
        self.pet.train()

        def loss(batch: TextBatch) -> Tensor:
            with self.pet.use(joined(self.past, self.pet.values)):
                value = answer_loss(self.model, batch, self.targets)
            return value + self.penalty()

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "train", self, groups_of((self.pet, self.lr)), loss, batches, self.recipe)
        self.past = detached(joined(self.past, self.pet.values))
        return log

    def penalty(self) -> Tensor:
        """What the pair in training adds to the loss, a scalar."""
        values, total = self.pet.values, torch.zeros((), device=self.runtime.device)
        if self.past and self.orthogonal:
            every = [overlap(self.past[name], a, self.norm) for name, a in values.items() if name.endswith("/a")]
            total = total + self.orthogonal * torch.stack(every).sum()
        if self.shrink:
            total = total + self.shrink * torch.stack([value.norm() for value in values.values()]).sum()
        return total

    def next_token(self, batch: TextBatch) -> Tensor:
        """Scores of the token after each: [B, L] -> [B, L, V], with the pairs of all tasks."""
        self.pet.eval()
        with self.pet.use(self.past) if self.past else self.pet.off():
            return self.model(batch.tokens)

    def state_dict(self) -> dict[str, Any]:
        """The pair in training and those of all tasks; the network itself stays."""
        return collect(self, "pet", "past")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def overlap(past: Tensor, new: Tensor, norm: str) -> Tensor:
    """How far rows new [r, I] are from being orthogonal to rows past [R, I]; a scalar."""
    products = past @ new.T
    return products.square().sum() if norm == "fro2" else products.abs().mean() if norm == "l1_mean" else products.abs().sum()


def joined(past: State, new: Any) -> State:
    """Pairs as one of a higher rank, rows of A and columns of B one after another: its product is the sum of theirs."""
    if not past:
        return dict(new.items())
    return {name: torch.cat([past[name], value], dim=0 if name.endswith("/a") else 1) for name, value in new.items()}
