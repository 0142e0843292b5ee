"""AdaLoRA, adaptive budget allocation (Zhang et al., ICLR 2023, arXiv 2303.10512): ranks go where they matter while it trains.

W' = W + s B diag(e) A, A [r, I] and B [O, r] N(0, 0.02^2), e [r] 0 at the start. A triplet is (row j of A, e_j, column j of B).

After every step, of each value p:
    I = |p dp|,  mean <- beta mean + (1 - beta) I,  spread <- beta spread + (1 - beta) |I - mean|
    score of triplet j = (mean spread)(e_j) + average over i of (mean spread)(A_ji) + average over o of (mean spread)(B_oj)
Every `every` steps e_j becomes 0 for the (b_0 - b) triplets of the lowest scores of all layers, with the budget b after step s
of S: b_0 = r a layer up to step `warm_up`, then (b_0 - b_T) (1 - (s - warm_up) / (S - hold - warm_up))^3 + b_T, and b_T =
`target` a layer from step S - hold, where the choice is made once more and stays. Before that, e_j may grow again.
The loss gets `orthogonal` times the average of |A A' - I| and |B' B - I| over the layers.

Continual: one allocation an experience, of S = the steps of its training; it starts with all triplets and no scores. Scores
follow the step, as in the release: p is what the step has made of it, dp the gradient that made it. The release's factor
alpha / (r + 1e-5) is s. Exactly b_0 - b triplets are left out; of equal scores, the first in the order of the layers.

State: the values; mean and spread of each, and which triplets are kept, as buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.interfaces import Data, Place, UserError
from clbench.models.pet import Network, Pet, normal, zeros
from clbench.models.pet_modules import Spec
from clbench.models.pet_sites import Blocks, affine, broadcast
from clbench.models.weight_change import Pass, attach, guided_only, target_sites


def adalora(
    model: Network,
    runtime: Any,
    *,
    rank: int = 12,  # triplets of a layer at the start
    target: int = 8,  # of a layer on average at the end
    targets: Sequence[str] = ("k", "v"),  # of q, k, v, qkv, proj, fc1, fc2
    scale: float = 1.0,
    warm_up: int = 0,  # steps of an experience before the budget falls
    hold: int = 0,  # last steps of an experience, whose triplets stay
    every: int = 1,
    beta: float = 0.85,
    orthogonal: float = 0.5,
    std: float = 0.02,
    blocks: Blocks = None,
) -> Pet:
    """Low-rank terms whose ranks are allotted while they train: r (I + O + 1) values, of which target (I + O + 1) are left."""
    sites, spec = target_sites(model, "adalora", targets, blocks, rank), Spec()
    if not 1 <= target <= rank:
        raise UserError(f"pet=adalora: target must lie in 1 to rank={rank}, got {target}")
    if warm_up < 0 or hold < 0 or every < 1 or not 0 <= beta < 1:
        got = f"got {warm_up}, {hold}, {every} and {beta:g}"
        raise UserError(f"pet=adalora: warm_up and hold must be at least 0, every at least 1, beta in [0, 1), {got}")
    for site in sites:
        out, into = site.shape
        spec |= {f"{site.name}/a": ((rank, into), normal(0.0, std)), f"{site.name}/b": ((out, rank), normal(0.0, std))}
        spec[f"{site.name}/e"] = ((rank,), zeros)
    guide = Allocation([site.name for site in sites], rank, target, scale, warm_up, hold, every, beta, orthogonal)
    pet = attach(model, runtime, "adalora", sites, spec, guide.form)
    for name, value in list(pet.values.items()):
        pet.register_buffer(f"{name}_mean", torch.zeros_like(value.detach()))
        pet.register_buffer(f"{name}_spread", torch.zeros_like(value.detach()))
    pet.register_buffer("kept", torch.ones(len(sites), rank, dtype=torch.bool, device=runtime.device))
    pet.guide = guide
    guide.pet = pet
    return pet


@dataclass(eq=False)
class Allocation:
    """What AdaLoRA does around the steps of a training."""

    names: list[str]
    rank: int
    target: int
    scale: float
    warm_up: int
    hold: int
    every: int
    beta: float
    orthogonal: float
    pet: Any = None  # set when it is made
    begun: bool = False

    def form(self, p: Pass) -> Tensor:
        """S B diag(e) A x."""
        guided_only(self.pet, self.begun)
        return self.scale * affine(broadcast(p.get("e"), p.x) * affine(p.x, p.get("a")), p.get("b"))

    def begin(self, data: Data) -> None:
        """No scores, all triplets."""
        self.begun, pet = True, self.pet
        for name in pet.values:
            self.average(name, "mean").zero_()
            self.average(name, "spread").zero_()
        pet.kept.fill_(True)

    def penalty(self) -> Tensor | None:
        """How far the rows of A and the columns of B are from an orthonormal system."""
        if self.orthogonal == 0:
            return None
        values, eye = self.pet.values, torch.eye(self.rank, device=self.pet.kept.device)
        systems = [m for name in self.names for m in (values[f"{name}/a"], values[f"{name}/b"].T)]
        return self.orthogonal * torch.stack([(m @ m.T - eye.to(m)).norm() for m in systems]).mean()

    def budget(self, step: int, steps: int) -> int:
        """Triplets of all layers after `step` of `steps` steps."""
        start, end = (number * len(self.names) for number in (self.rank, self.target))
        if step <= self.warm_up:
            return start
        left = max(0.0, 1 - (step - self.warm_up) / (steps - self.hold - self.warm_up))
        return int((start - end) * left**3 + end)

    @torch.no_grad()
    def after_step(self, place: Place) -> None:
        """Score every value by its gradient, which is still there; leave triplets out where it is time."""
        pet, step, steps = self.pet, place.step + 1, place.steps
        if self.warm_up + self.hold >= steps:
            more = f"warm_up={self.warm_up} and hold={self.hold} need more steps than an experience has, {steps}"
            raise UserError(f"pet=adalora: {more}")
        for name, p in pet.values.items():
            if p.grad is not None:
                mean, spread, now = self.average(name, "mean"), self.average(name, "spread"), (p * p.grad).abs()
                mean.lerp_(now, 1 - self.beta)
                spread.lerp_((now - mean).abs(), 1 - self.beta)
        end = steps - self.hold
        if step == end or (step < end and step % self.every == 0):
            self.choose(len(self.names) * self.rank - self.budget(step, steps))
        if step >= end or step % self.every == 0:
            for name, kept in zip(self.names, pet.kept, strict=True):
                pet.values[f"{name}/e"].mul_(kept)

    def choose(self, without: int) -> None:
        """Keep all triplets but those of the `without` lowest scores."""
        order = torch.cat([self.score(name) for name in self.names]).argsort(stable=True)
        self.pet.kept.view(-1).fill_(True)[order[:without]] = False

    def score(self, name: str) -> Tensor:
        """Of the triplets of a layer [r]."""
        e, a, b = (self.average(f"{name}/{part}", "mean") * self.average(f"{name}/{part}", "spread") for part in "eab")
        return e + a.mean(1) + b.mean(0)

    def average(self, name: str, kind: str) -> Tensor:
        """The running mean or spread of a value."""
        return getattr(self.pet, f"{name}_{kind}")
