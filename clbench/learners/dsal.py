"""DS-AL: a dual-stream analytic learner (Zhuang et al., AAAI 2024, doi 10.1609/aaai.v38i15.29670).

ACIL's ridge regression (acil.py) is the main stream; what it leaves over of the new classes is regressed on other features of
the same random layer, the compensation stream:

    h = relu(f R),  t = tanh(f R),     R [D, M] from U(-1/sqrt(D), 1/sqrt(D))
    W   = (gamma I + sum H^T H)^-1 sum H^T Y                 after this experience
    E   = Y - H W, of the experience's samples, its columns of classes that are not new set to 0 (previous-label cleansing)
    W_c = (gamma_c I + sum T^T T)^-1 sum T^T E               score = h W + C t W_c

gamma = gamma_c = 0.1; C = 0.6 (`compensation`) is the release's for CIFAR, 1.5 that for ImageNet.

E depends on W, and W on what came before: the order of experiences counts a little, and in the release that of batches too.
Here an experience is one batch, whose order does not count. An experience without new classes gives E = 0. Deviations: sums in
place of recursions (the same W and W_c); the network is taken as it is, see acil.py.
Published (release's README, CIFAR-100 from scratch, ResNet-32, 50 classes, then 25 experiences of 2): average 71.28, last
64.04 %.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.random_features import uniform
from clbench.streams import rng
from clbench.training.cholesky import check_finite
from clbench.training.features import extract
from clbench.training.ridge import ROWS, RidgeRoot, targets
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class Dsal:
    """State: the sums of both streams, or their roots, and the two readouts [M, K] (R comes from the seed)."""

    capabilities: ClassVar[Capabilities] = Capabilities(trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        projection: int = 8192,  # M
        ridge: float = 0.1,  # gamma
        compensation: float = 0.6,  # C
        compensation_ridge: float = 0.1,  # gamma_c
        batch_size: int = 128,
    ):
        if projection < 1 or not (0 < ridge < math.inf and 0 < compensation_ridge < math.inf):
            raise UserError(
                f"learner.projection={projection} must be at least 1, learner.ridge={ridge} and "
                f"learner.compensation_ridge={compensation_ridge} above 0"
            )
        if not 0 <= compensation < math.inf:
            raise UserError(f"learner.compensation must be at least 0, got {compensation}")
        self.model, self.runtime, self.batch_size = model, runtime, batch_size
        self.ridge, self.compensation, self.compensation_ridge = ridge, compensation, compensation_ridge
        model.freeze()
        self.layer_DM = uniform(model.num_features, projection, rng.key(runtime.seed, "projection"), runtime.device)
        self.main, self.rest = RidgeRoot(projection, runtime.device), RidgeRoot(projection, runtime.device)
        self.main_MK = self.rest_MK = torch.zeros(projection, 0, dtype=torch.float64, device=runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass; the main stream first, then what it leaves over."""
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        with self.runtime.phase("ridge"):
            self.update(features, y, experience.num_seen, len(experience.new_classes))
        return {}

    def update(self, features: Tensor, y: Tensor, num_classes: int, new: int) -> None:
        """Add an experience: features [N, D], y [N] below `num_classes`, the last `new` of which are new."""
        check_finite(features, "features")
        self.main.update(features, y, num_classes, self.relu)
        self.main_MK = self.main.solve(self.ridge)
        answers = torch.cat([self.relu(f) @ self.main_MK for f in features.split(ROWS)])
        error = targets(y, num_classes).to(answers) - answers
        error[:, : num_classes - new] = 0
        self.rest.update(features, error, num_classes, self.tanh)
        self.rest_MK = self.rest.solve(self.compensation_ridge)

    def relu(self, features: Tensor) -> Tensor:
        """Features [N, D] -> h [N, M] float64."""
        return torch.relu(features.to(self.layer_DM) @ self.layer_DM)

    def tanh(self, features: Tensor) -> Tensor:
        """Features [N, D] -> t [N, M] float64."""
        return torch.tanh(features.to(self.layer_DM) @ self.layer_DM)

    def predict(self, batch: Batch) -> Tensor:
        """Regressed one-hot targets and their compensation [B, num_seen]."""
        self.model.eval()
        f = self.model.features(batch)
        return (self.relu(f) @ self.main_MK + self.compensation * (self.tanh(f) @ self.rest_MK)).float()

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "main", "rest", "main_MK", "rest_MK")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
