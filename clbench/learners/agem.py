"""A-GEM: averaged gradient episodic memory (Chaudhry, Ranzato, Rohrbach & Elhoseiny, ICLR 2019, arXiv 1812.00420).

    g of the new batch, h of a batch drawn from the memory of earlier tasks;   g.h < 0:  g <- g - (g.h / h.h) h    (eq. 11)

over all trained parameters; the memory's samples are not trained on. Dot products are in float64.

policy  "ring": the newest samples of every class of every task (the paper), the batch comes from earlier tasks; "reservoir": a
        uniform sample of all visits, the present task's too, for streams without boundaries (Mammoth's `agem_r`)

The paper keeps a fixed number a class (25 on MNIST, 13 on CIFAR): `per_class`; None divides the memory evenly among the classes
so far. Its reference batch has 256 samples. Reference samples pass in training mode, as in the released code, so that batch
normalisation sees them. In class-incremental streams the constraint hardly helps: results are near fine-tuning.
Published: Permuted MNIST, 17 tasks: 81 % (as a reproduction quotes it, not checked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as changed
from typing import Any, ClassVar, Literal

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


def projected(g: Tensor, reference: Tensor) -> Tensor | None:
    """G [P] without its part against `reference` [P]; None where the two agree and nothing is to be changed."""
    product = torch.dot(g, reference)
    return g - product / torch.dot(reference, reference) * reference if product < 0 else None


class Agem:
    """State: backbone, head with the classes that have appeared, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, anytime=True)

    @staticmethod
    def capabilities_of(*, policy: str = "ring", **options: Any) -> Capabilities:
        """A reservoir knows no tasks."""
        return changed(Agem.capabilities, needs_boundaries=policy != "reservoir")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        policy: Literal["ring", "reservoir"] = "ring",
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        per_class: int | None = None,  # of a ring; null: an even share
        replay: int = 256,  # samples of the reference gradient
        updates: float = 1.0,  # on each batch of the stream; below 1: some batches have none
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
        self.head = OnlineHead(model.num_features).to(runtime.device)
        self.memory = allowed_stream_memory(runtime, policy, memory, per_class)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on new samples; where the memory's loss would rise, the gradient is projected."""
        grow(self, experience)
        self.model.train()
        reference: list[ImageBatch | None] = [None]

        def loss(batch: OnlineBatch) -> Tensor:
            reference[0] = batch.old
            return F.cross_entropy(scores(self, batch.new), labels(batch.new))

        def project(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
            old, reference[0] = reference[0], None
            if old is None:
                return
            past = gradients(F.cross_entropy(scores(self, old), labels(old)), params)
            new = projected(flat(grads, params), flat(past, params))
            if new is not None:
                give(params, new)

        stream = OnlineStream(self, experience, replay=self.replay, past=self.policy == "ring")
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        options: Any = {"before_step": project, "after_step": stream.store}
        log = fit(self.runtime, "train", self, groups, loss, stream, self.recipe, **options)
        return {**log, "exemplars": float(len(self.memory))}

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]; a class that has not appeared has the lowest."""
        self.model.eval()
        return scores(self, batch)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
