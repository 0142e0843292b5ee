"""Fixed random layers, drawn from a key and never stored: what closed forms put between features and their classifier.

Legend: N samples, D features, M random features. All in float64, so that sums of them do not depend on how samples are batched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Fourier:
    """Random Fourier features of the kernel exp(-gamma |x - y|^2) (Rahimi & Recht, NeurIPS 2007): z(x).z(y) is near it.

    z(x) = sqrt(2/M) cos(sqrt(2 gamma) x W + b), entries of W [D, M] from N(0, 1), of b [M] from U(0, 2 pi).
    """

    def __init__(self, num_features: int, width: int, key: int, device: torch.device | str = "cpu"):
        generator = torch.Generator().manual_seed(key >> 1)
        self.weight_DM = torch.randn(num_features, width, generator=generator, dtype=torch.float64).to(device)
        self.phase_M = (2 * math.pi * torch.rand(width, generator=generator, dtype=torch.float64)).to(device)

    def __call__(self, x: Tensor, gamma: float) -> Tensor:
        """Features [N, D] -> z [N, M] float64."""
        angle = math.sqrt(2 * gamma) * (x.to(self.weight_DM) @ self.weight_DM) + self.phase_M
        return math.sqrt(2 / len(self.phase_M)) * torch.cos(angle)


def uniform(num_features: int, width: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """A layer as `nn.Linear` starts, without bias: U(-1/sqrt(D), 1/sqrt(D)) [D, M] float64."""
    bound, generator = num_features**-0.5, torch.Generator().manual_seed(key >> 1)
    return torch.empty(num_features, width, dtype=torch.float64).uniform_(-bound, bound, generator=generator).to(device)
