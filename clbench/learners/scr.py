"""SCR: supervised contrastive replay (Mai, Li, Kim & Sanner, CVPR-W 2021, arXiv 2103.13885).

The encoder and a projector (D -> D -> 128, L2-normalised output) learn from pairs of views: of the new and the drawn samples
one view is the plain image, the other a random crop with flip, colour jitter and grey. The loss is supervised contrastive over
all of them (`training/contrastive.py`). There is no softmax and no classifier to forget: the answer is the nearest class mean
of the memory's *encoder* features, L2-normalised before and after averaging. Means are taken when they are asked for, in
evaluation mode, so that a look in mid-experience sees those of the network and the memory of that moment.

variant  "paper": every batch is trained on; "official": no step until the memory holds something, as in the released code
review   after each experience one pass over the memory with gradients divided by 10: the review trick, which the released
         configurations switch on. Stored samples are then seen more often, and boundaries must be told
start    replay begins with the second batch (released), or with the second experience
past     draw from samples of earlier experiences alone
mirror   whether the second view may be flipped (digits and texts do not mirror)

Released: r = 100, b = 10, temperature 0.1, SGD 0.1 from scratch; the default rates are for pre-trained backbones.
Deviations: jitter comes in the order brightness, contrast, saturation, hue; a class without samples in the memory has the
lowest score (released: a random mean).
Published: Split CIFAR-10, one pass: about 48 % (as others quote the paper, not checked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as changed
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch
from clbench.training.contrastive import strong_view, supervised_contrastive
from clbench.training.fit import Recipe, fit
from clbench.training.online import MemoryMeans, OnlineBatch, OnlineStream, Start, labels, nearest_mean
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, parameters_of, restore
from clbench.training.stream_memory import Remembered, allowed_stream_memory

WIDTH = 128


def projector(num_features: int, generator: torch.Generator, width: int = WIDTH) -> nn.Sequential:
    """D -> D -> `width` with a ReLU between; weights and biases U(-1/sqrt(D), 1/sqrt(D)) from a CPU generator."""
    made = nn.Sequential(
        nn.utils.skip_init(nn.Linear, num_features, num_features),
        nn.ReLU(),
        nn.utils.skip_init(nn.Linear, num_features, width),
    )
    for p in made.parameters():
        nn.init.uniform_(p, -(num_features**-0.5), num_features**-0.5, generator=generator)
    return made


class Scr:
    """State: backbone, projector, memory, means [K, D] of the last experience's end."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_boundaries=False, anytime=True)

    @staticmethod
    def capabilities_of(
        *, review: bool = False, start: str = "second_batch", past: bool = False, **options: Any
    ) -> Capabilities:
        """A review comes where an experience ends, and what refers to experiences must be told where they end."""
        return changed(Scr.capabilities, needs_boundaries=review or past or start == "second_experience")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",  # official: no step on the first batch
        review: bool = False,
        start: Start = "second_batch",
        past: bool = False,
        mirror: bool = True,
        temperature: float = 0.1,
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        replay: int = 100,  # drawn in each update
        updates: float = 1.0,  # on each batch of the stream; below 1: some batches have none
        lr: float = 0.1,  # projector
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 10,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        schedule: Schedule = constant,
    ):
        if variant not in ("paper", "official"):
            raise UserError(f"unknown learner.variant={variant}: choose paper or official")
        if start not in get_args(Start):
            raise UserError(f"unknown learner.start={start}: choose {' or '.join(get_args(Start))}")
        if variant == "official" and start == "second_experience":
            raise UserError(
                "learner.variant=official makes no step without a draw, learner.start=second_experience no draw at first"
            )
        self.start: Start = start
        self.past = past
        self.model, self.runtime, self.variant, self.review, self.mirror = model, runtime, variant, review, mirror
        self.epochs, self.batch_size, self.updates = runtime.epochs(epochs), batch_size, updates
        self.augment, self.replay, self.temperature = "none", replay, temperature
        self.lr, self.backbone_lr = lr, backbone_lr
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.projector = projector(model.num_features, runtime.generator("projector")).to(runtime.device)
        self.memory = allowed_stream_memory(runtime, "reservoir", memory)
        self.means_KD = torch.zeros(0, model.num_features, device=runtime.device)
        self._means: MemoryMeans | None = None  # while it learns

    def learn(self, experience: Experience) -> dict[str, float]:
        """Contrast the views of new and drawn samples; then take the means."""
        self.model.train()
        params = parameters_of(self.model, self.projector)
        self._means = means = MemoryMeans(self, experience.train, experience.num_seen)

        def loss(batch: OnlineBatch) -> Tensor:
            means.forget()
            if batch.old is None and self.variant == "official":
                return torch.stack([(p * 0).sum() for p in params]).sum()
            return self.contrast(batch.joined, batch.key, experience.train.pipeline)  # type: ignore[attr-defined]

        stream = OnlineStream(self, experience, replay=self.replay, start=self.start, past=self.past)
        groups = groups_of((self.model, self.backbone_lr), (self.projector, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, stream, self.recipe, after_step=stream.store)
        if self.review and len(self.memory):
            log |= self._review(experience.train, means)
        means.forget()
        self.means_KD, self._means = means(), None
        return {**log, "exemplars": float(len(self.memory))}

    def _review(self, train: Any, means: MemoryMeans) -> dict[str, float]:
        """One pass over the memory with a tenth of the gradients."""
        self.model.train()
        key = self.runtime.key("review")
        places: list[int] = [0]

        def at_place(place: Place) -> None:
            places[0] = place.step

        def loss(batch: ImageBatch) -> Tensor:
            means.forget()
            return self.contrast(batch, rng.key(key, places[0]), train.pipeline)

        def tenth(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
            for g in grads:
                if g is not None:
                    g.mul_(0.1)

        stored = Remembered(self.memory, train, self.replay, 1, key, False)
        groups = groups_of((self.model, self.backbone_lr), (self.projector, self.lr))
        options: Any = {"at_place": at_place, "before_step": tenth}
        return fit(self.runtime, "review", self, groups, loss, stored, self.recipe, **options)

    def contrast(self, batch: ImageBatch, key: int, pipeline: Any) -> Tensor:
        """The loss over both views of a batch."""
        other = strong_view(batch.x, rng.key(key, "view"), pipeline.profile, self.mirror)
        f = [F.normalize(self.projector(self.model.features(view)), dim=1) for view in (batch.x, other)]
        y = labels(batch)
        return supervised_contrastive(torch.cat(f), torch.cat([y, y]), self.temperature)

    def predict(self, batch: Batch) -> Tensor:
        """Minus squared distances to the class means [B, num_seen]."""
        self.model.eval()
        means = self.means_KD if self._means is None else self._means()
        return nearest_mean(self.model.features(batch), means)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "projector", "memory", "means_KD")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
