"""Fast and slow weights with consolidation, in the way of brain-inspired few-shot continual learning; Reptile and moving
averages of weights are special cases.

Each experience is learned by fast weights that begin at the slow ones theta_s,
    local cross-entropy + (strength / 2) sum_p F_p (theta_p - theta_f_p)^2,
theta_f the fast weights at the end of the experience before. Then the slow weights are pulled towards the fast ones,
    theta_s <- (1 - rho) theta_s + rho theta_f,
and answer. The first experience is the base training: slow and fast weights are one, nothing holds them.

importance  "fisher" (default): F is the empirical Fisher information of the fast weights, the mean over samples of the squared
            gradient, summed over experiences, as in `ewc`; "uniform": 1
rho         1: fast weights alone, `finetune masking=local` under a penalty; strength=0: Reptile with a step an experience

Choices, because there is no code and only an abstract was read: the whole of the loss, rho, strength, the importance. Rows of
the head for new classes are taken as they are, since there are none to keep. Deviations: no few-shot episodes evaluate the
slow weights; statistics of BatchNorm are those of the fast ones. Published numbers: none read.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.learners.regularised import Penalty, Regularised
from clbench.models.backbone import Backbone
from clbench.models.heads import scores
from clbench.training.fisher import Weights, fisher_per_sample, kept, moved, quadratic_penalty, trained
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect


class FastSlow(Regularised):
    """State: backbone and head (slow between experiences), the last fast weights of the backbone, their importance so far."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_random_access=True, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        rho: float = 0.5,  # how far the slow weights go towards the fast ones
        strength: float = 100.0,
        importance: Literal["fisher", "uniform"] = "fisher",
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        if not 0 <= rho <= 1:
            raise UserError(f"learner.rho must lie between 0 and 1, got {rho}")
        if not 0 <= strength < math.inf:
            raise UserError(f"learner.strength must be a finite number from 0, got {strength}")
        if importance not in ("fisher", "uniform"):
            raise UserError(f"unknown learner.importance={importance}: choose fisher or uniform")
        recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        super().__init__(
            model, runtime, recipe, strength, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size
        )  # fmt: skip
        self.rho, self.weighted = rho, importance == "fisher" and strength > 0
        self.fast: Weights = {}
        self.fisher: Weights = {}

    def penalty(self, experience: Experience) -> Penalty | None:
        """Half the weighted squared distance from the last fast weights."""
        if not (self.fast and self.strength):
            return None
        fast, importance = self.fast, self.fisher if self.weighted else None
        return lambda batch, features, z: quadratic_penalty(self.model, fast, importance)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train fast weights, weigh them, then go back from them to where the slow ones end."""
        slow = [kept(self.model), kept(self.head)] if experience.index else [{}, {}]
        log = super().learn(experience)
        if self.weighted:
            with self.runtime.phase("fisher"), self.model.in_fp32():
                self.weigh(experience)
        self.fast = kept(self.model) if self.strength else {}
        with torch.no_grad():
            for module, before in zip((self.model, self.head), slow, strict=True):
                for name, value in before.items():
                    weight = trained(module)[name]
                    weight.copy_(value.lerp(weight, self.rho))
        return log

    def weigh(self, experience: Experience) -> None:
        """Add the Fisher information of an experience."""
        self.model.eval()
        head, total = partial(scores, self.head, task=experience.task), dict[str, torch.Tensor]()
        for batch in experience.train.test_batches(self.batch_size):
            self.runtime.check_stop()
            assert batch.y is not None
            found = fisher_per_sample(self.model, head, batch.x, batch.y, experience.classes)
            total = {name: total.get(name, 0) + f for name, f in found.items()}
        for name, f in total.items():
            self.fisher[name] = self.fisher.get(name, 0) + f / len(experience.train)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | collect(self, "fast", "fisher")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.runtime.device
        super().load_state_dict({**state, "fast": moved(state["fast"], device), "fisher": moved(state["fisher"], device)})
