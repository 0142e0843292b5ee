"""The learning-rate schedule of CODA-Prompt's code base, for L2P++, CODA-Prompt and OVOR."""

from __future__ import annotations

import math
from dataclasses import replace

from clbench.interfaces import Place, Schedule


def epoch_cosine(place: Place, *, epochs: int) -> float:
    """A quarter cosine that moves once an epoch, one epoch late: cos(99 pi max(0, e - 1) / (200 (epochs - 1))) in epoch e.

    The first step of the released scheduler sets the rate that is already there, so the multipliers of K epochs are
    1, 1, cos(99 pi / (200 (K - 1))), ..., cos(99 pi (K - 2) / (200 (K - 1))): the last of 20 epochs has 0.097, not 0.016.
    One epoch has 1 (the release divides by 0). Source: utils/schedulers.py of GT-RIPL/CODA-Prompt, also in jpmorganchase/ovor.
    """
    epoch = place.step * epochs // place.steps
    return math.cos(99 * math.pi * max(0, epoch - 1) / (200 * max(1, epochs - 1)))


def part_of(schedule: Schedule, first: int, total: int) -> Schedule:
    """`schedule` over `total` steps, for a `fit` call that makes those from `first` on."""
    return lambda place: schedule(replace(place, step=first + place.step, steps=total))
