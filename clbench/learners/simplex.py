"""Stationary representations by a fixed d-simplex classifier (Biondi, Pernici, Ricci & Del Bimbo, CVPR 2024, arXiv 2405.02581,
"Stationary Representations: Optimally Approximating Compatibility and Implications for Improved Model Replacements").

Fine-tuning, but the classifier never trains: its rows are vertices of a regular simplex in the space of features
(`models/simplex.py`), every class that comes takes the next free one. Vertices of classes that have not come take part in the
softmax of the training,
    CE(scale W f(x), y)   over all `reserve` vertices,
so that features are drawn away from where later classes will be: the place of a class does not move when classes are added,
and features of an old and a new model can be compared. Answers are given among the classes seen.

reserve  null: D + 1, all vertices that D features have; fewer, where the number of classes to come is known
Deviations: features are as they come, not normalised; `scale` is 1. The paper's comparison of an old gallery with new queries
is no evaluator here; `clbench report flips` compares answers. Published number in this setting: none read.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.simplex import SimplexHead
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


class Simplex:
    """State: backbone, and how many vertices are taken."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        reserve: int | None = None,  # classes that the softmax has room for; null: features + 1
        scale: float = 1.0,  # of the logits
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        if not 0 < scale < math.inf:
            raise UserError(f"learner.scale must be a finite number above 0, got {scale}")
        self.model, self.runtime = model, runtime
        self.backbone_lr, self.epochs, self.batch_size = backbone_lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = SimplexHead(model.num_features, reserve, scale).to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Give new classes their vertices, train the network towards them."""
        self.head.grow(len(experience.new_classes))
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(self.head(self.model.features(batch)), batch.y)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        return fit(self.runtime, "train", self, groups_of((self.model, self.backbone_lr)), loss, batches, self.recipe)

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))[:, : self.head.num_classes]

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
