"""Classifiers that grow with the classes. Shapes: features [B, D] -> scores [B, K].

Loading a state with more classes than a head has grows it first; blocks that are there already are filled in place, so that
an optimiser which holds their parameters stays valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import UserError


class LinearHead(nn.Module):
    """One `Linear(D, classes of an experience)` per experience; logits are concatenated. New rows: normal(0, std), bias 0."""

    def __init__(self, num_features: int, std: float = 0.02):
        super().__init__()
        self.num_features, self.std = num_features, std
        self.blocks = nn.ModuleList()
        self.anchor: Tensor
        self.register_buffer("anchor", torch.zeros(0), persistent=False)  # where new blocks go

    @property
    def num_classes(self) -> int:
        """K."""
        return sum(block.out_features for block in self.blocks)  # type: ignore[misc]

    def grow(self, count: int, generator: torch.Generator) -> None:
        """Append `count` classes; weights are drawn from a CPU generator (torch's trunc_normal_, bounds -2 and 2)."""
        block = nn.Linear(self.num_features, count)
        nn.init.trunc_normal_(block.weight, std=self.std, generator=generator)
        nn.init.zeros_(block.bias)
        self.blocks.append(block.to(self.anchor.device))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, K]."""
        assert len(self.blocks), "the head has no class yet"
        return torch.cat([block(features) for block in self.blocks], dim=1)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill in place; blocks that are missing are added, blocks too many are removed."""
        widths = [len(state[f"blocks.{i}.weight"]) for i in range(sum(key.endswith(".weight") for key in state))]
        while len(self.blocks) > len(widths):
            del self.blocks[-1]
        for i, width in enumerate(widths):
            if i < len(self.blocks) and self.blocks[i].out_features == width:
                continue
            block = nn.Linear(self.num_features, width).to(self.anchor.device)
            if i < len(self.blocks):
                self.blocks[i] = block
            else:
                self.blocks.append(block)
        return super().load_state_dict(state, strict, assign)


class CosineHead(nn.Module):
    """sigma * cos(f, w_c) with a learnable sigma (1 at the start) and rows U(-1/sqrt(D), 1/sqrt(D)), one block per experience."""

    def __init__(self, num_features: int):
        super().__init__()
        self.linear = LinearHead(num_features)
        self.sigma = nn.Parameter(torch.ones(1))

    @property
    def num_classes(self) -> int:
        """K."""
        return self.linear.num_classes

    def grow(self, count: int, generator: torch.Generator) -> None:
        """Append `count` classes."""
        self.linear.grow(count, generator)
        block = self.linear.blocks[-1]
        bound = self.linear.num_features**-0.5
        with torch.no_grad():
            drawn = torch.empty(count, self.linear.num_features).uniform_(-bound, bound, generator=generator)
            block.weight.copy_(drawn)
        block.bias.requires_grad_(False)

    def assign(self, first: int, prototypes: Tensor) -> None:
        """Overwrite the rows of classes first, first + 1, ... by prototypes [P, D]."""
        row = 0
        with torch.no_grad():
            for block in self.linear.blocks:
                for i in range(block.out_features):
                    if first <= row < first + len(prototypes):
                        block.weight[i].copy_(prototypes[row - first])
                    row += 1

    def forward(self, features: Tensor) -> Tensor:
        """Scaled cosines [B, K]."""
        rows = torch.cat([block.weight for block in self.linear.blocks])
        return self.sigma * F.linear(F.normalize(features, dim=1), F.normalize(rows, dim=1))

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill in place, growing first where needed."""
        part = {key.removeprefix("linear."): value for key, value in state.items() if key.startswith("linear.")}
        self.linear.load_state_dict(part, strict, assign)
        with torch.no_grad():
            self.sigma.copy_(state["sigma"])


class PrototypeHead:
    """Class means of everything ever seen: sums [K, D] and counts [K] in float64, so the order of arrival does not matter.

    metric "euclidean": -||f - mean||^2; "cosine": cos(f, mean), the mean taken over un-normalised features.
    """

    def __init__(self, num_features: int, metric: str = "euclidean"):
        if metric not in ("euclidean", "cosine"):
            raise UserError(f"unknown metric {metric!r}: choose euclidean or cosine")
        self.metric = metric
        self.sums_KD = torch.zeros(0, num_features, dtype=torch.float64)
        self.counts_K = torch.zeros(0, dtype=torch.float64)

    def to(self, device: torch.device | str) -> PrototypeHead:
        """Move the statistics."""
        self.sums_KD, self.counts_K = self.sums_KD.to(device), self.counts_K.to(device)
        return self

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [N, D], y [N] below `num_classes`."""
        more = num_classes - len(self.counts_K)
        if more > 0:
            self.sums_KD = torch.cat([self.sums_KD, self.sums_KD.new_zeros(more, self.sums_KD.shape[1])])
            self.counts_K = torch.cat([self.counts_K, self.counts_K.new_zeros(more)])
        f = features.double()
        for c in y.unique():
            rows = y == c
            self.sums_KD[c] += f[rows].sum(0)
            self.counts_K[c] += rows.sum()

    @property
    def means_KD(self) -> Tensor:
        """Means [K, D] float64; a class without samples has mean 0."""
        return self.sums_KD / self.counts_K.clamp_min(1)[:, None]

    def __call__(self, features: Tensor) -> Tensor:
        """Scores [B, K] float32; classes without samples get the lowest finite score."""
        f, means = features.double(), self.means_KD
        if self.metric == "cosine":
            z = F.normalize(f, dim=1) @ F.normalize(means, dim=1).T
        else:
            z = 2 * f @ means.T - means.square().sum(1) - f.square().sum(1, keepdim=True)
        return z.masked_fill(self.counts_K == 0, -1e30).float()

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts."""
        return {"sums_KD": self.sums_KD, "counts_K": self.counts_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace them."""
        device = self.sums_KD.device
        self.sums_KD, self.counts_K = state["sums_KD"].to(device).clone(), state["counts_K"].to(device).clone()
