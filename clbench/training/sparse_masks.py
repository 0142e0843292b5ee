"""Masks over weights: drawn at a density, changed by pruning and growth, kept as one bit a weight and task.

Functions take and give tensors of one layer; masks are bool of the weights' shape. Of equal scores the first go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Init = Literal["uniform", "erk"]
Prune = Literal["magnitude", "set", "taylor"]


class TaskMasks:
    """Masks of tasks over some weights: uint8 [tasks / 8, ...] by name. `tasks` is their number."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.packed = {name: torch.zeros(0, *w.shape, dtype=torch.uint8, device=w.device) for name, w in weights.items()}
        self.tasks = 0

    def get(self, name: str, task: int) -> Tensor:
        """The mask of a task."""
        return (self.packed[name][task // 8] >> task % 8) % 2 == 1

    def put(self, name: str, task: int, mask: Tensor) -> None:
        """Replace the mask of a task, or begin one."""
        row, bit = task // 8, 1 << task % 8
        if row == len(self.packed[name]):
            self.packed[name] = torch.cat([self.packed[name], torch.zeros_like(mask, dtype=torch.uint8)[None]])
        packed = self.packed[name][row]
        packed.copy_(torch.where(mask, packed | bit, packed & (255 - bit)))
        self.tasks = max(self.tasks, task + 1)

    def others(self, name: str, task: int) -> Tensor:
        """Weights that are in the mask of another task."""
        packed = self.packed[name].clone()
        packed[task // 8] &= 255 - (1 << task % 8)
        return (packed != 0).any(0)

    def state_dict(self) -> dict[str, Any]:
        """Bits and number."""
        return {"packed": self.packed, "tasks": self.tasks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.packed = {name: state["packed"][name].to(own.device, copy=True) for name, own in self.packed.items()}
        self.tasks = state["tasks"]


def densities(shapes: Sequence[Sequence[int]], density: float, init: Init) -> list[float]:
    """The density of each layer: the same, or Erdos-Renyi with kernels, proportional to (sum of dimensions) / (product)."""
    if init == "uniform":
        return [density] * len(shapes)
    sizes, sums, full = [math.prod(s) for s in shapes], [sum(s) for s in shapes], set[int]()
    while True:
        left = density * sum(sizes) - sum(sizes[i] for i in full)
        scale = left / max(1, sum(total for i, total in enumerate(sums) if i not in full))
        above = {i for i, size in enumerate(sizes) if i not in full and scale * sums[i] > size}
        if not above:
            return [1.0 if i in full else scale * sums[i] / size for i, size in enumerate(sizes)]
        full |= above


def drawn(weight: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """A random mask of a density, of one weight at least."""
    count = max(1, round(density * weight.numel()))
    return top(torch.rand(weight.shape, generator=generator).to(weight.device), torch.ones_like(weight).bool(), count)


def pruned(weight: Tensor, grad: Tensor, mask: Tensor, count: int, how: Prune) -> Tensor:
    """Which `count` weights leave a mask."""
    if how == "set":
        positive = top(-weight, mask & (weight >= 0), count // 2)
        return positive | top(weight, mask & (weight < 0), count - count // 2)
    return top(-(weight.abs() if how == "magnitude" else (weight * grad).square()), mask, count)


def top(score: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` largest scores of those `among` (all of them where there are fewer), as a mask."""
    order = score.masked_fill(~among, -math.inf).flatten().argsort(descending=True, stable=True)
    found = torch.zeros_like(among).flatten()
    found[order[:count]] = True
    return found.view_as(among) & among
