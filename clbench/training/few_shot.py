"""Tricks of few-shot class-incremental learning ("A Bag of Tricks for Few-Shot Class-Incremental Learning", arXiv 2403.14392):
what is added to the session of the base classes, and which weights later sessions may change. See `incremental_frozen.py`.

Legend: B images, D features, K classes, V pseudo-classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, UserError
from clbench.models.heads import CosineHead, LinearHead
from clbench.models.simplex import turned_vertices
from clbench.streams import rng
from clbench.training.contrastive import strong_view, supervised_contrastive
from clbench.training.runtime import Runtime

TEMPERATURE = 0.07  # of the contrastive loss
TURNS = 4  # quarter turns that are told apart


def simplex(num_classes: int, num_features: int, seed: int) -> Tensor:
    """The rows of `num_classes` classes [K, D] by seed: a regular simplex in a random orientation."""
    if not 2 <= num_classes <= num_features:
        raise UserError(f"learner.etf={num_classes} classes must be from 2 to the {num_features} features of the model")
    return turned_vertices(num_classes, num_features, torch.Generator().manual_seed(rng.key(seed, "etf") >> 1)).float()


def pairs(num_classes: int, number: int, generator: torch.Generator) -> Tensor:
    """Some pairs of different classes [V, 2], each once, the smaller one first."""
    every = torch.tensor(list(itertools.combinations(range(num_classes), 2))).reshape(-1, 2)
    if number > len(every):
        raise UserError(f"learner.virtual={number}: {num_classes} base classes have {len(every)} pairs")
    return every[torch.randperm(len(every), generator=generator)[:number]]


def mixed(x: Tensor, y: Tensor, pairs_V2: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Halves of two images added where their classes are one of the pairs: x [B, C, H, W] -> (images, numbers of the pairs).

    Each image has one partner, drawn from the batch.
    """
    partner = torch.randperm(len(y), generator=generator).to(y.device)
    both_B2 = torch.stack([y, y[partner]], dim=1).sort(1).values
    rows, which = (both_B2[:, None] == pairs_V2.to(y.device)[None]).all(2).nonzero(as_tuple=True)
    return (x[rows] + x[partner[rows]]) / 2, which


def rotated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every image in four turns of 90 degrees, turn after turn: x [B, C, S, S] -> (images [4B], turns [4B])."""
    turns = torch.arange(TURNS, device=x.device).repeat_interleave(len(x))
    return torch.cat([x.rot90(k, (2, 3)) for k in range(TURNS)]), turns


def least_important(importance: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks of the `share` of weights with the least importance, over all tensors together; equal ones stay together."""
    flat = torch.cat([value.flatten() for value in importance.values()])
    count = int(share * len(flat))
    limit = float(flat.kthvalue(count).values) if count else -math.inf
    return {name: value <= limit for name, value in importance.items()}


class BaseSession:
    """The loss of the base session: cross-entropy of the head, and what is asked for besides.

        CE + supcon x SupCon + rotation x CE of the turn

    SupCon is over normalised features of an image and of a second, stronger view of it. With `virtual` pseudo-classes the
    first term runs over K + V classes and over images and mixtures; their V rows are dropped when the session is over.
    """

    def __init__(
        self, runtime: Runtime, model: Any, head: CosineHead, supcon: float, virtual: int, rotation: float, mirror: bool
    ):
        self.runtime, self.model, self.head, self.mirror = runtime, model, head, mirror
        self.supcon, self.virtual, self.rotation = supcon, virtual, rotation
        self.turns = LinearHead(model.num_features).to(runtime.device) if rotation else None
        self.pairs_V2 = torch.zeros(0, 2, dtype=torch.int64)
        self.step = 0

    def begin(self, num_classes: int, etf: int) -> None:
        """Rows of the head: learned, or those of a simplex over `etf` classes; and of pseudo-classes and turns."""
        self.head.grow(num_classes, self.runtime.generator("head"))
        if etf:
            if etf < num_classes:
                raise UserError(f"learner.etf={etf}: the base session alone has {num_classes} classes")
            self.head.assign(0, simplex(etf, self.model.num_features, self.runtime.seed)[:num_classes])
            self.head.blocks[0].requires_grad_(False)
        if self.virtual:
            self.pairs_V2 = pairs(num_classes, self.virtual, self.runtime.generator("pairs"))
            self.head.grow(self.virtual, self.runtime.generator("virtual"))
        if self.turns is not None:
            self.turns.grow(TURNS, self.runtime.generator("turns"))

    def end(self) -> None:
        """Pseudo-classes and turns are no longer needed."""
        if self.virtual:
            del self.head.blocks[-1]
        if self.turns is not None:
            del self.turns.blocks[-1]

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained besides backbone and head."""
        return [] if self.turns is None else list(self.turns.parameters())

    def loss(self, batch: Batch) -> Tensor:
        """Of step `step` -> scalar."""
        assert batch.y is not None
        features, y = self.model.features(batch), batch.y
        other, labels = features, y
        if self.virtual:
            x, which = mixed(batch.x, y, self.pairs_V2, self.runtime.generator("mix", self.step))
            if len(x):
                other = torch.cat([features, self.model.features(x)])
                labels = torch.cat([y, which + self.head.num_classes - self.virtual])
        loss = F.cross_entropy(self.head(other), labels)
        if self.supcon:
            view = strong_view(batch.x, self.runtime.key("view", self.step), self.model.profile, self.mirror)
            two = F.normalize(torch.cat([features, self.model.features(view)]), dim=1)
            loss = loss + self.supcon * supervised_contrastive(two, torch.cat([y, y]), TEMPERATURE)
        if self.turns is not None:
            x, turn = rotated(batch.x)
            loss = loss + self.rotation * F.cross_entropy(self.turns(self.model.features(x)), turn)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The rows of the turns, and the pairs."""
        return {"turns": None if self.turns is None else self.turns.state_dict(), "pairs_V2": self.pairs_V2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs_V2 = state["pairs_V2"].cpu()
        if self.turns is not None:
            self.turns.load_state_dict(state["turns"])


def masked(grads: Iterable[Tensor | None], masks: Iterable[Tensor]) -> None:
    """Zero gradients in place where a mask is false."""
    for grad, mask in zip(grads, masks, strict=True):
        if grad is not None:
            grad.mul_(mask)
