"""Incremental-frozen: the floor of few-shot class-incremental learning (`avg_cos` in CEC: Zhang, Song, Lin, Zheng, Pan & Xu,
CVPR 2021, arXiv 2104.03047, "Few-Shot Incremental Learning with Continually Evolved Classifiers").

Base session (the first experience): the whole network is trained with a cosine classifier, CE of temperature x cos(f, w_c).
Then the network is frozen and every class, of the base session too, is the mean of its un-normalised features under the test
transform; a later session adds the means of its few shots. The answer is the largest cosine. The final result does not depend
on the order of the later sessions.

Deviations: the last weights of the base session are taken, the releases take those with the best test accuracy; means answer
from the first session on, the releases report the better of trained rows and means there, so that their drop compares two
classifiers. A class that comes back has its mean over all its samples.
Constants: the release's for CIFAR-100 from scratch (SGD 0.9 nesterov, 0.1, weight decay 5e-4, batch 128, x 0.1 at 60 and 70 %
of 100 epochs); pre-trained networks need smaller rates. Published number: none read.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import CosineHead, PrototypeHead
from clbench.training.features import extract
from clbench.training.first_session import adapt
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import multistep
from clbench.training.state import collect, restore

DROPS = partial(multistep, milestones=(0.6, 0.7))


class IncrementalFrozen:
    """State: backbone, the classifier of the base session, sums and counts of every class."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        temperature: float = 16.0,
        lr: float = 0.1,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 5e-4,
        schedule: Schedule = DROPS,
    ):
        if temperature <= 0:
            raise UserError(f"learner.temperature must be above 0, got {temperature}")
        self.model, self.runtime = model, runtime
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, nesterov=nesterov, weight_decay=weight_decay, schedule=schedule)
        self.base_head = CosineHead(model.num_features).to(runtime.device)
        torch.nn.init.constant_(self.base_head.sigma, temperature)
        self.base_head.sigma.requires_grad_(False)
        self.prototypes = PrototypeHead(model.num_features, "cosine").to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train in the base session; then one pass over the data for its class means."""
        log = {}
        if experience.index == 0:
            log = adapt(
                self.runtime, self, self.model, self.model, self.base_head, experience,
                lr=self.lr, epochs=self.epochs, batch_size=self.batch_size, recipe=self.recipe,
            )  # fmt: skip
            self.model.freeze()
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        self.prototypes.update(features, y, experience.num_seen)
        return log

    def predict(self, batch: Batch) -> Tensor:
        """Cosines [B, num_seen]."""
        self.model.eval()
        return self.prototypes(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "base_head", "prototypes")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
        self.model.freeze() if len(self.prototypes.counts_K) else self.model.unfreeze()
