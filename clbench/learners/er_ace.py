"""ER-ACE: replay with an asymmetric cross-entropy (Caccia et al., ICLR 2022, "New Insights on Reducing Abrupt Representation
Change in Online Continual Learning", openreview.net/forum?id=N8MaByOzUfb).

    CE over the batch's own classes on the b new samples + CE over all classes seen on the r drawn samples, two passes

New samples push no row of a class that is absent from their batch, so a new class does not abruptly displace old ones.

variant  "paper": the softmax of new samples runs over the classes present; "official": the released code also leaves open the
         seen class of the largest number, absent or not (its mask opens all columns from there on, for classes to come)
start    replay begins with the second batch, or with the second experience (released, where the stream is not task-free)
past     draw from samples of earlier experiences alone (an option of the release)

Deviations: the head grows, so that unseen classes are in no softmax; the released code has all of them from the start, at -1e9.
Its presets: SGD 0.1 from scratch, b = r = 10, cosine head with scale 10 (`head=cosine10`, the default here too); the default
rates are for pre-trained backbones.
Published: Split CIFAR-10 and Split CIFAR-100, one pass: about 52 % and 25 % (as others quote the paper, not checked).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST, OnlineHead
from clbench.training.fit import Recipe, fit
from clbench.training.online import Augment, OnlineBatch, OnlineStream, Start, grow, labels, scores
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore
from clbench.training.stream_memory import allowed_stream_memory

VARIANTS = ("paper", "official")


def asymmetric_cross_entropy(z: Tensor, y: Tensor, seen_K: Tensor, variant: str) -> Tensor:
    """Cross-entropy of new samples, z [B, K], y [B]: its softmax runs over the classes in y (see the module's `variant`)."""
    open_K = torch.zeros_like(seen_K)
    open_K[y] = True
    if variant == "official":
        open_K[seen_K.nonzero().max()] = True
    return F.cross_entropy(z.masked_fill(~open_K, LOWEST), y)


class ErAce:
    """State: backbone, head with the classes that have appeared, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_boundaries=False, anytime=True)

    @staticmethod
    def capabilities_of(*, start: str = "second_batch", past: bool = False, **options: Any) -> Capabilities:
        """What refers to experiences must be told where they end."""
        return replace(ErAce.capabilities, needs_boundaries=past or start == "second_experience")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",  # official opens one column by accident
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        replay: int | None = None,  # drawn in each update; null: as many as new ones
        updates: float = 1.0,  # on each batch of the stream; below 1: some batches have none
        start: Start = "second_batch",
        past: bool = False,
        head: Literal["linear", "cosine10"] = "cosine10",
        augment: Augment = "both",
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 10,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        schedule: Schedule = constant,
    ):
        for name, value, known in (("variant", variant, VARIANTS), ("start", start, get_args(Start))):
            if value not in known:
                raise UserError(f"unknown learner.{name}={value}: choose {' or '.join(known)}")
        self.model, self.runtime, self.variant, self.past = model, runtime, variant, past
        self.start: Start = start
        self.epochs, self.batch_size, self.updates, self.augment = runtime.epochs(epochs), batch_size, updates, augment
        self.replay = batch_size if replay is None else replay
        self.lr, self.backbone_lr = lr, backbone_lr
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = OnlineHead(model.num_features, head).to(runtime.device)
        self.memory = allowed_stream_memory(runtime, "reservoir", memory)

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass (or what the budget allows): new samples among themselves, drawn ones among all classes."""
        grow(self, experience)
        self.model.train()

        def loss(batch: OnlineBatch) -> Tensor:
            y = labels(batch.new)
            total = asymmetric_cross_entropy(scores(self, batch.new), y, self.head.seen_K, self.variant)
            return total if batch.old is None else total + F.cross_entropy(scores(self, batch.old), labels(batch.old))

        stream = OnlineStream(self, experience, replay=self.replay, start=self.start, past=self.past)
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, stream, self.recipe, after_step=stream.store)
        return {**log, "exemplars": float(len(self.memory))}

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]; a class that has not appeared has the lowest."""
        self.model.eval()
        return scores(self, batch)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
