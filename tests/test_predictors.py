"""The three predictors: published and hand-worked values, and the sums written out naively."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.interfaces import Place, UserError
from clbench.training import schedules, schedules_infinite
from clbench.training.pretraining import scaling_laws
from clbench.training.pretraining.scaling_laws import AnnealingLaw, ContinualLaw, areas, convex_bound


def rates(schedule, steps, **options):
    return np.array([schedule(Place(0, n, steps, n), **options) for n in range(steps)])


TABLE = [  # schedule, options, best factor and bound, both times sqrt(400)
    (schedules.linear, {}, 0.991, 2.013),
    (schedules.rex, {}, 0.800, 2.034),
    (schedules.cosine, {}, 0.965, 2.068),
    (schedules.cosine, {"end": 0.1}, 0.872, 2.081),
    (schedules_infinite.infinite, {"warmup": 1 / 400}, 0.728, 2.142),
    (schedules_infinite.wsd, {"warmup": 0}, 0.537, 2.146),
    (schedules_infinite.wsd, {"warmup": 0, "shape": "linear"}, 0.507, 2.186),
    (schedules.repeated_cosine, {"warmup": 0, "end": 0, "repeats": 2}, 0.866, 2.297),
    (lambda place: (place.step + 1) ** -0.5, {}, 4.242, 2.445),
    (schedules.constant, {}, 0.364, 2.751),
]


@pytest.mark.parametrize(("schedule", "options", "factor", "bound"), TABLE)
def test_convex_bound_against_the_table(schedule, options, factor, bound):
    found = convex_bound(rates(schedule, 400, **options))
    assert found.factor * 20 == pytest.approx(factor, abs=6e-4)
    assert found.value * 20 == pytest.approx(bound, abs=6e-4)


def naive(eta, gamma, d, g):
    total = sum(eta) * gamma
    bound = d**2 / (2 * total) + gamma**2 * sum(x * x for x in eta) * g**2 / (2 * total)
    for k in range(len(eta) - 1):
        later, own = gamma * sum(eta[k + 1 :]), gamma * sum(eta[k:])
        bound += 0.5 * gamma * eta[k] / later * sum((gamma * x * g) ** 2 for x in eta[k:]) / own
    return bound


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=8), st.floats(0.3, 3), st.floats(0.3, 3))
def test_convex_bound_is_the_least_over_the_factor(eta, d, g):
    found = convex_bound(np.array(eta), d, g)
    assert naive(eta, found.factor, d, g) == pytest.approx(found.value, rel=1e-9)
    for other in (0.9, 1.1):
        assert naive(eta, found.factor * other, d, g) > found.value
    scaled = convex_bound(3 * np.array(eta), d, g)
    assert scaled.value == pytest.approx(found.value) and scaled.factor == pytest.approx(found.factor / 3)
    assert convex_bound(np.array([*eta, 0.0, 0.0]), d, g) == found


def test_areas_against_published_values():
    cosine = 2e-4 * rates(schedules.cosine, 10_000, end=0.1)
    wsd = 2e-4 * rates(schedules_infinite.wsd, 10_000, warmup=0, shape="linear", end=0.1)
    for eta, forward, fallen in ((cosine, 1.100, 0.1719), (wsd, 1.820, 0.1022)):
        assert areas(eta).forward == pytest.approx(forward, abs=5e-4)
        assert areas(eta).annealed == pytest.approx(fallen, abs=5e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2), max_size=8), st.sampled_from([0.5, 0.999, 1.0]), st.none() | st.floats(0, 2))
def test_areas_by_their_recursion(eta, fade, before):
    last, momentum, fallen = before, 0.0, 0.0
    for x in eta:
        momentum = fade * momentum + ((x if last is None else last) - x)
        fallen, last = fallen + momentum, x
    found = areas(np.array(eta), fade, before)
    assert found.forward == pytest.approx(sum(eta)) and found.annealed == pytest.approx(fallen, abs=1e-9)


def test_annealing_law_by_hand():
    law = AnnealingLaw(2.0, 0.5, 0.5, 0.3, fade=0.5)
    # S1 = 4; falls 0, 1, 0 -> m = 0, 1, 0.5 -> S2 = 1.5
    assert law(np.array([2.0, 1.0, 1.0])) == pytest.approx(2 + 0.5 / 2 - 0.3 * 1.5)
    flat, annealed = rates(schedules.constant, 20_000), rates(schedules_infinite.wsd, 20_000, warmup=0, shape="linear")
    assert scaling_laws.PRETRAINING(2e-4 * annealed) < scaling_laws.PRETRAINING(2e-4 * flat)


def test_continual_law_by_hand():
    law = ContinualLaw(2.0, 0.5, 0.5, 0.3, 0.1, 0.4, 3.0, 0.5, fade=0.5)
    before, after = np.array([2.0, 1.0]), np.array([0.5, 0.5])
    want = 2 + 0.5 / math.sqrt(4) - 0.3 * 1 - 0 + 0.4 * (1 - (1 + 3) ** -0.5)
    assert law(before, after) == pytest.approx(want)
    assert law(before, np.array([])) == pytest.approx(2 + 0.5 / math.sqrt(3) - 0.3)


def test_published_constants_give_what_the_formula_says():
    """The two fits of arXiv 2505.07796, their terms written out."""
    before = 2e-4 * rates(schedules.cosine, 10_000, end=0.1)
    after = 2e-4 * rates(schedules.cosine, 5_000, warmup=0.01, end=0.1)
    (s1, s2), (c1, c2) = areas(before), areas(after)
    old = 3.057 + 0.490 * (s1 + c1) ** -0.497 + 0.366 * (1 - (28 * c1 + 1) ** -0.189) - 0.299 * s2 - 0.298 * c2
    new = 3.024 + 0.412 * (s1 + c1) ** -0.677 - 0.666 * (1 - (5662 * c1 + 1) ** -0.146) - 0.278 * s2 - 0.324 * c2
    assert scaling_laws.OLD_DOMAIN(before, after) == pytest.approx(old)
    assert scaling_laws.NEW_DOMAIN(before, after) == pytest.approx(new)
    none = np.array([])
    assert scaling_laws.OLD_DOMAIN(before, after) > scaling_laws.OLD_DOMAIN(before, none)  # forgetting
    assert scaling_laws.NEW_DOMAIN(before, after) < scaling_laws.NEW_DOMAIN(before, none)  # adaptation


@pytest.mark.parametrize("wrong", [[], [0.0, 0.0], [1.0, -1.0], [math.nan], [math.inf], [[1.0]]])
def test_rates_that_are_none(wrong):
    for predictor in (convex_bound, AnnealingLaw(1, 1, 1, 1), lambda x: scaling_laws.OLD_DOMAIN(x, np.array([]))):
        with pytest.raises(UserError, match="a predictor needs rates"):
            predictor(np.array(wrong))
