"""Schedule-free SGD and AdamW (Defazio et al. 2024, arXiv 2405.15682): no schedule; an average of the weights is the result.

Gradients g are taken at y, z moves, x is the average that answers; all three begin at the weights:

    z <- z - lr (g + decay y)                        SGD
    z <- z - lr (g / (sqrt(v^) + eps) + decay y)     AdamW, v^ the bias-corrected mean of g^2
    x <- (1 - c) x + c z,  c = lr^2 / the sum of all lr^2;   y <- (1 - beta) z + beta x

beta takes the place of momentum. The weights are y while it steps: `evaluate` puts x there, `train` puts y back, and `fit` ends
with x. Choices: lr of a step in c, where the release takes the largest so far; warm-up is a schedule's. Running statistics of
BatchNorm are those of y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

EPS = 1e-8


class ScheduleFree(torch.optim.Optimizer):
    """State of a parameter: x, z and, with `square_beta` (AdamW), v; its steps and its sum of squared rates."""

    def __init__(self, groups: ParamsT, beta: float, square_beta: float | None, weight_decay: float):
        super().__init__(groups, {"lr": 1e-3, "beta": beta, "square_beta": square_beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step down the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            lr, beta, decay = group["lr"], group["square_beta"], group["weight_decay"]
            for p in (p for p in group["params"] if p.grad is not None and lr > 0):
                if p not in self.state:
                    self.state[p] = {"x": p.detach().clone(), "z": p.detach().clone(), "steps": 0, "weight": 0.0}
                    self.state[p] |= {} if beta is None else {"v": torch.zeros_like(p)}
                state, move = self.state[p], p.grad
                state["steps"] += 1
                state["weight"] += lr**2
                if beta is not None:
                    v = state["v"].mul_(beta).addcmul_(move, move, value=1 - beta)
                    move = move / (v / (1 - beta ** state["steps"])).sqrt_().add_(EPS)
                state["z"].add_(move.add(p, alpha=decay) if decay else move, alpha=-lr)
                state["x"].lerp_(state["z"], lr**2 / state["weight"])
                p.copy_(self._between(p, group))

    @torch.no_grad()
    def evaluate(self) -> None:
        """Put the averages into the weights."""
        for p in self.state:
            p.copy_(self.state[p]["x"])

    @torch.no_grad()
    def train(self) -> None:
        """Put back where gradients are taken."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p in self.state):
                p.copy_(self._between(p, group))

    def _between(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.lerp(self.state[p]["z"], self.state[p]["x"], group["beta"])
