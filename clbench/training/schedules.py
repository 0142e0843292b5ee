"""Learning-rate schedules: pure functions `Place -> multiplier` of every base rate. Nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clbench.interfaces import Place


def constant(place: Place) -> float:
    """Always 1."""
    return 1.0


def linear(place: Place, *, warmup: float = 0.0, end: float = 0.0) -> float:
    """Rise from 0 over the first `warmup` share of the steps, then fall in a line to `end`."""
    return _warm(place, warmup, lambda share: 1 - (1 - end) * share)


def cosine(place: Place, *, warmup: float = 0.0, end: float = 0.0) -> float:
    """Rise from 0 over the first `warmup` share of the steps, then half a cosine from 1 to `end`."""
    return _warm(place, warmup, lambda share: end + (1 - end) * 0.5 * (1 + math.cos(math.pi * share)))


def multistep(place: Place, *, milestones: Sequence[float] = (0.9,), gamma: float = 0.1) -> float:
    """Multiply by `gamma` at each milestone, given as a share of the experience's steps (18 of 20 epochs = 0.9)."""
    return gamma ** sum(place.step >= round(milestone * place.steps) for milestone in milestones)


def stepwise_cosine(place: Place, *, periods: int) -> float:
    """Cosine to 0 that moves once a period (torch's CosineAnnealingLR stepped once an epoch): (1 + cos(pi e / periods)) / 2."""
    period = place.step * periods // place.steps
    return 0.5 * (1 + math.cos(math.pi * period / periods))


def _warm(place: Place, warmup: float, then) -> float:
    warm = round(warmup * place.steps)
    if place.step < warm:
        return (place.step + 1) / warm
    return then((place.step - warm) / max(1, place.steps - warm))
