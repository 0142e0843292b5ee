"""PAR: parameter allocation and regularisation (CVPR 2023, "Task Difficulty Aware Parameter Allocation & Regularization for
Lifelong Learning"). The task of a sample must be disclosed, at test time too.

Tasks are shared among experts. How far the new task is from an old one is measured in the features x of the run's network as it
was at the start, frozen; m_c are the means of the new task's classes, p the class means (prototypes) of the old task:
  d  = sum over classes c of max(0, mean of log(|x - nearest p| / |x - m_c|) over the samples of c)
  d <- min(1 - e^(-2 d), d)
An expert's distance is the mean (`linkage`: or the largest, the least) over its tasks. The nearest expert,
  up to `reuse`  takes the task: where it has less than `small` times the samples of the expert's largest task, a new head alone
                 is trained; else expert and heads, CE(new head) + kd sum over its other heads of distillation (T = 2) from a
                 copy of before
  beyond         is left alone: a new expert is trained with cross-entropy.
A task of up to `few` samples goes to the nearest of the experts that saw at least ten times as many, whatever the distance, and
trains its head with ten times the weight decay.

variant  "paper" (default), or "official": a distance of exactly 0, which says that every class lies nearer to old prototypes
         than to its own mean, becomes 1, and `kd` has no effect.

There is no search for architectures: all experts are copies of the run's network. So the paper's second threshold (0.75, up to
which the nearest expert's architecture is reused with new weights) has nothing to decide; `related` may give it another use.
Choices: all heads of an expert are trained under distillation, whose loss is multiplied by T^2; the largest norm of a gradient;
a task that comes back goes to its expert, as under `reuse`, and has the prototypes of both times.
Deviations: features are those of training samples under the test transform (the release: of validation samples, by a ResNet-18
pre-trained on ImageNet); the last weights, not those of the best validation epoch; no early stop.
Constants: the release's (SGD 0.9, 0.01 and a cosine, batch 64, decay 0.003; 100 epochs). Published numbers: none read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.experts import Expert, Experts
from clbench.models.heads import LOWEST
from clbench.models.units import keep_statistics
from clbench.streams.images.data import shuffled
from clbench.training.distillation import frozen_copy, prediction_distillation
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import class_rows
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore

TEMPERATURE = 2.0
MORE = 10  # times the samples of a task with few, that an expert must have seen; times the weight decay
TINY = 1e-12  # the least distance of two features


def task_distance(features: Sequence[Tensor], prototypes_PD: Tensor) -> float:
    """How far a task is from another: features [N_c, D] of each of its classes, class means of the other -> in [0, 1]."""
    total = 0.0
    for f in features:
        x, old = f.double(), prototypes_PD.double()
        to_old = torch.cdist(x, old, compute_mode="donot_use_mm_for_euclid_dist").amin(1).clamp_min(TINY)
        to_own = (x - x.mean(0)).norm(dim=1).clamp_min(TINY)
        total += max(0.0, float((to_old / to_own).log().mean()))
    return min(float(1 - torch.exp(torch.tensor(-2 * total, dtype=torch.float64))), total)


class Par:
    """State: experts; of each task, in the order of their appearance, its number, expert and prototypes; sizes of experts."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True, needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",
        reuse: float = 0.5,  # largest distance at which an expert takes the task
        related: float | None = None,  # largest at which a new expert starts as a copy of the nearest; null: never
        linkage: Literal["mean", "max", "min"] = "mean",  # over an expert's tasks
        small: float = 0.5,  # of an expert's largest task: with less a head alone is trained
        few: int = 25,  # samples; 0: without this rule
        kd: float = 1.0,
        lr: float = 0.01,
        epochs: int | None = None,
        batch_size: int = 64,
        momentum: float = 0.9,
        weight_decay: float = 0.003,
        clip: float | None = 5.0,
        schedule: Schedule = cosine,
    ):
        for name, value, known in (("variant", variant, ("paper", "official")), ("linkage", linkage, ("mean", "max", "min"))):
            if value not in known:
                raise UserError(f"unknown learner.{name}={value}: choose {' or '.join(known)}")
        if related is not None and related <= reuse:
            raise UserError(f"learner.related={related} has no effect: choose more than learner.reuse={reuse}")
        self.model, self.runtime, self.official = model, runtime, variant == "official"
        self.reuse, self.related, self.small, self.few = reuse, related, small, few
        self.kd = 1.0 if self.official else kd
        self.over = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}[linkage]
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule, clip=clip)
        model.freeze()
        self.experts = Experts(model)
        self.tasks: list[int] = []
        self.owners: list[int] = []
        self.prototypes: list[Tensor] = []
        self.largest: list[int] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Find the expert, train what it needs, keep the prototypes."""
        task, size = experience.task, len(experience.train)
        assert task is not None
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        classes = [features[rows] for rows in class_rows(y, experience.classes).values() if len(rows)]
        distances = self.distances(classes)
        chosen, is_few = self.allocate(task, size, distances)
        log = self._take(experience, chosen, is_few) if chosen is not None else self._new(experience, distances)
        means = torch.stack([f.double().mean(0).float() for f in classes])
        index = len(self.experts) - 1 if chosen is None else chosen
        self.largest[index] = max(self.largest[index], size)
        if task in self.tasks:
            place = self.tasks.index(task)
            self.prototypes[place] = torch.cat([self.prototypes[place], means])
        else:
            self.tasks, self.owners = [*self.tasks, task], [*self.owners, index]
            self.prototypes = [*self.prototypes, means]
        found = {"experts": float(len(self.experts)), "expert": float(index)}
        return log | found | ({"distance": min(distances)} if distances else {})

    def distances(self, classes: Sequence[Tensor]) -> list[float]:
        """Of each expert from a task with these features of its classes."""
        each = [task_distance(classes, old) for old in self.prototypes]
        if self.official:
            each = [1.0 if d == 0 else d for d in each]
        by_expert = [[d for d, owner in zip(each, self.owners, strict=True) if owner == e] for e in range(len(self.experts))]
        return [float(self.over(torch.tensor(some, dtype=torch.float64), 0)) for some in by_expert]

    def allocate(self, task: int, size: int, distances: list[float]) -> tuple[int | None, bool]:
        """The expert that takes a task, None for a new one; whether it is one of few samples."""
        if task in self.tasks:
            return self.owners[self.tasks.index(task)], False
        taught = [e for e, largest in enumerate(self.largest) if largest >= MORE * size]
        if size <= self.few and taught:
            return min(taught, key=distances.__getitem__), True
        nearest = min(range(len(distances)), key=distances.__getitem__, default=None)
        return (nearest if nearest is not None and distances[nearest] <= self.reuse else None), False

    def _new(self, experience: Experience, distances: list[float]) -> dict[str, float]:
        """Train a new expert."""
        near = self.related is not None and distances and min(distances) <= self.related
        expert = self.experts.add(self.experts[distances.index(min(distances))] if near else None)
        self.largest = [*self.largest, 0]
        return self._fit(experience, expert, "whole", self.recipe)

    def _take(self, experience: Experience, index: int, is_few: bool) -> dict[str, float]:
        """Train an expert, or a head of its alone, on a task that it takes."""
        decay = self.recipe.weight_decay * (MORE if is_few else 1)
        alone = is_few or len(experience.train) < self.small * self.largest[index]
        recipe = replace(self.recipe, weight_decay=decay)
        return self._fit(experience, self.experts[index], "head" if alone else "distil", recipe)

    def _fit(
        self, experience: Experience, expert: Expert, how: Literal["whole", "head", "distil"], recipe: Recipe
    ) -> dict[str, float]:
        assert experience.task is not None
        model, heads = expert.model, expert.heads
        teacher, old_heads = frozen_copy(model, heads) if how == "distil" else (None, None)
        others = [] if old_heads is None else [i for i, task in enumerate(heads.tasks) if task != experience.task]
        place = heads.grow(experience.task, experience.classes, self.runtime.generator("head"))
        model.train(how != "head")
        if how == "distil":
            keep_statistics(model)

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            with torch.set_grad_enabled(how != "head"):
                f = model.features(batch)
            total = F.cross_entropy(heads.at(place)(f), heads.targets(place, batch.y))
            if others:
                assert teacher is not None and old_heads is not None
                with torch.no_grad():
                    before = teacher.features(batch)
                parts = [prediction_distillation(heads.at(i)(f), old_heads.at(i)(before), TEMPERATURE) for i in others]
                total = total + self.kd * torch.stack(parts).sum()
            return total

        groups = groups_of((heads.at(place), self.lr)) if how == "head" else groups_of((model, self.lr), (heads, self.lr))
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        return fit(self.runtime, "train", self, groups, loss, batches, recipe)

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen] of the task's head; `LOWEST` for other tasks' classes."""
        place = self.tasks.index(batch.task) if batch.task in self.tasks else len(self.tasks) - 1
        expert = self.experts[self.owners[place]]
        expert.model.eval()
        own = expert.heads(expert.model.features(batch), self.tasks[place])
        return F.pad(own, (0, self.num_classes - own.shape[1]), value=LOWEST)

    @property
    def num_classes(self) -> int:
        """Classes seen by any expert."""
        return max(expert.heads.num_classes for expert in self.experts)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "experts", "tasks", "owners", "prototypes", "largest")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
