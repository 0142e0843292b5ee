"""Learning-rate schedules: pure functions `Place -> multiplier` of every base rate. Nothing to save, nothing to restore.

A share is one of the experience's steps. Warm-up is (n + 1) / warm in update n of this file, so no update is without effect;
`schedules_infinite` counts from 0 as its sources do. Values that make no sense raise `UserError`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from clbench.interfaces import Place, UserError


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


def constant_after_warmup(place: Place, *, warmup: float = 0.01) -> float:
    """Rise from 0 over the first `warmup` share of the first experience, then always 1: for averages in place of anneals."""
    shares(warmup=warmup)
    warm = round(warmup * place.steps)
    return min(1.0, (place.global_step + 1) / max(1, warm))


def repeated_cosine(
    place: Place, *, warmup: float = 0.01, end: float = 0.1, rewarm: Literal["zero", "end"] = "zero", repeats: int = 1
) -> float:
    """Re-warm and re-decay: warm-up and half a cosine to `end`, `repeats` times in every experience.

    rewarm  where a later warm-up starts: from 0 (Ibrahim et al. 2024), or from `end`, where the cosine before it ended (the
            cyclic schedule in the code of Singh et al. 2025). `warmup` is a share of a cycle.
    """
    shares(warmup=warmup, end=end)
    if repeats < 1 or repeats > place.steps:
        raise UserError(f"schedule.repeats must be from 1 to the number of steps, {place.steps}, got {repeats}")
    cycle = min(place.step * repeats // place.steps, repeats - 1)
    first, last = (-(-i * place.steps // repeats) for i in (cycle, cycle + 1))
    inside = Place(place.experience, place.step - first, last - first, place.global_step)
    warm = round(warmup * inside.steps)
    later = cycle > 0 or place.experience > 0
    if inside.step < warm and later and rewarm == "end":
        return end + (1 - end) * (inside.step + 1) / warm
    return cosine(inside, warmup=warmup, end=end)


def autoregressive_cosine(place: Place, *, warmup: float = 0.01, end: float = 0.0) -> float:
    """TiC-LM's "AR" (Li et al. 2025): each experience has a warm-up and a cosine of its own, with a falling peak.

    The peak is what one cosine over all steps so far and those of this experience would be at its start: 1, then for equal
    experiences (1 + end) / 2, ...
    """
    shares(warmup=warmup, end=end)
    before = place.global_step - place.step
    peak = end + (1 - end) * 0.5 * (1 + math.cos(math.pi * before / max(1, before + place.steps)))
    warm = round(warmup * place.steps)
    if place.step < warm:
        return peak * (place.step + 1) / warm
    share = (place.step - warm) / max(1, place.steps - warm)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * share))


def inverse_sqrt(
    place: Place, *, warmup: float = 0.01, scale: float = 0.05, end: float = 0.0, anneal: float = 0.0, restart: bool = False
) -> float:
    """1 / sqrt(tau), tau = (n - warm + s) / s, not below `end`: for runs whose length is unknown.

    scale    s as a share of the experience's steps
    anneal   share at the end of each experience in which it falls in a line to `end`
    restart  false: n goes on from experience to experience, true: each experience starts anew
    """
    shares(warmup=warmup, end=end, anneal=anneal)
    if scale <= 0:
        raise UserError(f"schedule.scale must be above 0, got {scale}")
    warm, stretch = round(warmup * place.steps), scale * place.steps
    before = 0 if restart else place.global_step - place.step

    def rate(n: int) -> float:
        if n < warm:
            return (n + 1) / warm
        return max(end, ((n - warm + stretch) / stretch) ** -0.5)

    start = round((1 - anneal) * place.steps)
    if place.step <= start:
        return rate(before + place.step)
    top = rate(before + start)
    return top + (end - top) * (place.step - start) / (place.steps - start)


def rex(place: Place, *, warmup: float = 0.0, beta: float = 0.5) -> float:
    """(1 - p) / ((1 - beta) + beta (1 - p)) over the share p after warm-up: above linear everywhere (Chen et al. 2022)."""
    shares(warmup=warmup)
    if not 0 <= beta < 1:
        raise UserError(f"schedule.beta must be at least 0 and below 1, got {beta}")
    return _warm(place, warmup, lambda share: (1 - share) / ((1 - beta) + beta * (1 - share)))


def exponential(place: Place, *, warmup: float = 0.0, end: float = 0.01, gamma: float | None = None) -> float:
    """end^p over the share p after warm-up: the rate falls by the same factor in every update; `end` 0.5 is that of gpt-neox.

    gamma  this factor itself (torch's ExponentialLR stepped once an update), in place of `end`
    """
    shares(warmup=warmup, end=end)
    if gamma is not None:
        if not 0 < gamma <= 1:
            raise UserError(f"schedule.gamma must be above 0 and at most 1, got {gamma}")
        return _warm(place, warmup, lambda _: gamma ** (place.step - round(warmup * place.steps)))
    if end == 0:
        raise UserError("schedule.end must be above 0: an exponential decay never gets to 0")
    return _warm(place, warmup, lambda share: end**share)


def one_cycle(
    place: Place, *, warmup: float = 0.3, start: float = 0.04, end: float = 4e-6, shape: Literal["cosine", "linear"] = "cosine"
) -> float:
    """From `start` up to 1 in update warmup N - 1 of N, then down to `end` in the last one (Smith and Topin 2019).

    The defaults and the places are those of torch's OneCycleLR (start = 1 / div_factor, end = start / final_div_factor, two
    phases). Its momentum, which moves the other way, stays where it is here.
    """
    shares(warmup=warmup, start=start, end=end)
    if warmup == 1:
        raise UserError("schedule.warmup must be below 1: a cycle comes down again")
    peak, last = warmup * place.steps - 1, place.steps - 1
    step = min(place.step, last)
    low, share = (start, 1 - step / peak) if step < peak else (end, (step - peak) / (last - peak))
    return low + (1 - low) * ((1 - share) if shape == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


def table(place: Place, *, values: Sequence[float] = (1.0, 0.0)) -> float:
    """Multipliers at equal distances from the first update to the end of the experience, in straight lines between them.

    What `clbench schedule fit RECORD --refine` writes. The default is linear decay.
    """
    if len(values) < 2 or not all(0 <= value < math.inf for value in values) or max(values) == 0:
        raise UserError("schedule.values must be two numbers or more from 0, one of them above 0")
    at = min(place.step / place.steps, 1.0) * (len(values) - 1)
    low = min(int(at), len(values) - 2)
    return values[low] + (values[low + 1] - values[low]) * (at - low)


def power(
    place: Place,
    *,
    batch: int,  # sequences in a step
    context: int,  # tokens in a sequence
    peak: float = 0.02,  # the learner's base rate
    a: float = 4.0,
    b: float = -0.51,
    warmup: float = 0.01,
    anneal: float = 0.1,
    end: float = 0.01,
    sequence: int | None = None,  # tokens of the sequences that the law counts
) -> float:
    """min(1, batch a n^b / peak) after n tokens (Shen et al. 2024, arXiv 2408.13359), then an exponential anneal to `end`.

    batch, context  sequences in a step and tokens in a sequence
    peak            the learner's base rate, 0.02 in the paper, because the law gives rates and a schedule gives multipliers
    sequence        the law was fitted with sequences of 4096 tokens: 4096 counts the batch in such; null: as it is
    """
    shares(warmup=warmup, anneal=anneal, end=end)
    if sequence is not None and sequence < 1:
        raise UserError(f"schedule.sequence must be at least 1 or null, got {sequence}")
    size = batch if sequence is None else batch * context / sequence
    warm, start = round(warmup * place.steps), round((1 - anneal) * place.steps)
    before = place.global_step - place.step

    def rate(step: int) -> float:
        if before + step < warm:
            return (before + step + 1) / warm
        return min(1.0, size * a * max(1, (before + step) * batch * context) ** b / peak)

    if place.step <= start:
        return rate(place.step)
    if end == 0:
        raise UserError("schedule.end must be above 0: an exponential anneal never gets to 0")
    return rate(start) * (end / rate(start)) ** ((place.step - start) / (place.steps - start))


def shares(**values: float) -> None:
    """`UserError` unless every value lies from 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"schedule.{name} must lie from 0 to 1, got {value}")


def _warm(place: Place, warmup: float, then) -> float:
    warm = round(warmup * place.steps)
    if place.step < warm:
        return (place.step + 1) / warm
    return then((place.step - warm) / max(1, place.steps - warm))
