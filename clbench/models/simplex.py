"""Vertices of a regular simplex, and a fixed classifier of them: nothing of it trains, new classes take free vertices.

Pernici, Bruni, Baecchi & Del Bimbo, "Regular Polytope Networks", IEEE TNNLS 2022, arXiv 2103.15632.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError


def vertices(dimension: int) -> Tensor:
    """D + 1 unit vectors in R^D, any two with the cosine -1 / D, in float64 [D + 1, D]."""
    last = (1 - (dimension + 1) ** 0.5) / dimension
    rows = torch.cat([torch.eye(dimension, dtype=torch.float64), torch.full((1, dimension), last, dtype=torch.float64)])
    rows = rows - rows.mean(0)
    return rows / rows.norm(dim=1, keepdim=True)


def turned_vertices(number: int, dimension: int, generator: torch.Generator) -> Tensor:
    """K <= D unit vectors in R^D, any two with the cosine -1 / (K - 1), in a random orientation, in float64 [K, D].

    A simplex equiangular tight frame, sqrt(K / (K - 1)) U (I - 11^T / K) of orthonormal columns U [D, K].
    """
    drawn = torch.randn(dimension, number, generator=generator, dtype=torch.float64)
    u_DK = torch.linalg.qr(drawn).Q
    centred = u_DK - u_DK.mean(1, keepdim=True)
    return math.sqrt(number / (number - 1)) * centred.T


class SimplexHead(nn.Module):
    """The first `reserve` vertices in R^D; the first `num_classes` of them are taken. No parameter, no bias.

    `UserError` where more classes come than were reserved, or more are reserved than there are vertices.
    """

    def __init__(self, num_features: int, reserve: int | None, scale: float):
        super().__init__()
        if reserve is not None and not 2 <= reserve <= num_features + 1:
            raise UserError(f"learner.reserve must lie between 2 and {num_features + 1}, the features + 1, got {reserve}")
        self.scale = scale
        self.rows_KD: Tensor
        self.register_buffer("rows_KD", vertices(num_features)[:reserve].float(), persistent=False)
        self.taken: Tensor
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    @property
    def num_classes(self) -> int:
        return int(self.taken)

    def grow(self, count: int) -> None:
        """`count` classes take the next vertices."""
        if self.num_classes + count > len(self.rows_KD):
            text = f"class {self.num_classes + count} has no vertex: learner.reserve={len(self.rows_KD)}"
            raise UserError(f"{text}, and features of {self.rows_KD.shape[1]} numbers have {self.rows_KD.shape[1] + 1}")
        self.taken += count

    def forward(self, features: Tensor) -> Tensor:
        """Logits of every reserved class [B, reserve]."""
        return self.scale * features @ self.rows_KD.to(features.dtype).T
