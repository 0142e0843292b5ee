"""Linear discriminant analysis from the sums of a ridge regression: exact, whatever the order and the split of the samples.

`RidgeRoot` keeps G = sum h h^T and Q = sum h y^T (y one-hot), or a root [R C] of them. With N, the classes' counts,

    mu = Q N^-1        W = sum (h - mu_y)(h - mu_y)^T = G - Q N^-1 Q^T

and R - C N^-1 C^T R is a root of W: C^T C = N, so that it is R without its part in the span of C.

Legend: M features, K classes, R rows of the root.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clbench.training.ridge import RidgeRoot, solve


class WithinClass:
    """Means [K, M] of the classes, and their common scatter W, not divided: itself or by a root of it. All float64.

    counts_K are the samples of each class in `sums`; a class without any has mean 0.
    """

    def __init__(self, sums: RidgeRoot, counts_K: Tensor):
        self.samples = float(counts_K.sum())
        share_K1 = 1 / counts_K.to(sums.root_RM).clamp_min(1)[:, None]
        if sums.sums is None:
            self.means_KM = share_K1 * (sums.cross_RK.T @ sums.root_RM)
            root_RM = sums.root_RM - sums.cross_RK @ self.means_KM
            self.root_RM: Tensor | None = root_RM
            self.gram = root_RM @ root_RM.T  # [R, R]: W's eigenvalues, but for zeros
        else:
            self.means_KM = share_K1 * sums.sums.cross_MK.T
            self.root_RM = None
            self.gram = sums.sums.gram_MM - sums.sums.cross_MK @ self.means_KM  # W

    def oas(self) -> tuple[float, float]:
        """Oracle approximating shrinkage of S = W / n (Chen et al. 2010): the share rho and what S shrinks to, tr(S) / M."""
        width = self.means_KM.shape[1]
        mean = float(self.gram.trace()) / self.samples / width
        square = float(self.gram.square().sum()) / self.samples**2 / width**2
        below = (self.samples + 1) * (square - mean**2 / width)
        return (1.0 if below <= 0 else min((square + mean**2) / below, 1.0)), mean

    def solve(self, scale: float, ridge: float) -> Tensor:
        """(scale W + ridge I)^-1 mu of each class [K, M], for scale >= 0 and ridge > 0."""
        if scale == 0:
            return self.means_KM / ridge
        if self.root_RM is None:
            return solve(self.gram, self.means_KM.T, ridge / scale).T / scale
        inner = solve(self.gram, self.root_RM @ self.means_KM.T, ridge / scale)
        return (self.means_KM - inner.T @ self.root_RM) / ridge

    def pseudo_solve(self, least: float) -> Tensor:
        """W^+ mu of each class [K, M], where eigenvalues of at most `least` times the largest count as 0."""
        values, vectors = torch.linalg.eigh(self.gram)
        kept = values > least * values.max().clamp_min(0) if len(values) else values > 0
        inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0)
        if self.root_RM is None:
            return (self.means_KM @ vectors) * inverse @ vectors.T
        rows = vectors.T @ self.root_RM  # [R, M]: eigenvectors of W times the roots of their eigenvalues
        return (self.means_KM @ rows.T) * inverse.square() @ rows
