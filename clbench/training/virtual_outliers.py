"""Virtual outliers for a head (Huang, Chen & Hsu, ICLR 2024, arXiv 2402.04129): a second stage after any training of features.

The head alone is trained on the experience's features f and on virtual outliers o:
  CE + weight (huber(relu(id_score - lse(z(f)))) + huber(relu(lse(z(o)) - outlier_score))),
lse the log-sum-exp over the experience's logits. Outliers (NPOS) are new every epoch; the variants stand in `learners/ovor.py`,
which is this with one prompt. For other learners (`learner.ovor={...}`): features are those that they answer with at test time,
under the test transform, and the rate runs over both stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Experience, UserError
from clbench.training.features import FeatureBatches, extract
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.prompts import part_of
from clbench.training.runtime import Runtime
from clbench.training.state import groups_of

Points = tuple[Tensor, Tensor, Tensor]  # features [B, D], labels [B], outliers [O, D]


class VirtualOutliers:
    """The options of the second stage."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",
        epochs: int = 4,  # on stored features
        weight: float = 0.1,
        id_score: float = 15.0,
        outlier_score: float = 3.0,
        neighbours: int = 50,
        boundary: int = 50,
        candidates: int = 600,  # around each boundary point
        per_class: int = 40,
        noise: float = 0.1,
    ):
        counts = {"neighbours": neighbours, "boundary": boundary, "candidates": candidates, "per_class": per_class}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"learner.{name} must be at least 1, got {value}")
        if epochs < 0:
            raise UserError(f"learner.ovor: epochs must be at least 0, got {epochs}")
        kinds = {"paper": around_boundary, "official": around_origin}
        if variant not in kinds:
            raise UserError(f"unknown learner.variant={variant}: choose paper or official")
        self.runtime, self.epochs = runtime, epochs
        self.outliers = partial(kinds[variant], noise=noise, **counts)
        self.weight, self.id_score, self.outlier_score = weight, id_score, outlier_score

    def stage(
        self, head: nn.Module, features: Tensor, y: Tensor, experience: Experience, batch_size: int
    ) -> tuple[Callable[[Points], Tensor], WithOutliers]:
        """Loss and batches of the stage, for `fit`: features [N, D], labels y [N]."""

        def make(epoch: int) -> Tensor:
            return self.outliers(features, len(experience.classes), self.runtime.generator("outliers", epoch))

        def loss(batch: Points) -> Tensor:
            z = head(batch[0])
            own, outside = (logits[:, list(experience.classes)] for logits in (z, head(batch[2])))
            penalty = hinge(self.id_score - own.logsumexp(1)) + hinge(outside.logsumexp(1) - self.outlier_score)
            return masked_cross_entropy(z, batch[1], "local", experience.classes) + self.weight * penalty

        batches = FeatureBatches(features, y, batch_size, self.epochs, self.runtime.key("outliers"))
        return loss, WithOutliers(batches, make)

    def recipes(self, recipe: Recipe, steps: int, samples: int, batch_size: int) -> tuple[Recipe, Recipe]:
        """The recipe of both stages, for a first one of `steps`: one schedule over all steps."""
        total = steps + self.epochs * -(-samples // batch_size)
        schedules = (part_of(recipe.schedule, first, total) for first in (0, steps))
        first, second = (replace(recipe, schedule=schedule) for schedule in schedules)
        return first, second

    def train_head(self, learner: Any, net: Any, experience: Experience, recipe: Recipe) -> dict[str, float]:
        """The stage for a learner with `head`, `lr`, `batch_size`; `net` has `features(batch)` and `eval()`."""
        features, y = extract(self.runtime, net, experience.train, learner.batch_size)
        loss, batches = self.stage(learner.head, features, y, experience, learner.batch_size)
        return fit(self.runtime, "outliers", learner, groups_of((learner.head, learner.lr)), loss, batches, recipe)


def with_outliers(
    learner: Any, net: Any, experience: Experience, steps: int, train: Callable[[Recipe], dict[str, float]]
) -> dict[str, float]:
    """One training of `steps` by the recipe of a learner, or with its option `ovor` both stages."""
    if learner.ovor is None:
        return train(learner.recipe)
    first, second = learner.ovor.recipes(learner.recipe, steps, len(experience.train), learner.batch_size)
    return train(first) | learner.ovor.train_head(learner, net, experience, second)


class WithOutliers:
    """Batches of features, each with its share of the epoch's outliers; a pure function of the step."""

    def __init__(self, batches: FeatureBatches, make: Callable[[int], Tensor]):
        self.batches, self.make, self.steps = batches, make, batches.steps
        self._made: tuple[int, Tensor] = (-1, torch.zeros(0))

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, D], labels [B], outliers [O, D]."""
        epoch, i = divmod(step, self.batches.per_epoch)
        if self._made[0] != epoch:
            self._made = (epoch, self.make(epoch))
        return *self.batches(step), self._made[1][i :: self.batches.per_epoch]


def hinge(x: Tensor) -> Tensor:
    """Mean Huber loss of the positive part of x [N]; 0 where there is none to take it of."""
    return F.huber_loss(x.relu(), torch.zeros_like(x)) if len(x) else x.sum()


def kth_distance(x: Tensor, among: Tensor, k: int) -> Tensor:
    """Distance of each row of x [N, D] to its k-th nearest row of `among` [M, D] (the last one where M < k) -> [N]."""
    return torch.cdist(x, among).topk(min(k, len(among)), dim=1, largest=False, sorted=False).values.amax(1)


def around_boundary(
    features: Tensor,
    classes: int,
    generator: torch.Generator,
    *,
    neighbours: int,
    boundary: int,
    candidates: int,
    per_class: int,
    noise: float,
) -> Tensor:
    """Outliers [per_class * classes, D] of features [N, D] as the paper describes them, farthest first."""
    inside = F.normalize(features, dim=1)
    points = kth_distance(inside, inside, neighbours).topk(min(boundary, len(inside))).indices
    offsets = noise * torch.randn(candidates, features.shape[1], generator=generator).to(features)
    far = torch.stack([kth_distance(inside[point] + offsets, inside, neighbours) for point in points])  # [points, candidates]
    kept = far.flatten().topk(min(per_class * classes, far.numel())).indices
    at = points[kept // candidates]
    return (inside[at] + offsets[kept % candidates]) * features[at].norm(dim=1, keepdim=True)


def around_origin(
    features: Tensor,
    classes: int,
    generator: torch.Generator,
    *,
    neighbours: int,
    boundary: int,
    candidates: int,
    per_class: int,
    noise: float,
) -> Tensor:
    """Outliers [per_class * classes, D] of features [N, D] as the release makes them, farthest first."""
    offsets = noise * torch.randn(candidates, features.shape[1], generator=generator).to(features)
    order = kth_distance(offsets, F.normalize(features, dim=1), neighbours).argsort(descending=True, stable=True)
    return offsets[order].repeat_interleave(min(boundary, len(features)), dim=0)[: per_class * classes]
