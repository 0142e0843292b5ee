"""Distillation towards an old model where it is right: focal distillation (Yan, Xiong, Kundu, Yang, Deng, Wang, Xia & Soatto,
CVPR 2021, arXiv 2011.09161, "Positive-Congruent Training") and, with other weights, the training of MUSCLE (Echterhoff et al.,
Findings of EMNLP 2024, arXiv 2407.09435).

    CE(z(x), y) + strength sum_i w_i T^2 KL(softmax(z_old(x_i) / T) || softmax(z(x_i) / T)) / B
    w_i = base + focus [the old model answers x_i right]

over the classes that the old model knows; z_old is the network as the experience found it. What the old model answers right
and the new one does not is a negative flip (`clbench report flips`). base=1 focus=5 is focal distillation with the paper's
constants; base=0 focus=1 distils from the old model where it is right and trains on the labels alone elsewhere, as MUSCLE does
token by token (which trains a compatibility adapter of a language model; here all weights train).
The cross-entropy runs over all classes seen. Where an experience brings new classes alone the old model is right nowhere, and
w_i = base: the loss is meant for streams in which classes come again (domains, repetition, data updates).
Authors' names beyond the first are from memory. Published number in this setting: none read.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.finetune import Finetune
from clbench.models.backbone import Backbone
from clbench.models.heads import grow
from clbench.streams.images.data import shuffled
from clbench.training.distillation import frozen_copy
from clbench.training.fit import fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import groups_of


def focal_distillation(z: Tensor, old: Tensor, y: Tensor, base: float, focus: float, temperature: float) -> Tensor:
    """Mean over the batch of w_i T^2 KL: logits [B, K] of the new and [B, K_old] of the old network, labels [B] -> scalar."""
    soft = (old / temperature).softmax(1)
    kl_B = (soft * (soft.clamp_min(1e-30).log() - (z[:, : old.shape[1]] / temperature).log_softmax(1))).sum(1)
    weight_B = base + focus * (old.argmax(1) == y).to(kl_B)
    return temperature**2 * (weight_B * kl_B).mean()


class FocalKd(Finetune):
    """State: backbone and head (the teacher is both, as an experience finds them)."""

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)

    @classmethod
    def capabilities_of(cls, **options: Any) -> Capabilities:
        return cls.capabilities

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 1.0,
        base: float = 1.0,  # weight of every sample
        focus: float = 5.0,  # more, where the old model is right
        temperature: float = 2.0,
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        for name, value in (("strength", strength), ("base", base), ("focus", focus)):
            if not 0 <= value < math.inf:
                raise UserError(f"learner.{name} must be a finite number from 0, got {value}")
        if not 0 < temperature < math.inf:
            raise UserError(f"learner.temperature must be a finite number above 0, got {temperature}")
        super().__init__(
            model, runtime, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, momentum=momentum,
            weight_decay=weight_decay, schedule=schedule,
        )  # fmt: skip
        self.strength, self.base, self.focus, self.temperature = strength, base, focus, temperature

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the labels, and towards the network as it was."""
        teacher, old_head = frozen_copy(self.model, self.head) if experience.index else (None, None)
        grow(self.head, experience, lambda: self.runtime.generator("head"))
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            z = self.head(self.model.features(batch))
            total = masked_cross_entropy(z, batch.y, "seen", experience.classes)
            if teacher is None or old_head is None or not self.strength:
                return total
            with torch.no_grad():
                old = old_head(teacher.features(batch))
            return total + self.strength * focal_distillation(z, old, batch.y, self.base, self.focus, self.temperature)

        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
