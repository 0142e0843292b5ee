"""Loss metrics on matrices and curves worked by hand."""

import math

import numpy as np
import pytest

from clbench.evaluation import loss_metrics as m

R = np.array([[1.0, 4.0, 5.0], [1.5, 2.0, 4.0], [1.25, 2.5, 3.0]])
FIRST = [0, 1, 2]
START = np.array([6.0, 6.0, 6.0])


def test_matrix_metrics_by_hand():
    assert m.loss_matrix([[10.0, 30.0]], [10, 20]).tolist() == [[1.0, 1.5]]
    assert m.final_loss(R) == pytest.approx(6.75 / 3)
    assert m.average_loss(R, FIRST) == pytest.approx((1.0 + 1.75 + 2.25) / 3)
    assert m.learned_loss(R, FIRST) == pytest.approx(2.0) and m.retained_loss(R, FIRST) == pytest.approx(1.875)
    assert m.forgetting_after(R, FIRST) == pytest.approx((0.25 + 0.5) / 2) == -m.backward_transfer(R, FIRST)
    assert m.forgetting_best(R, FIRST) == pytest.approx((0.25 + 0.5) / 2)
    better = R.copy()
    better[1, 0] = 0.5  # better in between than right after its own experience
    assert m.forgetting_best(better, FIRST) == pytest.approx((0.75 + 0.5) / 2)
    assert m.forgetting_after(better, FIRST) == pytest.approx((0.25 + 0.5) / 2)
    assert m.forward_transfer(R, START, FIRST) == pytest.approx(((6 - 4) + (6 - 4)) / 2)
    assert m.regret(R, [1.0, 2.0, 2.5]) == pytest.approx((0.25 + 0.5 + 0.5) / 3)
    assert m.regret_learned(R, [1.0, 1.5, 2.0], FIRST) == pytest.approx((0 + 0.5 + 1) / 3)
    assert math.isnan(m.regret(R, [1.0, None, 2.0])) and math.isnan(m.retained_loss(R[:1], [0]))
    assert m.bits_per_byte([math.log(2)], [1.0])[0] == pytest.approx(1) and m.bits_per_byte([2 * math.log(2)], [4.0])[0] == 0.5
    assert np.isnan(m.bits_per_byte([1.0], [None])[0])


def test_recovery_ratios_of_the_published_tables():
    """Pile then SlimPajama, mean of both: 2.47 without replay, 2.37 at 5 %, 2.35 union; then German."""
    assert m.recovery_ratio(2.47, 2.37, 2.35) == pytest.approx(0.83, abs=0.005)
    assert m.recovery_ratio(2.34, 1.85, 1.75) == pytest.approx(0.83, abs=0.005)
    assert m.recovery_ratio(2.34, 1.75, 1.75) == pytest.approx(1.0) and math.isnan(m.recovery_ratio(1.0, 1.0, 1.0))


def test_anneal_gain_of_new_and_old_sets():
    trunk = [[120.0, 400.0, 500.0], [140.0, 230.0, 400.0], None]
    gain = m.anneal_gain(trunk, R, [100, 100, 100], FIRST)
    assert gain["anneal_gain_new"] == pytest.approx((0.2 + 0.3) / 2) and gain["anneal_gain_old"] == pytest.approx(-0.1)
    assert math.isnan(m.anneal_gain(None, R, [1, 1, 1], FIRST)["anneal_gain_new"])


def curves():
    a = [3.0, 1.0, 1.0, 2.0, 1.5, 1.0, 1.0, 1.0, 4.0, 2.0]
    b = [5.0, 5.0, 5.0, 4.0, 3.0, 2.0, 2.0, 2.5, 2.5, 2.25]
    experience = [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    return {
        "tokens": [0, 100, 100, 110, 150, 200, 200, 210, 250, 300],
        "experience": experience,
        "step": [0, 10, 0, 1, 5, 10, 0, 1, 5, 10],
        "loss": {"a": a, "b": b},
        "accuracy": {"a": [0, 0.9, 0.9, 0.4, 0.6, 0.8, 0.8, 0.8, 0.2, 0.5], "b": [0, 0, 0, 0.2, 0.4, 0.6, 0.6, 0.5, 0.5, 0.55]},
    }


def test_stability_gaps_by_hand():
    first, again, other = m.gaps(curves(), ["a", "b"], [0, 1])
    assert (first["experience"], first["set"], first["start"], first["depth"], first["peak_step"]) == (1, "a", 1.0, 1.0, 1)
    assert first["tokens"] == 100 and first["area"] == pytest.approx(10 * 0.5 + 40 * 0.75 + 50 * 0.25)
    assert again["depth"] == 3.0 and again["tokens"] is None and other["set"] == "b" and other["depth"] == 0.5
    assert m.gaps(curves(), ["a", "b"], [0, 1], tolerance=1.0)[1]["tokens"] == 100
    assert m.gaps(curves(), ["b"], [2]) == []


def test_dips_of_what_is_learned_by_hand():
    seen = curves()
    seen["accuracy"]["b"] = [0, 0, 0.5, 0.25, 0.375, 0.75, 0.75, 0.5, 0.5, 0.5]
    seen["accuracy"]["c"] = [0, 0, 0, 0, 0, 0, 0.5, 0.375, 0.25, 0.375]
    seen["loss"]["c"] = [1.0] * 10
    first, second = m.dips(seen, ["a", "b", "c"], [0, 1, 2])
    assert first == {"experience": 1, "start": 0.5, "depth": 0.25, "tokens": 100}, "of b alone"
    assert second == {"experience": 2, "start": 0.5, "depth": 0.25, "tokens": None}
    (rises,) = m.dips({**seen, "accuracy": {"b": [0, 0, 0.1, 0.2, 0.3, 0.4, 0, 0, 0, 0]}}, ["b"], [1])
    assert rises["depth"] == 0 and rises["tokens"] == 0
    both = m.dips(seen, ["b", "c"], [2, 2])
    assert both[0]["start"] == 0.625 and both[0]["depth"] == 0.25, "the mean of two sets"
    assert m.dips(seen, ["a"], [0]) == []


def test_worst_accuracies():
    assert m.min_accuracy(curves(), ["a", "b"], [0, 1]) == pytest.approx((0.2 + 0.5) / 2)
    names = ["a", "b", "c"]
    with_new = curves()
    with_new["accuracy"]["c"] = [0.0] * 9 + [0.75]
    with_new["loss"]["c"] = [1.0] * 10
    assert m.worst_case_accuracy(with_new, names, [0, 1, 2]) == pytest.approx(0.75 / 3 + 2 / 3 * 0.35)


def test_the_rates_share_of_forgetting():
    same, shifted = curves(), curves()
    same["loss"]["a"][3] = 1.25
    same["loss"]["a"][4] = 1.0
    assert m.rate_share(same, shifted, "a") == pytest.approx(0.25)
    shifted["loss"]["a"][3:6] = [0.5, 0.5, 0.5]
    assert math.isnan(m.rate_share(same, shifted, "a"))


def test_records_without_losses_have_no_numbers():
    assert m.summary({"correct": [[1]], "n": [1]}) == {} == m.summary({"sum_loss": [[1.0]], "n": [1]})
