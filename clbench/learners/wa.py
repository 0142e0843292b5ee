"""WA: weight aligning (Zhao, Xiao, Gan, Zhang & Xia, CVPR 2020, arXiv 1911.07053), as in PyCIL.

    (1 - lambda) CE + lambda KD,   lambda = classes known before / classes seen

CE over all seen classes, KD = -sum softmax(z_old / T) log softmax(z / T), T = 2, on the classes known before, on new and herded
samples shuffled together. After training the new classes' weight vectors are multiplied by
mean |w_old| / mean |w_new| (biases stay), so that new classes are not favoured for their longer vectors.

Deviations: where classes come back, lambda = known before / (known before + classes of the experience), which is the same
without them (else an experience without new classes would be distilled only), and such a class counts as old. The default
rates are for pre-trained backbones; PyCIL's protocol is a ResNet-32 from scratch, 170 epochs (200 first), SGD 0.1 (x 0.1 at
60, 100, 140), batch 128, weight decay 2e-4, 2,000 exemplars.
Published (read off PyCIL's plot, +- 1, in that protocol): CIFAR-100 B0 Inc10 last 52 %.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.training.distillation import frozen_copy, prediction_distillation
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.memory import Rehearsed, allowed_memory
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


def align_weights(head: LinearHead, known: int) -> float:
    """Scale the rows of classes known, known + 1, ... to the old rows' mean norm, in place -> the factor."""
    rows = torch.cat([block.weight for block in head.blocks]).detach()  # type: ignore[misc]
    norms = rows.norm(dim=1)
    factor = float(norms[:known].mean() / norms[known:].mean())
    first = 0
    with torch.no_grad():
        for block in head.blocks:
            if first >= known:
                block.weight.mul_(factor)  # type: ignore[operator]
            first += int(block.out_features)  # type: ignore[arg-type]
    return factor


class WeightAligning:
    """State: backbone, head, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        temperature: float = 2.0,
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        schedule: Schedule = constant,
    ):
        self.model, self.runtime, self.temperature = model, runtime, temperature
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.memory = allowed_memory(runtime, "herding", memory)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on new and stored samples, align, herd."""
        known = experience.num_seen - len(experience.new_classes)
        share = known / (known + len(experience.classes))
        teacher = frozen_copy(self.model, self.head) if known else None
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            z = self.head(self.model.features(batch))
            if teacher is None:
                return F.cross_entropy(z, batch.y)
            with torch.no_grad():
                old = teacher[1](teacher[0].features(batch))
            kd = prediction_distillation(z[:, :known], old, self.temperature, squared=False)
            return (1 - share) * F.cross_entropy(z, batch.y) + share * kd

        train: Any = experience.train
        batches = Rehearsed(train, self.memory.data(train), self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        if known and experience.new_classes:
            log["factor"] = align_weights(self.head, known)
        features, _ = extract(self.runtime, self.model, self.memory.candidates(train), self.batch_size)
        self.memory.update(train, features)
        return {**log, "exemplars": float(len(self.memory))}

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        """Backbone, head, memory."""
        return collect(self, "model", "head", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
