"""Statistics over runs: against scipy, by hand, by property, and where there is too little to say."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clbench.report import statistics
from clbench.report.statistics import Split

NUMBERS = st.floats(-1, 1, allow_nan=False).map(lambda v: round(v, 6))


@pytest.mark.parametrize("n", range(1, 20))
def test_interquartile_mean_is_scipys(n):
    values = np.random.default_rng(n).normal(size=(3, n))
    np.testing.assert_allclose(statistics.iqm(values), stats.trim_mean(values, 0.25, axis=1))


def test_interquartile_mean_by_hand():
    assert statistics.iqm([100, 2, 3, -50]) == 2.5 and statistics.iqm([1, 2, 6]) == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=9))
def test_mean_std_and_t_test(values):
    mean, std = statistics.mean_std(values)
    assert mean == pytest.approx(np.mean(values)) and std == pytest.approx(np.std(values, ddof=1))
    if std > 1e-9:
        assert statistics.t_test(values)[1] == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=1e-9)


def test_without_spread_or_with_one_pair():
    assert statistics.t_test([0.1, 0.1]) == (pytest.approx(0.1), None) and statistics.t_test([0.0, 0.0]) == (0.0, 1.0)
    assert statistics.t_test([0.3]) == (0.3, None) and statistics.t_test([]) == (None, None)
    one, none = statistics.paired([[0.5]]), statistics.paired([])
    assert (one.n, one.mean, one.low, one.p_t) == (1, 0.5, None, None) and (none.n, none.mean) == (0, None)
    assert statistics.paired([[0.1, 0.1, 0.1]]).level and not statistics.paired([[0.1, 0.2]]).level


@settings(max_examples=25, deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=7))
def test_sign_flip_counts_every_pattern(values):
    def statistic(x, axis):
        return np.mean(x, axis=axis)

    found = statistics.sign_flip(values)
    seen = abs(sum(values)) - 1e-12
    patterns = list(itertools.product((1, -1), repeat=len(values)))
    assert found == sum(abs(math.fsum(s * v for s, v in zip(p, values, strict=True))) >= seen for p in patterns) / len(patterns)
    theirs = stats.permutation_test((np.array(values),), statistic, permutation_type="samples", n_resamples=np.inf).pvalue
    assert found <= 1 and (
        found == pytest.approx(theirs, abs=1e-9) or 0 in np.abs(values) or len(set(np.abs(values))) < len(values)
    )


def test_sign_flip_of_many_is_drawn_and_repeats():
    values = np.random.default_rng(0).normal(0.3, 1, 40)
    assert statistics.sign_flip(values) == statistics.sign_flip(values)
    assert statistics.sign_flip(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)
    assert statistics.sign_flip([0.1, 0.2, 0.3]) == 0.25 == statistics.paired([[0.1, 0.2, 0.3]]).p_least


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0] and statistics.holm([]) == [] and statistics.holm([None]) == [None]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_and_keeps_order(ps):
    out = statistics.holm(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, out, strict=True))
    assert [q for _, q in sorted(zip(ps, out, strict=True))] == sorted(out)


def test_bootstrap_against_scipy_on_one_stratum():
    values = np.random.default_rng(1).normal(size=12)
    low, high = statistics.bootstrap([values.tolist()], resamples=20000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=0).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert low < values.mean() < high


def test_bootstrap_draws_each_stratum_from_itself():
    """Two orders far apart, no spread within: an unstratified bootstrap would give a wide interval, this gives none."""
    assert statistics.bootstrap([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]) == (0.5, 0.5)
    low, high = statistics.bootstrap([[0.0], [1.0], [0.2], [0.9]])  # a seed for each order: they are one stratum together
    assert low < 0.4 and high > 0.6
    assert statistics.bootstrap([[0.5]]) is None and statistics.bootstrap([]) is None


def test_bootstrap_repeats_and_leaves_the_global_generator_alone():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = statistics.bootstrap([[1.0, 2.0, 5.0], [2.0, 3.0]], statistics.iqm)
    assert first == statistics.bootstrap([[1.0, 2.0, 5.0], [2.0, 3.0]], statistics.iqm)
    assert first != statistics.bootstrap([[1.0, 2.0, 5.0], [2.0, 3.0]], statistics.iqm, seed=1)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_probability_of_improvement_is_the_u_statistic():
    x, y = [0.9, 0.8, 0.7, 0.7], [0.7, 0.6, 0.85]
    assert statistics.improvement([x], [y]) == pytest.approx(stats.mannwhitneyu(x, y).statistic / 12)
    assert statistics.improvement([[1, 1], [0]], [[1], [1, 1]]) == 0.25  # (0.5 + 0) / 2
    assert statistics.improvement([], []) is None and statistics.improvement_interval([[1]], [[0]]) is None
    low, high = statistics.improvement_interval([x], [y])
    assert 0 <= low < statistics.improvement([x], [y]) < high <= 1


def test_profile_by_hand():
    scores = {"a": [0.2, 0.6, 0.9, 0.95], "b": [0.7]}
    assert statistics.profile(scores, [0.1, 0.5, 0.7, 0.99]) == [1.0, (0.75 + 1) / 2, (0.5 + 0) / 2, 0.0]
    assert math.isnan(statistics.profile({}, [0.5])[0])


def test_variance_split_by_hand_and_against_scipy():
    groups = [[1.0, 3.0], [5.0, 7.0], [9.0, 11.0]]
    split = statistics.variance_split(groups)
    assert split == Split(pytest.approx(15.0), pytest.approx(2.0), False, pytest.approx(15 / 17), 3, 6)
    f = (2 * split.order + split.noise) / split.noise  # MS_between / MS_within
    assert f == pytest.approx(stats.f_oneway(*groups).statistic)
    uneven = statistics.variance_split([[1.0, 2.0, 3.0], [4.0], [2.0, 6.0]])
    n0 = (6 - 14 / 6) / 2
    f = (n0 * uneven.order + uneven.noise) / uneven.noise
    assert not uneven.truncated or f <= stats.f_oneway([1, 2, 3], [4], [2, 6]).statistic + 1
    assert uneven.truncated or f == pytest.approx(stats.f_oneway([1, 2, 3], [4], [2, 6]).statistic)


def test_variance_split_says_what_it_cannot():
    negative = statistics.variance_split([[0.0, 1.0], [0.1, 0.9]])
    assert negative.truncated and negative.order == 0 and negative.share == 0
    assert "one class order" in statistics.variance_split([[1.0, 2.0]])
    assert "one seed" in statistics.variance_split([[1.0], [2.0]])
    assert statistics.variance_split([[1.0, 1.0], [1.0, 1.0]]).share is None


def test_variance_split_recovers_what_was_put_in():
    random = np.random.default_rng(0)
    groups = [(random.normal(0, 3) + random.normal(0, 1, 20)).tolist() for _ in range(400)]
    split = statistics.variance_split(groups)
    assert split.order == pytest.approx(9, rel=0.15) and split.noise == pytest.approx(1, rel=0.05)


def test_intervals_cover_as_often_as_they_say():
    """With 30 runs the percentile interval holds the true mean in about 95 of 100 cases."""
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        low, high = statistics.bootstrap([random.normal(size=15).tolist(), random.normal(size=15).tolist()])
        hits += low <= 0 <= high
    assert 0.89 <= hits / 300 <= 0.98


def test_verdicts():
    assert statistics.verdict(0.1, 0.01) == "better" and statistics.verdict(-0.1, 0.01) == "worse"
    assert statistics.verdict(0.1, 0.05) == "not distinguishable" and statistics.verdict(0.1, None) == "too few seeds"


def test_identical_runs_are_one_observation():
    """Five copies of a deterministic run would give p = 0 (t-test) and 0.06 (sign flips), and an interval without width."""
    same = statistics.paired([[0.2] * 3, [0.2] * 2])
    assert (same.n, same.mean, same.level, same.p_t, same.p_flip, same.low, same.high) == (5, 0.2, True, None, None, None, None)
    assert statistics.verdict(same.mean, same.p_t, same.level) == "no spread"
    equal = statistics.paired([[0.0] * 5])
    assert equal.level and equal.p_t == equal.p_flip == 1.0 and statistics.verdict(0.0, 1.0, True) == "not distinguishable"
    assert statistics.sign_flip([0.2] * 5) == 2 / 2**5


@dataclass
class Result:
    seed: int
    values: dict[str, float]


def test_against_best_of_deterministic_learners():
    def side(*values):
        return {"m_mean": sum(values) / len(values)}, [Result(s, {"m": v}) for s, v in enumerate(values)]

    field = [side(0.9, 0.9, 0.9), side(0.5, 0.5, 0.5), side(0.9, 0.9, 0.9), side(0.1, 0.2, 0.15), side(0.3)]
    statistics.against_best(field, "m")
    p = stats.ttest_1samp([-0.8, -0.7, -0.75], 0).pvalue
    assert [(row["vs_best"], row.get("vs_best_p")) for row, _ in field] == [
        ("best", None),
        ("no spread", None),
        ("not distinguishable", 1.0),
        ("worse", pytest.approx(2 * p)),
        ("too few seeds", None),
    ]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.lists(NUMBERS, max_size=4), max_size=3), max_size=5))
def test_many_questions_in_one_call_are_answered_as_one_by_one(rows):
    """Also for runs in another order; means of many rows at once may round their last bit otherwise."""
    alone = [statistics.bootstrap([row[::-1] for row in strata]) for strata in rows]
    for together, one in zip(statistics.bootstraps(rows), alone, strict=True):
        assert together == (one and pytest.approx(one, rel=1e-12, abs=1e-12))
    flat = [[v for s in strata for v in s] for strata in rows]
    assert statistics.t_tests(flat) == [statistics.t_test(row) for row in flat]
    known = [row for row in flat if row]
    assert statistics.iqms(known) == [float(statistics.iqm(row)) for row in known]


def test_a_stratum_of_one_run_is_not_drawn():
    """[3] beside [0, 6]: the mean is 3 + 0, 3 + 3 or 3 + 6 over 3, and never without the 3."""
    assert statistics.bootstrap([[0.0, 6.0], [3.0]]) == (1.0, 5.0)
    assert statistics.improvement_interval([[0.0, 2.0]], [[1.0]]) == (0.0, 1.0)
