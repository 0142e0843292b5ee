"""EASE: Expandable Subspace Ensemble (Zhou, Sun, Ye & Zhan, CVPR 2024, arXiv 2403.12030).

Every experience t trains a fresh adapter A_t on a frozen ViT, with a cosine classifier of its own over its own classes, and
keeps it. In each subspace j (features under A_j) a class is its mean; classes of experience i have true means in the
subspaces j <= i only. The missing ones, i < j <= t, are completed without old data from what both subspaces share:
  A, B = means in subspace i, and in j, of the classes of experiences >= j;   M = means of experience i in subspace i
  missing = softmax(cos(M, A)) B                                                                            (eqs. 7 to 9)
The answer is the largest of   z_c = sum_j w_ij cos(f_j(x), P_cj),   w_ii = 1,  w_ij = alpha / t  for j != i,  i the
experience of class c; with `pretrained_weight` > 0 the bare network is one more subspace with that weight.

Deviations: the rate follows a cosine over steps (the release moves it once an epoch).
Published logs (ViT-B/16, CIFAR-100 B0 Inc5, seed 1993): last 84.21 % (augreg_in21k_ft_in1k), 85.80 % (augreg_in21k); average
90.62, 91.51 %. 20 epochs, batch 48, SGD 0.9, rate 0.025, weight decay 5e-4, alpha 0.1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import CosineHead
from clbench.models.pet import Factory, State, unguided
from clbench.models.pet_modules import adapter
from clbench.streams.images.data import shuffled
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import class_rows
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore


def complete(means_KSD: Tensor, experience_of_class: Tensor) -> Tensor:
    """Fill the means [K, S, D] that classes of earlier experiences lack in later subspaces, from those that exist.

    Entry [c, j] is read only where j <= experience_of_class[c], and computed everywhere else. `experience_of_class` [K] rises.
    """
    full, by_subspace = means_KSD.clone(), means_KSD.transpose(0, 1)
    subspaces = torch.arange(means_KSD.shape[1], device=full.device)
    ends = torch.searchsorted(experience_of_class.contiguous(), subspaces, right=True).tolist()
    for i, (first, end) in enumerate(zip([0, *ends], ends[:-1], strict=False)):
        there = F.normalize(means_KSD[first:, i], dim=1)
        likeness = there[: end - first] @ there[end - first :].T
        absent = experience_of_class[end:] < subspaces[i + 1 :, None]
        share = likeness.masked_fill(absent[:, None], -torch.inf).softmax(dim=2)
        full[first:end, i + 1 :] = (share @ by_subspace[i + 1 :, end:]).transpose(0, 1)
    return full


class Ease:
    """State: the newest adapter with its classifier, all adapters, true class means [K, S, D], the experience of each class.

    With `pretrained_weight` also class means under the bare network [K, D].
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_pretrained=True, needs_new_classes=True, needs_disjoint_classes=True, needs_random_access=True
    )

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        pet: Factory = adapter,
        alpha: float = 0.1,
        pretrained_weight: float = 0.0,  # above 0: the bare network is one more subspace (CUB, OmniBenchmark: 1)
        lr: float = 0.025,
        epochs: int | None = None,
        batch_size: int = 48,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = cosine,
    ):
        newest = unguided(pet(model, runtime), "ease")
        if newest is None:
            raise UserError("ease expands by a module an experience: pet=none has nothing to expand")
        self.model, self.runtime, self.pet = model, runtime, newest
        self.alpha, self.pretrained_weight = alpha, pretrained_weight
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.own_head = CosineHead(model.num_features).to(runtime.device)
        self.bank: list[State] = []
        self.means_KSD = torch.zeros(0, 0, model.num_features, device=runtime.device)
        self.bare_KD = torch.zeros(0, model.num_features, device=runtime.device)
        self.experience_of_class: list[int] = []
        self._full: Tensor | None = None

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train a fresh adapter, keep it, add the new classes' means in all subspaces."""
        t, first = len(self.bank), len(self.experience_of_class)
        if t > 0:
            self.pet.reset(self.runtime.generator("pet"))
        self.own_head = CosineHead(self.model.num_features).to(self.runtime.device)
        self.own_head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.pet.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(self.own_head(self.model.features(batch)), batch.y - first)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.pet, self.lr), (self.own_head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        self.pet.eval()
        self.bank = [*self.bank, self.pet.state()]
        known = self.means_KSD
        grown = known.new_zeros(experience.num_seen, t + 1, known.shape[2])
        grown[:first, :t] = known[:first, :t] if first else 0
        for j in range(t + 1):
            grown[first:, j] = self._means(experience, j)
        self.means_KSD = grown
        if self.pretrained_weight:
            self.bare_KD = torch.cat([self.bare_KD, self._means(experience, None)])
        self.experience_of_class = [*self.experience_of_class, *[t] * len(experience.new_classes)]
        self._full = None
        return {**log, "adapters": float(t + 1)}

    def _means(self, experience: Experience, j: int | None) -> Tensor:
        """Means of the new classes in subspace j (None: of the bare network) [C, D]."""
        with self.pet.off() if j is None else self.pet.use(self.bank[j], tag=j):
            f, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        return torch.stack([f[rows].mean(0) for rows in class_rows(y, experience.new_classes).values()])

    def predict(self, batch: Batch) -> Tensor:
        """Weighted sums of cosines [B, num_seen]."""
        self.model.eval()
        owner = torch.tensor(self.experience_of_class, device=self.means_KSD.device)
        if self._full is None:
            self._full = complete(self.means_KSD, owner)
        t = len(self.bank) - 1
        z = torch.zeros(len(batch), len(owner), device=owner.device)
        for j, state in enumerate(self.bank):
            with self.pet.use(state, tag=j):
                f = F.normalize(self.model.features(batch), dim=1)
            weight = torch.where(owner == j, 1.0, self.alpha / max(1, t))
            z = z + weight * (f @ F.normalize(self._full[:, j], dim=1).T)
        if self.pretrained_weight:
            with self.pet.off():
                f = F.normalize(self.model.features(batch), dim=1)
            z = z + self.pretrained_weight * (f @ F.normalize(self.bare_KD, dim=1).T)
        return z

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "pet", "own_head", "bank", "means_KSD", "bare_KD", "experience_of_class")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
        self._full = None
