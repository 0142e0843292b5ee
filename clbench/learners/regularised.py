"""Local cross-entropy and a penalty: what L2, EWC, prediction and feature distillation and LwF share; the penalty is theirs.

    loss = CE over the experience's classes + strength x penalty

Everything that `train_only` leaves trainable of the backbone and a growing linear head are trained on each experience in turn.
The penalty holds the network near what it was at the start of the experience; the first experience has none to be near to.

Options of all of them: `refresh`, `project` and, of `trainable`, half and lisa (`training/steps.py`).

Legend: B batch, D features, K classes seen so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead, TaskHead, grow, linear_head, scores
from clbench.streams.images.data import shuffled
from clbench.training.distillation import frozen_copy, prediction_distillation
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.state import collect, groups_of, restore
from clbench.training.steps import Steps, reads_again

Penalty = Callable[[Batch, Tensor, Tensor], Tensor]  # batch, features [B, D], logits [B, K] -> scalar


class Regularised(ABC):
    """A learner but for its penalty. State: backbone and head (what the penalty compares with is made of them)."""

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)
    masking = "local"  # which classes the cross-entropy's softmax runs over

    @classmethod
    def capabilities_of(cls, *, head: str = "single", refresh: Any = None, **options: Any) -> Capabilities:
        """A head for every task needs the task; the Fisher information of a refresh needs the samples again."""
        again = cls.capabilities.needs_random_access or reads_again(refresh)
        return replace(cls.capabilities, needs_task_id=head == "per_task", needs_random_access=again)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        recipe: Recipe,
        strength: float,
        *,
        lr: float,
        backbone_lr: float,
        epochs: int | None,
        batch_size: int,
        head: Literal["single", "per_task"] = "single",
        steps: Steps | None = None,
    ):
        self.model, self.runtime, self.recipe, self.strength = model, runtime, recipe, strength
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.head = linear_head(head, model.num_features).to(runtime.device)
        self.stepping = steps or Steps(runtime)

    @abstractmethod
    def penalty(self, experience: Experience) -> Penalty | None:
        """The penalty of an experience, asked for before its classes join the head; None where there is none."""

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train backbone and head on the new data under the penalty."""
        penalty = self.penalty(experience)
        grow(self.head, experience, lambda: self.runtime.generator("head"))
        self.model.train()

        def parts(batch: Batch, penalty: Penalty | None = penalty) -> tuple[Tensor, Tensor | None]:
            features = self.model.features(batch)
            z = scores(self.head, features, experience.task)
            return self.local(z, batch, experience), None if penalty is None else self.strength * penalty(batch, features, z)

        def loss(batch: Batch) -> Tensor:
            local, rest = parts(batch)
            return local if rest is None else local + rest

        def new(batch: Batch) -> Tensor:
            return parts(batch, None)[0]

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        modules = {"model": self.model, "head": self.head}
        with self.stepping.around(self.model, modules, loss, new=new, parts=parts, **self.hooks()) as (total, hooks):
            groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
            log = fit(self.runtime, "train", self, groups, total, batches, self.recipe, **hooks)
        self.stepping.end(modules, experience, new)
        return log

    def local(self, z: Tensor, batch: Batch, experience: Experience) -> Tensor:
        """The loss of the experience itself, of logits [B, K]."""
        assert batch.y is not None
        return masked_cross_entropy(z, batch.y, self.masking, experience.classes)

    def hooks(self) -> dict[str, Any]:
        """What else `fit` is told: functions that are called around a step. None here."""
        return {}

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return scores(self.head, self.model.features(batch), batch.task)

    def state_dict(self) -> dict[str, Any]:
        """Backbone and head."""
        return self.collect()

    def collect(self, *more: str) -> dict[str, Any]:
        """The state that all have, and attributes of a method's own by name."""
        return collect(self, "model", "head", *more, *self.stepping.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def distance_of_predictions(model: Backbone, head: LinearHead | TaskHead, temperature: float, squared: bool = True) -> Penalty:
    """Distillation of the answers that network and head give now, on the classes that they know now.

    With a head for every task it is the sum over the earlier tasks' heads, each over its own classes.
    """
    teacher, old_head = frozen_copy(model, head)

    def penalty(batch: Batch, features: Tensor, z: Tensor) -> Tensor:
        with torch.no_grad():
            old = old_head(teacher.features(batch))
        return prediction_distillation(z[:, : old.shape[1]], old, temperature, squared)

    def sum_over_tasks(batch: Batch, features: Tensor, z: Tensor) -> Tensor:
        assert isinstance(head, TaskHead)
        with torch.no_grad():
            before = teacher.features(batch)
            old = [old_head.at(place)(before) for place in range(len(old_head.tasks))]
        parts = [prediction_distillation(head.at(i)(features), one, temperature, squared) for i, one in enumerate(old)]
        return torch.stack(parts).sum()

    return sum_over_tasks if isinstance(head, TaskHead) else penalty
