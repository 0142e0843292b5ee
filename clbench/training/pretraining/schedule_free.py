"""Schedule-free averaging (Defazio et al. 2024, arXiv 2405.15682): no anneal, the average of the iterates is evaluated.

Three copies of the weights: z moves with the optimiser, x is the average of all z, and gradients are taken at y between them:
y = (1 - beta) z + beta x. Written as a rule for `after_step`, so that any optimiser can stand below it: what the optimiser
changed at y is applied to z. Momentum is replaced by `beta`, so the optimiser should have none (Adam: beta1 = 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.training.distributed import placed_like


class ScheduleFree:
    """Keeps x and z for parameters that hold y while training.

    beta    0: gradients at z (plain averaging, Polyak-Ruppert), 1: at the average itself
    weight  of an iterate in the average is its learning rate squared: warm-up counts little
    """

    def __init__(self, params: Sequence[Tensor], beta: float = 0.9):
        if not 0 <= beta < 1:
            raise UserError(f"beta of schedule-free averaging must be at least 0 and below 1, got {beta}")
        self.params, self.beta, self.weight = list(params), beta, 0.0
        self.average = [p.detach().clone() for p in self.params]
        self.moving = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def after_step(self, rate: float) -> None:
        """Take in an update that was made with this learning rate, then move the parameters to the next y."""
        self.weight += rate**2
        share = rate**2 / self.weight if self.weight else 1.0
        for p, x, z in zip(self.params, self.average, self.moving, strict=True):
            y = torch.lerp(z, x, self.beta)
            z += p - y
            x.lerp_(z, share)
            p.copy_(torch.lerp(z, x, self.beta))

    @torch.no_grad()
    def evaluate(self) -> None:
        """Put the average into the parameters; `train` undoes it."""
        for p, x in zip(self.params, self.average, strict=True):
            p.copy_(x)

    @torch.no_grad()
    def train(self) -> None:
        """Put y into the parameters: before training goes on."""
        for p, x, z in zip(self.params, self.average, self.moving, strict=True):
            p.copy_(torch.lerp(z, x, self.beta))

    def state_dict(self) -> dict[str, Any]:
        """Average, moving weights, sum of squared rates."""
        return {"average": self.average, "moving": self.moving, "weight": self.weight}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in ((self.average, state["average"]), (self.moving, state["moving"])):
            for mine, other in zip(own, saved, strict=True):
                mine.copy_(placed_like(other, mine))
        self.weight = state["weight"]
