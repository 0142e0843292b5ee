"""BiC: bias correction (Wu, Chen, Wang, Ye, Liu, Guo & Fu, CVPR 2019, arXiv 1905.13260), as in PyCIL.

A balanced part of new and stored samples is set aside, `held_out` x memory / classes known before of each class (at least one
where the class has two). Stage 1 trains the network on the rest with
    (1 - lambda) CE + lambda KD,   lambda = classes known before / classes seen, KD as in `icarl.py`
Stage 2 trains two numbers on the part set aside: the newest classes' logits become alpha z + beta. The corrections of all
experiences are applied at inference and in the logits that are distilled.

double_softmax  PyCIL's stage 2 takes the cross-entropy of softmax(z), a softmax twice; off by default.
Deviations: stage 2 needs samples of new and of old classes set aside, else it is left out; it has its own rate `bias_lr` and no
weight decay. Where classes come back, lambda = known before / (known before + classes of the experience), which is the same
without them: else an experience without new classes would be distilled only. The default rates are for pre-trained
backbones; PyCIL's protocol is a ResNet-32 from scratch, 170 epochs, SGD 0.1 (x 0.1 at 60, 100, 140), 2,000 exemplars.
Published (read off PyCIL's plot, +- 1, in that protocol): CIFAR-100 B0 Inc10 last 51 %.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams import rng
from clbench.streams.images.data import ImageData
from clbench.training.distillation import frozen_copy, prediction_distillation
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.memory import Rehearsed, allowed_memory
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


class BiasLayer(nn.Module):
    """alpha z + beta for each experience's classes; row e is (alpha, beta), (1, 0) at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList()
        self.anchor: Tensor
        self.register_buffer("anchor", torch.zeros(0), persistent=False)  # where new rows go

    def grow(self) -> None:
        self.rows.append(nn.Parameter(torch.tensor([1.0, 0.0], device=self.anchor.device)))

    def forward(self, z: Tensor, widths: list[int]) -> Tensor:
        """Corrected logits [B, K]; `widths` are the classes of each experience."""
        parts = [row[0] * part + row[1] for row, part in zip(self.rows, z.split(widths, dim=1), strict=True)]
        return torch.cat(parts, dim=1)

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Fill in place, with as many rows as the state has."""
        while len(self.rows) < len(state):
            self.grow()
        if len(self.rows) > len(state):
            self.rows = nn.ParameterList(list(self.rows)[: len(state)])
        return super().load_state_dict(state, strict, assign)


def balanced_rows(y: np.ndarray, per_class: int, key: int) -> np.ndarray:
    """Rows to set aside: `per_class` of each class at random, at least one, and never the last one of a class."""
    rows = []
    for c in np.unique(y):
        own = np.flatnonzero(y == c)
        order = own[rng.permutation(rng.key(key, int(c)), len(own))]
        rows.append(order[: min(max(1, per_class), len(own) - 1)])
    return np.sort(np.concatenate(rows))


class Bic:
    """State: backbone, head, corrections, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        held_out: float = 0.1,  # share of the memory per class that stage 2 is trained on
        temperature: float = 2.0,
        double_softmax: bool = False,  # as released: a softmax before the cross-entropy of stage 2
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        bias_lr: float = 0.01,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        schedule: Schedule = constant,
    ):
        if not 0 < held_out < 1:
            raise UserError(f"learner.held_out is a share of the memory between 0 and 1, got {held_out}")
        self.model, self.runtime = model, runtime
        self.held_out, self.temperature, self.double_softmax = held_out, temperature, double_softmax
        self.lr, self.backbone_lr, self.bias_lr = lr, backbone_lr, bias_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.bias = BiasLayer().to(runtime.device)
        self.memory = allowed_memory(runtime, "herding", memory)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Both stages, then herding."""
        known = experience.num_seen - len(experience.new_classes)
        teacher = frozen_copy(self.model, self.head, self.bias) if known else None
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
            self.bias.grow()
        train: Any = experience.train
        stored = self.memory.data(train)
        rest, rest_stored, aside, aside_stored = train, stored, None, None
        if stored is not None and experience.new_classes:
            per_class = int(self.held_out * len(self.memory) / known)
            new = _split(train, per_class, self.runtime.key("aside", "new"))
            old = _split(stored, per_class, self.runtime.key("aside", "stored"))
            if (new[1].y >= known).any() and len(old[1]):
                (rest, aside), (rest_stored, aside_stored) = new, old
        batches = Rehearsed(rest, rest_stored, self.batch_size, self.epochs, self.runtime.key("train"))
        log = self._train(batches, known / (known + len(experience.classes)), known, teacher)
        if aside is not None:
            log |= self._correct(Rehearsed(aside, aside_stored, self.batch_size, self.epochs, self.runtime.key("bias")))
        features, _ = extract(self.runtime, self.model, self.memory.candidates(train), self.batch_size)
        self.memory.update(train, features)
        return {**log, "exemplars": float(len(self.memory))}

    def _train(self, batches: Rehearsed, share: float, known: int, teacher: tuple[Any, ...] | None) -> dict[str, float]:
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            z = self.corrected(self.model.features(batch))
            if teacher is None:
                return F.cross_entropy(z, batch.y)
            with torch.no_grad():
                old = teacher[2](teacher[1](teacher[0].features(batch)), teacher[1].widths)
            kd = prediction_distillation(z[:, :known], old, self.temperature, squared=False)
            return (1 - share) * F.cross_entropy(z, batch.y) + share * kd

        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe)

    def _correct(self, batches: Rehearsed) -> dict[str, float]:
        """Stage 2: the newest correction alone, the network in evaluation mode."""
        self.model.eval()
        newest = self.bias.rows[-1]

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            with torch.no_grad():
                features = self.model.features(batch)
            z = self.corrected(features)
            return F.cross_entropy(z.softmax(1) if self.double_softmax else z, batch.y)

        recipe = Recipe("sgd", self.recipe.momentum, schedule=self.recipe.schedule)
        log = fit(self.runtime, "bias", self, [{"params": [newest], "lr": self.bias_lr}], loss, batches, recipe)
        return {**log, "alpha": float(newest.detach()[0]), "beta": float(newest.detach()[1])}

    def corrected(self, features: Tensor) -> Tensor:
        """Corrected logits [B, K]."""
        return self.bias(self.head(features), self.head.widths)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Corrected logits [B, num_seen], and those before the correction."""
        self.model.eval()
        z = self.head(self.model.features(batch))
        return {"corrected": self.bias(z, self.head.widths), "uncorrected": z}

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "bias", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def _split(data: ImageData, per_class: int, key: int) -> tuple[ImageData, ImageData]:
    aside = balanced_rows(np.asarray(data.y), per_class, key)
    return data.subset(np.setdiff1d(np.arange(len(data)), aside)), data.subset(aside)
