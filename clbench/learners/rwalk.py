"""RWalk: Riemannian Walk (Chaudhry, Dokania, Ajanthan & Torr, ECCV 2018, arXiv 1801.10112), without its exemplars.

    local cross-entropy + strength sum_p (F~_p + s~_p) (theta_p - theta*_p)^2

theta* are the weights at the end of the previous experience; ~ maps all weights together to [0, 1] by their least and largest
value. Every `interval` steps, with g the gradient of the cross-entropy alone and d theta the displacement in these steps,
    F <- (1 - alpha) F + alpha mean over the steps of g^2            (a running Fisher information, as in EWC++)
    s <- s + relu(omega / (h F d theta^2 + damping)),  omega = -sum g d theta over the steps
and at the end of an experience the score becomes the mean of the score so far and s (in the first: s); then s <- 0.

variant  "paper" (default): h = 1/2, old scores and new ones weigh the same. "official": h = 1, and the release adds that mean
         to the score instead of replacing it: 1.5 old + 0.5 new, so that old experiences weigh 3 : 1.
Factor: the release's penalty has no 1/2; nor has this file (`quadratic_penalty` has, and is doubled).

Deviations: steps at the end of an experience that do not fill an interval are one of their own; the head is not held, as in
`ewc`; one gradient serves both sums. Constants as in the release (alpha 0.9; interval 10 on MNIST, 50 on CIFAR). Default rates
are for small networks from scratch. Published (as quoted in Avalanche's table): Split-MNIST, task-incremental, 99 %.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.learners.regularised import Penalty, Regularised
from clbench.models.backbone import Backbone
from clbench.training.fisher import Weights, kept, moved, quadratic_penalty, train_only
from clbench.training.fit import Recipe
from clbench.training.path_integral import Step, scaled, zeros
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.steps import PartOrTrainable, Project, RefreshOptions, Steps, part_of

PARTS = ("fisher", "score", "gained", "path", "squares", "start")
Held = tuple[float, Weights, Weights]  # strength, reference, importance


class RWalk(Regularised):
    """State: backbone, head, Fisher information, score, and of the experience at hand: s, sums and start of the interval."""

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",
        strength: float = 1.0,
        alpha: float = 0.9,
        interval: int = 10,
        damping: float = 1e-3,
        trainable: PartOrTrainable = "all",
        optimizer: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.0,  # of sgd
        lr: float = 1e-3,  # head
        backbone_lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 64,
        schedule: Schedule = constant,
        refresh: RefreshOptions = None,  # {variant: official | paper, ...}, see `training/refresh.py`
        project: Project = None,  # bloop: the penalty gives way to the cross-entropy, see `training/bloop.py`
    ):
        if interval < 1 or damping <= 0 or not 0 < alpha <= 1:
            given = f"interval={interval} damping={damping} alpha={alpha}"
            raise UserError(f"learner.interval must be from 1, damping above 0, alpha in (0, 1], got {given}")
        train_only(model, part_of(trainable))
        recipe = Recipe(optimizer, momentum, schedule=schedule)
        steps = Steps(runtime, refresh=refresh, trainable=trainable, project=project)
        super().__init__(
            model, runtime, recipe, strength, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, steps=steps
        )
        self.official, self.alpha, self.interval, self.damping = variant == "official", alpha, interval, damping
        self.fisher: Weights = {}
        self.score: Weights = {}
        self.gained: Weights = {}
        self.path: Weights = {}
        self.squares: Weights = {}
        self.start: Weights = {}
        self.taken = 0  # steps of the interval
        self._held: Held = (0.0, {}, {})

    def penalty(self, experience: Experience) -> Penalty | None:
        """The squared distance from the weights now, each weighted by its scaled Fisher information and score."""
        if not self.score:
            return None
        fisher, score = scaled(self.fisher), scaled(self.score)
        reference, importance = kept(self.model), {name: fisher[name] + score[name] for name in fisher}
        self._held = (0.0 if self.stepping.bloop else self.strength, reference, importance)
        return lambda batch, features, z: 2 * quadratic_penalty(self.model, reference, importance)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train under the penalty, then merge this experience's score into that of the earlier ones."""
        self._held, self.taken = (0.0, {}, {}), 0
        self.gained, self.path, self.squares, self.start = *(zeros(self.model) for _ in range(3)), kept(self.model)
        log = super().learn(experience)
        self.close_interval()
        old, share = (1.5, 0.5) if self.official else (0.5, 0.5)
        merged = {name: old * self.score[name] + share * s if self.score else s for name, s in self.gained.items()}
        self.score, self._held = merged, (0.0, {}, {})
        self.gained, self.path, self.squares, self.start = {}, {}, {}, {}
        return {**log, "score_max": max(float(value.max()) for value in merged.values())}

    def hooks(self) -> dict[str, Any]:
        """Follow the path."""
        step = Step(self.model)

        def before(params: list[Tensor], grads: list[Tensor | None]) -> None:
            step.before(*self._held)

        def after(place: Place, batch: Batch) -> None:
            for name, value in step.after().items():
                self.path[name] += value
                self.squares[name] += step.grads[name].square()
            self.taken += 1
            if self.taken == self.interval:
                self.close_interval()

        return {"before_step": before, "after_step": after}

    @torch.no_grad()
    def close_interval(self) -> None:
        """Fisher information and score gain what the steps since the last interval gave."""
        if not self.taken:
            return
        half, now = 1.0 if self.official else 0.5, kept(self.model)
        for name, squares in self.squares.items():
            mean = squares / self.taken
            old = self.fisher.get(name, torch.zeros_like(mean))
            self.fisher[name] = (1 - self.alpha) * old + self.alpha * mean
            length = half * self.fisher[name] * (now[name] - self.start[name]).square()
            self.gained[name] += (self.path[name] / (length + self.damping)).clamp_min(0)
        self.path, self.squares, self.start, self.taken = zeros(self.model), zeros(self.model), now, 0

    def state_dict(self) -> dict[str, Any]:
        return self.collect(*PARTS, "taken")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, **{name: moved(state[name], self.runtime.device) for name in PARTS}})
