"""QDA: one full Gaussian a class, updated exactly: quadratic discriminant analysis in one pass (Friedman, JASA 1989).

On a frozen network every class c has count n_c, mean mu_c and scatter S_c of its features, float64. A batch of class c with
mean m, scatter W and size g is added at once (Chan, Golub & LeVeque 1979):

    S_c += W + n_c g / (n_c + g) (m - mu_c)(m - mu_c)^T,    mu_c += g / (n_c + g) (m - mu_c),    n_c += g

so that they are those of all its samples, whatever the order, batches and experiences they came in. Nothing is forgotten: other
classes do not touch a class. The answer is log N(x; mu_c, C_c), regularised as in Friedman's regularised discriminant analysis:

    C = ((1 - pooling) S_c + pooling S) / ((1 - pooling) n_c + pooling n),  S and n summed over classes
    C_c = (1 - shrinkage) C + shrinkage tr(C) / D I

pooling 0, shrinkage 0 is QDA (singular below D + 1 samples a class), pooling 1 linear discriminant analysis. `prior: true` adds
log(n_c / n). A class whose C is 0 (one sample, pooling 0) has the pooled one, and where that is 0 the identity; where C_c is
not definite, the least ridge that makes it so is added (training/cholesky.py). A class that has not come scores lowest.

Shrinkage 0.1, pooling 0 and no prior are choices (Friedman chooses both by cross-validation). Memory: K D^2 numbers. Published
number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST
from clbench.training.cholesky import check_finite, repaired
from clbench.training.features import streamed_features
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore

RIDGE = 1e-12  # the first one that is tried on a covariance without a Cholesky factor


class Qda:
    """State: counts [K], means [K, D], scatters [K, D, D], all float64 (the backbone never changes)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True, trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        shrinkage: float = 0.1,  # share of tr(C) / D I
        pooling: float = 0.0,  # 1: one covariance for all classes
        prior: bool = False,  # true: shares of classes count
        batch_size: int = 128,
    ):
        if not (0 <= shrinkage <= 1 and 0 <= pooling <= 1):
            raise UserError(f"learner.shrinkage={shrinkage} and learner.pooling={pooling} must be from 0 to 1")
        self.model, self.runtime, self.batch_size = model, runtime, batch_size
        self.shrinkage, self.pooling, self.prior = shrinkage, pooling, prior
        model.freeze()
        width, options = model.num_features, {"dtype": torch.float64, "device": runtime.device}
        self.counts_K, self.means_KD = torch.zeros(0, **options), torch.zeros(0, width, **options)
        self.scatters_KDD = torch.zeros(0, width, width, **options)
        self._factors: tuple[Tensor, Tensor] | None = None  # of the statistics of now

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass, valid after every batch."""
        self.grow(experience.num_seen)
        for features, y in streamed_features(self.runtime, self.model, experience.train, self.batch_size):
            self.update(features, y)
        return {"train_samples": float(self.counts_K.sum())}

    def grow(self, classes: int) -> None:
        """Empty statistics for classes that are new."""
        for name in ("counts_K", "means_KD", "scatters_KDD"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(classes - len(old), *old.shape[1:])]))
        self._factors = None

    def update(self, features: Tensor, y: Tensor) -> None:
        """Add samples: features [B, D], y [B]."""
        check_finite(features, "features")
        x = features.detach().to(self.means_KD)
        for c in y.unique().tolist():
            own = x[y == c]
            old, size, mean = self.counts_K[c], len(own), own.mean(0)
            gap = mean - self.means_KD[c]
            self.scatters_KDD[c] += (own - mean).T @ (own - mean) + old * size / (old + size) * torch.outer(gap, gap)
            self.means_KD[c] += size / (old + size) * gap
            self.counts_K[c] += size
        self._factors = None

    def covariance(self, c: int) -> Tensor:
        """C_c [D, D] of a class that has come."""
        eye = torch.eye(self.means_KD.shape[1]).to(self.means_KD)
        pooled, n = self.scatters_KDD.sum(0), self.counts_K.sum()
        keep = 1 - self.pooling
        cov = (keep * self.scatters_KDD[c] + self.pooling * pooled) / (keep * self.counts_K[c] + self.pooling * n)
        if not cov.trace() > 0:
            cov = pooled / n if pooled.trace() > 0 else eye
        return (1 - self.shrinkage) * cov + self.shrinkage * cov.trace() / len(eye) * eye

    def factors(self) -> tuple[Tensor, Tensor]:
        """Inverses of the lower factors of C_c [K, D, D], and -1/2 log|C_c| [K] with the prior; 0 for a class without any."""
        if self._factors is None:
            whiten, offset = torch.zeros_like(self.scatters_KDD), torch.zeros_like(self.counts_K)
            eye = torch.eye(self.means_KD.shape[1]).to(self.means_KD)
            for c in self.counts_K.nonzero().flatten().tolist():
                cov = self.covariance(c)
                ridge = RIDGE * float(cov.trace()) / len(cov)
                chol, _ = repaired(cov, f"the covariance of class {c}", ridge=ridge)
                whiten[c] = torch.linalg.solve_triangular(chol, eye, upper=False)
                offset[c] = -chol.diagonal().log().sum()
            if self.prior:
                offset = offset + (self.counts_K.clamp_min(1) / self.counts_K.sum().clamp_min(1)).log()
            self._factors = whiten, offset
        return self._factors

    def predict(self, batch: Batch) -> Tensor:
        """Log densities, but for a constant [B, num_seen]."""
        self.model.eval()
        x = self.model.features(batch).to(self.means_KD)
        whiten, offset = self.factors()
        scores = [((x - mu) @ w.T).square().sum(1) for mu, w in zip(self.means_KD, whiten, strict=True)]
        z = offset - 0.5 * torch.stack(scores, dim=1)
        return z.masked_fill(self.counts_K == 0, LOWEST).float()

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "counts_K", "means_KD", "scatters_KDD")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
        self._factors = None
