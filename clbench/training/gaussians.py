"""One Gaussian per class in feature space, and samples from it.

Legend: K classes, D features, S samples per class. Statistics are computed in float64 and kept in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ClassGaussians:
    """Means [K, D] and covariances [K, D, D] of the classes seen so far. State: both tensors."""

    def __init__(self, ridge: float = 1e-4, device: torch.device | str = "cpu"):
        self.ridge = ridge
        self.mean_KD = torch.zeros(0, 0, device=device)
        self.cov_KDD = torch.zeros(0, 0, 0, device=device)
        self._chol_KDD: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean_KD)

    def add(self, features: Tensor) -> None:
        """Append a class from its features [N, D]: unbiased covariance + ridge I (a single sample has covariance ridge I)."""
        f = features.double()
        mean = f.mean(0)
        centred = f - mean
        cov = centred.T @ centred / max(1, len(f) - 1) + self.ridge * torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
        mean, cov = mean.float()[None], cov.float()[None]
        self.mean_KD = torch.cat([self.mean_KD, mean]) if len(self) else mean
        self.cov_KDD = torch.cat([self.cov_KDD, cov]) if len(self.cov_KDD) else cov
        self._chol_KDD = None

    def cholesky(self) -> Tensor:
        """Lower factors [K, D, D], computed once per state; a covariance that lost definiteness gets ten times the ridge."""
        if self._chol_KDD is None:
            chol, bad = torch.linalg.cholesky_ex(self.cov_KDD.double())
            if bad.any():
                eye = torch.eye(self.cov_KDD.shape[1], dtype=torch.float64, device=chol.device)
                chol = torch.linalg.cholesky(self.cov_KDD.double() + 9 * self.ridge * eye * (bad > 0)[:, None, None])
            self._chol_KDD = chol.float()
        assert self._chol_KDD is not None
        return self._chol_KDD

    def sample(self, per_class: int, scale_K: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw from N(scale_k mean_k, cov_k) for every class -> features [K * per_class, D], labels [K * per_class]."""
        k, d = self.mean_KD.shape
        noise = torch.randn(k, per_class, d, generator=rng).to(self.mean_KD.device)
        x = (self.mean_KD * scale_K[:, None])[:, None] + noise @ self.cholesky().transpose(1, 2)
        return x.reshape(-1, d), torch.arange(k, device=x.device).repeat_interleave(per_class)

    def state_dict(self) -> dict[str, Any]:
        """Means and covariances."""
        return {"mean_KD": self.mean_KD, "cov_KDD": self.cov_KDD}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace them, on the device they are on here."""
        device = self.mean_KD.device
        self.mean_KD, self.cov_KDD = state["mean_KD"].to(device).clone(), state["cov_KDD"].to(device).clone()
        self._chol_KDD = None
