"""What the loss lost along the path of training, weight by weight: what SI and RWalk weigh weights by.

Over steps, omega = -sum g (theta_after - theta_before), with the gradient g of the task loss alone and the displacement that
the optimiser really made, whatever it is. Summed over the weights it is, for small steps, the decrease of the task loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clbench.training.fisher import Weights, kept, trained

NONE: Weights = {}


class Step:
    """One step of `fit`: `before` it the weights and their gradients are noted, `after` it what it gave is asked."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.start: Weights = {}
        self.grads: Weights = {}

    @torch.no_grad()
    def before(
        self,
        strength: float = 0.0,
        reference: Mapping[str, Tensor] = NONE,
        importance: Mapping[str, Tensor] = NONE,
    ) -> None:
        """Note weights and gradients, without that of a penalty strength x sum importance (theta - reference)^2."""
        self.start = kept(self.model)
        self.grads = {}
        for name, p in trained(self.model).items():
            g = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            if name in reference:
                g -= 2 * strength * importance[name] * (p - reference[name])
            self.grads[name] = g

    @torch.no_grad()
    def after(self) -> Weights:
        """-g (theta_after - theta_before)."""
        return {name: -self.grads[name] * (p - self.start[name]) for name, p in trained(self.model).items()}


def zeros(model: nn.Module) -> Weights:
    """0 for every trained weight."""
    return {name: torch.zeros_like(p, requires_grad=False) for name, p in trained(model).items()}


def scaled(weights: Mapping[str, Tensor]) -> Weights:
    """All weights together mapped to [0, 1] by their least and largest value; 0 where all are equal."""
    low = min(float(value.min()) for value in weights.values())
    high = max(float(value.max()) for value in weights.values())
    return {name: (value - low) / (high - low) if high > low else torch.zeros_like(value) for name, value in weights.items()}
