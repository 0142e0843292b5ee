"""Adam (Kingma & Ba, ICLR 2015, arXiv 1412.6980) that counts steps for every number of a tensor, not for the tensor.

So a part of a tensor can start anew: where moments and steps are set to 0, the bias correction is that of a first step. Where
nothing starts anew it is torch's Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

EPS = 1e-8
ZEROS = ("steps", "exp_avg", "exp_avg_sq")  # of each parameter, of its shape


class EntryAdam(torch.optim.Optimizer):
    """State of a parameter: steps and both moments, of its shape. `weight_decay` is added to the gradient."""

    def __init__(self, groups: ParamsT, betas: Sequence[float] = (0.9, 0.999), weight_decay: float = 0.0):
        super().__init__(groups, {"lr": 1e-3, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step down the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            for p in (p for p in group["params"] if p.grad is not None):
                if p not in self.state:
                    self.state[p] = {name: torch.zeros_like(p) for name in ZEROS}
                steps, mean, square = (self.state[p][name] for name in ZEROS)
                g = p.grad.add(p, alpha=decay) if decay else p.grad
                steps += 1
                mean.lerp_(g, 1 - beta1)
                square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                size = mean / (1 - beta1**steps)
                p.addcdiv_(size, (square / (1 - beta2**steps)).sqrt_().add_(EPS), value=-group["lr"])
