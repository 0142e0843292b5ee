"""Three closed-form predictors of the loss of a schedule. Imports no torch.

    convex_bound   how far the last iterate can be from the best, for a convex problem; needs nothing but the rates
    annealing_law  loss as a function of the sum of the rates and of how much they fell; constants are fitted to runs
    continual_law  the same, with a term for the shift to another domain

Rates are those of updates 1..T, a plain array. Trailing zeros are updates that do nothing and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clbench.interfaces import UserError


class Bound(NamedTuple):
    """Best factor on the rates, and the bound with it."""

    factor: float
    value: float


def convex_bound(rates: np.ndarray, distance: float = 1.0, gradient: float = 1.0) -> Bound:
    """Bound on the loss of the last iterate of subgradient descent, above the least loss, at the best factor on `rates`.

    With rates eta_1..eta_T times gamma, distance D to the solution, gradients of norm at most G:
        D^2 / (2 gamma S_1) + gamma G^2 (Q_1 / (2 S_1) + 1/2 sum_{k<T} eta_k / S_{k+1} * Q_k / S_k),
    S_k and Q_k the sums of eta_t and eta_t^2 over t >= k; least at `factor`. Defazio et al. 2023 (arXiv 2310.07831, theorem
    10); Schaipp et al. 2025 (arXiv 2501.18965), who find the same order of schedules as in language models. Use ratios: it is
    an upper bound, of a stationary problem: it knows nothing of shifts between experiences and of forgetting.
    """
    eta = _checked(rates)
    sums, squares = (np.cumsum(x[::-1])[::-1] for x in (eta, eta**2))
    start = distance**2 / (2 * sums[0])
    later = 0.5 * float((eta[:-1] / sums[1:] * squares[:-1] / sums[:-1]).sum())
    noise = gradient**2 * (squares[0] / (2 * sums[0]) + later)
    return Bound(float(np.sqrt(start / noise)), float(2 * np.sqrt(start * noise)))


class Areas(NamedTuple):
    """Sum of the rates, and the sum of their falls, each fading with the steps after it."""

    forward: float
    annealed: float


def areas(rates: np.ndarray, fade: float = 0.999, before: float | None = None) -> Areas:
    """S1 = sum of eta_i; S2 = sum of m_i with m_i = fade m_{i-1} + (eta_{i-1} - eta_i), m_0 = 0.

    before  the rate that eta_1 fell from; None: eta_1 itself. A rise counts as a negative fall.
    """
    eta = np.asarray(rates, float)
    if not len(eta):
        return Areas(0.0, 0.0)
    falls = -np.diff(eta, prepend=eta[0] if before is None else before)
    left = np.arange(len(eta), 0, -1)  # a fall counts in its own step and, fading, in all later ones
    weight = left if fade == 1 else (1 - fade**left) / (1 - fade)
    return Areas(float(eta.sum()), float(falls @ weight))


@dataclass(frozen=True)
class AnnealingLaw:
    """L = base + scale S1^-power - gain S2 (Tissue et al. 2024, arXiv 2408.11029); rates in absolute units."""

    base: float
    scale: float
    power: float
    gain: float
    fade: float = 0.999

    def __call__(self, rates: np.ndarray) -> float:
        """Loss after the updates with these rates."""
        forward, fallen = areas(_checked(rates), self.fade)
        return self.base + self.scale * forward**-self.power - self.gain * fallen


@dataclass(frozen=True)
class ContinualLaw:
    """Loss on one domain after pre-training and continual pre-training on another (Wang et al. 2025, arXiv 2505.07796).

    L = base + scale (S1_pt + S1_cpt)^-power - gain_before S2_pt - gain_after S2_cpt
        + shift (1 - (1 + speed S1_cpt)^-decay)
    shift is above 0 for the old domain (forgetting) and below 0 for the new one (adaptation).
    """

    base: float
    scale: float
    power: float
    gain_before: float
    gain_after: float
    shift: float
    speed: float
    decay: float
    fade: float = 0.999

    def __call__(self, before: np.ndarray, after: np.ndarray) -> float:
        """Loss after the rates `before` (pre-training) and `after` (continual pre-training, may be empty)."""
        first = areas(_checked(before), self.fade)
        second = areas(np.asarray(after, float), self.fade)
        shifted = self.shift * (1 - (1 + self.speed * second.forward) ** -self.decay)
        level = self.base + self.scale * (first.forward + second.forward) ** -self.power
        return level - self.gain_before * first.annealed - self.gain_after * second.annealed + shifted


# Published fits for 106 M parameters, FineWeb -> Knowledge-Pile, rates up to 2e-4, 4 M tokens a step (arXiv 2505.07796).
OLD_DOMAIN = ContinualLaw(3.057, 0.490, 0.497, 0.299, 0.298, 0.366, 28.0, 0.189)
NEW_DOMAIN = ContinualLaw(3.024, 0.412, 0.677, 0.278, 0.324, -0.666, 5662.0, 0.146)
PRETRAINING = AnnealingLaw(OLD_DOMAIN.base, OLD_DOMAIN.scale, OLD_DOMAIN.power, OLD_DOMAIN.gain_before)


def _checked(rates: np.ndarray) -> np.ndarray:
    """Rates [T] as float64 without trailing zeros; `UserError` where nothing is left or one is negative."""
    eta = np.asarray(rates, float)
    if eta.ndim != 1 or not np.isfinite(eta).all() or (eta < 0).any() or not (eta > 0).any():
        raise UserError("a predictor needs rates from 0, finite, and at least one above 0")
    return eta[: np.flatnonzero(eta)[-1] + 1]
