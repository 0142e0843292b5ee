"""SLCA++: SLCA with a small set of trained values (Zhang, Wang, Kang, Chen & Wei 2024, arXiv 2408.08295).

Differences from SLCA (`slca.py`), as in the release (GengDavid/SLCA):
  hybrid slow learner   rank-4 terms W + 0.8 B A on qkv, fc1 and fc2 of every block (A: first right singular vectors of W,
                        B: 0), with norms, biases and class token; the other weights stand still. Rates: terms 0.5 lr in
                        experience 0, then 0.1 lr; norms, biases, class token 0.1 lr; new head lr. All follow a cosine that
                        moves once an epoch and ends at one rate, lr x 0.1 x 0.1 (`floor`, a share of lr; MoCo v3: 0.001)
  symmetric loss        a CE + b RCE on the softmax over the experience's own classes, RCE = -sum_c p_c log(onehot_c), p clamped
                        to 1e-7 and more, onehot to 1e-4 and more; (a, b) = (1, 0.1) on CIFAR-100 and CUB, (0.5, 0.5) on
                        ImageNet-R and Cars
  alignment             means are not shrunk; each sample of a class learned `age` experiences ago is divided by 1 + rho age,
                        rho ~ U(mu - 0.01, mu + 0.01), mu = 0.02 (`head_scale`; 0 switches this off). At test time the input
                        of the head of that experience is multiplied by 1 + mu age
As in SLCA: fresh final LayerNorm, one Gaussian a class, logit normalisation (0.1; Cars 0.05), aligned heads are thrown away.

Deviations: a class's age counts its own experience (the release: class // size of the current experience, wrong for uneven
sizes). Low-rank terms are added to a layer's output (equal to recomputing W + 0.8 B A), signs of A are fixed.
Published number: none read; the protocol is SLCA's (CIFAR-100: 20 epochs, batch 128; ImageNet-R: 50
epochs, weight decay 0, as on Cars).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.models.low_rank import LowRank
from clbench.streams.images.data import shuffled
from clbench.training.features import extract
from clbench.training.fit import FlooredRecipe, fit
from clbench.training.gaussians import ClassGaussians, align, class_rows
from clbench.training.losses import symmetric_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import stepwise_cosine
from clbench.training.state import collect, groups_of, restore


class SlcaPP:
    """State: what is trained of the backbone, heads as trained, aligned heads (deployed), Gaussians, classes' experiences."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_new_classes=True, needs_disjoint_classes=True, needs_random_access=True
    )

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        lr: float = 0.01,  # head
        slow: float = 0.1,  # rate of all else / head rate
        first_slow: float = 0.5,  # the same for the low-rank terms in experience 0
        floor: float = 0.01,  # rate of all at the end of the cosine / head rate
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        sce_a: float = 1.0,  # weight of cross-entropy (ImageNet-R and Cars: 0.5)
        sce_b: float = 0.1,  # and of reverse cross-entropy (0.5)
        rank: int = 4,
        scale: float = 0.8,
        align_epochs: int = 5,
        align_lr: float = 0.01,
        align_samples: int = 256,
        ridge: float = 1e-4,
        logit_norm: float | None = 0.1,
        head_scale: float = 0.02,
        restore_heads: bool = True,
        fresh_norm: bool = True,
    ):
        self.model, self.runtime = model, runtime
        if fresh_norm:
            model.fresh_norm()
        self.tuned = LowRank(model, rank, scale)
        self.lr, self.slow, self.first_slow, self.floor = lr, slow, first_slow, floor
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.momentum, self.weight_decay = momentum, weight_decay
        self.sce_a, self.sce_b = sce_a, sce_b
        self.align: dict[str, Any] = {"epochs": align_epochs, "lr": align_lr, "samples": align_samples}
        self.logit_norm, self.head_scale, self.restore_heads = logit_norm, head_scale, restore_heads
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.aligned = LinearHead(model.num_features).to(runtime.device)
        self.gaussians = ClassGaussians(ridge, runtime.device)
        self.experience_of_class: list[int] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Slow learning, class statistics, classifier alignment."""
        first = len(self.experience_of_class)
        self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        log = self._slow_learning(experience, first)
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        self.gaussians.add(*(features[rows] for rows in class_rows(y, experience.new_classes).values()))
        self.experience_of_class += [experience.index] * len(experience.new_classes)
        self.aligned.load_state_dict(self.head.state_dict())
        if first > 0 and self.align["epochs"] > 0:
            log |= self._alignment()
        if not self.restore_heads:
            self.head.load_state_dict(self.aligned.state_dict())
        return log

    def _slow_learning(self, experience: Experience, first: int) -> dict[str, float]:
        """Symmetric cross-entropy on the newest head."""
        self.model.train()
        newest = self.head.blocks[-1]

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return symmetric_cross_entropy(newest(self.model.features(batch)), batch.y - first, self.sce_a, self.sce_b)

        terms = self.lr * (self.first_slow if first == 0 else self.slow)
        groups = groups_of((self.tuned.terms, terms), (self.tuned.own, self.lr * self.slow), (newest, self.lr))
        recipe = FlooredRecipe(
            "sgd",
            self.momentum,
            weight_decay=self.weight_decay,
            schedule=lambda place: stepwise_cosine(place, periods=self.epochs),
            floor=self.lr * self.floor,
        )
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        return fit(self.runtime, "train", self, groups, loss, batches, recipe)

    def ages(self) -> list[int]:
        """Experiences since each class was learned, 0 for the newest: K numbers."""
        return [self.experience_of_class[-1] - tau for tau in self.experience_of_class]

    def _alignment(self) -> dict[str, float]:
        """Train a copy of all heads on Gaussian features that shrink with their class's age."""
        return align(
            self.runtime,
            self,
            self.aligned,
            self.gaussians,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            age_K=torch.tensor(self.ages()) if self.head_scale else None,
            rho=(self.head_scale - 0.01, self.head_scale + 0.01),
            temperature=self.logit_norm,
            widths=self.aligned.widths,
            **self.align,
        )

    def predict(self, batch: Batch) -> Tensor:
        """Logits of the aligned heads [B, num_seen], their inputs scaled by 1 + head_scale age."""
        self.model.eval()
        features = self.model.features(batch)
        mu = self.head_scale if self.align["epochs"] > 0 else 0.0
        ages = self.ages()
        first, parts = 0, []
        for block in self.aligned.blocks:
            parts.append(block(features * (1 + mu * ages[first])))
            first += int(block.out_features)  # type: ignore[arg-type]
        return torch.cat(parts, dim=1)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "tuned", "head", "aligned", "gaussians", "experience_of_class")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
