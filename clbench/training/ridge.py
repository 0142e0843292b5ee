"""Ridge regression on one-hot targets from accumulated sums: exact, whatever the order and the number of experiences.

    G <- G + H^T H,   Q <- Q + H^T Y,   W = (G + lambda I)^-1 Q       scores = h W

RanPAC (McDonnell et al., NeurIPS 2023, arXiv 2307.02251) chooses lambda anew in each experience: from 1e-8, 1e-7, ..., 1e8 the
one with the least squared error on the last fifth of the experience's samples, fitted on the first four fifths. Its mean runs
over the columns of all classes, also of those that the experience does not have; these are 0 in targets and predictions alike,
so they scale every candidate's error by one factor and the choice is that of the experience's own columns.

Legend: N samples, M features (10 000 after RanPAC's projection), K classes, n the smaller of M and the fitted samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.streams import rng

CANDIDATES: tuple[float, ...] = tuple(10.0**power for power in range(-8, 9))
ROWS = 4096  # samples that are turned into float64 at a time


class RidgeSums:
    """G [M, M] and Q [M, K]. float64 (800 MB for M = 10 000); float32 halves that and loses ridges below 1e-7 of G's scale."""

    def __init__(self, num_features: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64):
        self.gram_MM = torch.zeros(num_features, num_features, dtype=dtype, device=device)
        self.cross_MK = torch.zeros(num_features, 0, dtype=dtype, device=device)

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [N, M], y [N] below `num_classes`; Q grows by columns of 0 where it is narrower."""
        more = num_classes - self.cross_MK.shape[1]
        if more > 0:
            self.cross_MK = F.pad(self.cross_MK, (0, more))
        for h, labels in zip(features.split(ROWS), y.split(ROWS), strict=True):
            h = h.to(self.gram_MM)
            self.gram_MM += h.T @ h
            self.cross_MK += h.T @ F.one_hot(labels.to(h.device), self.cross_MK.shape[1]).to(h)

    def solve(self, ridge: float) -> Tensor:
        """W [M, K] in the precision of the sums."""
        return solve(self.gram_MM, self.cross_MK, ridge)

    def state_dict(self) -> dict[str, Any]:
        """G and Q."""
        return {"gram_MM": self.gram_MM, "cross_MK": self.cross_MK}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace them."""
        self.gram_MM, self.cross_MK = (state[name].to(self.gram_MM).clone() for name in ("gram_MM", "cross_MK"))


class RidgeRoot:
    """The same regression, kept as H itself while there are fewer samples than features, and as sums from there on.

    W = H^T (H H^T + lambda I)^-1 Y is what the sums give, for N^2 M instead of M^3 operations and N M instead of M^2 numbers.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64):
        self.root_NM = torch.zeros(0, num_features, device=device)
        self.y_N = torch.zeros(0, dtype=torch.int64, device=device)
        self.num_classes, self.dtype = 0, dtype
        self.sums: RidgeSums | None = None

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [N, M], y [N] below `num_classes`."""
        self.num_classes = max(self.num_classes, num_classes)
        if self.sums is None and len(self.y_N) + len(y) >= self.root_NM.shape[1]:
            self.sums = RidgeSums(self.root_NM.shape[1], self.root_NM.device, self.dtype)
            self.sums.update(self.root_NM, self.y_N, self.num_classes)
            self.root_NM, self.y_N = self.root_NM[:0], self.y_N[:0]
        if self.sums is not None:
            self.sums.update(features, y, self.num_classes)
            return
        self.root_NM = torch.cat([self.root_NM, features.detach().to(self.root_NM)])
        self.y_N = torch.cat([self.y_N, y.to(self.y_N)])

    def solve(self, ridge: float) -> Tensor:
        """W [M, K] in the precision of the sums."""
        if self.sums is not None:
            return self.sums.solve(ridge)
        h = self.root_NM.to(self.dtype)
        return h.T @ solve(h @ h.T, F.one_hot(self.y_N, self.num_classes).to(h), ridge)

    def state_dict(self) -> dict[str, Any]:
        """H and labels, or the sums."""
        held = None if self.sums is None else self.sums.state_dict()
        return {"root_NM": self.root_NM, "y_N": self.y_N, "num_classes": self.num_classes, "sums": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace them."""
        self.root_NM, self.y_N = state["root_NM"].to(self.root_NM).clone(), state["y_N"].to(self.y_N).clone()
        self.num_classes, self.sums = state["num_classes"], None
        if state["sums"] is not None:
            self.sums = RidgeSums(self.root_NM.shape[1], self.root_NM.device, self.dtype)
            self.sums.load_state_dict(state["sums"])


def solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(gram + ridge I)^-1 cross for a positive semidefinite gram [M, M] and cross [M, K] -> [M, K].

    By Cholesky; where rounding made the sum indefinite, by the eigenvalues of gram, those below 0 taken as 0.
    """
    if ridge <= 0:
        raise UserError(f"the ridge must be above 0, got {ridge}")
    shifted = gram.clone()
    shifted.diagonal().add_(ridge)
    chol, bad = torch.linalg.cholesky_ex(shifted)
    if not bad:
        return torch.cholesky_solve(cross, chol)
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ ((vectors.T @ cross) / (values.clamp_min(0) + ridge)[:, None])


def validation_errors(
    features: Tensor, y: Tensor, num_classes: int, fitted: int, candidates: Sequence[float] = CANDIDATES
) -> Tensor:
    """Mean squared error on rows `fitted`, `fitted` + 1, ... of the ridge regressions on the rows before -> [candidates].

    features [N, M], y [N]; over all K columns. One eigendecomposition of size n serves all candidates: of H^T H, or of H H^T
    where the fitted samples are fewer than the features (then h W = h H^T (H H^T + lambda I)^-1 Y).
    """
    h, target = features.double(), F.one_hot(y, num_classes).double()
    fit, rest = h[:fitted], h[fitted:]
    if fitted < h.shape[1]:
        values, vectors = torch.linalg.eigh(fit @ fit.T)
        left, right = rest @ (fit.T @ vectors), vectors.T @ target[:fitted]
    else:
        values, vectors = torch.linalg.eigh(fit.T @ fit)
        left, right = rest @ vectors, vectors.T @ (fit.T @ target[:fitted])
    values = values.clamp_min(0)
    errors = [(left @ (right / (values + ridge)[:, None]) - target[fitted:]).square().mean() for ridge in candidates]
    return torch.stack(errors)


def choose_ridge(
    features: Tensor, y: Tensor, num_classes: int, key: int, candidates: Sequence[float] = CANDIDATES, share: float = 0.8
) -> float:
    """The candidate with the least error on the last 1 - `share` of an experience's samples, in the order that `key` draws.

    features [N, M], y [N]. The smallest of equals; the middle candidate where a part would be empty.
    """
    fitted = int(share * len(y))
    if fitted < 1 or fitted == len(y):
        return candidates[len(candidates) // 2]
    order = torch.from_numpy(rng.permutation(key, len(y))).to(y.device)
    errors = validation_errors(features[order], y[order], num_classes, fitted, candidates)
    return candidates[int(errors.argmin())]
