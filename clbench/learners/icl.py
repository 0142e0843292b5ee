"""ICL: the ideal continual learner, for a linear classifier (Peng, Giampouras & Vidal, ICML 2023, arXiv 2305.00316).

The ideal learner keeps the set of all minimisers, K_t = argmin of L_t over K_{t-1}: what it has learned stays a minimiser.
Where tasks share a minimiser it forgets nothing, by construction. For least squares on one-hot targets K_t is an affine space,
so it is exact and cheap: a solution W, and a basis B of the directions that are used up. For an experience (X, Y):

    Q = X (I - B B^T),  Q = U S V^T        singular values of at most tolerance |X| (Frobenius) count as 0
    W <- W + V S^-1 U^T (Y - X W),   B <- [B V]

W moves in directions that no earlier sample has, so earlier answers stay; what is new is fitted as far as that freedom goes, by
least squares with the least norm. An experience of n samples uses up to n of M directions; with none left (`freedom` in the
log) nothing is learned any more. So features pass a fixed random layer first, as in ACIL: h = relu(f R) [M], with R from
U(-1/sqrt(D), 1/sqrt(D)); `projection: 0` takes the features as they are. Random features of many samples are nearly dependent,
and a small singular value costs a large step: a larger `tolerance` uses fewer directions and keeps W small; what lies below it
may be forgotten. Ridge regression on the same features (`acil`) gives up exactness instead.

The random layer, one-hot targets (0 for classes that were not known) and the tolerance are choices. The paper treats continual
linear regression, factorisation of matrices and constraints on a rehearsal memory; only the first is here, in a form of our
own. Published numbers: it has none.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.random_features import uniform
from clbench.streams import rng
from clbench.training.cholesky import check_finite
from clbench.training.features import extract
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class Icl:
    """State: W [M, K] and the orthonormal B [M, R] of used directions, float64 (the random layer comes from the seed)."""

    capabilities: ClassVar[Capabilities] = Capabilities(trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        projection: int = 2000,  # M; 0: none
        tolerance: float = 1e-8,  # singular values that count as 0, as a share of the features' Frobenius norm
        batch_size: int = 128,
    ):
        if projection < 0 or not 0 < tolerance < 1:
            raise UserError(
                f"learner.projection={projection} must be at least 0, learner.tolerance={tolerance} above 0 and below 1"
            )
        self.model, self.runtime, self.tolerance, self.batch_size = model, runtime, tolerance, batch_size
        model.freeze()
        key, width = rng.key(runtime.seed, "projection"), projection or model.num_features
        self.layer_DM = uniform(model.num_features, projection, key, runtime.device) if projection else None
        self.weight_MK, self.basis_MR = torch.zeros(2, width, 0, dtype=torch.float64, device=runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass; the experience is solved at once."""
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        with self.runtime.phase("solve"):
            residual = self.update(features, F.one_hot(y, experience.num_seen))
        return {"residual": residual, "freedom": float(self.basis_MR.shape[0] - self.basis_MR.shape[1])}

    def update(self, features: Tensor, targets: Tensor) -> float:
        """Add an experience: features [N, D], targets [N, K] -> the root mean square of what is not fitted of it."""
        check_finite(features, "features")
        x_NM = self.expand(features)
        y_NK = targets.to(x_NM)
        self.weight_MK = F.pad(self.weight_MK, (0, y_NK.shape[1] - self.weight_MK.shape[1]))
        free_NM = self.outside(x_NM.T).T
        u_NR, s_R, v_RM = torch.linalg.svd(free_NM, full_matrices=False)
        kept = s_R > self.tolerance * x_NM.norm()
        new_MR = self.outside(v_RM[kept].T)  # again: rounding, divided by a small singular value, would reach the past
        error_NK = y_NK - x_NM @ self.weight_MK
        self.weight_MK = self.weight_MK + new_MR @ ((u_NR[:, kept].T @ error_NK) / s_R[kept, None])
        self.basis_MR = torch.cat([self.basis_MR, torch.linalg.qr(new_MR).Q], dim=1)
        return float((y_NK - x_NM @ self.weight_MK).square().mean().sqrt())

    def outside(self, columns: Tensor) -> Tensor:
        """(I - B B^T) of columns [M, N], twice: Gram-Schmidt is exact to rounding then."""
        for _ in range(2):
            columns = columns - self.basis_MR @ (self.basis_MR.T @ columns)
        return columns

    def expand(self, features: Tensor) -> Tensor:
        """Features [N, D] -> [N, M] float64."""
        if self.layer_DM is None:
            return features.double()
        return torch.relu(features.to(self.layer_DM) @ self.layer_DM)

    def predict(self, batch: Batch) -> Tensor:
        """Regressed one-hot targets [B, num_seen]."""
        self.model.eval()
        return (self.expand(self.model.features(batch)) @ self.weight_MK).float()

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "weight_MK", "basis_MR")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
