"""Infinite schedules: a constant phase of open length, and anneals that can be branches.

Pure functions `Place -> multiplier`. Update n uses the value at n with a warm-up of n / warm, as in the papers and in gpt-neox:
the first update of a run has rate 0. With `learner.branch` equal to `anneal` the anneal is thrown away after its evaluation;
with `learner.branch=0` the next experience goes on from the annealed weights. Values that make no sense raise `UserError`.
"""

from __future__ import annotations

import math
from typing import Literal

from clbench.interfaces import Place, UserError
from clbench.training.schedules import shares

Anneal = Literal["linear", "sqrt", "square", "cosine", "exponential", "inverse"]
CoolDown = Literal["cosine", "inverse_sqrt", "linear"]


def annealed(start: float, end: float, share: float, shape: Anneal) -> float:
    """On the way from `start` to `end`, after `share` of it.

    linear, cosine  as they say
    sqrt, square    1 - sqrt(p), 1 - p^2 (Haegele et al. 2024)
    exponential     start (end / start)^p (infinite schedules, Power)
    inverse         1 / (p / end + (1 - p) / start) (WSD-S, Wen et al. 2024)
    """
    if shape in ("exponential", "inverse"):
        if end <= 0:
            raise UserError(f"schedule.end must be above 0: an anneal of shape {shape} never gets to 0")
        if shape == "exponential":
            return start * (end / start) ** share
        return 1 / (share / end + (1 - share) / start)
    left = {
        "linear": 1 - share,
        "sqrt": 1 - math.sqrt(share),
        "square": 1 - share**2,
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
    }
    if shape not in left:
        raise UserError(f"schedule.shape must be one of {', '.join(left)}, exponential, inverse; got {shape!r}")
    return end + (start - end) * left[shape]


def wsd(
    place: Place,
    *,
    warmup: float = 0.01,
    anneal: float = 0.2,  # what is annealed; the branch
    shape: Anneal = "sqrt",
    end: float = 0.0,
    rewarm: bool = False,  # warm up in later experiences too
    periods: int = 1,  # anneals in each experience
) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): 1, then in the last `anneal` share of a period down to `end`.

    rewarm   whether later experiences warm up too; the first period of the run always does
    periods  in each experience: with more than one, or without a branch, training goes on from annealed weights at the full
             rate, which is WSD-S (Wen et al. 2024, arXiv 2410.05192)
    """
    shares(warmup=warmup, anneal=anneal, end=end)
    if periods < 1 or periods > place.steps:
        raise UserError(f"schedule.periods must be from 1 to the number of steps, {place.steps}, got {periods}")
    warm = round(warmup * place.steps)
    if place.step < warm and (place.experience == 0 or rewarm):
        return place.step / warm
    period = min(place.step * periods // place.steps, periods - 1)
    first, last = (-(-i * place.steps // periods) for i in (period, period + 1))
    start = first + round((1 - anneal) * (last - first))
    if place.step <= start:
        return 1.0
    return annealed(1.0, end, (place.step - start) / (last - start), shape)


def cosine_infinite(place: Place, *, warmup: float = 0.01, cooldown: float = 0.9, end: float = 0.1) -> float:
    """In the first experience warm-up and half a cosine that reaches `end` at the share `cooldown`; then `end` for ever."""
    shares(warmup=warmup, cooldown=cooldown, end=end)
    if place.experience > 0:
        return end
    warm, low = _phases(place, warmup, cooldown, 0.0)
    if place.step < warm:
        return place.step / warm
    return annealed(1.0, end, min(1.0, (place.step - warm) / max(1, low - warm)), "cosine")


def infinite(
    place: Place,
    *,
    warmup: float = 0.01,
    cooldown: float = 0.6,  # share at which the cool-down of the first experience ends
    constant: float = 0.55,
    anneal: float = 0.15,  # what is annealed; the branch
    end: float = 0.1,
    shape: CoolDown = "cosine",  # of the cool-down: cosine | inverse_sqrt | linear
    scale: float = 10.0,  # of inverse_sqrt
) -> float:
    """Infinite schedule (Ibrahim et al. 2024, arXiv 2403.08763): warm-up, cool-down, constant phase, exponential anneal.

    In the first experience the rate rises to 1, falls to `constant` at the share `cooldown`, and stays; in later ones it is
    `constant` from the start (Singh et al. 2025). In the last `anneal` share of each it falls to `end`.

    shape  of the cool-down: "cosine"; "inverse_sqrt": 1 / sqrt(1 + scale u), stretched to end at `constant`; "linear"
    Differs from the authors' code, where every phase ends later by the warm-up.
    """
    shares(warmup=warmup, cooldown=cooldown, constant=constant, anneal=anneal, end=end)
    warm, low = _phases(place, warmup, cooldown, anneal)
    stop = round((1 - anneal) * place.steps)
    if place.step > stop:
        return annealed(constant, end, (place.step - stop) / (place.steps - stop), "exponential")
    if place.experience > 0 or place.step > low:
        return constant
    if place.step < warm:
        return place.step / warm
    share = (place.step - warm) / max(1, low - warm)
    if shape == "inverse_sqrt":
        return 1 + (constant - 1) * ((1 + scale * share) ** -0.5 - 1) / ((1 + scale) ** -0.5 - 1)
    if shape not in ("cosine", "linear"):
        raise UserError(f"schedule.shape must be cosine, inverse_sqrt or linear, got {shape!r}")
    return annealed(1.0, constant, share, shape)


def _phases(place: Place, warmup: float, cooldown: float, anneal: float) -> tuple[int, int]:
    """Steps at which warm-up and cool-down end."""
    if not warmup <= cooldown <= 1 - anneal + 1e-12:
        text = f"warmup={warmup}, cooldown={cooldown}, anneal={anneal}"
        raise UserError(f"schedule: the phases must follow each other, warmup <= cooldown <= 1 - anneal; got {text}")
    return round(warmup * place.steps), round(cooldown * place.steps)
