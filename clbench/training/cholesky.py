"""Cholesky factors of covariances, and the one repair of a covariance that has none: the least ridge that does.

A covariance of fewer samples than features is singular, and rounding can make it indefinite. FeCAM, SEED and the Gaussians of
classifier alignment all get the factor of S + r I, where r is the first of a rising series, each ten times the one before, with
which S + r I is positive definite. They differ in the first ridge, and SEED in what it calls definite: both are its method's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_finite(values: Tensor, what: str) -> None:
    """FloatingPointError, as `fit` raises it for a loss, where one of `values` is NaN or infinite; `what` names them."""
    if not torch.isfinite(values).all():
        raise FloatingPointError(f"{what} are NaN or infinite")


def repaired(matrix: Tensor, what: str, *, ridge: float, always: bool = False, least: float = 0.0) -> tuple[Tensor, float]:
    """Lower factor L of matrix + r I -> (L [D, D], r): r is the first of 0, ridge, 10 ridge, 100 ridge, ... that does.

    matrix  [D, D] symmetric; `what` names it in the FloatingPointError that is raised where a number in it is not finite
    always  the series starts with `ridge`, not with 0
    least   also demand that the smallest eigenvalue is at least this share of the largest; 0: that the factorisation succeeds
    """
    check_finite(matrix, f"numbers of {what}")
    assert ridge > 0
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    values = torch.linalg.eigvalsh(matrix) if least > 0 else None
    added = ridge if always else 0.0
    while math.isfinite(added):  # a ridge above D times the largest number makes any matrix definite
        if values is None or values[0] + added >= least * (values[-1] + added):
            chol, bad = torch.linalg.cholesky_ex(matrix + added * eye if added else matrix)
            if not bad:
                return chol, added
        added = added * 10 or ridge
    raise FloatingPointError(f"{what} has no Cholesky factor whatever the ridge")
