"""Training a network that grew a new part: the loss of DER and MEMO, and what makes their classifier fair to old classes.

Shapes: B batch, F features of all parts, D features of the newest, K classes; N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.models.expansion import WideHead
from clbench.streams import rng
from clbench.training.features import FeatureBatches
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import class_rows
from clbench.training.runtime import Runtime
from clbench.training.schedules import multistep
from clbench.training.state import groups_of


def own_or_other(y: Tensor, classes: Sequence[int]) -> Tensor:
    """Labels [B] -> 1 + the place among `classes`, 0 for every other class."""
    hit = y[:, None] == torch.as_tensor(list(classes), device=y.device)
    return torch.where(hit.any(1), 1 + hit.int().argmax(1), 0)


def grow_heads(runtime: Runtime, experience: Any, head: WideHead, auxiliary: WideHead, features: int, width: int) -> None:
    """Room in the classifier for all classes and features; a new auxiliary head on the newest `width` features."""
    head.grow(experience.num_seen, features, runtime.generator("head"))
    auxiliary.clear()
    auxiliary.grow(1 + len(experience.classes), width, runtime.generator("auxiliary"))


def expansion_loss(
    features: Tensor, y: Tensor, head: WideHead, auxiliary: WideHead, classes: Sequence[int], weight: float
) -> Tensor:
    """Cross-entropy over all classes [B, K] + weight x that of the auxiliary head on the newest features [B, D]."""
    total = F.cross_entropy(head(features), y)
    own = features[:, -auxiliary.weight.shape[1] :]
    return total + weight * F.cross_entropy(auxiliary(own), own_or_other(y, classes)) if weight else total


def balanced_rows(y: Tensor, key: int) -> Tensor:
    """Rows of labels [N] in which every class has as many samples as the smallest one has, drawn at random."""
    rows = class_rows(y, y.unique().tolist())
    least = min(map(len, rows.values()))
    drawn = [own[torch.as_tensor(rng.permutation(rng.key(key, c), len(own))[:least]).to(y.device)] for c, own in rows.items()]
    return torch.cat(drawn)


def refit(
    runtime: Runtime,
    learner: Any,
    head: WideHead,
    features: Tensor,
    y: Tensor,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    weight_decay: float,
    temperature: float = 5.0,
) -> dict[str, float]:
    """Train a classifier anew on as many features of every class, the logits divided by `temperature`."""
    rows = balanced_rows(y, runtime.key("balance"))
    head.redraw(runtime.generator("balance"))
    batches = FeatureBatches(features[rows], y[rows], batch_size, epochs, runtime.key("balance"))
    recipe = Recipe("sgd", 0.9, weight_decay=weight_decay, schedule=partial(multistep, milestones=(0.3, 0.6)))

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(head(batch[0]) / temperature, batch[1])

    return fit(runtime, "balance", learner, groups_of((head, lr)), loss, batches, recipe)
