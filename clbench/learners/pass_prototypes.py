"""PASS: "Prototype Augmentation and Self-Supervision for Incremental Learning" (Zhu, Zhang, Wang, Yin & Liu, CVPR 2021). No
sample is stored.

Every image is seen in `rotations` orientations (4: by 0, 90, 180 and 270 degrees), and each orientation of a class is a class
of its own: class c has the logits 4c .. 4c + 3. A batch of B images is one of 4B. With F [4B, D] their features, F' those of
the network before the experience, and tau = `temperature`,
  loss = CE(z / tau) + distillation |F - F'| + augmentation CE(z(mu_c + r e) / tau, 4c)
|.| is the Frobenius norm of the whole batch, c are old classes at random with the means mu_c that their upright training images
had at the end of their experience, e ~ N(0, I), r^2 = mean over classes of (trace of the class's covariance) / D. Answers are
the logits 4c of an upright image.

variant    "official" (default): as many noisy means in a step as the batch size, r of the first experience. "pycil":
           floor(k / n) times as many, for k old classes and n in the experience, and r over all classes so far
reduction  of the distance of features: "sum" as published, a sum over the batch, so that its weight depends on the batch size;
           "mean": divided by sqrt(4B)

Deviations: means are taken under the test transform (released: of augmented images, without the last partial batch). Classes
that come back are no old classes in that experience, and take their mean of it. An image counts as one visit, whatever its
orientations. Released: ResNet-18 with CBAM from scratch, Adam 1e-3 (x 0.1 at epochs 45 and 90 of 101), weight decay 2e-4, batch
64. `backbone_lr` is a choice for pre-trained networks; from scratch it is 1e-3.
Published (read in another paper's README): CIFAR-100, 50 classes first, average over 5 / 10 steps 63.5 / 61.8 %; 40 first, 20
steps 58.1 %.

Legend: B images of a batch, D features, K classes seen so far.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams import rng
from clbench.streams.images.data import shuffled
from clbench.training.distillation import frozen_copy
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


def turned(x: Tensor, y: Tensor, rotations: int) -> tuple[Tensor, Tensor]:
    """Images [B, C, S, S] in all orientations, side by side -> [rB, C, S, S], and their labels r y, r y + 1, ... [rB]."""
    views = torch.stack([torch.rot90(x, k, (2, 3)) for k in range(rotations)], dim=1)
    orientation = torch.arange(rotations, device=y.device)
    return views.flatten(0, 1), (rotations * y[:, None] + orientation).flatten()


class Pass:
    """State: backbone, head, class means [K, D], trace of each class's covariance by D [K], classes of the first experience."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["official", "pycil"] = "official",
        rotations: int = 4,  # orientations of an image: 4, or 1 (upright alone)
        distillation: float = 10.0,
        augmentation: float = 10.0,
        reduction: Literal["sum", "mean"] = "sum",
        temperature: float = 0.1,
        lr: float = 1e-3,  # head
        backbone_lr: float = 1e-4,
        epochs: int | None = None,
        batch_size: int = 64,
        weight_decay: float = 2e-4,
        schedule: Schedule = constant,
    ):
        for name, value, known in (
            ("variant", variant, ("official", "pycil")),
            ("rotations", rotations, (1, 4)),
            ("reduction", reduction, ("sum", "mean")),
        ):
            if value not in known:
                raise UserError(f"unknown learner.{name}={value}: choose {known[0]} or {known[1]}")
        if temperature <= 0:
            raise UserError(f"learner.temperature must be above 0, got {temperature}")
        self.model, self.runtime, self.rotations = model, runtime, rotations
        self.official, self.mean = variant == "official", reduction == "mean"
        self.distillation, self.augmentation, self.temperature = distillation, augmentation, temperature
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("adam", weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.means_KD = torch.zeros(0, model.num_features, device=runtime.device)
        self.spread_K = torch.zeros(0, device=runtime.device)
        self.first = 0

    @property
    def radius(self) -> float:
        """r, the noise of a mean in every feature."""
        return float(self.spread_K[: self.first if self.official else None].mean().sqrt())

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on all orientations and on noisy means, then take the new means."""
        known = experience.num_seen - len(experience.new_classes)
        old = frozen_copy(self.model)[0] if known else None
        if experience.new_classes:
            self.head.grow(self.rotations * len(experience.new_classes), self.runtime.generator("head"))
        absent = torch.tensor(sorted(set(range(known)) - set(experience.classes)), dtype=torch.int64)
        number = self.batch_size * (1 if self.official else known // len(experience.classes))
        key, now = self.runtime.key("means"), [0]
        self.model.train()

        def at_place(place: Place) -> None:
            now[0] = place.step

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            x, y = turned(batch.x, batch.y, self.rotations)
            f = self.model.features(x)
            total = self._entropy(f, y)
            if old is None:
                return total
            with torch.no_grad():
                before = old.features(x)
            apart = torch.linalg.vector_norm(f - before) / (math.sqrt(len(f)) if self.mean else 1)
            total = total + self.distillation * apart
            if number and len(absent):
                noisy, c = self.noisy_means(absent, number, rng.key(key, now[0]))
                total = total + self.augmentation * self._entropy(noisy, self.rotations * c)
            return total

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe, at_place=at_place)
        self._remember(experience)
        return {**log, "radius": self.radius}

    def _entropy(self, features: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(features) / self.temperature, y)

    def noisy_means(self, classes: Tensor, number: int, key: int) -> tuple[Tensor, Tensor]:
        """Means of classes at random with noise [N, D], and the classes [N]."""
        chosen = classes[torch.from_numpy(rng.integers(key, number, len(classes)))].to(self.means_KD.device)
        noise = torch.randn(number, self.means_KD.shape[1], generator=torch.Generator().manual_seed(key >> 1))
        return self.means_KD[chosen] + self.radius * noise.to(self.means_KD), chosen

    def _remember(self, experience: Experience) -> None:
        """Means and spreads of the experience's classes, of its upright images."""
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        more = experience.num_seen - len(self.means_KD)
        self.means_KD = torch.cat([self.means_KD, self.means_KD.new_zeros(more, self.means_KD.shape[1])])
        self.spread_K = torch.cat([self.spread_K, self.spread_K.new_zeros(more)])
        if not experience.index:
            self.first = experience.num_seen
        for c in experience.classes:
            f = features[y == c].double()
            self.means_KD[c] = f.mean(0)
            if not (self.official and experience.index and c < self.first):
                self.spread_K[c] = (f - f.mean(0)).square().sum(0).mean() / max(1, len(f) - 1)

    def predict(self, batch: Batch) -> Tensor:
        """Logits of the classes seen so far, upright [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))[:, :: self.rotations]

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "means_KD", "spread_K", "first")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
