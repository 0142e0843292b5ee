"""PSMT: a parameter-selective mean teacher for continual test-time adaptation (ACCV 2024).

Network and head are trained on the source as in `finetune`. Student theta and teacher theta' begin as the source theta_0;
BatchNorm uses the statistics of the batch. For every test batch
  1. one step of the student on  1/2 S(student(x), y') + 1/2 S(student(view of x), y') + fisher sum_j F_j (theta_j - theta_0j)^2
     with the teacher's answer y' and S(z, y') = 1/2 CE(softmax y', z) + 1/2 CE(softmax z, y')
  2. theta' <- alpha theta' + (1 - alpha) theta
  3. of all weights the share `restore` with the smallest squared gradients of this step goes back: theta = theta' = theta_0
The answer is the sum of both networks' logits, those that the loss was computed with (answer=before) or those after these steps
(answer=after). F_j is the squared gradient of a batch's mean cross-entropy to the network's own answers, averaged over batches
of 64 source images: the method needs source data when adaptation begins.

variant  "official" (default): the release as it runs, which overwrites its views: both terms see x itself, y' = teacher(x).
         "paper": the second term sees one random view, and y' is CoTTA's: where the mean confidence of the source lies below
         `threshold`, the mean of the teacher's logits over `augmentations` views. Views are CoTTA's.

Choices: weights with equal gradients go back together, so do all that no sample of the batch reaches; F comes from training
images in batches of 64; the views; which logits are the answer. `learn` starts from the source's own weights again.
Constants: fisher 500, restore 0.03, alpha 0.999, as in the release; its configuration files run another method, so that its
rate is CoTTA's here (Adam 1e-3). Published numbers: none read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.cotta import Cotta, Network
from clbench.models.backbone import Backbone
from clbench.training.adaptation import (
    Reset,
    batch_statistics,
    begins_anew,
    distance,
    fisher_batches,
    fisher_of_answers,
)
from clbench.training.fisher import Weights, moved
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect


class Psmt(Cotta):
    """State: CoTTA's, and the Fisher information of every weight on the source."""

    capabilities: ClassVar[Capabilities] = Capabilities(transductive=True, adapts_at_test=True, needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["official", "paper"] = "official",
        fisher: float = 500.0,  # strength of the term towards the source
        fisher_samples: int = 10000,  # source images that its weights are computed from
        restore: float = 0.03,  # share of the weights that goes back in a step
        alpha: float = 0.999,
        threshold: float = 0.92,  # variant=paper: mean confidence of the source below which views are averaged
        augmentations: int = 32,  # variant=paper
        answer: Literal["before", "after"] = "before",  # predict, then adapt; or adapt, then predict
        reset: Reset = "never",  # when adaptation starts from the source again
        steps: int = 1,  # on each test batch
        adapt_optimizer: Literal["adam", "sgd"] = "adam",
        adapt_lr: float = 1e-3,
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        if variant not in ("official", "paper"):
            raise UserError(f"unknown learner.variant={variant}: choose official or paper")
        if not 0 <= fisher < math.inf:
            raise UserError(f"learner.fisher must be a finite number from 0, got {fisher}")
        if fisher_samples < 2:
            raise UserError(f"learner.fisher_samples must be at least 2, got {fisher_samples}")
        super().__init__(
            model, runtime, threshold=threshold, augmentations=augmentations, alpha=alpha, restore=restore, answer=answer,
            reset=reset, steps=steps, loss="symmetric", adapt_optimizer=adapt_optimizer, adapt_lr=adapt_lr, lr=lr,
            backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, momentum=momentum, weight_decay=weight_decay,
            schedule=schedule,
        )  # fmt: skip
        self.views, self.strength, self.fisher_samples = variant == "paper", fisher, fisher_samples
        self.fisher: Weights = {}

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the source, then weigh every weight."""
        self.fisher = {}
        log = super().learn(experience)
        self.model.eval()
        batches, net = fisher_batches(experience, self.runtime, self.fisher_samples), Network(self.model, self.head)
        with self.runtime.phase("fisher"), self.model.in_fp32(), batch_statistics(self.model):
            self.fisher = fisher_of_answers(net, net.forward, batches)
        return log

    def predict(self, batch: Batch) -> Tensor:
        """Sum of the logits of teacher and student [B, num_seen]; changes the state."""
        self.model.eval()
        if begins_anew(self.reset, batch):
            self.begin()
        with batch_statistics(self.model):
            for _ in range(self.steps):
                z = self.adapt(batch.x)
            if self.answer == "after":
                with torch.no_grad():
                    z = self.scores(self.teacher, batch.x) + self.scores(self.student.weights, batch.x)
        return z

    def adapt(self, x: Tensor) -> Tensor:
        """One step on images -> the logits with which it was computed, of both networks together [B, num_seen]."""
        with torch.no_grad():
            y = self.target(x) if self.views else self.scores(self.teacher, x)
        with torch.enable_grad():
            z = self.scores(self.student.weights, x)
            seen = self.scores(self.student.weights, self.view(x, self.augmentations)) if self.views else z
            loss = (self.gap(y, z) + self.gap(y, seen)) / 2
            grads = self.student.gradients(loss + self.strength * distance(self.student.weights, self.source(), self.fisher))
        squares = [g.square() for g in grads if g is not None]
        assert len(squares) == len(grads), "the last term sees every weight"
        limit = least(squares, self.restoring)
        self.student.move(grads)
        with torch.no_grad():
            self.follow()
            source = self.source()
            for (name, value), square in zip(self.student.weights.items(), squares, strict=True):
                for own in (value, self.teacher[name]):
                    own.copy_(torch.where(square <= limit, source[name], own))
        self.answered += 1
        return (y + z).detach()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | collect(self, "fisher")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "fisher": moved(state["fisher"], self.runtime.device)})


def least(values: Sequence[Tensor], share: float) -> float:
    """The largest of the `share` of smallest values, over all tensors together; -inf where these are none."""
    flat = torch.cat([v.flatten() for v in values])
    count = int(share * len(flat))
    return float(flat.kthvalue(count).values) if count else -math.inf
