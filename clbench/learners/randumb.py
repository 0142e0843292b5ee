"""RanDumb: random Fourier features and linear discriminant analysis in one pass (Prabhu et al., arXiv 2402.08823).

The network is frozen; a fixed random layer stands for a Gaussian kernel, and classes are told apart by one covariance:

    z = sqrt(2/M) cos(omega^T f + b),  omega ~ N(0, 2 gamma),  b ~ U(0, 2 pi),  gamma = 1 / (D Var(f))
    w_c = C^-1 mu_c,   b_c = -1/2 mu_c.w_c + log pi_c,   score_c = z.w_c + b_c
    C = (1 - s) ((1 - rho) S + rho tr(S)/M I) + s I

S is the covariance of all samples about their classes' means, rho the oracle approximating shrinkage (OAS) of it, pi_c the
share of class c, s = 1e-4 (`shrinkage`). Means and S come from sums, in float64: the same for any order, batch and split.

variant  "paper": with the classes' shares. "official": without them, as in the older of the released models; the newer one is
         scikit-learn's, with an OAS covariance of each class, averaged: M^2 numbers a class, not built

gamma: null takes Var over all features of the first experience, which is passed over before anything is learned from it: then
the learner cannot be asked inside an experience. A number for `gamma`, or no random layer (`projection: 0`, as released for
features of ViTs), is streaming: one batch after another. Deviations: the release looks at Var of *all* training data, which no
stream has; adds flipped copies of images; M = 25 000 (10 000 is its option's default); reports the mean accuracy of classes.
S takes M^2 numbers in float64; while M / 4 (not streaming: M) samples were not seen, a root of the sums takes less.
Published number: none (the repository's table was not read).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST
from clbench.models.random_features import Fourier
from clbench.streams import rng
from clbench.training.cholesky import check_finite
from clbench.training.discriminant import WithinClass
from clbench.training.features import extract, streamed_features
from clbench.training.ridge import RidgeRoot
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class RanDumb:
    """State: gamma, counts [K], sums [M, M] and [M, K] or their root (the random layer comes from the seed)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, trains=False)

    @staticmethod
    def capabilities_of(*, gamma: float | None = None, projection: int = 10_000, **options: Any) -> Capabilities:
        """A layer that is known from the start may be asked anywhere."""
        return replace(RanDumb.capabilities, anytime=gamma is not None or projection == 0)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",
        projection: int = 10_000,  # M; 0: none
        gamma: float | None = None,  # of the kernel; null: from the first experience's features
        shrinkage: float = 1e-4,
        batch_size: int = 128,
    ):
        if variant not in ("paper", "official"):
            raise UserError(f"unknown learner.variant={variant}: choose paper or official")
        if projection < 0 or (gamma is not None and not 0 < gamma < math.inf):
            raise UserError(f"learner.projection={projection} must be at least 0, learner.gamma={gamma} null or above 0")
        if gamma is not None and not projection:
            raise UserError("learner.gamma has no effect with learner.projection=0: there is no random layer")
        if not 0 < shrinkage <= 1:
            raise UserError(f"learner.shrinkage must be above 0 and at most 1, got {shrinkage}")
        self.model, self.runtime, self.shrinkage, self.batch_size = model, runtime, shrinkage, batch_size
        self.priors, self.gamma = variant == "paper", gamma
        self.streaming = gamma is not None or projection == 0
        model.freeze()
        key, width = rng.key(runtime.seed, "projection"), projection or model.num_features
        self.layer = Fourier(model.num_features, projection, key, runtime.device) if projection else None
        self.sums = RidgeRoot(width, runtime.device, rows=width // 4 if self.streaming else None)
        self.counts_K = torch.zeros(0, dtype=torch.float64, device=runtime.device)
        self._weights: tuple[Tensor, Tensor] | None = None  # of the sums of now

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass; valid after every batch where it is streaming."""
        if self.streaming:
            for features, y in streamed_features(self.runtime, self.model, experience.train, self.batch_size):
                self.update(features, y, experience.num_seen)
            return {"train_samples": float(self.counts_K.sum())}
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        check_finite(features, "features")
        if self.gamma is None:
            variance = float(features.double().var(correction=0))
            if not variance:
                raise UserError("the first experience's features are all the same: set learner.gamma")
            self.gamma = 1 / (features.shape[1] * variance)
        self.update(features, y, experience.num_seen)
        return {"train_samples": float(self.counts_K.sum()), "gamma": self.gamma}

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [N, D], y [N] below `num_classes`."""
        check_finite(features, "features")
        self.sums.update(features, y, num_classes, self.expand)
        counts_K = torch.bincount(y, minlength=num_classes).to(self.counts_K)
        counts_K[: len(self.counts_K)] += self.counts_K
        self.counts_K, self._weights = counts_K, None

    def expand(self, features: Tensor) -> Tensor:
        """Features [N, D] -> z [N, M] float64."""
        if self.layer is None:
            return features.double()
        assert self.gamma is not None, "no experience was learned"
        return self.layer(features, self.gamma)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Of each class: w [K, M] and b [K]."""
        if self._weights is None:
            found = WithinClass(self.sums, self.counts_K)
            (rho, mean), keep = found.oas(), 1 - self.shrinkage
            w = found.solve(keep * (1 - rho) / found.samples, keep * rho * mean + self.shrinkage)
            b = -0.5 * (w * found.means_KM).sum(1)
            if self.priors:
                b = b + (self.counts_K.clamp_min(1) / found.samples).log()
            self._weights = w, b
        return self._weights

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]; a class that has not come has the lowest."""
        self.model.eval()
        features = self.model.features(batch)
        w, b = self.weights()
        return (self.expand(features) @ w.T + b).masked_fill(self.counts_K == 0, LOWEST).float()

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "gamma", "sums", "counts_K")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
        self._weights = None
