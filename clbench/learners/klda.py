"""KLDA: kernel linear discriminant analysis for class-incremental learning (Momeni et al., AAAI 2025, arXiv 2412.15571).

The network is frozen. Random Fourier features of the kernel exp(-sigma |x - y|^2), then one covariance of all classes:

    z = sqrt(2/M) cos(omega^T f + b),  omega ~ N(0, 2 sigma),  b ~ U(0, 2 pi)
    W = sum (z - mu_y)(z - mu_y)^T,    score_c = -(z - mu_c)^T C^+ (z - mu_c)

There are no shares of classes and no ridge: C^+ is the pseudo-inverse. `models: n` above 1 is KLDA-E: the mean of the softmax
scores of n such models, each with a layer of its own. With one model score_c is given without -z^T C^+ z, the same for all c.

variant  "paper": C = W / N, the covariance. "official": C = W, as released, so that scores shrink as samples come, the softmax
         is nearly flat and the ensemble averages the scores themselves. For one model the answers are the same

Deviations: W is exact whatever order, batch and split the samples come in (the release centres a batch of a class by its
running mean: exact where a class comes at once) and float64; eigenvalues below M x 1.2e-7 of the largest count as 0 (the
release cuts at 1e-15, beyond float32: with fewer samples than M, where W is singular, it inverts rounding errors). W takes M^2
numbers a model; while M / 4 samples were not seen, a root of it takes less. sigma depends on the backbone; 1e-4 and 3 were seen
in use, those of the paper were not read.
Published number: none read.
"""

from __future__ import annotations

import math
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
from clbench.training.features import streamed_features
from clbench.training.ridge import RidgeRoot
from clbench.training.runtime import Runtime
from clbench.training.state import restore

FLOAT32 = torch.finfo(torch.float32).eps


class Klda:
    """State: counts [K], sums of each model, [M, M] and [M, K] or their root (the random layers come from the seed)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True, trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",
        projection: int = 5000,  # M
        sigma: float = 1e-4,  # of the kernel
        models: int = 1,  # above 1: an ensemble
        batch_size: int = 128,
    ):
        if variant not in ("paper", "official"):
            raise UserError(f"unknown learner.variant={variant}: choose paper or official")
        if projection < 1 or models < 1:
            raise UserError(f"learner.projection={projection} and learner.models={models} must be at least 1")
        if not 0 < sigma < math.inf:
            raise UserError(f"learner.sigma must be above 0, got {sigma}")
        self.model, self.runtime, self.divided = model, runtime, variant == "paper"
        self.sigma, self.batch_size, self.least = sigma, batch_size, projection * FLOAT32
        model.freeze()
        keys = [rng.key(runtime.seed, "projection", i) for i in range(models)]
        self.layers = [Fourier(model.num_features, projection, key, runtime.device) for key in keys]
        self.sums = [RidgeRoot(projection, runtime.device, rows=projection // 4) for _ in keys]
        self.counts_K = torch.zeros(0, dtype=torch.float64, device=runtime.device)
        self._weights: list[tuple[Tensor, Tensor]] | None = None  # of the sums of now

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass, valid after every batch."""
        for features, y in streamed_features(self.runtime, self.model, experience.train, self.batch_size):
            self.update(features, y, experience.num_seen)
        return {"train_samples": float(self.counts_K.sum())}

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [N, D], y [N] below `num_classes`."""
        check_finite(features, "features")
        for layer, sums in zip(self.layers, self.sums, strict=True):
            sums.update(layer(features, self.sigma), y, num_classes)
        counts_K = torch.bincount(y, minlength=num_classes).to(self.counts_K)
        counts_K[: len(self.counts_K)] += self.counts_K
        self.counts_K, self._weights = counts_K, None

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Of each model 2 C^+ mu [K, M] and -mu.C^+ mu [K]."""
        if self._weights is None:
            self._weights = []
            for sums in self.sums:
                found = WithinClass(sums, self.counts_K)
                w = found.pseudo_solve(self.least) * (found.samples if self.divided else 1)
                self._weights.append((2 * w, -(w * found.means_KM).sum(1)))
        return self._weights

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen], of an ensemble mean probabilities; a class that has not come has the lowest."""
        self.model.eval()
        features = self.model.features(batch)
        pairs = zip(self.layers, self.weights(), strict=True)
        scores = [layer(features, self.sigma) @ w.T + b for layer, (w, b) in pairs]
        scores = [z.masked_fill(self.counts_K == 0, LOWEST) for z in scores]
        if len(scores) == 1:
            return scores[0].float()
        mean = torch.stack([z.softmax(1) for z in scores]).mean(0)
        return mean.masked_fill(self.counts_K == 0, LOWEST).float()

    def state_dict(self) -> dict[str, Any]:
        return {"counts_K": self.counts_K, "sums": [sums.state_dict() for sums in self.sums]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, {"counts_K": state["counts_K"]})
        for sums, given in zip(self.sums, state["sums"], strict=True):
            sums.load_state_dict(given)
        self._weights = None
