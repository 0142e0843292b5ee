"""LwF: Learning without Forgetting (Li & Hoiem, ECCV 2016, arXiv 1606.09282), class-incremental as in PyCIL.

    local cross-entropy + strength x KD,   KD = -sum softmax(z_old / T) log softmax(z / T), no factor T^2

on the logits of the classes known before; z_old from the network at the end of the previous experience, T = 2, strength 3.
PyCIL's protocol is a ResNet-32 from scratch: 250 epochs, SGD 0.1 (x 0.1 at 60, 120, 180, 220), batch 128, weight decay 2e-4.
The default rates here are for pre-trained backbones.
Published (MOS table, ViT-B/16 augreg_in21k): CIFAR-100 B0 Inc5 last 41.07 %, average 46.29 %.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.distillation import frozen_copy, prediction_distillation
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


class Lwf:
    """State: backbone and head (the teacher is both, as an experience finds them)."""

    capabilities: ClassVar[Capabilities] = Capabilities()

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 3.0,
        temperature: float = 2.0,
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        schedule: Schedule = constant,
    ):
        self.model, self.runtime = model, runtime
        self.strength, self.temperature = strength, temperature
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the new data; old answers to it stay."""
        teacher = frozen_copy(self.model, self.head) if experience.index else None
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            z = self.head(self.model.features(batch))
            local = masked_cross_entropy(z, batch.y, "local", experience.classes)
            if teacher is None:
                return local
            with torch.no_grad():
                old = teacher[1](teacher[0].features(batch))
            return local + self.strength * prediction_distillation(z[:, : old.shape[1]], old, self.temperature, squared=False)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe)

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        """Backbone and head."""
        return collect(self, "model", "head")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        restore(self, state)
