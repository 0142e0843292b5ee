"""CLS-ER: "Learning Fast, Learning Slow: A General Continual Learning Method based on Complementary Learning System" (Arani,
Sarfraz & Zonooz, ICLR 2022, arXiv 2201.12604).

Beside the working network, which is trained, two averages of its weights are kept, a plastic and a stable one. With (x', y')
drawn from a reservoir,
  loss = CE(z([x; x']), y) + strength mean (z(x') - z*)^2
z* are, sample by sample, the logits of that average which gives y' the larger probability. After a step, with probability
`plastic_rate`, the plastic average follows:
  weights <- a weights + (1 - a) working weights,   a = min(1 - 1 / (step + 1), plastic_decay)
and the stable one likewise by its own numbers; steps are counted over the run from 1, so that the first a is 1/2 (as
released). The stable average answers.

answer  stable | plastic | working
strength, rates and decays: those released for Split CIFAR-10 (with 5,120 samples: stable_rate 0.8). Split MNIST: 2; 1, 0.99
(plastic), 0.9, 0.99 (stable); 128 samples drawn, SGD 0.03 for a memory of 200.

As released: the averages cover parameters alone, and BatchNorm in both has the statistics of the drawn samples that they have
scored. Deviations: the error is taken on the logits that the joint pass gives (released: a pass of the drawn samples alone),
over the classes that have appeared. The default rates are for pre-trained backbones; the release trains small networks from
scratch at 0.1.
Published (in its README; class-incremental, memory 200 / 500 / 5,120): Split MNIST 89.54 / 92.05 / 95.73 %, Split CIFAR-10
66.19 / 75.22 / 86.78 %.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST, OnlineHead
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch
from clbench.training.fit import Recipe, fit
from clbench.training.online import Augment, OnlineBatch, OnlineStream, labels
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore
from clbench.training.stream_memory import allowed_stream_memory

Answer = Literal["stable", "plastic", "working"]


class Average:
    """A copy of the network and its classifier that follows the working ones."""

    def __init__(self, model: Backbone, classifier: Any):
        self.model, self.classifier = copy.deepcopy(model), copy.deepcopy(classifier)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def follow(self, model: Backbone, classifier: Any, keep: float) -> None:
        """Its parameters become keep x its own + (1 - keep) x those given."""
        for own, given in ((self.model, model), (self.classifier, classifier)):
            for mine, theirs in zip(own.parameters(), given.parameters(), strict=True):
                mine.mul_(keep).add_(theirs, alpha=1 - keep)

    def state_dict(self) -> dict[str, Any]:
        """Weights and statistics."""
        return collect(self, "model", "classifier")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill in place, growing first where needed."""
        restore(self, state)


class ClsEr:
    """State: backbone, head with the classes that have appeared, both averages, steps of the run, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_boundaries=False, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        answer: Answer = "stable",
        strength: float = 0.15,
        plastic_rate: float = 0.3,  # probability that a step is followed
        plastic_decay: float = 0.999,  # largest a
        stable_rate: float = 0.1,
        stable_decay: float = 0.999,
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        replay: int | None = None,  # drawn in each update; null: as many as new ones
        updates: float = 1.0,  # on each batch of the stream; below 1: some batches have none
        augment: Augment = "both",
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 10,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip: float | None = None,
        schedule: Schedule = constant,
    ):
        if answer not in get_args(Answer):
            raise UserError(f"unknown learner.answer={answer}: choose {', '.join(get_args(Answer))}")
        shares = {"plastic_rate": plastic_rate, "plastic_decay": plastic_decay}
        for name, value in (shares | {"stable_rate": stable_rate, "stable_decay": stable_decay}).items():
            if not 0 <= value <= 1:
                raise UserError(f"learner.{name} must lie between 0 and 1, got {value}")
        self.model, self.runtime, self.answer, self.strength = model, runtime, answer, strength
        self.rates = {"plastic": (plastic_rate, plastic_decay), "stable": (stable_rate, stable_decay)}
        self.epochs, self.batch_size, self.updates, self.augment = runtime.epochs(epochs), batch_size, updates, augment
        self.replay = batch_size if replay is None else replay
        self.lr, self.backbone_lr = lr, backbone_lr
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule, clip=clip)
        self.head = OnlineHead(model.num_features).to(runtime.device)
        self.plastic, self.stable = Average(model, self.head.inner), Average(model, self.head.inner)
        self.steps = 0
        self.memory = allowed_stream_memory(runtime, "reservoir", memory)

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass (or what the budget allows) over new samples joined with drawn ones."""
        if count := len(experience.new_classes):
            for head in (self.head, self.plastic.classifier, self.stable.classifier):
                head.grow(count, self.runtime.generator("head"))  # the same rows for all
        self.model.train()

        def loss(batch: OnlineBatch) -> Tensor:
            joined = batch.joined
            z = self.head(self.model.features(joined))
            total = F.cross_entropy(z, labels(joined))
            if batch.old is None:
                return total
            wanted, seen = self.targets(batch.old), self.head.seen_K
            return total + self.strength * (z[len(batch.new) :, seen] - wanted[:, seen]).square().mean()

        stream = OnlineStream(self, experience, replay=self.replay)
        keys = {name: self.runtime.key("follow", name) for name in self.rates}

        def after(place: Place, batch: OnlineBatch) -> None:
            stream.store(place, batch)
            self.steps += 1
            for name, (rate, decay) in self.rates.items():
                if rng.uniform(keys[name], np.array(place.step)) < rate:
                    keep = min(1 - 1 / (self.steps + 1), decay)
                    getattr(self, name).follow(self.model, self.head.inner, keep)

        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, stream, self.recipe, after_step=after)
        return {**log, "exemplars": float(len(self.memory))}

    @torch.no_grad()
    def targets(self, drawn: ImageBatch) -> Tensor:
        """Logits [R, K] of the average that is surer of a sample's label."""
        plastic, stable = (self._scores(one.model.train(), one.classifier, drawn) for one in (self.plastic, self.stable))
        y = labels(drawn)[:, None]
        is_stable = stable.softmax(1).gather(1, y) > plastic.softmax(1).gather(1, y)
        return torch.where(is_stable, stable, plastic)

    def _scores(self, model: Backbone, classifier: Any, batch: Any) -> Tensor:
        """Logits [B, K]; a class that has not appeared has the lowest."""
        return classifier(model.features(batch)).masked_fill(~self.head.seen_K, LOWEST)

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen] of the network that answers."""
        if self.answer == "working":
            return self._scores(self.model.eval(), self.head.inner, batch)
        average = getattr(self, self.answer)
        return self._scores(average.model.eval(), average.classifier, batch)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "plastic", "stable", "steps", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
