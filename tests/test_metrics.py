"""Metrics by hand, by property, and what other libraries print on one matrix."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench import metrics
from clbench.metrics import compat

A = np.array([[80, 90, 10, 5], [85, 70, 15, 8], [75, 72, 60, 20], [60, 65, 75, 80]], float)
N = np.array([400, 100, 100, 100])
FIRST = np.arange(4)


@pytest.mark.parametrize(
    ("library", "name", "value"),
    [
        ("coda_prompt", "forgetting", 0.44),
        ("avalanche", "forgetting", 3.33),
        ("continuum", "forgetting", 5.67),
        ("libcontinual", "forgetting", 8.33),
        ("pilot", "forgetting", 10.67),
        ("renate", "forgetting", 11.67),
        ("mammoth", "forgetting", 16.67),
        ("avalanche", "bwt", -3.33),
        ("continuum", "bwt", -1.33),
        ("libcontinual", "bwt", -5.0),
        ("renate", "bwt", -3.33),
        ("mammoth", "bwt", -3.33),
        ("avalanche", "fwt", 41.67),
        ("continuum", "fwt", 41.67),
        ("mammoth", "fwt", 0.0),
    ],
)
def test_what_each_library_prints(library, name, value):
    assert getattr(compat, library)(A, N)[name] == pytest.approx(value, abs=0.005)


def test_renate_subtracts_the_baseline():
    assert compat.renate(A, N, init=[10] * 4)["fwt"] == pytest.approx(31.67, abs=0.005)
    assert compat.avalanche(A, N, init=[10] * 4)["fwt"] == pytest.approx(31.67, abs=0.005)


def test_by_hand():
    a = A / 100
    low = np.where(np.tril(np.ones((4, 4))) > 0, a, np.nan)
    for matrix in (a, low):
        assert metrics.last_macro(matrix, FIRST) == pytest.approx(0.70)
        assert metrics.last_micro(matrix, N, FIRST) == pytest.approx(46 / 70)
        assert metrics.step_macro(matrix, FIRST) == pytest.approx((0.8 + 0.775 + 0.69 + 0.70) / 4)
        assert metrics.step_micro(matrix, N, FIRST) == pytest.approx((0.8 + 0.82 + 0.72 + 46 / 70) / 4)
        assert metrics.forgetting(matrix, FIRST) == pytest.approx((0.25 + 0.07 - 0.15) / 3)
        assert metrics.forgetting_diagonal(matrix, FIRST) == pytest.approx((0.20 + 0.05 - 0.15) / 3)
        assert metrics.bwt(matrix, FIRST) == pytest.approx(-0.10 / 3)
        assert metrics.bwt_all(matrix, FIRST) == pytest.approx((5 - 5 - 20 + 2 - 5 + 15) / 600)
        assert metrics.plasticity(matrix, FIRST) == pytest.approx((80 + 70 + 60 + 80) / 400)
        assert metrics.worst(matrix, FIRST) == pytest.approx(0.60)
    assert metrics.fwt_zeroshot(a, FIRST) == pytest.approx((90 + 15 + 20) / 300)
    assert metrics.fwt_init(a, FIRST, [0.1] * 4) == pytest.approx((80 + 5 + 10) / 300)
    assert math.isnan(metrics.fwt_zeroshot(low, FIRST))
    assert metrics.intransigence(a, FIRST, [0.9] * 4) == pytest.approx((10 + 20 + 30 + 10) / 400)


def test_one_experience_has_nothing_to_forget():
    one = np.array([[0.5]])
    assert (
        metrics.last_macro(one, [0]) == 0.5 and math.isnan(metrics.forgetting(one, [0])) and math.isnan(metrics.bwt(one, [0]))
    )


def test_more_sets_than_experiences():
    a = np.array([[0.8, 0.6, np.nan], [0.7, 0.6, 0.9]])
    first = [0, 0, 1]
    assert metrics.macro(a, first) == pytest.approx([0.7, 2.2 / 3])
    assert metrics.forgetting(a, first) == pytest.approx(0.05)


def test_counts_to_accuracy():
    a = metrics.accuracy([[8, None], [4, 5]], [10, 20])
    np.testing.assert_array_equal(a, [[0.8, np.nan], [0.4, 0.25]])


@st.composite
def matrices(draw):
    t = draw(st.integers(2, 6))
    cells = draw(st.lists(st.integers(0, 50), min_size=t * t, max_size=t * t))
    n = draw(st.lists(st.integers(50, 90), min_size=t, max_size=t))
    return np.array(cells, float).reshape(t, t) / np.array(n), np.array(n)


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_properties(case):
    a, n = case
    first = np.arange(len(a))
    assert metrics.forgetting(a, first) >= metrics.forgetting_diagonal(a, first) - 1e-12
    assert metrics.bwt(a, first) == pytest.approx(-metrics.forgetting_diagonal(a, first))
    for f in (metrics.last_macro, metrics.step_macro, metrics.triangle_macro, metrics.plasticity):
        assert a.min() - 1e-12 <= f(a, first) <= a.max() + 1e-12
    same = np.full(len(a), 7)
    assert metrics.last_micro(a, same, first) == pytest.approx(metrics.last_macro(a, first))
    assert metrics.step_micro(a, same, first) == pytest.approx(metrics.step_macro(a, first))
    rising = np.sort(a, axis=0)
    assert metrics.forgetting(rising, first) <= 1e-12
    assert metrics.forgetting(a, first) == pytest.approx(compat.continuum(a, n)["forgetting"])
    assert 100 * metrics.forgetting(a, first) <= compat.pilot(100 * a, n)["forgetting"] + 0.01
    assert compat.renate(a, n)["forgetting"] >= compat.continuum(a, n)["forgetting"] - 1e-12


@settings(max_examples=40, deadline=None)
@given(matrices(), st.randoms(use_true_random=False))
def test_the_order_of_equal_sets_does_not_matter(case, random):
    a, n = case
    first = np.zeros(len(a), int)
    order = list(range(len(a)))
    random.shuffle(order)
    for f in (metrics.last_macro, metrics.step_macro, metrics.triangle_macro, metrics.plasticity, metrics.worst):
        assert f(a[:, order], first) == pytest.approx(f(a, first))
    for f in (metrics.forgetting, metrics.forgetting_diagonal, metrics.bwt, metrics.bwt_all):
        assert f(a[:, order], first) == pytest.approx(f(a, first))
    assert metrics.step_micro(a[:, order], n[order], first) == pytest.approx(metrics.step_micro(a, n, first))


def test_what_never_falls_is_not_forgotten():
    level = np.array([[0.5, np.nan], [0.5, 0.9]])
    assert metrics.forgetting(level, [0, 1]) == 0.0 and metrics.bwt(level, [0, 1]) == 0.0


@pytest.mark.parametrize("library", ["pilot", "mammoth", "avalanche", "continuum", "libcontinual", "renate", "coda_prompt"])
def test_libraries_on_one_experience_and_without_zero_shot_cells(library):
    values = getattr(compat, library)(compat.percent([[5]], [10]), [10])
    assert values.get("last", 50.0) == 50.0 and math.isnan(values["forgetting"])
    counts = [[8, None, None], [6, 9, None], [5, 9, 7]]
    values = getattr(compat, library)(compat.percent(counts, [10] * 3), [10] * 3)
    needs_zero_shot = library in ("mammoth", "renate")
    assert math.isnan(values["forgetting"]) == needs_zero_shot and math.isnan(values.get("fwt", math.nan))


def test_pilot_rounds_percent_before_averaging():
    values = compat.pilot(compat.percent([[1, None], [0, 2]], [3, 3]), [3, 3])
    assert values["average"] == pytest.approx((33.33 + 33.33) / 2) and values["forgetting"] == pytest.approx(33.33)


def test_summary_names_what_the_counts_allow():
    entry = {"correct": [[8, None], [6, 9]], "n": [10, 10], "first_seen": [0, 1], "correct_masked": [[9, None], [10, 9]]}
    values = metrics.summary(entry)
    assert values["last_masked_macro"] == pytest.approx(0.95) and "last_top5_micro" not in values
    assert values["forgetting"] == pytest.approx(0.2) and math.isnan(values["fwt_zeroshot"])
    assert metrics.summary({"sum_loss": [[1.0]], "n": [1], "first_seen": [0]}) == {}
