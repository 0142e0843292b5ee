"""GKEAL: Gaussian kernel embedded analytic learning (Zhuang, Weng, He, Lin & Zeng, CVPR 2023), made for few-shot streams.

ACIL's ridge regression (acil.py) on Gaussian kernels around samples of the first experience, in place of a random layer:

    h_j = exp(-|f - c_j|^2 / (2 sigma^2)),  j = 1..M        W = (gamma I + sum H^T H)^-1 sum H^T Y,  score = h W

The centres c_j are drawn from the first experience's features (few-shot: the base session) without replacement; where it has
fewer than `projection` samples all of them are centres. So they are of the first classes, and of no image that is kept.

sigma   10, the release's; 5 to 15 are its choices, for features of a ResNet. null: the root of the mean squared distance of
        the first experience's features from their mean, a choice for other networks
Deviations: the release draws a permutation that reaches the first M samples alone, and fills up with random mixtures of samples
whose weights may be of any size; here neither. Its concatenation of augmented features is left out. The network is taken as it
is, see acil.py.
Published (release's README, CIFAR-100 from scratch, ResNet-32, 50 classes, then 25 experiences of 2): average 70.37, last
62.30 %.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.streams import rng
from clbench.training.cholesky import check_finite
from clbench.training.features import extract
from clbench.training.ridge import RidgeRoot
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class Gkeal:
    """State: centres [M, D], sigma, the sums [M, M] and [M, K] or a root of them (none before the first experience)."""

    capabilities: ClassVar[Capabilities] = Capabilities(trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        projection: int = 8192,  # M, at most
        sigma: float | None = 10.0,  # width of a kernel; null: from the first experience's features
        ridge: float = 0.1,  # gamma
        batch_size: int = 128,
    ):
        if projection < 1 or not 0 < ridge < math.inf:
            raise UserError(f"learner.projection={projection} must be at least 1, learner.ridge={ridge} above 0")
        if sigma is not None and not 0 < sigma < math.inf:
            raise UserError(f"learner.sigma={sigma} must be null or above 0")
        self.model, self.runtime, self.projection, self.sigma = model, runtime, projection, sigma
        self.ridge, self.batch_size = ridge, batch_size
        model.freeze()
        self.centres_MD = torch.zeros(0, model.num_features, dtype=torch.float64, device=runtime.device)
        self.sums = RidgeRoot(0, runtime.device)
        self._readout: Tensor | None = None  # of the sums of now

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass; the first experience's features give the centres."""
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        with self.runtime.phase("ridge"):
            self.update(features, y, experience.num_seen)
        assert self.sigma is not None
        return {"centres": float(len(self.centres_MD)), "sigma": self.sigma}

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [N, D], y [N] below `num_classes`; the first ones give the centres."""
        check_finite(features, "features")
        if not len(self.centres_MD):
            self.centre(features.to(self.centres_MD))
        self.sums.update(features, y, num_classes, self.expand)
        self._readout = None

    def centre(self, features: Tensor) -> None:
        """Choose centres, and sigma where it is not given, from features [N, D]."""
        rows = rng.permutation(rng.key(self.runtime.seed, "centres"), len(features))[: self.projection]
        self.centres_MD = features[torch.as_tensor(rows, device=features.device)].clone()
        self.sums = RidgeRoot(len(self.centres_MD), self.runtime.device)
        if self.sigma is None:
            self.sigma = float((features - features.mean(0)).square().sum(1).mean().sqrt())
            if not self.sigma:
                raise UserError("the first experience's features are all the same: set learner.sigma")

    def expand(self, features: Tensor) -> Tensor:
        """Features [N, D] -> h [N, M] float64."""
        assert self.sigma is not None, "no experience was learned"
        exact = "donot_use_mm_for_euclid_dist"  # no number depends on the other samples of a batch
        distance = torch.cdist(features.to(self.centres_MD), self.centres_MD, compute_mode=exact)
        return torch.exp(-distance.square() / (2 * self.sigma**2))

    def predict(self, batch: Batch) -> Tensor:
        """Regressed one-hot targets [B, num_seen]."""
        self.model.eval()
        if self._readout is None:
            self._readout = self.sums.solve(self.ridge)
        return (self.expand(self.model.features(batch)) @ self._readout).float()

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "centres_MD", "sigma", "sums")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; the sums are as wide as there are centres."""
        self.sums = RidgeRoot(len(state["centres_MD"]), self.runtime.device)
        restore(self, state)
        self._readout = None
