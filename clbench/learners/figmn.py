"""FIGMN: incremental Gaussian mixtures in one pass, one for each class (Pinto & Engel 2017, arXiv 1701.03940).

On a frozen network each class has a mixture of its own features x, which other classes never change. A component has mean mu,
precision L = C^-1, log|C|, mass sp and age v. For a sample x, with d2_j = (x - mu_j)^T L_j (x - mu_j):

    all d2_j above the quantile 1 - beta of chi2 (or no component): a new one, mu = x, C = diag(s^2), s = delta std, sp = v = 1
    else  p_j = P(j | x),  v += 1,  sp_j += p_j,  w = p_j / sp_j,  e = x - mu_j,  mu_j += w e,  C_j <- (1 - w)(C_j + r e e^T)
    remove components with v > v_min and sp < sp_min

    variant  "exact": r = w, the recursive covariance; one component is mean and covariance of its samples, with s^2 once
             "published": r = w (1 - 3w + w^2) / (1 - w), below 0 for w > 0.382, a component's first updates. Where C would not
             stay positive definite the rank-one term is left out; `indefinite` in the log counts how often

L and |C| follow without an inversion: L <- (L - r L e e^T L / (1 + r d2)) / (1 - w),  |C| <- (1 - w)^D |C| (1 + r d2).
The answer is log p(x | c), without shares of classes. The samples' order counts, batches do not, but for the first.

Deviations: the paper's classifier is one mixture of features and labels. std is that of the first batch, a mixture's last
component stays, and features are projected first by N(0, 1 / D') entries (`projection`: D'), as a component takes D'^2
numbers. Defaults are ours. Published numbers: none read.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from scipy.stats import chi2
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST
from clbench.streams import rng
from clbench.training.cholesky import check_finite
from clbench.training.features import streamed_features
from clbench.training.runtime import Runtime

FIELDS = ("mean_JD", "precision_JDD", "logdet_J", "mass_J", "age_J")


class Mixture:
    """The components of a class. State: FIELDS, float64."""

    def __init__(self, width: int, exact: bool = True, limit: float = math.inf, v_min: float = math.inf, sp_min: float = 0.0):
        self.exact, self.limit, self.v_min, self.sp_min, self.indefinite = exact, limit, v_min, sp_min, 0
        self.mean_JD, self.precision_JDD = torch.zeros(0, width).double(), torch.zeros(0, width, width).double()
        self.logdet_J, self.mass_J, self.age_J = (torch.zeros(0).double() for _ in range(3))

    def distances(self, x: Tensor) -> Tensor:
        """Squared Mahalanobis distances of x [B, D] -> [B, J]."""
        gap = x[:, None] - self.mean_JD
        return torch.einsum("bjd,jde,bje->bj", gap, self.precision_JDD, gap)

    def joint(self, d2: Tensor) -> Tensor:
        """Log of share and density of each component, from distances [B, J] -> [B, J]."""
        constant = self.mean_JD.shape[1] * math.log(2 * math.pi)
        return (self.mass_J / self.mass_J.sum()).log() - 0.5 * (constant + self.logdet_J + d2)

    def log_density(self, x: Tensor) -> Tensor:
        """Of features [B, D] -> [B]."""
        if not len(self.mass_J):
            return x.new_full((len(x),), LOWEST)
        return self.joint(self.distances(x)).logsumexp(1)

    def add(self, x: Tensor, start: Tensor) -> None:
        """Learn a sample x [D]; a component that it begins has the standard deviations `start` [D]."""
        d2 = self.distances(x[None])[0]
        if bool((d2 > self.limit).all()):  # or there is none
            one = x.new_ones(1)
            new = (x[None], torch.diag(start**-2)[None], 2 * start.log().sum()[None], one, one)
            self.load_state_dict({n: torch.cat([getattr(self, n), v]) for n, v in zip(FIELDS, new, strict=True)})
            return
        p = self.joint(d2[None])[0].softmax(0)
        self.age_J, self.mass_J = self.age_J + 1, self.mass_J + p
        w = p / self.mass_J
        gap = x - self.mean_JD
        self.mean_JD = self.mean_JD + w[:, None] * gap
        self._spread(w, gap, d2)
        keep = ~((self.age_J > self.v_min) & (self.mass_J < self.sp_min))
        if not keep.any():
            keep[self.mass_J.argmax()] = True
        if not keep.all():
            self.load_state_dict({name: getattr(self, name)[keep] for name in FIELDS})

    def _spread(self, w: Tensor, gap: Tensor, d2: Tensor) -> None:
        """C <- (1 - w)(C + r e e^T) of every component."""
        r = w if self.exact else w * (1 - 3 * w + w**2) / (1 - w)
        grown = 1 + r * d2
        bad = grown <= 0
        self.indefinite += int(bad.sum())
        r, grown = r.masked_fill(bad, 0), grown.masked_fill(bad, 1)
        u = torch.einsum("jde,je->jd", self.precision_JDD, gap)
        outer = u[:, :, None] * u[:, None]
        self.precision_JDD = (self.precision_JDD - (r / grown)[:, None, None] * outer) / (1 - w)[:, None, None]
        self.logdet_J = self.logdet_J + gap.shape[1] * (1 - w).log() + grown.log()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in FIELDS:
            setattr(self, name, state[name].cpu().clone())


class Figmn:
    """State: the first components' standard deviations [D'], and a mixture for each class (the projection is the seed's)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True, trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["exact", "published"] = "exact",
        projection: int = 32,  # D'; 0: none
        delta: float = 1.0,  # standard deviation of a new component, as a share of that of the features
        beta: float = 0.01,  # share of a component's own samples that begin another; 0: one component
        v_min: float = 5.0,
        sp_min: float = 3.0,
        scale: float | None = None,  # std; null: of each feature in the first batch
        batch_size: int = 128,
    ):
        if variant not in ("exact", "published"):
            raise UserError(f"unknown learner.variant={variant}: choose exact or published")
        if projection < 0 or not 0 < delta < math.inf or not 0 <= beta < 1:
            raise UserError(
                f"learner.projection={projection} must be at least 0, learner.delta={delta} above 0, "
                f"learner.beta={beta} at least 0 and below 1"
            )
        if (scale is not None and not 0 < scale < math.inf) or v_min < 0 or sp_min < 0:
            raise UserError(
                f"learner.scale={scale} must be null or above 0, learner.v_min={v_min} and learner.sp_min={sp_min} at least 0"
            )
        self.model, self.runtime, self.delta, self.scale, self.batch_size = model, runtime, delta, scale, batch_size
        model.freeze()
        self.width = projection or model.num_features
        generator = torch.Generator().manual_seed(rng.key(runtime.seed, "projection") >> 1)
        drawn = torch.randn(model.num_features, self.width, generator=generator, dtype=torch.float64)
        self.layer_DD = drawn / self.width**0.5 if projection else torch.eye(self.width).double()
        limit = float(chi2.isf(beta, self.width))
        self.rules = {"exact": variant == "exact", "limit": limit, "v_min": v_min, "sp_min": sp_min}
        self.start_D = torch.zeros(0).double()
        self.mixtures: list[Mixture] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass, valid after every batch."""
        self.grow(experience.num_seen)
        before = sum(mixture.indefinite for mixture in self.mixtures)
        for features, y in streamed_features(self.runtime, self.model, experience.train, self.batch_size):
            self.update(features, y)
        components = sum(len(mixture.mass_J) for mixture in self.mixtures)
        indefinite = sum(mixture.indefinite for mixture in self.mixtures) - before
        return {"components": float(components), "indefinite": float(indefinite)}

    def grow(self, classes: int) -> None:
        """Empty mixtures for classes that are new."""
        self.mixtures += [Mixture(self.width, **self.rules) for _ in range(classes - len(self.mixtures))]

    def update(self, features: Tensor, y: Tensor) -> None:
        """Add samples one by one: features [B, D], y [B]."""
        check_finite(features, "features")
        x = self.project(features)
        if not len(self.start_D):
            self.start_D = self._start(x)
        for row, c in zip(x, y.tolist(), strict=True):
            self.mixtures[c].add(row, self.start_D)

    def _start(self, x: Tensor) -> Tensor:
        """Standard deviations of a new component [D']; a feature that does not vary has the mean of the others'."""
        std = x.std(0, correction=0) if self.scale is None else x.new_full((self.width,), self.scale)
        if not bool((std > 0).any()):
            raise UserError("the first batch's features do not vary: raise learner.batch_size, or set learner.scale")
        return self.delta * torch.where(std > 0, std, std[std > 0].mean())

    def project(self, features: Tensor) -> Tensor:
        """Features [N, D] -> [N, D'] float64 on the CPU."""
        return features.detach().cpu().double() @ self.layer_DD

    def predict(self, batch: Batch) -> Tensor:
        """Log densities [B, num_seen]."""
        self.model.eval()
        features = self.model.features(batch)
        x = self.project(features)
        return torch.stack([mixture.log_density(x) for mixture in self.mixtures], dim=1).float().to(features.device)

    def state_dict(self) -> dict[str, Any]:
        return {"start_D": self.start_D, "mixtures": [mixture.state_dict() for mixture in self.mixtures]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start_D, self.mixtures = state["start_D"].cpu().clone(), []
        self.grow(len(state["mixtures"]))
        for mixture, given in zip(self.mixtures, state["mixtures"], strict=True):
            mixture.load_state_dict(given)
