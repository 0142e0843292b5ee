"""SI: Synaptic Intelligence (Zenke, Poole & Ganguli, ICML 2017, arXiv 1703.04200, "Continual Learning Through Synaptic
Intelligence").

    local cross-entropy + strength sum_p Omega_p (theta_p - theta*_p)^2

theta* are the weights at the end of the previous experience. While an experience is learned, omega_p = -sum g_p d theta_p over
its steps: g is the gradient of the cross-entropy alone, d theta the step that the optimiser makes. At its end
    Omega_p <- relu(Omega_p + omega_p / ((theta_p - theta*_p)^2 + damping)),  omega <- 0

variant  "official" (default): the relu of the release (pathint). "paper": without it; then Omega may be negative, and the
         penalty drives weights away.
boundaries  "told" (default), or "found": Bayesian changepoint detection (`training/changepoint.py`) on random projections of
         each batch's mean image says where an experience ends, so that the stream may hide it (an addition of this file).
         The cross-entropy then runs over the classes in the batch. It takes many whole batches of an experience
Factor: the paper and its releases have no 1/2; nor has this file (`quadratic_penalty` has, and is doubled).

Deviations: the head is not held, as in `ewc`; the gradient of the penalty is taken off the applied gradient in closed form.
The release's MNIST networks are trained from scratch with Adam 1e-3, damping 0.1 (permuted) or 1e-3 (split): the default rates.
Pre-trained ViTs need smaller ones (`l2_reg`: 5e-5). Published (as quoted in Avalanche's table; the paper's was not read):
Split-MNIST, task-incremental, 97 %; Permuted-MNIST 95 %, 83 % reproduced there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.learners.regularised import Penalty, Regularised
from clbench.models.backbone import Backbone
from clbench.training.changepoint import Boundaries
from clbench.training.fisher import Weights, kept, moved, quadratic_penalty, train_only
from clbench.training.fit import Recipe
from clbench.training.path_integral import Step, zeros
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.steps import PartOrTrainable, Project, RefreshOptions, Steps, part_of


class Si(Regularised):
    """State: backbone, head, Omega (empty before the first experience) and omega of the experience at hand.

    With boundaries that are found also the weights at the last one, and the finder.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)

    @classmethod
    def capabilities_of(cls, *, boundaries: str = "told", **options: Any) -> Capabilities:
        """Who finds boundaries need not be told them."""
        return replace(super().capabilities_of(**options), needs_boundaries=boundaries != "found")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["official", "paper"] = "official",
        strength: float = 1.0,  # c
        damping: float = 0.1,  # xi
        trainable: PartOrTrainable = "all",
        optimizer: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.0,  # of sgd
        lr: float = 1e-3,  # head
        backbone_lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 64,
        schedule: Schedule = constant,
        boundaries: Literal["told", "found"] = "told",
        hazard: float = 0.01,  # of boundaries=found: chance that a batch begins another experience
        certain: float = 0.9,  # probability from which a boundary is found
        summary: int = 4,  # numbers that sum up a batch
        refresh: RefreshOptions = None,  # {variant: official | paper, ...}, see `training/refresh.py`
        project: Project = None,  # bloop: the penalty gives way to the cross-entropy, see `training/bloop.py`
    ):
        if damping <= 0:
            raise UserError(f"learner.damping must be above 0, got {damping}")
        if boundaries not in ("told", "found"):
            raise UserError(f"unknown learner.boundaries={boundaries}: choose told or found")
        if summary < 1:
            raise UserError(f"learner.summary must be at least 1, got {summary}")
        train_only(model, part_of(trainable))
        recipe = Recipe(optimizer, momentum, schedule=schedule)
        steps = Steps(runtime, refresh=refresh, trainable=trainable, project=project)
        super().__init__(
            model, runtime, recipe, strength, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, steps=steps
        )
        self.positive, self.damping = variant == "official", damping
        self.importance: Weights = {}
        self.path: Weights = {}
        self.reference: Weights = {}  # the weights that `learn` found: a part of the state between two experiences
        self.finder = Boundaries(summary, hazard, certain) if boundaries == "found" else None
        self.found = 0
        if self.finder is not None:
            self.masking = "batch"
            pixels = 3 * model.profile.size**2
            self.layer_PD = torch.randn(pixels, summary, generator=runtime.generator("summary")) / pixels**0.5

    def penalty(self, experience: Experience) -> Penalty | None:
        """The squared distance from the weights now, each weighted by its importance so far."""
        if not self.importance and self.finder is None:
            return None

        def held(batch: Batch, features: Tensor, z: Tensor) -> Tensor:
            whole = len(batch) == self.batch_size  # the mean of fewer images varies more
            if self.finder is not None and whole and self.finder.see(batch.x.mean(0).flatten().cpu() @ self.layer_PD):
                self.consolidate()
            if not self.importance:
                return z.new_zeros(())
            return 2 * quadratic_penalty(self.model, self.reference, self.importance)

        return held

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train under the penalty, then turn the path of this experience into importance."""
        if self.finder is not None:
            if not self.path:
                self.reference, self.path = kept(self.model), zeros(self.model)
            return {**super().learn(experience), "boundaries": float(self.found)}
        self.reference, self.path = kept(self.model), zeros(self.model)
        log = super().learn(experience)
        self.consolidate()
        self.path, self.reference = {}, {}
        return {**log, "importance_sum": float(sum(value.sum() for value in self.importance.values()))}

    def consolidate(self) -> None:
        """An experience has ended: Omega from its path; a path begins."""
        total: Weights = {}
        for name, p in kept(self.model).items():
            gained = self.path[name] / ((p - self.reference[name]).square() + self.damping)
            value = self.importance[name] + gained if self.importance.get(name) is not None else gained
            total[name] = value.clamp_min(0) if self.positive else value
        self.importance, self.path, self.reference = total, zeros(self.model), kept(self.model)
        self.found += 1

    def hooks(self) -> dict[str, Any]:
        """Follow the path."""
        step = Step(self.model)

        def before(params: list[Tensor], grads: list[Tensor | None]) -> None:
            held = 0.0 if self.stepping.bloop else self.strength
            step.before(held, self.reference if self.importance else {}, self.importance)

        def after(place: Place, batch: Batch) -> None:
            for name, value in step.after().items():
                self.path[name] += value

        return {"before_step": before, "after_step": after}

    def state_dict(self) -> dict[str, Any]:
        return self.collect(*self._weights(), *(["finder", "found"] if self.finder is not None else []))

    def _weights(self) -> tuple[str, ...]:
        return ("importance", "path") if self.finder is None else ("importance", "path", "reference")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        weights = {name: moved(state[name], self.runtime.device) for name in self._weights()}
        super().load_state_dict({**state, **weights})
