"""MOS: Model Surgery (Sun, Zhou, Zhao, Gan, Zhan & Ye, AAAI 2025, arXiv 2412.09441).

One adapter on a frozen ViT goes through all experiences; a copy A_t is kept after each. P_t is the mean of A_0 .. A_{t-1}.
  training   local cross-entropy + `orth` x L_orth, L_orth = cross-entropy of M M^T / 0.8 with the identity, M the old class
             means and the batch's features; classifier at a tenth of the adapter's rate
  merging    after every step A <- (1 - a) A + a P_t, a = 0.1, from the second experience on
  alignment  all rows of the classifier on samples of class Gaussians, which stays aligned (`covariance`: full, diagonal,
             multi-centroid)
  retrieval  a sample starts at the experience of the nearest class mean under A_0 (cosine q), is classified with that
             experience's adapter (logits z), moves to the experience of the answer, and so on: until it stays, at most 4 rounds
  ensemble   softmax(z) + softmax((t + 1) q)

variant  "paper": as above.
  "official_effective" (default, what the released code deploys, made independent of test batches): the release merges
    inside every block of every forward pass as well, so with L blocks a step sees block l at P + (1-a)^(l+1) (A - P), then A
    has moved to P + (1-a)^L (A - P) before the optimiser's step; and because evaluation merges too, the adapter in use for
    statistics and retrieval of experience j >= 1 is P_j itself.
  "official_raw": the same with evaluation's merging as it happens, batch by batch (statistics: 3 x batch_size images of one
    class): predictions change the state and depend on how often evaluation ran; the record is marked.
Only the adapters that a batch's samples visit are run, all of them in one mixed pass per round.
Logged: |A_t - P_t| / |P_t|, how far training leaves the mean. Deviations: the rate follows a cosine over steps; the
classifier grows with the classes (the release's rows of future classes, which only decay, do not exist).
Published logs (ViT-B/16, CIFAR-100 B0 Inc5, seed 1993): last 89.25 %, average 93.30 % (augreg_in21k); 89.12, 93.10 %
(augreg_in21k_ft_in1k). 20 epochs, batch 48, SGD 0.9, rate 0.03, weight decay 5e-4, adapter 16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead, PrototypeHead
from clbench.models.pet import Factory, State, average, distance, stack
from clbench.models.pet_modules import adapter
from clbench.streams.images.data import ImageBatch, shuffled
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import ClassGaussians, align, class_rows
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore

ROUNDS = 4


def orthogonality(means_KD: Tensor, features_BD: Tensor) -> Tensor:
    """Every row, old class mean or sample, should be most like itself -> scalar."""
    rows = torch.cat([means_KD.to(features_BD.dtype), features_BD])
    return F.cross_entropy(rows @ rows.T / 0.8, torch.arange(len(rows), device=rows.device))


def pulled(state: State, mean: State, keep: float, per_block: bool = False, calls: int = 0) -> State:
    """P + k (A - P): k = keep^calls, or keep^(calls + l + 1) in the l-th adapted block, in the order of the blocks."""
    blocks = sorted({int(name.split("/")[0]) for name in state})
    order = {str(block): position for position, block in enumerate(blocks)}
    out = {}
    for name, value in state.items():
        power = calls + (order[name.split("/")[0]] + 1 if per_block else 0)
        out[name] = mean[name] + keep**power * (value - mean[name])
    return out


class Mos:
    """State: the adapter, kept adapters, classifier, prototypes under A_0, Gaussians, experiences of the classes.

    In the raw variant also how many evaluation batches each kept adapter has seen.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(needs_pretrained=True, needs_new_classes=True, needs_random_access=True)

    @staticmethod
    def capabilities_of(*, variant: str = "official_effective", **others: Any) -> Capabilities:
        """The raw variant adapts while it predicts."""
        return replace(Mos.capabilities, adapts_at_test=variant == "official_raw", transductive=variant == "official_raw")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        pet: Factory = adapter,
        variant: Literal["paper", "official_effective", "official_raw"] = "official_effective",
        lr: float = 0.03,
        head_lr: float = 0.1,  # classifier's rate / adapter's rate
        epochs: int | None = None,
        batch_size: int = 48,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = cosine,
        merge: float = 0.1,
        orth: float = 0.1,
        ensemble: bool = True,
        covariance: Literal["full", "diagonal", "multi-centroid"] = "full",  # full | diagonal (ImageNet-A) | multi-centroid
        ridge: float = 1e-4,
        align_epochs: int = 30,
        align_lr: float = 0.005,
        align_samples: int | None = None,  # per class and epoch; null: 5 x batch_size
    ):
        tuned = pet(model, runtime)
        if tuned is None or tuned.kind != "adapter":
            raise UserError("mos merges adapters: choose pet=adapter")
        self.model, self.runtime, self.pet, self.variant = model, runtime, tuned, variant
        self.lr, self.head_lr, self.epochs, self.batch_size = lr, head_lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.keep, self.orth, self.ensemble = 1 - merge, orth, ensemble
        self.align = {"epochs": align_epochs, "lr": align_lr, "samples": align_samples or 5 * batch_size}
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.prototypes = PrototypeHead(model.num_features, "cosine").to(runtime.device)
        self.gaussians = ClassGaussians(ridge, runtime.device, covariance, seed=runtime.seed)
        self.bank: list[State] = []
        self.experience_of_class: list[int] = []
        self.evaluated: list[int] = []
        self._stacked: State | None = None
        self._means: dict[int, State] = {}

    @property
    def blocks(self) -> int:
        return len({name.split("/")[0] for name in self.pet.values})

    def mean(self, j: int) -> State:
        """P_j: the mean of the first j kept adapters, which never change."""
        if j not in self._means:
            self._means[j] = average(self.bank[:j])
        return self._means[j]

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train with merging, keep a copy, statistics, alignment, prototypes."""
        t = len(self.bank)
        self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        log = self._train(experience, self.mean(t) if t else None)
        self.bank = [*self.bank, self.pet.state()]
        self.evaluated, self._stacked = [*self.evaluated, 0], None
        if t:
            gap, size = distance(self.bank[t], self.mean(t))
            log["distance_from_mean"] = gap / max(size, 1e-12)
        features, y = self._statistics(experience, t)
        self.gaussians.add(*(features[rows] for rows in class_rows(y, experience.new_classes).values()))
        self.experience_of_class = [*self.experience_of_class, *[t] * len(experience.new_classes)]
        if t and self.align["epochs"]:
            log |= align(
                self.runtime, self, self.head, self.gaussians,
                samples=int(self.align["samples"]), epochs=int(self.align["epochs"]), lr=float(self.align["lr"]),
                momentum=self.recipe.momentum, weight_decay=self.recipe.weight_decay,
            )  # fmt: skip
        with self.pet.use(self.bank[0], tag=0):
            features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        self.prototypes.update(features, y, experience.num_seen)
        return log

    def _train(self, experience: Experience, mean: State | None) -> dict[str, float]:
        """Stage 1, with the merging of the variant."""
        inside = mean is not None and self.variant != "paper"
        means_KD = self.gaussians.centres() if len(self.gaussians) else torch.zeros(0, self.model.num_features)
        means_KD = means_KD.to(self.runtime.device)
        self.pet.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            used = None
            if inside and mean is not None:  # the gradient is taken at the merged values, and belongs to the adapter
                seen = pulled(self.pet.state(), mean, self.keep, per_block=True)
                used = {name: value + (seen[name] - value).detach() for name, value in self.pet.values.items()}
            with self.pet.use(used):
                features = self.model.features(batch)
            local = masked_cross_entropy(self.head(features), batch.y, "local", experience.classes)
            return local + self.orth * orthogonality(means_KD, features)

        def merge_forward(params: list[Tensor], grads: list[Tensor | None]) -> None:
            if inside and mean is not None:
                self.pet.approach(mean, 1 - self.keep**self.blocks)

        def merge_step(place: Place, batch: Any) -> None:
            if mean is not None:
                self.pet.approach(mean, 1 - self.keep)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.pet, self.lr), (self.head, self.lr * self.head_lr))
        log = fit(
            self.runtime, "train", self, groups, loss, batches, self.recipe,
            before_step=merge_forward, after_step=merge_step,
        )  # fmt: skip
        self.pet.eval()
        return log

    def _statistics(self, experience: Experience, t: int) -> tuple[Tensor, Tensor]:
        """Features of the experience's images under the adapter in use -> [N, D], labels [N]."""
        if t == 0 or self.variant == "paper":
            with self.pet.use(self.bank[t], tag=t):
                return extract(self.runtime, self.model, experience.train, self.batch_size)
        if self.variant == "official_effective":
            self.pet.insert(self.mean(t))
            with self.pet.use(self.mean(t), tag=t):
                return extract(self.runtime, self.model, experience.train, self.batch_size)
        return self._raw_statistics(experience, t)

    def _raw_statistics(self, experience: Experience, t: int) -> tuple[Tensor, Tensor]:
        """One loader a class in batches of 3 x batch_size, merging in place L times a batch."""
        parts, labels, mean, calls = [], [], self.mean(t), 0
        for rows in class_rows(torch.as_tensor(experience.train.y), experience.new_classes).values():
            for chunk in rows.split(3 * self.batch_size):
                batch = experience.train.batch(chunk.numpy())
                used = pulled(self.bank[t], mean, self.keep, True, calls)
                with torch.no_grad(), self.pet.use(used):
                    parts.append(self.model.features(batch))
                calls += self.blocks
                assert batch.y is not None
                labels.append(batch.y)
        self.pet.insert(pulled(self.bank[t], mean, self.keep, False, calls))
        return torch.cat(parts), torch.cat(labels)

    def deployed(self) -> list[State]:
        """The adapters of retrieval, one an experience."""
        later = range(1, len(self.bank))
        if self.variant == "paper":
            return self.bank
        if self.variant == "official_effective":
            return [self.bank[0], *(self.mean(j) for j in later)]
        return [
            self.bank[0],
            *(pulled(self.bank[j], self.mean(j), self.keep, True, self.blocks * self.evaluated[j]) for j in later),
        ]

    def predict(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Scores [B, num_seen]: of the ensemble (or of retrieval without it), of retrieval, of the prototypes."""
        self.model.eval()
        owner = torch.tensor(self.experience_of_class, device=self.runtime.device)
        if self._stacked is None or self.variant == "official_raw":
            self._stacked = stack(self.deployed())
        with self.pet.use(self.bank[0], tag=None if self.variant == "official_raw" else "bank"):  # row 0 of the bank
            q = self.prototypes(self.model.features(batch))
        z = self.retrieve(batch, self._stacked, owner, owner[q.argmax(dim=1)])
        if self.variant == "official_raw":
            self.evaluated = [seen + 1 for seen in self.evaluated]
        both = z.softmax(dim=1) + (len(self.bank) * q).softmax(dim=1)
        return {"answer": both if self.ensemble else z, "retrieval": z, "prototypes": q}

    def retrieve(self, batch: ImageBatch, bank: State, owner: Tensor, guess: Tensor) -> Tensor:
        """Logits [B, K] of each sample's last round; a sample that settles is not run again."""
        z = torch.zeros(len(batch), len(owner), device=owner.device)
        rows, now = torch.arange(len(batch), device=owner.device), guess
        for _ in range(ROUNDS):
            with self.pet.use(bank, now, tag=None if self.variant == "official_raw" else "bank"):
                z[rows] = self.head(self.model.features(batch.select(rows)))
            moved = owner[z[rows].argmax(dim=1)]
            rows, now = rows[moved != now], moved[moved != now]
            if not len(rows):
                break
        return z

    def state_dict(self) -> dict[str, Any]:
        parts = ("pet", "bank", "head", "prototypes", "gaussians", "experience_of_class", "evaluated")
        return collect(self, *parts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
        self._stacked, self._means = None, {}
