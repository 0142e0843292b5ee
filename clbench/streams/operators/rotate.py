"""Rotated images: the same images under another angle in every experience."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.operators.copies import chosen, copied, whole, with_transforms
from clbench.streams.scenario import Scenario
from clbench.streams.transforms import INTERPOLATIONS

DRAWS = ("evenly", "bins", "uniform")


def rotate(
    stream: Scenario,
    experiences: int | None = 10,
    angles: Sequence[float] | None = None,
    draw: Literal["evenly", "bins", "uniform"] = "evenly",
    largest: float = 180.0,
    seed: int = 0,
    interpolation: Literal["nearest", "bilinear"] = "nearest",
) -> Scenario:
    """All images in every experience, turned by an angle of its own ("Rotated MNIST").

    experiences    so many, each with all samples of the stream and an evaluation set (without it 10, or as many as angles);
                   null: those that there are
    angles         in degrees, counter-clockwise, one for each experience; or drawn:
    draw           evenly: 0, M / T, 2 M / T, ... of M = `largest` and T experiences. bins: one uniform draw in each of these T
                   bins (GEM, Lopez-Paz & Ranzato 2017). uniform: T draws of [0, M), in no order (Mammoth)
    seed           of the draws, to a hundredth of a degree
    interpolation  Pillow's; nearest is what Mammoth, GEM and Avalanche use. The size is kept, what lies outside is black
    """
    chosen(draw, "rotate.draw", DRAWS)
    chosen(interpolation, "rotate.interpolation", INTERPOLATIONS)
    whole(seed, "rotate.seed")
    if seed and (draw == "evenly" or angles is not None):
        raise UserError(f"rotate.seed={seed} has no effect: no angle is drawn")
    if isinstance(largest, bool) or not isinstance(largest, int | float) or not 0 < largest <= 360:
        raise UserError(f"rotate.largest must be in (0, 360], got {largest!r}")
    if experiences is not None:
        number = whole(experiences, "rotate.experiences", 1) if angles is None else len(_listed(angles))
        stream = copied(stream, number, "rotated", "rotate")
    number = len(stream.manifest.experiences)
    turned = _drawn(number, draw, float(largest), seed) if angles is None else _listed(angles)
    if len(turned) != number:
        raise UserError(f"rotate.angles must name one angle for each of the {number} experiences, got {len(turned)}")
    steps = [({"rotate": {"degrees": a, "interpolation": interpolation}},) if a % 360 else () for a in turned]
    return with_transforms(stream, steps)


def _listed(angles: Sequence[float]) -> list[float]:
    if isinstance(angles, str) or not isinstance(angles, Sequence) or not angles:
        raise UserError(f"rotate.angles must be a list of degrees, got {angles!r}")
    for angle in angles:
        if isinstance(angle, bool) or not isinstance(angle, int | float) or not -360 <= angle <= 360:
            raise UserError(f"rotate.angles must be degrees in -360..360, got {angle!r}")
    return [float(angle) for angle in angles]


def _drawn(number: int, draw: str, largest: float, seed: int) -> list[float]:
    if draw == "evenly":
        places = np.arange(number) / number
    else:
        places = rng.uniform(rng.key("rotate", seed), np.arange(number))
        places = (np.arange(number) + places) / number if draw == "bins" else places
    return [round(float(place) * largest, 2) for place in places]
