"""SLCA: Slow Learner with Classifier Alignment (Zhang, Wang, Kang, Chen & Wei, ICCV 2023, arXiv 2303.05118).

Slow learner: the whole backbone is trained with a 100 times smaller rate than the head; each experience has a head of its
own, trained with the softmax over its own classes (eq. 1); heads of earlier experiences stand still.
Classifier alignment (eqs. 2 to 4): every class keeps a Gaussian N(mu_c, Sigma_c) of its features at the end of its own
experience. From the second experience on all heads are trained for `align_epochs` on samples of these Gaussians with the
softmax over all classes, the logits divided by (mean over heads of each head's norm) x temperature.

Options, with the released code's behaviour as default (GengDavid/SLCA):
  fresh_norm      the final LayerNorm is replaced by a new one (eps 1e-5), as the release does on loading (not in the paper)
  logit_norm      temperature of the normalisation, None switches it off (0.1; Cars 0.05)
  mean_rescale    samples come from N((0.9 + 0.1 (tau + 1) / (t + 1)) mu, Sigma), tau the class's own experience
  official_task_index  tau = class // size of the current experience, as released; wrong for uneven sizes, so off by default
  drift           null (default): statistics of old classes are never refreshed, the slow rate is what keeps them valid.
                  "shift" (as in SSIAT, sigma 4), "linear", "nonlinear" (SLDC): they follow the features of the
                  experience's images before and after training (`training/drift.py`)
  restore_heads   alignment is thrown away after evaluation: the next one starts from the heads as they were trained

Single GPU semantics.
Published (as read in the repository's figure, which does not name the backbone): CIFAR-100 B0 Inc10 last 91.53 %, ImageNet-R B0
Inc20 77.00 %; 20 epochs, batch 128, SGD 0.9, rates 0.01 / 1e-4, x 0.1 after 18 of 20 epochs, weight decay 5e-4. A re-run with
ViT-B/16 augreg_in21k (MOS table): CIFAR-100 B0 Inc5 last 88.55 %, average 92.49 %. The paper's own tables were not read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.drift import Drift, checked
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import ClassGaussians, align, class_rows, shrunken_means
from clbench.training.runtime import Runtime
from clbench.training.schedules import multistep
from clbench.training.state import collect, groups_of, restore


class Slca:
    """State: backbone, heads as trained, aligned heads (deployed), Gaussians, the experience of each class."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_new_classes=True, needs_disjoint_classes=True, needs_random_access=True
    )

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        lr: float = 0.01,  # head
        slow: float = 0.01,  # backbone rate / head rate
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = multistep,
        align_epochs: int = 5,
        align_lr: float = 0.01,
        align_samples: int = 256,
        drift: Literal["shift", "linear", "nonlinear"] | None = None,
        ridge: float = 1e-4,
        logit_norm: float | None = 0.1,
        mean_rescale: bool = True,
        restore_heads: bool = True,
        fresh_norm: bool = True,
        official_task_index: bool = False,
    ):
        self.model, self.runtime = model, runtime
        if fresh_norm:
            model.fresh_norm()
        self.lr, self.slow, self.epochs, self.batch_size = lr, slow, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.align: dict[str, Any] = {"epochs": align_epochs, "lr": align_lr, "samples": align_samples}
        self.logit_norm, self.mean_rescale, self.restore_heads = logit_norm, mean_rescale, restore_heads
        self.official_task_index = official_task_index
        self.drift = Drift(checked(drift), runtime, self)
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.aligned = LinearHead(model.num_features).to(runtime.device)
        self.gaussians = ClassGaussians(ridge, runtime.device)
        self.experience_of_class: list[int] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Slow learning, class statistics, classifier alignment."""
        first = len(self.experience_of_class)
        follows = first > 0 and self.drift.kind is not None
        old = extract(self.runtime, self.model, experience.train, self.batch_size)[0] if follows else None
        self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        log = self._slow_learning(experience, first)
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        if old is not None:
            log |= self.drift.follow(self.gaussians, old, features)
        self.gaussians.add(*(features[rows] for rows in class_rows(y, experience.new_classes).values()))
        self.experience_of_class += [experience.index] * len(experience.new_classes)
        if first > 0 and self.align["epochs"] > 0:
            log |= self._alignment(experience)
        if not self.restore_heads:
            self.head.load_state_dict(self.aligned.state_dict())
        return log

    def _slow_learning(self, experience: Experience, first: int) -> dict[str, float]:
        """Local cross-entropy on the newest head; two groups whose rates differ by `slow`."""
        self.model.train()
        newest = self.head.blocks[-1]

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(newest(self.model.features(batch)), batch.y - first)

        groups = groups_of((self.model, self.lr * self.slow), (newest, self.lr))
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        self.aligned.load_state_dict(self.head.state_dict())  # where alignment begins
        return log

    def _alignment(self, experience: Experience) -> dict[str, float]:
        """Train a copy of all heads on Gaussian features; the rate follows a cosine that moves once an epoch."""
        return align(
            self.runtime,
            self,
            self.aligned,
            self.gaussians,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
            mean_scale_K=self.rescale(experience),
            temperature=self.logit_norm,
            widths=self.aligned.widths,
            **self.align,
        )

    def rescale(self, experience: Experience) -> Tensor:
        """Factor of each class's mean [K]: 0.9 + 0.1 (tau + 1) / (t + 1), or 1."""
        if not self.mean_rescale:
            return torch.ones(len(self.experience_of_class))
        tau = self.experience_of_class
        if self.official_task_index:
            tau = [c // len(experience.new_classes) for c in range(len(tau))]
        return shrunken_means(tau, experience.index)

    def predict(self, batch: Batch) -> Tensor:
        """Logits of the aligned heads [B, num_seen]; no normalisation at test time."""
        self.model.eval()
        return self.aligned(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "aligned", "gaussians", "experience_of_class")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
