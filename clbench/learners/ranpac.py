"""RanPAC: random projections and second-order prototypes (McDonnell, Gong, Parvaneh, Abbasnejad & van den Hengel,
NeurIPS 2023, arXiv 2307.02251).

First experience: a PET (`pet=adapter | ssf | vpt`) is trained with a cosine classifier, then frozen
(`pet=none`: no such phase). Features pass a fixed random layer, h(x) = ReLU(f(x) W), W [D, M] with N(0, 1) entries and
M = 10 000 (`projection: 0`: h = f); the classifier is the ridge regression of one-hot targets on all h seen so far,
W_o = (G + lambda I)^-1 Q with G = sum h h^T, Q = sum h y^T, scores h(x) W_o over the seen classes. lambda is chosen anew in
each experience on the last fifth of its samples, from 1e-8 .. 1e8 (training/ridge.py).

Deviations: sums and solution in float64 (the release: float32); where fewer than M samples were seen, a root of the sums is
kept, of as many rows as samples, each a mixture of all of them, and the same solution found from it; the rate follows a cosine
over steps; W comes from the seed and is not stored. A class that comes back adds to its sums. The authors' code answers with
h(x) W_o, as here; PILOT's port normalises both first and so answers with cosines.
Published (repository's tables, ViT-B/16, one order): CIFAR-100 B0 Inc10 last 92.2 % with the adapter (augreg_in21k), 89.0 %
without the first phase, 90.6 % without projection. 20 epochs, batch 48, SGD 0.9, rate 0.01, weight decay 5e-4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import CosineHead
from clbench.models.pet import Factory
from clbench.models.pet_modules import adapter
from clbench.streams import rng
from clbench.training.features import extract
from clbench.training.first_session import adapt
from clbench.training.fit import Recipe
from clbench.training.ridge import RidgeRoot, choose_ridge
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, restore


class RanPac:
    """State: the module and its first classifier (where there is one), the regression's sums or their root, the readout [M, K].

    At most M (M + 2 K) numbers besides the module, however many samples were seen.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(needs_pretrained=True)

    @staticmethod
    def capabilities_of(*, pet: Any = None, **options: Any) -> Capabilities:
        """With a module to adapt, the first experience's samples are needed again for the sums."""
        adapts = not (isinstance(pet, Mapping) and str(pet.get("_target_")).endswith(".none"))
        return replace(RanPac.capabilities, needs_random_access=adapts, trains=adapts)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        pet: Factory = adapter,
        projection: int = 10_000,  # M; 0: none
        ridge: float | None = None,  # null: chosen in each experience from 1e-8 .. 1e8
        lr: float = 0.01,
        epochs: int | None = None,
        batch_size: int = 48,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = cosine,
    ):
        if projection < 0 or (ridge is not None and ridge <= 0):
            raise UserError(f"learner.projection={projection} must be at least 0, learner.ridge={ridge} null or above 0")
        self.model, self.runtime, self.ridge = model, runtime, ridge
        self.pet = pet(model, runtime)
        model.freeze()
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.first_head = CosineHead(model.num_features).to(runtime.device)
        self.projection: Tensor | None = None
        if projection:
            generator = torch.Generator().manual_seed(rng.key(runtime.seed, "projection") >> 1)
            self.projection = torch.randn(model.num_features, projection, generator=generator).to(runtime.device)
        self.sums = RidgeRoot(projection or model.num_features, runtime.device)
        self.readout_MK = torch.zeros(projection or model.num_features, 0, device=runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Adapt once; add the new samples to the sums, choose the ridge, solve."""
        log = {}
        if experience.index == 0 and self.pet is not None:
            log = adapt(
                self.runtime, self, self.pet, self.model, self.first_head, experience,
                lr=self.lr, epochs=self.epochs, batch_size=self.batch_size, recipe=self.recipe,
            )  # fmt: skip
        if self.pet is None:
            f, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        else:
            with self.pet.use(tag="adapted"):
                f, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        with self.runtime.phase("ridge"):
            seen, key = experience.num_seen, self.runtime.key("ridge")
            ridge = self.ridge or choose_ridge(f, y, seen, key, expand=self.expand)
            self.sums.update(f, y, seen, self.expand)
            self.readout_MK = self.sums.solve(ridge).float()
        return {**log, "ridge": ridge}

    def expand(self, features: Tensor) -> Tensor:
        """Features [N, D] -> h [N, M]."""
        return features if self.projection is None else torch.relu(features @ self.projection)

    def predict(self, batch: Batch) -> Tensor:
        """Regressed one-hot targets [B, num_seen]."""
        self.model.eval()
        if self.pet is None:
            return self.expand(self.model.features(batch)) @ self.readout_MK
        with self.pet.use(tag="adapted"):
            return self.expand(self.model.features(batch)) @ self.readout_MK

    def state_dict(self) -> dict[str, Any]:
        return collect(self, *(["pet", "first_head"] if self.pet else []), "sums", "readout_MK")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
