"""The learning-rate rule that CODA-Prompt's code base gave to L2P++, CODA-Prompt and OVOR."""

from __future__ import annotations

import math
from dataclasses import replace

from clbench.interfaces import Place, Schedule


def epoch_cosine(place: Place, *, epochs: int) -> float:
    """A quarter cosine that moves once an epoch: cos(99 pi e / (200 (epochs - 1))), from 1 to cos(0.495 pi) = 0.016."""
    epoch = place.step * epochs // place.steps
    return math.cos(99 * math.pi * epoch / (200 * max(1, epochs - 1)))


def part_of(schedule: Schedule, first: int, total: int) -> Schedule:
    """`schedule` over `total` steps, for a `fit` call that makes those from `first` on."""
    return lambda place: schedule(replace(place, step=first + place.step, steps=total))
