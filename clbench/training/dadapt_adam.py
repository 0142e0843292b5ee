"""D-Adapt-Adam (Defazio & Mishchenko, ICML 2023, arXiv 2301.07733): Adam that finds its step size while it runs.

d is a lower bound of the distance from the start to a solution. It begins at 1e-6 and never falls; rate = d lr, lr is 1 or what
a schedule says. In a step, with the gradient g, from the old s and v:

    r = rate <g, s / (sqrt(v) + eps)>,  R <- sqrt(b2) R + (1 - sqrt(b2)) r
    m <- b1 m + (1 - b1) rate g,  v <- b2 v + (1 - b2) g^2,  s <- sqrt(b2) s + (1 - sqrt(b2)) rate g
    d <- max(d, R / ((1 - sqrt(b2)) |s|_1)),  x <- x - m / (sqrt(v) + eps)

Sums run over all parameters. The step uses the rate from before d was changed. No bias correction, as in the release; decay
is decoupled, x <- x (1 - rate decay), where the release adds it to the gradient unless told otherwise. A group with the rate 0
stands still and is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

EPS = 1e-8
START = 1e-6


class DAdaptAdam(torch.optim.Optimizer):
    """State of a parameter: m, v and s, of its shape. `d` and R (`weighted`) stand in every group, the same in all."""

    def __init__(self, groups: ParamsT, betas: Sequence[float] = (0.9, 0.999), weight_decay: float = 0.0, start: float = START):
        defaults = {"lr": 1.0, "betas": tuple(betas), "weight_decay": weight_decay, "d": start, "weighted": 0.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step down the gradients that are there."""
        assert closure is None
        first = self.param_groups[0]
        (beta1, beta2), d, weighted = first["betas"], first["d"], first["weighted"]
        root, rate = beta2**0.5, d * max(group["lr"] for group in self.param_groups)
        moving = [(p, group) for group in self.param_groups if group["lr"] > 0 for p in group["params"] if p.grad is not None]
        sums = []
        for p, _ in moving:
            if p not in self.state:
                self.state[p] = {name: torch.zeros_like(p) for name in ("m", "v", "s")}
            m, v, s = (self.state[p][name] for name in ("m", "v", "s"))
            inner = (p.grad * s / v.sqrt().add_(EPS)).sum()
            m.mul_(beta1).add_(p.grad, alpha=rate * (1 - beta1))
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            s.mul_(root).add_(p.grad, alpha=rate * (1 - root))
            sums.append(torch.stack([inner, s.abs().sum()]))
        if not sums:
            return
        inner, size = torch.stack([pair.to(sums[0]) for pair in sums]).sum(0).tolist()
        if size == 0:
            return
        weighted = root * weighted + (1 - root) * rate * inner
        for group in self.param_groups:
            group["d"], group["weighted"] = max(d, weighted / ((1 - root) * size)), weighted
        for p, group in moving:
            p.mul_(1 - rate * group["weight_decay"])
            p.addcdiv_(self.state[p]["m"], self.state[p]["v"].sqrt().add_(EPS), value=-1)
