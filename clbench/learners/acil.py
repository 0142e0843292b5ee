"""ACIL and G-ACIL: analytic class-incremental learning (Zhuang et al., NeurIPS 2022; G-ACIL 2024, arXiv 2403.15706).

The network is frozen. Features pass a fixed random layer, and the classifier is recursive least squares over batches:

    h = relu(f R),   R [D, M] from U(-1/sqrt(D), 1/sqrt(D)),   P = I / gamma and W = 0 at first
    P <- P - P H^T (I + H P H^T)^-1 H P,    W <- W + P H^T (Y - H W)      H [n, M], Y [n, K] one-hot; a new class: a column of 0

which is, after any batches of any classes, W = (gamma I + sum H^T H)^-1 sum H^T Y. The sums are kept here and solved when an
answer is asked for (training/ridge.py): the same W, without the rounding of a recursion. ACIL has experiences of their own
classes, G-ACIL any mixture of labels: one formula.

Deviations: the network is taken as it is; the papers train it on the first half of the classes (another run with
`save_model=true`, then `model.weights=FILE`), the release at the epoch that is best on the *test* set. M = 8192 is CIFAR's
(ImageNet: 16 384). `ranpac pet=none learner.ridge=0.1` is this with R ~ N(0, 1).
Published (release's README, CIFAR-100 from scratch, ResNet-32, 50 classes, then 25 experiences of 2): average 71.05 +- 0.25,
last 63.38 +- 0.33 %; 2 to 5 points above the papers' own, owing to augmentation.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST
from clbench.models.random_features import uniform
from clbench.streams import rng
from clbench.training.cholesky import check_finite
from clbench.training.features import streamed_features
from clbench.training.ridge import RidgeRoot
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class Acil:
    """State: sums [M, M] and [M, K], or a root of them while M / 4 samples were not seen (R comes from the seed)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True, trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        projection: int = 8192,  # M
        ridge: float = 0.1,  # gamma
        batch_size: int = 128,
    ):
        if projection < 1 or not 0 < ridge < math.inf:
            raise UserError(f"learner.projection={projection} must be at least 1, learner.ridge={ridge} above 0")
        self.model, self.runtime, self.ridge, self.batch_size = model, runtime, ridge, batch_size
        model.freeze()
        self.layer_DM = uniform(model.num_features, projection, rng.key(runtime.seed, "projection"), runtime.device)
        self.sums = RidgeRoot(projection, runtime.device, rows=projection // 4)
        self._readout: Tensor | None = None  # of the sums of now

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass, valid after every batch."""
        for features, y in streamed_features(self.runtime, self.model, experience.train, self.batch_size):
            self.update(features, y, experience.num_seen)
        return {}

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [N, D], y [N] below `num_classes`."""
        check_finite(features, "features")
        self.sums.update(features, y, num_classes, self.expand)
        self._readout = None

    def expand(self, features: Tensor) -> Tensor:
        """Features [N, D] -> h [N, M] float64."""
        return torch.relu(features.to(self.layer_DM) @ self.layer_DM)

    def readout(self) -> Tensor:
        """W [M, K] float64."""
        if self._readout is None:
            self._readout = self.sums.solve(self.ridge)
        return self._readout

    def predict(self, batch: Batch) -> Tensor:
        """Regressed one-hot targets [B, num_seen]; a class that has not come has the lowest."""
        self.model.eval()
        z = self.expand(self.model.features(batch)) @ self.readout()
        return z.masked_fill((self.readout() == 0).all(0), LOWEST).float()

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "sums")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
        self._readout = None
