"""TUNA: integrating task-specific and universal adapters (Wang, Zhou & Ye, ICCV 2025, arXiv 2508.08165).

Every experience t trains an adapter a_t on a frozen ViT and keeps it. One cosine classifier serves all of them.
  training   CosFace over the experience's classes, s (cos - m [own class]), + reg e^-(t+1) sum over i < t of the likeness of
             a_t and a_i: the mean over blocks of |mean of U_t U_i^T|, U the up-projection [D, r] with rows of length 1
  universal  a*, entry by entry: the sign is that of the mean of a_0 .. a_t (- where it is 0), the size the largest |a_i| among
             those of that sign, 0 where there is none
  alignment  a Gaussian for each class, of its features under its own experience's adapter; from the second experience on the
             whole classifier is trained on samples of them, logits times s, and stays so
  answer     p_i = softmax(s cos(f_i, w)) under each adapter; the p_i of least entropy + the softmax under a*

variant  "official" (default): |mean| as above, in which products of both signs cancel. "paper": mean of |U_t U_i^T|.
start    "fresh" (default): a_t is drawn anew; "previous": it goes on from a_{t-1}. The vote on signs presupposes a common
         start; which of them the paper's own code does is not known.
Deviations: the port that could be read never uses the universal adapter (its list of adapters holds each twice, and evaluation
reads stale ones); here the answer is as the paper states it. The rate of alignment falls once over all epochs (there: it rises
again). Features of kept adapters are remembered; a test image passes through the newest and the universal one alone.
Published (second hand in the specification, ViT-B/16 augreg_in21k): CIFAR-100 B0 Inc5 last 90.74 %, average 94.44 %; ImageNet-R
B0 Inc20 79.42 / 84.22 %. Its epochs are not known; the port has 15, batch 16, SGD 0.9, rate 0.01, decay 5e-4, adapter 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import CosineHead
from clbench.models.pet import Factory, State, stack
from clbench.models.pet_modules import adapter
from clbench.streams.images.data import shuffled
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import ClassGaussians, align, class_rows
from clbench.training.losses import margin_logits
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore


def universal(states: Sequence[State]) -> State:
    """The elected sign of every entry, with the largest size among the entries that have it."""
    found: State = {}
    for name, values in stack(states).items():
        sign = torch.where(values.mean(0) > 0, 1.0, -1.0)
        found[name] = sign * torch.where(values * sign > 0, values.abs(), 0.0).amax(0)
    return found


def likeness(new: State, old: State, absolute: bool) -> Tensor:
    """Mean over blocks of |mean(U V^T)|, or of mean|U V^T|: up-projections of two adapters, rows of length 1 -> scalar."""
    parts = []
    for name in (name for name in old if name.endswith("/up")):
        u, v = F.normalize(new[name], dim=1), F.normalize(old[name], dim=1)
        parts.append((u @ v.T).abs().mean() if absolute else (u.mean(0) @ v.mean(0)).abs())
    return torch.stack(parts).mean()


def entropy(p: Tensor) -> Tensor:
    """Of probabilities [..., K] -> [...]."""
    return -torch.special.xlogy(p, p).sum(-1)


class Tuna:
    """State: the newest adapter, all adapters, the classifier, Gaussians."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_pretrained=True, needs_new_classes=True, needs_disjoint_classes=True, needs_random_access=True
    )

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        pet: Factory = adapter,
        variant: Literal["official", "paper"] = "official",
        start: Literal["fresh", "previous"] = "fresh",
        reg: float = 1e-3,  # of the likeness to earlier adapters; 0: without
        scale: float = 20.0,
        margin: float = 0.0,
        lr: float = 0.01,
        epochs: int | None = None,
        batch_size: int = 16,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = cosine,
        covariance: Literal["full", "diagonal"] = "full",
        ridge: float = 1e-4,
        align_epochs: int = 30,
        align_lr: float = 0.005,
        align_samples: int | None = None,  # per class and epoch; null: 5 x batch_size
    ):
        newest = pet(model, runtime)
        if newest is None or newest.kind != "adapter":
            raise UserError("tuna elects signs of adapters: choose pet=adapter")
        for name, value, known in (("variant", variant, ("official", "paper")), ("start", start, ("fresh", "previous"))):
            if value not in known:
                raise UserError(f"unknown learner.{name}={value}: choose {' or '.join(known)}")
        if covariance not in ("full", "diagonal"):
            raise UserError(f"unknown learner.covariance={covariance}: choose full or diagonal")
        self.model, self.runtime, self.pet = model, runtime, newest
        self.absolute, self.fresh, self.reg = variant == "paper", start == "fresh", reg
        self.scale, self.margin = scale, margin
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.align: dict[str, Any] = {"epochs": align_epochs, "lr": align_lr, "samples": align_samples or 5 * batch_size}
        self.head = CosineHead(model.num_features).to(runtime.device)
        self.head.sigma.requires_grad_(False)
        self.gaussians = ClassGaussians(ridge, runtime.device, covariance)
        self.bank: list[State] = []
        self._universal: State | None = None

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train an adapter, keep it, statistics, alignment."""
        first = self.head.num_classes
        self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        if self.bank and self.fresh:
            self.pet.reset(self.runtime.generator("pet"))
        log = self._train(experience, slice(first, experience.num_seen))
        self.bank, self._universal = [*self.bank, self.pet.state()], None
        with self.pet.use(self.bank[-1], tag=len(self.bank) - 1):
            features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        self.gaussians.add(*(features[rows] for rows in class_rows(y, experience.new_classes).values()))
        if first and self.align["epochs"]:
            log |= align(
                self.runtime, self, self.head, self.gaussians, multiplier=self.scale,
                momentum=self.recipe.momentum, weight_decay=self.recipe.weight_decay, **self.align,
            )  # fmt: skip
        return {**log, "adapters": float(len(self.bank))}

    def _train(self, experience: Experience, newest: slice) -> dict[str, float]:
        """CosFace on the new columns, and unlike the adapters before."""
        factor = self.reg * math.exp(-(len(self.bank) + 1))
        self.pet.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            cosines, y = self.head(self.model.features(batch))[:, newest], batch.y - newest.start
            total = F.cross_entropy(margin_logits(cosines, y, self.scale, self.margin), y)
            for old in self.bank if factor else ():
                total = total + factor * likeness(dict(self.pet.values), old, self.absolute)
            return total

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.pet, self.lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        self.pet.eval()
        return log

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Scores [B, num_seen]: of both together, of the most certain adapter, of the universal one."""
        self.model.eval()
        specific_TBK = torch.stack([self._answer(batch, state, j) for j, state in enumerate(self.bank)])
        chosen = entropy(specific_TBK).argmin(0)
        specific = specific_TBK[chosen, torch.arange(len(chosen), device=chosen.device)]
        if len(self.bank) == 1:
            return {"both": specific, "specific": specific, "universal": specific}
        if self._universal is None:
            self._universal = universal(self.bank)
        common = self._answer(batch, self._universal, ("universal", len(self.bank)))
        return {"both": specific + common, "specific": specific, "universal": common}

    def _answer(self, batch: Batch, state: State, tag: Any) -> Tensor:
        """Class probabilities under an adapter [B, num_seen]."""
        with torch.no_grad(), self.pet.use(state, tag=tag):
            return (self.scale * self.head(self.model.features(batch))).softmax(1)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "pet", "bank", "head", "gaussians")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
        self._universal = None
