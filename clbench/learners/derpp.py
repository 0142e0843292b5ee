"""DER++: Dark Experience Replay (Buzzega, Boschini, Porrello, Abati & Calderara, NeurIPS 2020, arXiv 2004.07211).

    CE(z(x), y) + alpha MSE(z(x'), z') + beta CE(z(x''), y'')

(x', z') and (x'', y'') are two independent draws from a memory of images with their labels and the logits that they had when
they were stored; each is augmented anew: three forward passes a step. `beta: 0` is DER. CE runs over all classes seen.

online   the released protocol: samples enter a reservoir step by step, with the logits that the augmented image had before the
         step; draws begin with the second batch, `updates` are made on each batch of the stream. One pass is enough, no
         boundary is needed. Logits of classes that had not appeared are not known

refresh  forget a little before each step (`training/refresh.py`): what its release adds to this method

Deviations: with `online: false` the memory is chosen at the end of each experience (a uniform sample of everything seen), and
logits are recorded then, under the test transform; Mammoth inserts after each step, with the logits of the augmented image.
Logits cover the classes known at that time, and the error is taken on these alone (Mammoth's head has all classes from the
start, so that stale logits of classes not yet seen are pulled at too). The default rates, for pre-trained backbones, are a
choice. Mammoth's S-CIFAR-100 with memory 500: alpha 0.3, beta 0.5, rate 0.03. Published number: none read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead, OnlineHead
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch, ImageData, shuffled
from clbench.training.features import extract
from clbench.training.fit import Batches, Recipe, fit
from clbench.training.memory import allowed_memory, drawn
from clbench.training.online import OnlineBatch, OnlineStream, grow, labels, scores
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore
from clbench.training.steps import RefreshOptions, Steps, reads_again
from clbench.training.stream_memory import allowed_stream_memory


@dataclass
class DarkBatch:
    """New samples, a draw to match logits on (memory rows `rows`), a draw to classify. Empty draws are None."""

    new: ImageBatch
    dark: ImageBatch | None = None
    rows: np.ndarray | None = None
    labelled: ImageBatch | None = None

    @property
    def ids(self) -> Tensor:
        return torch.cat([part.ids for part in (self.new, self.dark, self.labelled) if part is not None])

    @property
    def replayed(self) -> int:
        return len(self) - len(self.new)

    def __len__(self) -> int:
        return len(self.ids)


class DarkBatches:
    """New batches, each with two independent draws of `size` from the memory; a pure function of the step."""

    def __init__(self, new: Batches, memory: ImageData | None, size: int, key: int):
        self.new, self.memory, self.size, self.key = new, memory, size, key
        self.steps = new.steps

    def __call__(self, step: int) -> DarkBatch:
        new = self.new(step)
        if self.memory is None or self.size == 0:
            return DarkBatch(new)
        keys = [rng.key(self.key, step, word) for word in ("dark", "labelled")]
        rows = [drawn(key, self.size, len(self.memory)) for key in keys]
        dark, labelled = (self.memory.batch(r, rng.key(k, "augment")) for r, k in zip(rows, keys, strict=True))
        return DarkBatch(new, dark, rows[0], labelled)


@dataclass
class OnlineDark(OnlineBatch):
    """An online batch whose draw is matched on logits, with a second draw to classify."""

    labelled: ImageBatch | None = None

    def __len__(self) -> int:
        return super().__len__() + (0 if self.labelled is None else len(self.labelled))


class OnlineDarks:
    """Batches of a stream, each with two independent draws."""

    def __init__(self, stream: OnlineStream):
        self.stream, self.steps = stream, stream.steps

    def __call__(self, step: int) -> OnlineDark:
        first = self.stream(step)
        _, labelled = self.stream.draw(rng.key(first.key, "labelled"))
        return OnlineDark(**vars(first), labelled=labelled)


class DerPP:
    """State: backbone, head, memory, the logits of its samples [M, K] (NaN where a class was not known)."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_random_access=True, anytime=True)

    @staticmethod
    def capabilities_of(*, online: bool = False, refresh: Any = None, **options: Any) -> Capabilities:
        """A memory that is filled step by step needs neither the samples again nor boundaries."""
        again = not online or reads_again(refresh)
        return replace(DerPP.capabilities, needs_random_access=again, needs_boundaries=again)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        alpha: float = 0.3,  # logits
        beta: float = 0.5,  # labels
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        replay: int | None = None,  # size of each draw; null: as many as new ones
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 32,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        schedule: Schedule = constant,
        online: bool = False,  # a memory that is filled step by step
        updates: float = 1.0,  # online: on each batch of the stream
        refresh: RefreshOptions = None,  # {variant: official | paper, ...}
    ):
        if not online and updates != 1:
            raise UserError(f"learner.updates={updates} has no effect without learner.online=true")
        self.stepping = Steps(runtime, refresh=refresh)
        self.online, self.updates, self.augment = online, updates, "both"
        self.model, self.runtime, self.alpha, self.beta = model, runtime, alpha, beta
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.replay = batch_size if replay is None else replay
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head: Any = (OnlineHead if online else LinearHead)(model.num_features).to(runtime.device)
        self.memory: Any = (allowed_stream_memory if online else allowed_memory)(runtime, "reservoir", memory)
        self.logits_MK = torch.zeros(0, 0, device=runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train with both draws, then choose the memory again and record the logits of what is new in it."""
        if self.online:
            return self._learn_online(experience)
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.model.train()

        def loss(batch: DarkBatch) -> Tensor:
            total = self.new(batch.new)
            if batch.dark is not None and batch.labelled is not None:
                stored = self.logits_MK[torch.as_tensor(batch.rows, device=self.logits_MK.device)]
                total = total + self.alpha * dark_error(self.head(self.model.features(batch.dark)), stored)
                z = self.head(self.model.features(batch.labelled))
                total = total + self.beta * F.cross_entropy(z, labels(batch.labelled))
            return total

        new = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        batches = DarkBatches(new, self.memory.data(experience.train), self.replay, self.runtime.key("replay"))
        log = self._fit(experience, loss, batches)
        self._store(experience)
        return {**log, "exemplars": float(len(self.memory))}

    def _store(self, experience: Experience) -> None:
        """Samples that stay keep their logits; those that come get the logits of now."""
        old = {int(i): row for i, row in zip(self.memory.ids, self.logits_MK, strict=True)}
        self.memory.update(experience.train)
        data = self.memory.data(experience.train)
        if data is None:
            return
        features, _ = extract(self.runtime, self.model, data, self.batch_size)
        with torch.no_grad():
            logits = self.head(features)
        for m, i in enumerate(self.memory.ids):
            if int(i) in old:
                logits[m] = torch.nan
                logits[m, : len(old[int(i)])] = old[int(i)]
        self.logits_MK = logits

    def _learn_online(self, experience: Experience) -> dict[str, float]:
        """One pass (or what the budget allows); samples enter the memory with the logits that their step has just seen."""
        grow(self, experience)
        self.model.train()
        seen: list[Tensor] = []

        def loss(batch: OnlineDark) -> Tensor:
            z = scores(self, batch.new)
            seen[:] = [z.detach().masked_fill(~self.head.seen_K, torch.nan)]
            total = F.cross_entropy(z, labels(batch.new))
            if batch.old is not None and batch.labelled is not None:
                stored = self.logits_MK[torch.as_tensor(batch.rows, device=self.logits_MK.device)]
                if not stored.isnan().all():  # samples of batches without an update have no logits
                    total = total + self.alpha * dark_error(scores(self, batch.old), stored)
                total = total + self.beta * F.cross_entropy(scores(self, batch.labelled), labels(batch.labelled))
            return total

        stream = OnlineStream(self, experience, replay=self.replay)
        self._record(stream.passed, self.logits_MK[:0])

        def store(place: Place, batch: OnlineDark) -> None:
            self._record(stream.store(place, batch), seen[0])

        log = self._fit(experience, loss, OnlineDarks(stream), after_step=store)
        return {**log, "exemplars": float(len(self.memory))}

    def _fit(self, experience: Experience, loss: Any, batches: Any, **hooks: Any) -> dict[str, float]:
        """One `fit` over everything that trains."""
        modules = {"model": self.model, "head": self.head}
        with self.stepping.around(self.model, modules, loss, new=lambda batch: self.new(batch.new), **hooks) as (total, more):
            groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
            log = fit(self.runtime, "train", self, groups, total, batches, self.recipe, **more)
        self.stepping.end(modules, experience, self.new)
        return log

    def new(self, batch: ImageBatch) -> Tensor:
        """Cross-entropy of new samples over the classes seen."""
        return F.cross_entropy(scores(self, batch), labels(batch))

    def _record(self, entered: list[tuple[int, int]], z: Tensor) -> None:
        """Keep the logits [B, K] of samples that have entered by (slot, position in the batch or -1: none are known)."""
        more, wider = len(self.memory) - len(self.logits_MK), z.shape[1] - self.logits_MK.shape[1]
        self.logits_MK = F.pad(self.logits_MK, (0, wider, 0, more), value=torch.nan)
        for slot, i in entered:
            self.logits_MK[slot] = z[i] if i >= 0 else torch.nan

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory", "logits_MK", *self.stepping.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, {**state, "logits_MK": state["logits_MK"].to(self.runtime.device)})


def dark_error(z: Tensor, stored: Tensor) -> Tensor:
    """Mean squared error between logits z [B, K] and stored ones [B, K' <= K] where these are known (not NaN)."""
    known = ~stored.isnan()
    return (z[:, : stored.shape[1]] - stored)[known].square().mean()
