"""A-GEM: averaged gradient episodic memory (Chaudhry, Ranzato, Rohrbach & Elhoseiny, ICLR 2019, arXiv 1812.00420).

    g of the new batch, h of a batch drawn from the memory of earlier tasks;   g.h < 0:  g <- g - (g.h / h.h) h    (eq. 11)

over all trained parameters; the memory's samples are not trained on. Dot products are in float64.

policy  "ring": the newest samples of every class of every task (the paper), the batch comes from earlier tasks; "reservoir": a
        uniform sample of all visits, the present task's too, for streams without boundaries (Mammoth's `agem_r`)

columns  "seen" (default): the softmax runs over all classes that have appeared; "task": over those of the sample's task, for
         new samples, reference and answers (released for CIFAR and CUB). Tasks must be disclosed

The paper keeps a fixed number a class (25 on MNIST, 13 on CIFAR): `per_class`; None divides the memory evenly among the classes
so far. Its reference batch has 256 samples. Reference samples pass in training mode, as in the released code, so that batch
normalisation sees them. In class-incremental streams the constraint hardly helps: results are near fine-tuning.
Published: Permuted MNIST, 17 tasks: 81 % (as a reproduction quotes it, not checked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as changed
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import OnlineHead
from clbench.streams.images.data import ImageBatch
from clbench.training.fit import Recipe, fit
from clbench.training.online import Augment, OnlineBatch, OnlineStream, flat, give, gradients, grow, labels, scores
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore
from clbench.training.stream_memory import allowed_stream_memory
from clbench.training.task_columns import Columns, TaskColumns


def projected(g: Tensor, reference: Tensor) -> Tensor | None:
    """G [P] without its part against `reference` [P]; None where the two agree and nothing is to be changed."""
    product = torch.dot(g, reference)
    return g - product / torch.dot(reference, reference) * reference if product < 0 else None


class Agem:
    """State: backbone, head with the classes that have appeared, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, anytime=True)

    @staticmethod
    def capabilities_of(*, policy: str = "ring", columns: str = "seen", **options: Any) -> Capabilities:
        """A reservoir knows no tasks; columns of a task need the task."""
        by_task = columns == "task"
        return changed(Agem.capabilities, needs_boundaries=policy != "reservoir" or by_task, needs_task_id=by_task)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        policy: Literal["ring", "reservoir"] = "ring",
        columns: Columns = "seen",  # that a softmax runs over; task: in streams that disclose tasks
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        per_class: int | None = None,  # of a ring; null: an even share
        replay: int = 256,  # samples of the reference gradient
        updates: float = 1.0,  # on each batch of the stream; below 1: some batches have none
        head: Literal["linear", "cosine10"] = "linear",
        augment: Augment = "both",
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 10,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        schedule: Schedule = constant,
    ):
        if policy not in ("ring", "reservoir"):
            raise UserError(f"unknown learner.policy={policy}: choose ring or reservoir")
        if per_class is not None and (policy != "ring" or per_class < 1):
            raise UserError(f"learner.per_class={per_class} must be at least 1, and is for learner.policy=ring")
        self.model, self.runtime, self.policy, self.replay = model, runtime, policy, replay
        self.epochs, self.batch_size, self.updates, self.augment = runtime.epochs(epochs), batch_size, updates, augment
        self.lr, self.backbone_lr = lr, backbone_lr
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head, self.columns = OnlineHead(model.num_features, head).to(runtime.device), TaskColumns(columns)
        self.memory = allowed_stream_memory(runtime, policy, memory, per_class)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on new samples; where the memory's loss would rise, the gradient is projected."""
        grow(self, experience)
        self.columns.see(experience)
        self.model.train()
        at_hand: list[OnlineBatch] = []

        def loss(batch: OnlineBatch) -> Tensor:
            at_hand[:] = [batch]
            return self.loss(batch.new, np.full(len(batch.new), experience.index))

        def project(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
            batch = at_hand.pop()
            if batch.old is None:
                return
            past = gradients(self.loss(batch.old, self.memory.experience[batch.rows]), params)
            new = projected(flat(grads, params), flat(past, params))
            if new is not None:
                give(params, new)

        stream = OnlineStream(self, experience, replay=self.replay, past=self.policy == "ring")
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        options: Any = {"before_step": project, "after_step": stream.store}
        log = fit(self.runtime, "train", self, groups, loss, stream, self.recipe, **options)
        return {**log, "exemplars": float(len(self.memory))}

    def loss(self, batch: ImageBatch, experiences: np.ndarray) -> Tensor:
        """Mean cross-entropy of samples that came from `experiences` [B]."""
        return F.cross_entropy(self.columns.of_experiences(scores(self, batch), experiences), labels(batch))

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]; a class that has not appeared, or is none of the task's columns, has the lowest."""
        self.model.eval()
        return self.columns.of_task(scores(self, batch), batch.task)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory", *(["columns"] if self.columns.by_task else []))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
