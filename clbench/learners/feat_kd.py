"""Feature distillation, rehearsal-free (Smith, Tian, Halbe, Hsu & Kira, CVPR-W 2023, arXiv 2203.17269).

    local cross-entropy + strength x |f_t(x) - f_{t-1}(x)|^2

f_{t-1} being the features of the network at the end of the previous experience. `trainable`: all | attention | qkv, as in
`l2_reg.py`. No official code was found; the constants are start values. No published number is given: the paper's tables were
not re-read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.distillation import feature_distillation, frozen_copy
from clbench.training.fisher import Part, train_only
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore


class FeatKd:
    """State: backbone and head (the teacher is both, as an experience finds them)."""

    capabilities: ClassVar[Capabilities] = Capabilities()

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 1.0,
        trainable: Part = "qkv",
        lr: float = 5e-5,
        backbone_lr: float = 5e-5,
        epochs: int | None = None,
        batch_size: int = 128,
        weight_decay: float = 0.0,
        schedule: Schedule = cosine,
    ):
        train_only(model, trainable)
        self.model, self.runtime, self.strength = model, runtime, strength
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("adam", weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the new data; its features stay near what they were."""
        teacher = frozen_copy(self.model) if experience.index else None
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            features = self.model.features(batch)
            local = masked_cross_entropy(self.head(features), batch.y, "local", experience.classes)
            if teacher is None:
                return local
            with torch.no_grad():
                old = teacher[0].features(batch)
            return local + self.strength * feature_distillation(features, old)

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
