"""LAE: Learning, Accumulation, Ensemble (Gao, Zhao, Sun, Xi, Zhang, Ghanem & Zhang, ICCV 2023, arXiv 2303.10070).

One PET module (adapter, LoRA or prefix) on a frozen ViT, never reset: the online one.
  learning      local cross-entropy: the softmax runs over the experience's classes. From the second experience on the online
                module is frozen for the first part of the training, in which only the classifier is trained.
  accumulation  an offline copy, made at the end of the first experience, follows by theta_off <- a theta_off + (1 - a)
                theta_on after every step, frozen ones included (a = 0.9999).
  ensemble      p = max(softmax(z_on), softmax(z_off)), element by element over all seen classes.

The paper's adaptation-speed calibration is in the modules: `pet=adapter_lae | lora_lae | prefix_lae` (blocks 0 to 4).
`freeze` is a share of the training's steps: the release's 3 of 5 epochs (CIFAR-100) and 30 of 50 (ImageNet-R) are both 0.6.
As released, the incomplete last batch of an epoch is dropped.
PILOT's port differs (batch 128 with the rate of batch 24, prefix frozen in the first experience): other numbers.
The release: ViT-B/16 orig_in21k, three orders, CIFAR-100 B0 Inc10 5 epochs, batch 24. Published (as read in SSIAT's README, a
re-run of three orders): CIFAR-100 B0 Inc20 last 85.25 %, average 89.80 %; ImageNet-R 72.29 / 77.99 %. The paper's own tables
were not read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.models.pet import Factory, State, follow, unguided
from clbench.models.pet_modules import adapter
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


class Lae:
    """State: the online module, the offline one (empty until the second experience), the head, experiences learned."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_pretrained=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        pet: Factory = adapter,
        lr: float = 0.0028125,  # 0.03 x batch / 256
        epochs: int | None = None,
        batch_size: int = 24,
        freeze: float = 0.6,  # share of the training, from the second experience on, in which the module is frozen
        decay: float = 0.9999,
        weight_decay: float = 0.0,
        schedule: Schedule = constant,
    ):
        if not 0 <= freeze < 1:
            raise UserError(f"learner.freeze is a share of the training below 1, got {freeze}")
        if not 0 <= decay <= 1:
            raise UserError(f"learner.decay must lie between 0 and 1, got {decay}")
        online = unguided(pet(model, runtime), "lae")
        if online is None:
            raise UserError("lae tunes a module: choose pet=adapter_lae, lora_lae or prefix_lae")
        self.model, self.runtime, self.pet = model, runtime, online
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.freeze, self.decay = freeze, decay
        self.recipe = Recipe("adam", weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features, std=0.001).to(runtime.device)
        self.offline: State = {}
        self.learned = 0

    def learn(self, experience: Experience) -> dict[str, float]:
        """Learning and accumulation in one pass of the data."""
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        if self.learned == 1:
            self.offline = self.pet.state()
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"), drop_last=True)
        frozen = round(self.freeze * batches.visits) if self.learned else 0
        moves = True
        self.pet.train()

        def at_place(place: Place) -> None:
            nonlocal moves
            moves = place.step >= frozen * place.steps // batches.visits

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            with torch.set_grad_enabled(moves):
                features = self.model.features(batch)
            return masked_cross_entropy(self.head(features), batch.y, "local", experience.classes)

        def accumulate(place: Place, batch: Any) -> None:
            follow(self.offline, dict(self.pet.values), 1 - self.decay)

        groups = groups_of((self.head, self.lr), (self.pet, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe, at_place=at_place, after_step=accumulate)
        self.learned += 1
        return log

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Class probabilities [B, num_seen] of the ensemble, and of the online and offline modules alone."""
        self.model.eval()
        online = self.head(self.model.features(batch)).softmax(dim=1)
        if not self.offline:
            return {"ensemble": online, "online": online, "offline": online}
        with self.pet.use(self.offline):
            offline = self.head(self.model.features(batch)).softmax(dim=1)
        return {"ensemble": torch.maximum(online, offline), "online": online, "offline": offline}

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "pet", "offline", "head", "learned")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
