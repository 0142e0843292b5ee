"""Bloop ("Careful with that Scalpel: Improving Gradient Surgery with an EMA", ICML 2024, arXiv 2402.02998).

A second loss (of a memory, of a regulariser) must not undo the first (of the new samples): its gradient a loses what lies along
a running mean m of the first loss's gradient g. Over all weights at once, before every step:

    m <- m + rate (g - m),   step along g + a - (<a, m> / |m|^2) m

m starts as the first g, as in the release, and anew with every experience, whose first loss is another one (a choice). `rate`
is the release's default 0.1; 1 is projection without a mean. The factor of the second loss is the learner's own. Weights that
a step does not train (no gradient of either loss) stay out of it. The release adds 1e-7 to |m|^2; here it is exact.
Published number: none read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.training.online import flat, give
from clbench.training.runtime import Runtime

Parts = Callable[[Any], tuple[Tensor, Tensor | None]]  # batch -> the loss of the new samples, that of the rest


class Bloop:
    """State: the running mean [P] of an experience in training, empty between experiences."""

    def __init__(self, runtime: Runtime, *, rate: float = 0.1):
        if not 0 < rate <= 1:
            raise UserError(f"learner.project bloop: rate must lie in (0, 1], got {rate}")
        self.runtime, self.rate = runtime, rate
        self.mean = torch.zeros(0)

    def loss(self, parts: Parts, params: Callable[[], list[Tensor]]) -> tuple[Callable[[Any], Tensor], dict[str, Any]]:
        """A loss for `fit` with the value of both parts and the gradient of the first, and the hook that adds the other."""
        second: dict[Tensor, Tensor | None] = {}

        def loss(batch: Any) -> Tensor:
            main, rest = parts(batch)
            second.clear()
            if rest is None:
                return main
            trained = params()
            found = torch.autograd.grad(rest, trained, retain_graph=True, allow_unused=True)
            second.update(zip(trained, found, strict=True))
            return main + rest.detach()

        def before(params: list[Tensor], grads: list[Tensor | None]) -> None:
            self.combine(params, grads, [second.get(p) for p in params])
            second.clear()

        return loss, {"before_step": before}

    @torch.no_grad()
    def combine(self, params: list[Tensor], grads: list[Tensor | None], rest: list[Tensor | None]) -> None:
        """Update the mean by the gradients of the first loss; make the step's direction the gradients of `params`."""
        g, a = flat(grads, params), flat(rest, params)
        self.mean = self.mean + self.rate * (g - self.mean) if len(self.mean) else g
        if all(part is None for part in rest):
            return
        taking = [i for i, pair in enumerate(zip(grads, rest, strict=True)) if any(part is not None for part in pair)]
        sizes = [p.numel() for p in params]
        direction = (g + orthogonal(a, self.mean)).split(sizes)
        give([params[i] for i in taking], torch.cat([direction[i] for i in taking]))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean = state["mean"].to(self.runtime.device)


def orthogonal(a: Tensor, m: Tensor) -> Tensor:
    """A vector [P] without its part along m [P]."""
    length = m @ m
    return a if length == 0 else a - (a @ m) / length * m
