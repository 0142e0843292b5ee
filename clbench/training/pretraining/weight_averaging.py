"""Weight averages along the trajectory, evaluated in place of an anneal: no change of the rate, no further tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.training.distributed import placed_like
from clbench.training.pretraining.schedule_free import ScheduleFree
from clbench.training.pretraining.segments import AfterStep, Segment


@dataclass(frozen=True)
class Average:
    """Which average.

    kind   "none"; "ema": exponential, goes on from experience to experience; "last_k": mean of the last checkpoints of each;
           "schedule_free": of all weights, and gradients are taken between weights and average (for betas [0, ...])
    decay  of the exponential average, at most (1 + n) / (10 + n) after n steps, so that it forgets the start; beta of
           schedule_free
    last, every   checkpoints in the mean, and their distance as a share of the experience's steps
    """

    kind: Literal["none", "ema", "last_k", "schedule_free"] = "none"
    decay: float = 0.99
    last: int = 5
    every: float = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1 or self.last < 1 or not 0 < self.every * self.last <= 1:
            raise UserError(f"average needs decay in 0..1, last from 1 and last * every at most 1, got {self}")


class Averager:
    """Keeps the average of a model's weights."""

    def __init__(self, model: nn.Module, rule: Average):
        self.model, self.rule = model, rule
        self.weights: dict[str, Tensor] = {}
        self.number = 0
        self.free = ScheduleFree(list(model.parameters()), rule.decay) if rule.kind == "schedule_free" else None

    def __bool__(self) -> bool:
        return self.rule.kind != "none"

    @torch.no_grad()
    def after_step(self, step: int, steps: int, rate: float = 1.0) -> None:
        """Take in the weights after update `step` - 1 of `steps`, made at a rate."""
        rule = self.rule
        if self.free is not None:
            self.free.after_step(rate)
            return
        if rule.kind == "last_k":
            distance = max(1, round(rule.every * steps))
            left = steps - step
            if left == distance * (rule.last - 1):
                self.weights, self.number = {}, 0
            if left % distance or left > distance * (rule.last - 1):
                return
            share = 1 / (self.number + 1)
        else:
            share = 1 - min(rule.decay, (1 + self.number) / (10 + self.number))
        self.number += 1
        for name, value in self.model.state_dict().items():
            if name not in self.weights or not value.is_floating_point():
                self.weights[name] = value.detach().clone()
            else:
                self.weights[name].lerp_(value, share)

    def before(self, then: AfterStep | None) -> AfterStep:
        """An `after_step` that takes in the weights, then calls another."""

        def both(segment: Segment, step: int, losses: Tensor, counts: np.ndarray) -> None:
            self.after_step(step, segment.steps, segment.rate(step - 1))
            if then is not None:
                then(segment, step, losses, counts)

        return both

    def evaluate(self) -> None:
        """Put the average into the model."""
        if self.free is not None:
            self.free.evaluate()
        else:
            self.model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """The average and how many weights it has taken in."""
        free = None if self.free is None else self.free.state_dict()
        return {"weights": self.weights, "number": self.number, "free": free}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.model.state_dict()
        self.weights = {name: placed_like(value, own[name]) for name, value in state["weights"].items()}
        self.number = state["number"]
        if self.free is not None:
            self.free.load_state_dict(state["free"])
