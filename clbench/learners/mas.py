"""MAS: Memory Aware Synapses (Aljundi, Babiloni, Elhoseiny, Rohrbach & Tuytelaars, ECCV 2018, arXiv 1711.09601).

    local cross-entropy + strength sum_p Omega_p (theta_p - theta*_p)^2

theta* are the weights at the end of the previous experience. Omega says how much the squared length of the answer z depends
on a weight: after an experience, over its N samples under the test transform and in evaluation mode, without their labels,
    Omega_p <- Omega_p + 1/N sum_i |d |z(x_i)|^2 / d theta_p|

variant  "paper" (default): the magnitude of each sample's gradient. "official": the release sums |z|^2 over a batch and takes
         the magnitude of that gradient, in which samples cancel; it equals the paper for batches of one.
z are the logits of all classes seen; where the task is disclosed, of the task's classes.
Factor: the paper and the release have no 1/2; nor has this file (`quadratic_penalty` has, and is doubled).

Deviations: the head is not held, as in `ewc`. Default rates are for small networks from scratch; pre-trained ViTs need
smaller ones. Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Capabilities, Experience, Schedule
from clbench.learners.regularised import Penalty, Regularised
from clbench.models.backbone import Backbone
from clbench.training.fisher import Weights, kept, moved, quadratic_penalty, sum_per_sample, train_only, trained
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.steps import PartOrTrainable, Project, RefreshOptions, Steps, part_of


class Mas(Regularised):
    """State: backbone, head, Omega (empty before the first experience)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_random_access=True, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",
        strength: float = 1.0,
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
        train_only(model, part_of(trainable))
        recipe = Recipe(optimizer, momentum, schedule=schedule)
        steps = Steps(runtime, refresh=refresh, trainable=trainable, project=project)
        super().__init__(
            model, runtime, recipe, strength, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, steps=steps
        )
        self.per_sample = variant == "paper"
        self.importance: Weights = {}

    def penalty(self, experience: Experience) -> Penalty | None:
        """The squared distance from the weights now, each weighted by its importance so far."""
        if not self.importance:
            return None
        reference = kept(self.model)
        return lambda batch, features, z: 2 * quadratic_penalty(self.model, reference, self.importance)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train under the penalty, then add this experience's importance."""
        log = super().learn(experience)
        with self.runtime.phase("importance"), self.model.in_fp32():
            new = self.importance_of(experience)
        self.importance = {name: value + self.importance.get(name, torch.zeros_like(value)) for name, value in new.items()}
        return {**log, "importance_mean": float(torch.cat([v.flatten() for v in self.importance.values()]).mean())}

    def importance_of(self, experience: Experience) -> Weights:
        """The mean over the samples of an experience."""
        self.model.eval()
        classes = list(range(self.head.num_classes) if experience.task is None else experience.classes)

        def length(features: Tensor, target: Tensor | None = None) -> Tensor:
            return self.head(features)[:, classes].square().sum()

        total: Weights = {}
        for batch in experience.train.test_batches(self.batch_size):
            self.runtime.check_stop()
            if self.per_sample:
                part = sum_per_sample(self.model, batch.x, batch.ids, length, Tensor.abs)
            else:
                weights = trained(self.model)
                grads = torch.autograd.grad(length(self.model.features(batch)), list(weights.values()), allow_unused=True)
                pairs = zip(weights.items(), grads, strict=True)
                part = {name: torch.zeros_like(p) if g is None else g.abs() for (name, p), g in pairs}
            total = {name: value + total[name] if total else value for name, value in part.items()}
        return {name: value.detach() / len(experience.train) for name, value in total.items()}

    def state_dict(self) -> dict[str, Any]:
        return self.collect("importance")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "importance": moved(state["importance"], self.runtime.device)})
