"""How class statistics follow a network that has changed: fitted on features of the same images before and after training.

    shift      mean_c + sum_i w_ci (new_i - old_i), w_ci ~ exp(-|old_i - mean_c|^2 / (2 sigma^2)) + 1e-5, normalised over i;
               covariances stay (SSIAT, arXiv 2403.19979)
    linear     W = (X^T X + gamma I)^-1 X^T Y of old and new features X, Y, rows of length 1, then W <- (1 - o) W + o I,
               o = exp(-N / (alpha D)): few images leave everything where it is. mean W, W^T cov W + 1e-2 I
               (SLDC, arXiv 2511.09926)
    nonlinear  g(x) = w_0 x + w_1 W_1 x + w_2 MLP(x), w a softmax, trained on the same rows by squared error with
               penalty (w_0 + w_1 - 1)^2. Of 10 D samples of each Gaussian, |x| g(x / |x|) give new moments, + 1e-3 I (SLDC)

Both maps of SLDC are fitted on rows of length 1; the linear one is applied to the raw moments, as released.

Legend: N images, D features, K classes. Closed forms and moments are computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from clbench.interfaces import UserError
from clbench.training.cholesky import repaired
from clbench.training.features import FeatureBatches
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import ClassGaussians
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import groups_of

Kind = Literal["shift", "linear", "nonlinear"]
KINDS = ("shift", "linear", "nonlinear")
JITTER = 1e-3  # of covariances without a Cholesky factor, and of refitted ones


def checked(kind: Kind | None) -> Kind | None:
    """The kind, if there is one of this name; None leaves statistics as they are."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"unknown learner.drift={kind}: choose null, shift, linear or nonlinear")
    return kind


def is_unpaired(variant: str, kind: Kind | None) -> bool:
    """Whether old and new features are those of unpaired images: "official", as SSIAT's descendants release it, not "paper"."""
    if variant not in ("paper", "official"):
        raise UserError(f"unknown learner.variant={variant}: choose paper or official")
    if variant == "official" and kind != "shift":
        raise UserError("learner.variant=official goes with learner.drift=shift alone: maps are fitted to pairs")
    return variant == "official"


def shifted(means_KD: Tensor, old_ND: Tensor, new_ND: Tensor, sigma: float) -> Tensor:
    """Class means [K, D] moved by the drift of samples near them: features before and after [N, D]."""
    near_KN = torch.exp(-torch.cdist(means_KD.double(), old_ND.double()).square() / (2 * sigma**2)) + 1e-5
    weight_KN = near_KN / near_KN.sum(dim=1, keepdim=True)
    return (means_KD.double() + weight_KN @ (new_ND - old_ND).double()).to(means_KD.dtype)


def linear_map(old_ND: Tensor, new_ND: Tensor, gamma: float, alpha: float) -> Tensor:
    """W [D, D] float64 with old W ~ new for rows of length 1, nearer to the identity the fewer rows there are."""
    x, y = (F.normalize(f.double(), dim=1) for f in (old_ND, new_ND))
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    share = math.exp(-len(x) / (alpha * x.shape[1]))
    return (1 - share) * torch.linalg.solve(x.T @ x + gamma * eye, x.T @ y) + share * eye


class Transition(nn.Module):
    """g: features of length 1 [B, D] -> [B, D], a mixture of the identity, a linear map and a small network."""

    def __init__(self, width: int, generator: torch.Generator):
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))
        self.linear: Any = skip_init(nn.Linear, width, width, bias=False)
        self.network = nn.Sequential(skip_init(nn.Linear, width, width), nn.ReLU(), skip_init(nn.Linear, width, width))
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(width))
            for p in self.network.parameters():
                p.copy_(torch.empty(p.shape).uniform_(-(width**-0.5), width**-0.5, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """The mixture."""
        w = self.mix.softmax(0)
        return w[0] * x + w[1] * self.linear(x) + w[2] * self.network(x)


@dataclass
class Drift:
    """`fit` on features before and after, then `move` the moments of classes that were learned before.

    runtime, learner  whose `fit` trains the nonlinear map
    sigma     of the shift, in units of features
    gamma     ridge of the linear map; alpha: images per feature until the fitted map counts 63 %
    penalty   of the nonlinear map's weight w_2 (0: as released, where it is added to a number that nothing differentiates)
    steps     of the nonlinear map's training, batches of 32 pairs
    """

    kind: Kind | None
    runtime: Runtime
    learner: Any
    sigma: float = 4.0
    gamma: float = 1e-4
    alpha: float = 1.0
    penalty: float = 0.5
    steps: int = 5000

    def fit(self, old_ND: Tensor, new_ND: Tensor) -> dict[str, float]:
        """Learn the change from features of the same images -> numbers for the log."""
        assert old_ND.shape == new_ND.shape, "one row before and one after for every image"
        self.pairs = old_ND, new_ND
        if self.kind == "linear":
            self.map_DD = linear_map(old_ND, new_ND, self.gamma, self.alpha)
        return self._train(*self.pairs) if self.kind == "nonlinear" else {}

    def _train(self, old_ND: Tensor, new_ND: Tensor) -> dict[str, float]:
        """Adam from 1e-3 to 5e-4 along a cosine."""
        self.transition = Transition(old_ND.shape[1], self.runtime.generator("drift")).to(old_ND.device)
        x, y = (F.normalize(f.float(), dim=1) for f in (old_ND, new_ND))
        batches = FeatureBatches(x, y, 32, 1, self.runtime.key("drift"))
        batches.steps = self.steps

        def loss(pair: tuple[Tensor, Tensor]) -> Tensor:
            weight = self.transition.mix.softmax(0)
            return F.mse_loss(self.transition(pair[0]), pair[1]) + self.penalty * (weight[0] + weight[1] - 1).square()

        recipe = Recipe("adam", schedule=partial(cosine, end=0.5))
        return fit(self.runtime, "drift", self.learner, groups_of((self.transition, 1e-3)), loss, batches, recipe)

    @torch.no_grad()
    def move(self, mean_KD: Tensor, cov_KDD: Tensor) -> tuple[Tensor, Tensor]:
        """Means [K, D] and covariances [K, D, D] in the old features -> in the new ones."""
        if self.kind is None:
            return mean_KD, cov_KDD
        if self.kind == "shift":
            return shifted(mean_KD, *self.pairs, self.sigma), cov_KDD
        if self.kind == "linear":
            w = self.map_DD
            cov = w.T @ cov_KDD.double() @ w + 1e-2 * torch.eye(len(w), dtype=w.dtype, device=w.device)
            return (mean_KD.double() @ w).to(mean_KD.dtype), cov.to(cov_KDD.dtype)
        moved = [self._resampled(k, mean, cov) for k, (mean, cov) in enumerate(zip(mean_KD, cov_KDD, strict=True))]
        return torch.stack([mean for mean, _ in moved]), torch.stack([cov for _, cov in moved])

    def follow(self, gaussians: ClassGaussians, old_ND: Tensor, new_ND: Tensor) -> dict[str, float]:
        """`fit`, then move all classes in place -> numbers for the log; `drift`: how far means went, on average."""
        log = self.fit(old_ND, new_ND)
        mean_KD, cov_KDD = self.move(gaussians.mean_KD, gaussians.cov_KDD)
        log["drift"] = float((mean_KD - gaussians.mean_KD).norm(dim=1).mean())
        gaussians.replace(mean_KD, cov_KDD)
        del self.pairs
        return log

    def _resampled(self, k: int, mean_D: Tensor, cov_DD: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of class `k`'s samples behind the nonlinear map."""
        width = len(mean_D)
        chol, _ = repaired(cov_DD.double(), f"the covariance of class {k}", ridge=JITTER)
        noise = torch.randn(10 * width, width, generator=self.runtime.generator("drift", k)).to(mean_D.device)
        x = mean_D + noise @ chol.T.to(mean_D.dtype)
        norm = x.norm(dim=1, keepdim=True)
        y = (norm * self.transition(x / norm.clamp_min(1e-12))).double()
        eye = torch.eye(width, dtype=y.dtype, device=y.device)
        return y.mean(0).to(mean_D.dtype), (y.T.cov() + JITTER * eye).to(cov_DD.dtype)
