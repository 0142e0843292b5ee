"""iCaRL: Incremental Classifier and Representation Learning (Rebuffi, Kolesnikov, Sperl & Lampert, CVPR 2017).

arXiv 1611.07725; with cross-entropy as PyCIL has it.

    CE over all seen classes + KD,   KD = -sum softmax(z_old / T) log softmax(z / T), T = 2, no factor T^2

on new and stored samples, shuffled together; z_old from the network at the end of the previous experience, on the classes known
then. Exemplars are herded: greedily, so that their mean follows the class mean of L2-normalised features; a class that shrinks
keeps the front of its list. Two answers: `nme`, the nearest class mean of the exemplars (features and means L2-normalised;
scores are negative squared distances), and `linear`, the trained classifier. `answer` says which counts; the other is recorded.

Defaults: PILOT's for ViTs, but for the head: its rate (PILOT: 1e-3 for all) and its start; and for weight decay (5e-4 in the
first experience).
head_init  new rows of the head: "normal" (0, 0.02), or "kaiming_uniform", U(-sqrt(3 / D), sqrt(3 / D)), as PyCIL and PILOT
           have it: wider by 1.8 with D = 768. The head's start scales the features' first gradients, so `nme` moves too.
online     samples enter a class-balanced memory step by step (`training/stream_memory.py`), each batch of the stream is joined
           with `replay` drawn samples for `updates` steps, and means are those of the moment: one pass is enough, and the
           learner can be asked in mid-experience. Herding, which needs a whole class, is left out

Deviations: where the memory holds no sample of a class, `nme` gives it the lowest score. The original paper's loss is a
sigmoid cross-entropy (Mammoth's `icarl`), which is not built.
Published: CIFAR-100 B0 Inc10, 2,000 exemplars, last: PyCIL, ResNet-32 from scratch, 49.5 % (read off its plot, +- 1), `nme`
49.4 % in a log of one of its issues; PILOT, ViT-B/16 augreg_in21k_ft_in1k, SGD 1e-3, batch 128, 78.7 % (read off its plot,
+- 0.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead, OnlineHead
from clbench.training.distillation import frozen_copy, prediction_distillation
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.memory import Rehearsed, allowed_memory, exemplar_means
from clbench.training.online import MemoryMeans, OnlineBatch, OnlineStream, nearest_mean
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore
from clbench.training.stream_memory import allowed_stream_memory


class Icarl:
    """State: backbone, head, memory, exemplar means [K, D]."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_random_access=True)

    @staticmethod
    def capabilities_of(*, online: bool = False, **options: Any) -> Capabilities:
        """A memory that is filled step by step does not need the samples again."""
        return replace(Icarl.capabilities, needs_random_access=not online, anytime=online)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        answer: Literal["nme", "linear"] = "nme",  # nme | linear; the other is recorded beside it
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        strength: float = 1.0,
        temperature: float = 2.0,
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        schedule: Schedule = constant,
        head_init: Literal["normal", "kaiming_uniform"] = "normal",
        online: bool = False,  # a memory that is filled step by step
        replay: int | None = None,  # online: drawn in each update; null: as many as new ones
        updates: float = 1.0,  # online: on each batch of the stream
    ):
        if not online and (replay is not None or updates != 1):
            raise UserError(f"learner.replay={replay} and learner.updates={updates} have no effect without learner.online=true")
        self.online, self.updates, self.augment = online, updates, "both"
        self.replay = batch_size if replay is None else replay
        self.model, self.runtime, self.answer = model, runtime, answer
        self.strength, self.temperature = strength, temperature
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        if online and head_init != "normal":
            raise UserError(f"learner.head_init={head_init} has no effect with learner.online=true")
        head: Any = OnlineHead(model.num_features) if online else LinearHead(model.num_features, init=head_init)
        self.head = head.to(runtime.device)
        self.memory: Any = (
            allowed_stream_memory(runtime, "balanced", memory) if online else allowed_memory(runtime, "herding", memory)
        )
        self.means_KD = torch.zeros(0, model.num_features, device=runtime.device)
        self._means: MemoryMeans | None = None  # online, while it learns

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on new and stored samples, herd, take the exemplars' means."""
        teacher = frozen_copy(self.model, self.head) if experience.index else None
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.model.train()

        def loss(batch: Any) -> Tensor:
            return self._loss(batch.joined if self.online else batch, teacher)

        if self.online:
            return self._learn_online(experience, loss)
        train: Any = experience.train
        batches = Rehearsed(train, self.memory.data(train), self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        features, _ = extract(self.runtime, self.model, self.memory.candidates(train), self.batch_size)
        self.memory.update(train, features)
        stored = self.memory.data(train)
        if stored is None:
            raise UserError("iCaRL answers with its exemplars' means and kept none: set learner.memory above 0")
        features, y = extract(self.runtime, self.model, stored, self.batch_size)
        self.means_KD = exemplar_means(features, y, experience.num_seen)
        return {**log, "exemplars": float(len(self.memory))}

    def _loss(self, batch: Any, teacher: tuple[Any, ...] | None) -> Tensor:
        """Cross-entropy, and distillation of a teacher's answers."""
        z = self.head(self.model.features(batch))
        total = F.cross_entropy(z, batch.y)
        if teacher is None:
            return total
        with torch.no_grad():
            old = teacher[1](teacher[0].features(batch))
        kd = prediction_distillation(z[:, : old.shape[1]], old, self.temperature, squared=False)
        return total + self.strength * kd

    def _learn_online(self, experience: Experience, loss: Callable[[Any], Tensor]) -> dict[str, float]:
        """One pass (or what the budget allows) over new samples joined with drawn ones."""
        self._means = means = MemoryMeans(self, experience.train, experience.num_seen)
        stream = OnlineStream(self, experience, replay=self.replay)

        def store(place: Place, batch: OnlineBatch) -> None:
            stream.store(place, batch)
            means.forget()

        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, stream, self.recipe, after_step=store)
        self.means_KD, self._means = means(), None
        return {**log, "exemplars": float(len(self.memory))}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Scores [B, num_seen] of both answers, the chosen one first."""
        self.model.eval()
        features = self.model.features(batch)
        nme = nearest_mean(features, self.means_KD if self._means is None else self._means())
        both = {"nme": nme, "linear": self.head(features)}
        return {self.answer: both[self.answer], **both}

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory", "means_KD")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, {**state, "means_KD": state["means_KD"].to(self.runtime.device)})
