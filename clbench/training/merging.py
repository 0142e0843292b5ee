"""Merging of networks that were trained from one start: a *state* is {name: tensor}, tau_t = theta_t - theta_0 a task vector.

Everything is computed in float64, tensor by tensor, and comes back in the kind of number that it had. Ties in a ranking go to
the lower index. Sources: the papers named at each operator, in the forms that mergekit and the authors' code have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]
Scope = Literal["tensor", "model"]
TINY = 1e-12


def _by_tensor(base: State, states: Sequence[State], merge: Callable[[Tensor, Tensor], Tensor]) -> State:
    """theta_0 + `merge`(theta_0, task vectors [T, ...]) for every tensor."""
    found = {}
    for name, start in base.items():
        zero = start.double()
        taus = torch.stack([state[name].double() - zero for state in states])
        found[name] = (zero + merge(zero, taus)).to(start.dtype)
    return found


def average(states: Sequence[State]) -> State:
    """Mean of the weights."""
    return {name: torch.stack([s[name].double() for s in states]).mean(0).to(v.dtype) for name, v in states[0].items()}


def task_arithmetic(base: State, states: Sequence[State], scale: float) -> State:
    """theta_0 + scale sum tau_t (Ilharco et al., ICLR 2023, arXiv 2212.04089)."""
    return _by_tensor(base, states, lambda _, taus: scale * taus.sum(0))


def ties(base: State, states: Sequence[State], scale: float, keep: float, scope: Scope = "tensor") -> State:
    """Keep the largest share of each task vector, elect a sign, average who has it (Yadav et al., NeurIPS 2023, 2306.01708).

    The elected sign is that of the sum, + where that is 0. `scope`: what is ranked together.
    """
    return _together(base, states, scope, lambda taus: scale * elected(trimmed(taus, keep)))


def trimmed(taus: Tensor, keep: float) -> Tensor:
    """Of each row of task vectors [T, ...] the round(keep n) entries of largest size, 0 elsewhere."""
    flat = taus.reshape(len(taus), -1)
    number = round(keep * flat.shape[1])
    kept = flat.abs().sort(dim=1, descending=True, stable=True).indices[:, :number]
    mask = torch.zeros_like(flat).scatter_(1, kept, 1.0)
    return (flat * mask).reshape(taus.shape)


def elected(taus: Tensor) -> Tensor:
    """Mean over those whose sign is that of the sum; 0 where nobody has an entry [T, ...] -> [...]."""
    sign = torch.where(taus.sum(0) >= 0, 1.0, -1.0).to(taus)
    agree = (taus * sign > 0).to(taus)
    return (taus * agree).sum(0) / agree.sum(0).clamp_min(1)


def dropped(base: State, state: State, drop: float, generator: torch.Generator) -> State:
    """DARE: each entry of the task vector is 0 with probability `drop`, the others are divided by 1 - drop.

    Yu et al., ICML 2024, arXiv 2311.03099. The generator is one of the CPU.
    """
    found = {}
    for name, start in base.items():
        mask = (torch.rand(start.shape, generator=generator, dtype=torch.float64) >= drop).to(start.device)
        tau = (state[name].double() - start.double()) * mask / (1 - drop)
        found[name] = (start.double() + tau).to(start.dtype)
    return found


def breadcrumbs(base: State, states: Sequence[State], scale: float, density: float, top: float) -> State:
    """Without the `top` share of largest entries and the smallest ones, so that `density` is left; then their sum.

    Davari & Belilovsky, ECCV 2024, arXiv 2312.06795. Of n entries floor(density n) are kept and floor(top n) of the largest are
    dropped, fewer where both do not fit.
    """

    def merge(_: Tensor, taus: Tensor) -> Tensor:
        flat = taus.reshape(len(taus), -1)
        n = flat.shape[1]
        kept = math.floor(density * n)
        largest = min(math.floor(top * n), n - kept)
        order = flat.abs().sort(dim=1, descending=True, stable=True).indices[:, largest : largest + kept]
        mask = torch.zeros_like(flat).scatter_(1, order, 1.0)
        return scale * (flat * mask).sum(0).reshape(taus.shape[1:])

    return _by_tensor(base, states, merge)


def fisher(states: Sequence[State], information: Sequence[State]) -> State:
    """Weights by information, sum F_t theta_t / sum F_t; the mean where nobody has any.

    Matena & Raffel, NeurIPS 2022, arXiv 2111.09832.
    """
    found = {}
    for name, first in states[0].items():
        theta, f = (torch.stack([one[name].double() for one in some]) for some in (states, information))
        total = f.sum(0)
        found[name] = torch.where(total > 0, (f * theta).sum(0) / total.clamp_min(1e-300), theta.mean(0)).to(first.dtype)
    return found


def model_stock(base: State, states: Sequence[State]) -> State:
    """Between mean and start, t mean theta + (1 - t) theta_0, t = N c / (1 + (N - 1) c) in [0, 1].

    c is the mean cosine of two task vectors; one model is itself. Jang, Yun & Han, ECCV 2024, arXiv 2403.19522, tensor by
    tensor.
    """

    def merge(_: Tensor, taus: Tensor) -> Tensor:
        number = len(taus)
        if number == 1:
            return taus[0]
        flat = taus.reshape(number, -1)
        lengths = flat.norm(dim=1)
        cosines = (flat @ flat.T / (lengths[:, None] * lengths).clamp_min(TINY)).clamp(-1, 1)
        c = float((cosines.sum() - cosines.diagonal().sum()) / (number * (number - 1)))
        t = min(max(number * c / (1 + (number - 1) * c), 0.0), 1.0) if 1 + (number - 1) * c > TINY else 0.0
        return t * taus.mean(0)

    return _by_tensor(base, states, merge)


def pcb(base: State, states: Sequence[State], scale: float, ratio: float) -> State:
    """Parameter competition balancing (Du et al., NeurIPS 2024, arXiv 2410.02396), over all tensors at once.

    score = exp(N minmax(|tau|)^2) tanh(tau sum tau); of each task the `ratio` of largest scores weighs, from 0 to 1.
    """

    def merge(taus: Tensor) -> Tensor:
        number, n = taus.shape
        size = taus.abs()
        cut = max(0, math.ceil(1e-4 * n) - 1)
        ranked = size.sort(dim=1).values
        size = size.clamp(ranked[:, cut, None], ranked[:, n - 1 - cut, None])
        score = (number * _unit(size).square()).exp() * torch.tanh(taus * taus.sum(0))
        least = score.sort(dim=1).values[:, min(n - 1, n - max(1, round(ratio * n))), None]
        weight = _unit(score.clamp_min(least)) if number * n > 1 else torch.ones_like(score)
        return scale * (weight * taus.sign() * size).sum(0) / weight.sum(0).clamp_min(TINY)

    return _together(base, states, "model", merge)


def _unit(rows: Tensor) -> Tensor:
    """Each row of [T, n] from 0 to 1; 1 where all are equal."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return torch.where(high > low, (rows - low) / (high - low).clamp_min(1e-300), torch.ones_like(rows))


def iso_c(base: State, states: Sequence[State], scale: float) -> State:
    """Matrices: the singular values of sum tau become their mean; other tensors: mean (Marczak et al. 2025, arXiv 2502.04959).

    Kernels of convolutions count as matrices [out, rest].
    """

    def merge(zero: Tensor, taus: Tensor) -> Tensor:
        if zero.ndim < 2:
            return scale * taus.mean(0)
        total = taus.sum(0).reshape(len(zero), -1)
        u, s, vh = torch.linalg.svd(total, full_matrices=False)
        return scale * (s.mean() * (u @ vh)).reshape(zero.shape)

    return _by_tensor(base, states, merge)


def slerp(old: State, new: State, share: float) -> State:
    """On the arc between two states, `share` of the way, tensor by tensor; on the line where they are nearly parallel."""
    found = {}
    for name, first in old.items():
        a, b = first.double(), new[name].double()
        cosine = float((a * b).sum() / (a.norm() * b.norm()).clamp_min(TINY))
        if abs(cosine) > 0.9995 or float(a.norm() * b.norm()) < TINY:
            found[name] = torch.lerp(a, b, share).to(first.dtype)
            continue
        angle = math.acos(cosine)
        parts = math.sin((1 - share) * angle) * a + math.sin(share * angle) * b
        found[name] = (parts / math.sin(angle)).to(first.dtype)
    return found


def moving_average(old: State, new: State, momentum: float) -> State:
    """Of two states, momentum old + (1 - momentum) new."""
    return {name: torch.lerp(new[name].double(), value.double(), momentum).to(value.dtype) for name, value in old.items()}


def _together(base: State, states: Sequence[State], scope: Scope, merge: Callable[[Tensor], Tensor]) -> State:
    """theta_0 + `merge`(task vectors [T, n]), of every tensor by itself or of all tensors in one row."""
    if scope == "tensor":
        return _by_tensor(base, states, lambda zero, taus: merge(taus.reshape(len(taus), -1)).reshape(zero.shape))
    taus = torch.stack(
        [torch.cat([(s[name].double() - zero.double()).flatten() for name, zero in base.items()]) for s in states]
    )
    parts = merge(taus).split([value.numel() for value in base.values()])
    return {
        name: (zero.double() + part.reshape(zero.shape)).to(zero.dtype)
        for (name, zero), part in zip(base.items(), parts, strict=True)
    }
