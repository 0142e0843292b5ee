"""APER, formerly ADAM: first-session adaptation and merged prototypes (Zhou, Cai, Ye, Zhan & Liu, IJCV 2024,
"Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All You Need",
arXiv 2303.07338).

First experience: a PET (`pet=adapter | ssf | vpt | vpt_shallow`) or, with `pet=none`, a copy of the whole backbone is trained
with a cosine classifier; afterwards nothing is trained any more. A sample is described by both networks,
F(x) = [f_pretrained(x) ; f_adapted(x)], un-normalised; class c is the mean of F over its training samples (test transform),
and the answer is the largest cosine. A class that comes back has its mean over all its samples.

Deviations: the rate follows a cosine over steps (the release moves it once an epoch). Adapting BatchNorm statistics alone,
the release's choice for ResNets, is not built.
Published (MOS table, ViT-B/16 augreg_in21k, one order): CIFAR-100 B0 Inc5 with the adapter last 85.15 %, average 90.65 %;
SSF 81.98, VPT-deep 82.17, fine-tuned 81.27 %. 20 epochs, batch 48, SGD 0.9, rate 0.01, weight decay 5e-4.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule
from clbench.models.backbone import Backbone
from clbench.models.heads import CosineHead, PrototypeHead
from clbench.models.pet import Factory
from clbench.models.pet_modules import adapter
from clbench.training.first_session import adapt
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, restore


class Aper:
    """State: what was adapted (module or backbone), the classifier it was trained with, sums and counts of every class."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_pretrained=True, needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        pet: Factory = adapter,
        lr: float = 0.01,
        epochs: int | None = None,
        batch_size: int = 48,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = cosine,
    ):
        self.model, self.runtime = model, runtime
        self.pet = pet(model, runtime)
        self.adapted = copy.deepcopy(model) if self.pet is None else model
        model.freeze()
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.trained_head = CosineHead(model.num_features).to(runtime.device)
        self.prototypes = PrototypeHead(2 * model.num_features, "cosine").to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Adapt once; then one pass over the new data for its class means."""
        log = {}
        if experience.index == 0:
            log = adapt(
                self.runtime, self, self.pet or self.adapted, self.adapted, self.trained_head, experience,
                lr=self.lr, epochs=self.epochs, batch_size=self.batch_size, recipe=self.recipe,
            )  # fmt: skip
            self._settle()
        with self.runtime.phase("extract"), torch.no_grad():
            for batch in experience.train.test_batches(self.batch_size):
                self.runtime.check_stop()
                assert batch.y is not None
                self.prototypes.update(self.features(batch), batch.y, experience.num_seen)
        return log

    def _settle(self) -> None:
        """A whole network that was adapted never changes again: its features are remembered."""
        if self.pet is None:
            self.adapted.freeze()

    def features(self, batch: Batch) -> Tensor:
        """Both descriptions of a batch side by side [B, 2 D]."""
        self.adapted.eval()
        if self.pet is None:
            return torch.cat([self.model.features(batch), self.adapted.features(batch)], dim=1)
        with self.pet.off():
            bare = self.model.features(batch)
        with self.pet.use(tag="adapted"):
            return torch.cat([bare, self.model.features(batch)], dim=1)

    def predict(self, batch: Batch) -> Tensor:
        """Cosines [B, num_seen]."""
        return self.prototypes(self.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "adapted" if self.pet is None else "pet", "trained_head", "prototypes")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
        if self.pet is None:
            self.adapted.freeze() if len(self.prototypes.counts_K) else self.adapted.unfreeze()
