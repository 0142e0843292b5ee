"""Ridge regression on one-hot targets from accumulated sums: exact, whatever the order and the number of experiences.

    G <- G + H^T H,   Q <- Q + H^T Y,   W = (G + lambda I)^-1 Q       scores = h W

RanPAC (McDonnell et al., NeurIPS 2023, arXiv 2307.02251) chooses lambda anew in each experience: from 1e-8, 1e-7, ..., 1e8 the
one with the least squared error on the last fifth of the experience's samples, fitted on the first four fifths. Its mean runs
over the columns of all classes, also of those that the experience does not have; these are 0 in targets and predictions alike,
so they scale every candidate's error by one factor and the choice is that of the experience's own columns.

Features may be given before RanPAC's projection, with the function that makes them: then only a block of rows, or as many rows
as M, exist at a time, whatever the number of samples.

Legend: N samples, D features as they are given, M features after the projection (10 000; without one D), K classes, n the
smaller of M and the fitted samples, R rows of a root, at most M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.streams import rng

CANDIDATES: tuple[float, ...] = tuple(10.0**power for power in range(-8, 9))
ROWS = 4096  # samples that are turned into float64 at a time
Expand = Callable[[Tensor], Tensor]  # features [N, D] -> h [N, M]


def same(features: Tensor) -> Tensor:
    """H = f: no projection."""
    return features


class RidgeSums:
    """G [M, M] and Q [M, K]. float64 (800 MB for M = 10 000); float32 halves that and loses ridges below 1e-7 of G's scale."""

    def __init__(self, num_features: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64):
        self.gram_MM = torch.zeros(num_features, num_features, dtype=dtype, device=device)
        self.cross_MK = torch.zeros(num_features, 0, dtype=dtype, device=device)

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [N, M], y [N] below `num_classes` or targets; Q grows by columns of 0 where it is narrower."""
        more = num_classes - self.cross_MK.shape[1]
        if more > 0:
            self.cross_MK = F.pad(self.cross_MK, (0, more))
        for h, labels in zip(features.split(ROWS), y.split(ROWS), strict=True):
            h = h.to(self.gram_MM)
            self.gram_MM += h.T @ h
            self.cross_MK += h.T @ targets(labels, self.cross_MK.shape[1]).to(h)

    def solve(self, ridge: float) -> Tensor:
        """W [M, K] in the precision of the sums."""
        return solve(self.gram_MM, self.cross_MK, ridge)

    def state_dict(self) -> dict[str, Any]:
        """G and Q."""
        return {"gram_MM": self.gram_MM, "cross_MK": self.cross_MK}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gram_MM, self.cross_MK = (state[name].to(self.gram_MM).clone() for name in ("gram_MM", "cross_MK"))


class RidgeRoot:
    """The same regression, kept as a root of the sums, G = R^T R and Q = R^T C, while it has fewer rows than features.

    W = R^T (R R^T + lambda I)^-1 C is what the sums give, for R^2 M instead of M^3 operations and R M instead of M^2 numbers.
    [R C] is the triangular factor of the QR decomposition of all rows [h y]: a function of G and Q alone (up to the signs of
    its rows), whatever the order of the samples was. It has as many rows as samples until they are M, and becomes G and Q then;
    at `rows` of them where that is given: a root of few rows is cheaper for those that add small batches.
    """

    def __init__(
        self,
        num_features: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        rows: int | None = None,
    ):
        self.most = num_features if rows is None else min(rows, num_features)
        self.root_RM = torch.zeros(0, num_features, dtype=dtype, device=device)
        self.cross_RK = torch.zeros(0, 0, dtype=dtype, device=device)
        self.sums: RidgeSums | None = None

    def update(self, features: Tensor, y: Tensor, num_classes: int, expand: Expand = same) -> None:
        """Add samples: features [N, D] before `expand`, y [N] below `num_classes` or targets [N, `num_classes`]."""
        rows, width = self.root_RM.shape
        if self.sums is None and rows + len(y) >= self.most:
            self.sums = RidgeSums(width, self.root_RM.device, self.root_RM.dtype)
            self.sums.gram_MM, self.sums.cross_MK = self.root_RM.T @ self.root_RM, self.root_RM.T @ self.cross_RK
            self.root_RM, self.cross_RK = self.root_RM[:0], self.cross_RK[:0]
        if self.sums is not None:
            for f, labels in blocks(features, y):
                self.sums.update(expand(f), labels, num_classes)
            return
        classes = max(self.cross_RK.shape[1], num_classes)
        old = torch.cat([self.root_RM, F.pad(self.cross_RK, (0, classes - self.cross_RK.shape[1]))], dim=1)
        new = torch.cat([expand(features).detach().to(self.root_RM), targets(y, classes).to(self.root_RM)], dim=1)
        mixed = torch.linalg.qr(torch.cat([old, new]), mode="r").R
        self.root_RM, self.cross_RK = mixed[:, :width].contiguous(), mixed[:, width:].contiguous()

    def solve(self, ridge: float) -> Tensor:
        """W [M, K] in the precision of the sums."""
        if self.sums is not None:
            return self.sums.solve(ridge)
        return self.root_RM.T @ solve(self.root_RM @ self.root_RM.T, self.cross_RK, ridge)

    def state_dict(self) -> dict[str, Any]:
        """R and C, or the sums."""
        held = None if self.sums is None else self.sums.state_dict()
        return {"root_RM": self.root_RM, "cross_RK": self.cross_RK, "sums": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.root_RM, self.cross_RK = (state[name].to(self.root_RM).clone() for name in ("root_RM", "cross_RK"))
        self.sums = None
        if state["sums"] is not None:
            self.sums = RidgeSums(self.root_RM.shape[1], self.root_RM.device, self.root_RM.dtype)
            self.sums.load_state_dict(state["sums"])


def targets(y: Tensor, num_classes: int) -> Tensor:
    """One-hot rows of labels [N]; targets [N, num_classes] are what they are."""
    return y if y.ndim == 2 else F.one_hot(y, num_classes)


def blocks(features: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in blocks of at most ROWS rows: features [N, D], y [N]."""
    return zip(features.split(ROWS), y.split(ROWS), strict=True)


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
    features: Tensor,
    y: Tensor,
    num_classes: int,
    fitted: int,
    candidates: Sequence[float] = CANDIDATES,
    expand: Expand = same,
) -> Tensor:
    """Mean squared error on rows `fitted`, `fitted` + 1, ... of the ridge regressions on the rows before -> [candidates].

    features [N, D] before `expand`, y [N]; over all K columns. One eigendecomposition of size n serves all candidates: of
    H^T H, or of H H^T where the fitted samples are fewer than the features (then h W = h H^T (H H^T + lambda I)^-1 Y).
    """
    width = expand(features[:1]).shape[1]
    if fitted < width:
        fit = torch.cat([expand(f).double() for f in features[:fitted].split(ROWS)])
        values, vectors = torch.linalg.eigh(fit @ fit.T)
        right = vectors.T @ F.one_hot(y[:fitted], num_classes).double()
    else:
        sums = RidgeSums(width, features.device)
        for f, labels in blocks(features[:fitted], y[:fitted]):
            sums.update(expand(f), labels, num_classes)
        values, vectors = torch.linalg.eigh(sums.gram_MM)
        fit, right = None, vectors.T @ sums.cross_MK
    values = values.clamp_min(0)
    errors = torch.zeros(len(candidates), dtype=torch.float64, device=features.device)
    for f, labels in blocks(features[fitted:], y[fitted:]):
        h, target = expand(f).double(), F.one_hot(labels, num_classes).double()
        left = (h if fit is None else h @ fit.T) @ vectors
        gaps = (left @ (right / (values + ridge)[:, None]) - target for ridge in candidates)
        errors += torch.stack([gap.square().sum() for gap in gaps])
    return errors / ((len(y) - fitted) * num_classes)


def choose_ridge(
    features: Tensor,
    y: Tensor,
    num_classes: int,
    key: int,
    candidates: Sequence[float] = CANDIDATES,
    share: float = 0.8,
    expand: Expand = same,
) -> float:
    """The candidate with the least error on the last 1 - `share` of an experience's samples, in the order that `key` draws.

    features [N, D] before `expand`, y [N]. The smallest of equals; the middle candidate where a part would be empty.
    """
    fitted = int(share * len(y))
    if fitted < 1 or fitted == len(y):
        return candidates[len(candidates) // 2]
    order = torch.from_numpy(rng.permutation(key, len(y))).to(y.device)
    errors = validation_errors(features[order], y[order], num_classes, fitted, candidates, expand)
    return candidates[int(errors.argmin())]
