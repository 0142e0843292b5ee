"""Rates that follow the run (`learner.adapt`): factors on what the schedule says, with a state of their own.

plateau        `factor` times lower when the loss stops falling (torch's ReduceLROnPlateau): after more than `patience` looks in
               a row that are not below best x (1 - threshold)
hypergradient  the rate a moves with the agreement of the gradient g and the step u before it (Baydin et al. 2018, arXiv
               1703.04782, Adam-HD: u = m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps)): additive, a <- a + rate <g, u>, as
               there, or multiplicative, a <- a (1 + rate cos(g, u)), which knows no scale
fedhyper       FedHyper-G (arXiv 2310.03156) with an experience in place of a round of clients: its whole change D of the
               weights counts a times, a <- a + <D, D before>, within 1 / most and most

Deviations and choices of this file: the looks of `plateau` are means of the training loss over `every` updates, because a
learner here sees no validation text; one inner product over all parameters, where the code of Adam-HD moves its rate inside the
loop over them; gradients as clipped; a rate stays within 1/100 and 100 times its schedule; nothing moves in an experience's
first update; a look notes the rate as it is before the update moves it. `normalise=cosine` of fedhyper takes the cosine
instead, because the product grows with the square of the changes.

A new experience looks like a plateau for ever to a `best` of the old one: it begins without. Whether the factor begins at 1
again, too, says `restart`: by default that of `plateau` does, the others' goes on. No published number is at this scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clbench.interfaces import Place, Schedule, UserError
from clbench.training.distributed import placed_like
from clbench.training.state import detached

if TYPE_CHECKING:
    from clbench.training.pretraining.segments import AfterStep, Segment

WIDEST = 100.0


class Rate:
    """A factor that does nothing, for the training of `model`. State: the names in `kept`."""

    kept: tuple[str, ...] = ("factor", "fresh")
    model: nn.Module | None = None

    def __init__(self, restart: bool):
        self.restart, self.factor, self.fresh = restart, 1.0, True

    @property
    def searching(self) -> bool:
        """Whether the weights of the update at hand are thrown away."""
        return False

    def begin(self, model: nn.Module) -> None:
        """A new experience."""
        self.factor, self.fresh = (1.0 if self.restart else self.factor), True

    def schedule(self, base: Schedule) -> Schedule:
        """A schedule times the factor of the moment."""

        def scaled(place: Place) -> float:
            return base(place) * self.factor

        return scaled

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are there, and the rates in the groups are those of the schedule and the factor."""

    def seen(self, losses: Tensor) -> None:
        """The losses of an update's batch [B, L]."""

    def end(self, model: nn.Module) -> None:
        """The experience's last update is done."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and what else is kept."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.kept:
            setattr(self, name, detached(state[name]))


class Plateau(Rate):
    """State: factor, lowest mean, bad looks in a row, the running sum."""

    kept = ("factor", "fresh", "best", "bad", "total", "number")

    def __init__(
        self, *, every: int = 20, factor: float = 0.1, patience: int = 2, threshold: float = 1e-4, restart: bool = True
    ):
        super().__init__(restart)
        if every < 1 or patience < 0 or not 0 < factor < 1 or not 0 <= threshold < 1:
            raise UserError("learner.adapt plateau needs every from 1, patience from 0, factor and threshold between 0 and 1")
        self.every, self.cut, self.patience, self.threshold = every, factor, patience, threshold
        self.best, self.bad, self.total, self.number = math.inf, 0, 0.0, 0

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        self.best, self.bad, self.total, self.number = math.inf, 0, 0.0, 0

    def look(self, loss: float) -> None:
        """Judge one mean."""
        if loss < self.best * (1 - self.threshold):
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        if self.bad > self.patience:
            self.factor, self.bad = self.factor * self.cut, 0

    def seen(self, losses: Tensor) -> None:
        self.total, self.number = self.total + float(losses.double().mean()), self.number + 1
        if self.number == self.every:
            self.look(self.total / self.every)
            self.total, self.number = 0.0, 0


class Hypergradient(Rate):
    """State: the factor; the steps before are in the optimiser's moments."""

    def __init__(
        self, *, rate: float = 0.01, form: Literal["multiplicative", "additive"] = "multiplicative", restart: bool = False
    ):
        super().__init__(restart)
        if not 0 < rate < math.inf or form not in ("multiplicative", "additive"):
            raise UserError("learner.adapt hypergradient needs rate above 0, and form multiplicative or additive")
        self.rate, self.form = rate, form

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.fresh:
            self.fresh = False
            return
        inner, grads, steps = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and "exp_avg" in optimizer.state[p]:
                    u = last_step(optimizer.state[p], group["betas"], group["eps"])
                    g = p.grad.double()
                    inner, grads, steps = (
                        inner + (g * u).sum().cpu(),
                        grads + g.square().sum().cpu(),
                        steps + u.square().sum().cpu(),
                    )
        before = self.factor
        self.factor = self.moved(float(inner), float((grads * steps).sqrt()), optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:
            group["lr"] *= self.factor / before

    def moved(self, inner: float, norms: float, rate: float) -> float:
        """The factor after an inner product, where the product of norms and the rate are these."""
        if self.form == "multiplicative":
            found = self.factor * (1 + self.rate * (inner / norms if norms > 0 else 0.0))
        else:
            found = self.factor * (1 + self.rate * inner / rate) if rate > 0 else self.factor
        return min(WIDEST, max(1 / WIDEST, found))


def last_step(state: dict[str, Any], betas: Sequence[float], eps: float) -> Tensor:
    """The direction of Adam's step from its moments as they are, in float64."""
    n = float(state["step"])
    mean, square = state["exp_avg"].double() / (1 - betas[0] ** n), state["exp_avg_sq"].double() / (1 - betas[1] ** n)
    return mean / (square.sqrt() + eps)


class FedHyper(Rate):
    """State: the factor, weights at the beginning of the experience, the change in the one before."""

    kept = ("factor", "fresh", "start", "before")

    def __init__(self, *, most: float = 3.0, normalise: Literal["none", "cosine"] = "none", restart: bool = False):
        super().__init__(restart)
        if not 1 <= most < math.inf or normalise not in ("none", "cosine"):
            raise UserError("learner.adapt fedhyper needs most from 1, and normalise none or cosine")
        self.most, self.normalise = most, normalise
        self.start: list[Tensor] = []
        self.before: list[Tensor] = []

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        self.start = [p.detach().clone() for p in model.parameters()]

    def schedule(self, base: Schedule) -> Schedule:
        """As it is: the factor is that of whole experiences."""
        return base

    @torch.no_grad()
    def end(self, model: nn.Module) -> None:
        params = list(model.parameters())
        start, before = ([placed_like(x, p) for x, p in zip(kept, params, strict=False)] for kept in (self.start, self.before))
        change = [p - x for p, x in zip(params, start, strict=True)]
        if before:
            inner = product(change, before)
            if self.normalise == "cosine":
                norms = math.sqrt(product(change, change) * product(before, before))
                inner = inner / norms if norms > 0 else 0.0
            self.factor = min(self.most, max(1 / self.most, self.factor + inner))
        if self.factor != 1:
            for p, x, d in zip(params, start, change, strict=True):
                p.copy_(x + self.factor * d)
        self.before, self.start = change, []


def product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Inner product over lists of tensors of the same shapes."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


KINDS: dict[str, Callable[..., Rate]] = {"plateau": Plateau, "hypergradient": Hypergradient, "fedhyper": FedHyper}


def watching(adapt: Rate, then: AfterStep | None) -> AfterStep:
    """An `after_step` that shows the losses to `adapt`, then calls another."""

    def both(segment: Segment, step: int, losses: Tensor, counts: np.ndarray) -> None:
        adapt.seen(losses)
        if then is not None:
            then(segment, step, losses, counts)

    return both
