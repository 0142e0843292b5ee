"""L2 Init: regenerative regularisation (Kumar, Marklund & Van Roy, 2023, arXiv 2308.11958, "Maintaining Plasticity in Continual
Learning via Regenerative Regularization").

    cross-entropy + strength |theta - theta_0|^2

over all weights and biases of backbone and head; theta_0 are the first ones: those that the model came with, and those that a
row of the head was drawn with. The term is in the loss, so Adam scales it with the rest. It keeps a network able to learn
rather than from forgetting; `l2_reg` with reference=pretrained holds the backbone alone.
Factor: the paper has no 1/2; nor has this file (`quadratic_penalty` has, and is doubled).

masking  softmax over the experience's classes ("local", default: where the same classes come again, over all; boundaries must
         be told) or all seen.
Constants: Adam 1e-3 or 1e-4, strength 1e-2 to 1e-5, in the paper's text; no released code was found. Published number: none
read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.fisher import kept, moved, quadratic_penalty
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


class L2Init:
    """State: backbone and head, and the first weights of both."""

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)

    @staticmethod
    def capabilities_of(*, masking: str = "local", **options: Any) -> Capabilities:
        """The penalty needs no boundaries; a softmax over an experience's classes must be told where one ends."""
        return replace(L2Init.capabilities, needs_boundaries=masking == "local")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 1e-2,
        masking: Literal["local", "seen", "batch"] = "local",
        optimizer: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.0,  # of sgd
        lr: float = 1e-3,  # head
        backbone_lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 64,
        schedule: Schedule = constant,
    ):
        self.model, self.runtime, self.strength, self.masking = model, runtime, strength, masking
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe(optimizer, momentum, schedule=schedule)
        self.head, self.first_head = (LinearHead(model.num_features).to(runtime.device) for _ in range(2))
        self.first = kept(model)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train everything on the experience, near where it began."""
        if experience.new_classes:
            for head in (self.head, self.first_head):  # the same draws
                head.grow(len(experience.new_classes), self.runtime.generator("head"))
        first_head = {name: p.detach() for name, p in self.first_head.named_parameters()}
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            z = self.head(self.model.features(batch))
            half = quadratic_penalty(self.model, self.first) + quadratic_penalty(self.head, first_head)
            return masked_cross_entropy(z, batch.y, self.masking, experience.classes) + 2 * self.strength * half

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe)

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "first_head", "first")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, {**state, "first": moved(state["first"], self.runtime.device)})
