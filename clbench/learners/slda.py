"""Deep SLDA: streaming linear discriminant analysis on a frozen backbone (Hayes & Kanan, CVPR-W 2020, arXiv 1909.01520).

Class means mu_k, counts c_k and one covariance S are updated with every sample x of class y; answers come from

    L = ((1 - eps) S + eps I)^-1,   score_k = x.L mu_k - 1/2 mu_k.L mu_k,   eps = 1e-4  (`shrinkage`; no prior)

variant  "exact": S is the within-class covariance: n S += c/(c+1) d d^T with d = x - mu_y and c = c_y before the sample,
         nothing for a class's first sample. Independent of the samples' order and of batches
         "official": as released: n S += n/(n+1) d d^T whatever the class, so that a class's first sample enters with d = x, its
         raw second moment. One at a time, so the order counts. It inflates S (by 13 % in a check with 400 samples)

`exact` is the default: it is what the text calls the covariance. A batch of class y with mean m, scatter W and size g is added
at once: n S += W + c g/(c+g) (m - mu_y)(m - mu_y)^T. Statistics are float64. `shrinkage: 1` is the nearest class mean. A class
that has not come has the lowest score (released: 0, which can win). Deviations: statistics start at nothing; the released code
can start from a base session (an OAS covariance), and so does the paper.
Published: CORe50, class-iid order: about 79 % (as others quote it, not checked).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST
from clbench.training.cholesky import check_finite
from clbench.training.features import streamed_features
from clbench.training.runtime import Runtime
from clbench.training.state import collect


class Slda:
    """State: counts [K], means [K, D], scatter n S [D, D], all float64 (the backbone never changes)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True, trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["exact", "official"] = "exact",
        shrinkage: float = 1e-4,
        batch_size: int = 128,
    ):
        if variant not in ("exact", "official"):
            raise UserError(f"unknown learner.variant={variant}: choose exact or official")
        if not 0 < shrinkage <= 1:
            raise UserError(f"learner.shrinkage must be above 0 and at most 1, got {shrinkage}")
        self.model, self.runtime, self.variant = model, runtime, variant
        self.shrinkage, self.batch_size = shrinkage, batch_size
        model.freeze()
        self.counts_K, self.means_KD = torch.zeros(0).double(), torch.zeros(0, model.num_features).double()
        self.scatter_DD = torch.zeros(model.num_features, model.num_features).double()
        self._weights: tuple[Tensor, Tensor] | None = None  # of the statistics of now

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass, valid after every batch."""
        more = experience.num_seen - len(self.counts_K)
        self.counts_K = torch.cat([self.counts_K, self.counts_K.new_zeros(more)])
        self.means_KD = torch.cat([self.means_KD, self.means_KD.new_zeros(more, self.means_KD.shape[1])])
        self._weights = None
        for features, y in streamed_features(self.runtime, self.model, experience.train, self.batch_size):
            self.update(features, y)
        return {"train_samples": float(self.counts_K.sum())}

    def update(self, features: Tensor, y: Tensor) -> None:
        """Add samples: features [B, D], y [B]."""
        x, y = features.detach().cpu().double(), y.cpu()
        check_finite(x, "features")
        if self.variant == "official":
            for row, c in zip(x, y.tolist(), strict=True):
                self._add_one(row, c)
        else:
            for c in y.unique().tolist():
                self._add_class(x[y == c], c)
        self._weights = None

    def _add_one(self, x: Tensor, c: int) -> None:
        n, delta = self.counts_K.sum(), x - self.means_KD[c]
        self.scatter_DD += n / (n + 1) * torch.outer(delta, delta)
        self.means_KD[c] += delta / (self.counts_K[c] + 1)
        self.counts_K[c] += 1

    def _add_class(self, x: Tensor, c: int) -> None:
        old, size, mean = self.counts_K[c], len(x), x.mean(0)
        gap = mean - self.means_KD[c]
        self.scatter_DD += (x - mean).T @ (x - mean) + old * size / (old + size) * torch.outer(gap, gap)
        self.means_KD[c] += size / (old + size) * gap
        self.counts_K[c] += size

    def covariance(self) -> Tensor:
        """S [D, D] float64."""
        return self.scatter_DD / self.counts_K.sum().clamp_min(1)

    def weights(self) -> tuple[Tensor, Tensor]:
        """L mu [K, D] and -1/2 mu.L mu [K]."""
        if self._weights is None:
            eye = torch.eye(len(self.scatter_DD), dtype=torch.float64)
            chol = torch.linalg.cholesky((1 - self.shrinkage) * self.covariance() + self.shrinkage * eye)
            w = torch.cholesky_solve(self.means_KD.T, chol).T
            self._weights = w, -0.5 * (w * self.means_KD).sum(1)
        return self._weights

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]."""
        self.model.eval()
        features = self.model.features(batch)
        w, b = self.weights()
        z = features.detach().cpu().double() @ w.T + b
        return z.masked_fill(self.counts_K == 0, LOWEST).float().to(features.device)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "counts_K", "means_KD", "scatter_DD")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():  # on the CPU, where they are summed up, whatever the network runs on
            setattr(self, name, value.detach().to("cpu", copy=True))
        self._weights = None
