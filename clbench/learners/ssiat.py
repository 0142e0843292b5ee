"""SSIAT: Semantically-Shifted Incremental Adapter-Tuning (Tan, Zhou, Xiang, Wang, Wu & Li, CVPR 2024, arXiv 2403.19979).

One adapter is tuned on all experiences without any restraint, with a cosine classifier: local cross-entropy of
s (cos - m [own class]) over the experience's classes (s = 20, m = 0; ImageNet-A 0.3). Old class statistics follow the drift:
  delta_i = f_new(x_i) - f_old(x_i) for the images of this experience, before and after training
  mu_c <- mu_c + sum_i w_ci delta_i,   w_ci ~ exp(-|f_old(x_i) - mu_c|^2 / (2 sigma^2)) + 1e-5, normalised over i, sigma = 4
Covariances stay. Then all classifiers are trained on samples of the Gaussians (means times 0.9 + 0.1 (tau + 1) / (t + 1),
logits times s) and keep what they learned.

drift            "shift" (default): as above; "linear", "nonlinear": SLDC's maps, which move covariances too; null: old
                 statistics stay (`training/drift.py`)
compat_unpaired  as released: f_old and f_new come from two passes over shuffled, augmented images, so that row i of one is
                 another image than row i of the other. By default both are of the same images under the test transform.
Deviations: the rate follows a cosine over steps; later experiences take half of the epochs (`later`: 20, then 10, released).
Published (README table, ViT-B/16 augreg_in21k, three orders, B0 Inc20): CIFAR-100 last 91.35 %, average 94.35 %; ImageNet-R
79.38 / 83.63; ImageNet-A 62.43 / 70.83; CUB 88.75 / 93.00 (augreg_in21k_ft_in1k). Batch 48, SGD 0.9, rate 0.01, decay 5e-4.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import CosineHead
from clbench.models.pet import Factory, unguided
from clbench.models.pet_modules import adapter
from clbench.streams.images.data import shuffled
from clbench.training.drift import Drift, checked
from clbench.training.features import augmented, extract
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import ClassGaussians, align, class_rows, shrunken_means
from clbench.training.losses import margin_logits
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore


class Ssiat:
    """State: the adapter, the cosine classifier, Gaussians, the experience of each class."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_pretrained=True, needs_new_classes=True, needs_disjoint_classes=True, needs_random_access=True
    )

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        pet: Factory = adapter,
        lr: float = 0.01,
        epochs: int | None = None,
        later: float = 0.5,  # share of the epochs from the second experience on
        batch_size: int = 48,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = cosine,
        scale: float = 20.0,
        margin: float = 0.0,  # ImageNet-A: 0.3
        sigma: float = 4.0,
        drift: Literal["shift", "linear", "nonlinear"] | None = "shift",
        compat_unpaired: bool = False,  # as released: the drift of unpaired images
        ridge: float = 1e-3,
        align_epochs: int = 5,
        align_lr: float = 0.01,
        align_samples: int = 256,
    ):
        tuned = unguided(pet(model, runtime), "ssiat")
        if tuned is None:
            raise UserError("ssiat tunes a module: pet=none has nothing to tune")
        if not 0 < later <= 1:
            raise UserError(f"learner.later is a share of the epochs, above 0 and at most 1, got {later}")
        self.model, self.runtime, self.pet = model, runtime, tuned
        self.lr, self.epochs, self.later, self.batch_size = lr, runtime.epochs(epochs), later, batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.scale, self.margin, self.compat_unpaired = scale, margin, compat_unpaired
        if compat_unpaired and drift != "shift":
            raise UserError("learner.compat_unpaired=true goes with learner.drift=shift alone: maps are fitted to pairs")
        self.drift = Drift(checked(drift), runtime, self, sigma)
        self.align = {"epochs": align_epochs, "lr": align_lr, "samples": align_samples}
        self.head = CosineHead(model.num_features, std=0.02).to(runtime.device)
        self.head.sigma.requires_grad_(False)
        self.gaussians = ClassGaussians(ridge, runtime.device)
        self.experience_of_class: list[int] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Tune, move the old means, add new statistics, align."""
        first = len(self.experience_of_class)
        epochs = max(1, round(self.later * self.epochs)) if first else self.epochs
        old = self._features(experience, "old") if first and self.drift.kind else None
        self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        newest = slice(first, experience.num_seen)
        self.pet.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            cosines, y = self.head(self.model.features(batch))[:, newest], batch.y - first
            return F.cross_entropy(margin_logits(cosines, y, self.scale, self.margin), y)

        batches = shuffled(experience.train, self.batch_size, epochs, self.runtime.key("train"))
        groups = groups_of((self.pet, self.lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        self.pet.eval()
        if old is not None:
            log |= self.drift.follow(self.gaussians, old, self._features(experience, "new"))
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        self.gaussians.add(*(features[rows] for rows in class_rows(y, experience.new_classes).values()))
        self.experience_of_class = [*self.experience_of_class, *[experience.index] * len(experience.new_classes)]
        if first and self.align["epochs"]:
            log |= align(
                self.runtime, self, self.head, self.gaussians,
                samples=int(self.align["samples"]), epochs=int(self.align["epochs"]), lr=self.align["lr"],
                momentum=self.recipe.momentum, weight_decay=self.recipe.weight_decay, multiplier=self.scale,
                mean_scale_K=shrunken_means(self.experience_of_class, experience.index),
            )  # fmt: skip
        return log

    def _features(self, experience: Experience, when: str) -> Tensor:
        """Features of the experience's images [N, D] with the adapter as it is: paired rows, or as released."""
        if not self.compat_unpaired:
            return extract(self.runtime, self.model, experience.train, self.batch_size)[0]
        return augmented(self.runtime, self.model, experience.train, self.batch_size, when)[0]

    def predict(self, batch: Batch) -> Tensor:
        """Cosines [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "pet", "head", "gaussians", "experience_of_class")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
