"""Shrink and perturb: weights are shrunk and noise is added, so that a trained network can learn anew (Ash & Adams, NeurIPS
2020, arXiv 1910.08475, "On Warm-Starting Neural Network Training"). Training as in `finetune`.

    theta <- p theta + sigma e,  e ~ N(0, 1)

variant  "paper" (default): before each experience but the first, all weights and biases of backbone and head, p = `shrink`.
         "official": the form of the Loss of Plasticity release (Dohare et al., Nature 2024): after every step, sigma alone;
         the shrinking is the optimiser's weight decay (`weight_decay=1e-4`, sigma 1e-4 to 1e-6).

Defaults are start values, to be tuned. Published number: none read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, parameters_of, restore


class ShrinkPerturb:
    """State: backbone and head."""

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)

    @staticmethod
    def capabilities_of(*, variant: str = "paper", masking: str = "seen", **options: Any) -> Capabilities:
        """What is done at every step needs no boundaries; a softmax over an experience's classes does."""
        return replace(ShrinkPerturb.capabilities, needs_boundaries=variant == "paper" or masking == "local")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",
        shrink: float | None = None,  # p of the paper's form; null: 0.6
        sigma: float = 0.01,
        masking: Literal["local", "seen", "batch"] = "seen",
        optimizer: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.9,  # of sgd
        weight_decay: float = 0.0,
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 64,
        schedule: Schedule = constant,
    ):
        self.every_step = variant == "official"
        if self.every_step and shrink is not None:
            raise UserError(f"learner.shrink={shrink} has no effect with learner.variant=official: set learner.weight_decay")
        self.shrink = 0.6 if shrink is None else shrink
        if not 0 <= self.shrink <= 1 or sigma < 0:
            raise UserError(f"learner.shrink must lie in [0, 1] and sigma from 0, got shrink={shrink} sigma={sigma}")
        self.model, self.runtime, self.sigma, self.masking = model, runtime, sigma, masking
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe(optimizer, momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Shrink and perturb what was learned, grow the head, train on the experience."""
        if experience.index and not self.every_step:
            self.change(self.shrink, self.runtime.generator("perturb"))
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return masked_cross_entropy(self.head(self.model.features(batch)), batch.y, self.masking, experience.classes)

        def after(place: Place, batch: Batch) -> None:
            self.change(1.0, self.runtime.generator("perturb", place.step))

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        return fit(
            self.runtime, "train", self, groups, loss, batches, self.recipe, after_step=after if self.every_step else None
        )

    @torch.no_grad()
    def change(self, shrink: float, generator: torch.Generator) -> None:
        """Theta <- shrink theta + sigma e."""
        for p in parameters_of(self.model, self.head):
            p.mul_(shrink)
            if self.sigma:
                p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=self.sigma)

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
