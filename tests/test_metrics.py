"""Metrics by hand, by property, and what other libraries print on one matrix."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.evaluation import metrics, peer_metrics
from clbench.records.record import fault

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
    assert getattr(peer_metrics, library)(A, N)[name] == pytest.approx(value, abs=0.005)


def test_renate_subtracts_the_baseline():
    assert peer_metrics.renate(A, N, init=[10] * 4)["fwt"] == pytest.approx(31.67, abs=0.005)
    assert peer_metrics.avalanche(A, N, init=[10] * 4)["fwt"] == pytest.approx(31.67, abs=0.005)


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
    assert metrics.forgetting(a, first) == pytest.approx(peer_metrics.continuum(a, n)["forgetting"])
    assert 100 * metrics.forgetting(a, first) <= peer_metrics.pilot(100 * a, n)["forgetting"] + 0.01
    assert peer_metrics.renate(a, n)["forgetting"] >= peer_metrics.continuum(a, n)["forgetting"] - 1e-12


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


@pytest.mark.parametrize("library", [name for name in peer_metrics.PEERS if name != "gmvandeven"])
def test_libraries_on_one_experience_and_without_zero_shot_cells(library):
    values = getattr(peer_metrics, library)(peer_metrics.percent([[5]], [10]), [10])
    assert values.get("last", 50.0) == 50.0 and math.isnan(values["forgetting"])
    counts = [[8, None, None], [6, 9, None], [5, 9, 7]]
    values = getattr(peer_metrics, library)(peer_metrics.percent(counts, [10] * 3), [10] * 3)
    needs_zero_shot = library in ("mammoth", "renate")
    assert math.isnan(values["forgetting"]) == needs_zero_shot and math.isnan(values.get("fwt", math.nan))


def test_pilot_rounds_percent_before_averaging():
    values = peer_metrics.pilot(peer_metrics.percent([[1, None], [0, 2]], [3, 3]), [3, 3])
    assert values["average"] == pytest.approx((33.33 + 33.33) / 2) and values["forgetting"] == pytest.approx(33.33)


def test_summary_names_what_the_counts_allow():
    entry = {"correct": [[8, None], [6, 9]], "n": [10, 10], "first_seen": [0, 1], "correct_masked": [[9, None], [10, 9]]}
    values = metrics.summary(entry)
    assert values["last_masked_macro"] == pytest.approx(0.95) and "last_top5_micro" not in values
    assert values["forgetting"] == pytest.approx(0.2) and math.isnan(values["fwt_zeroshot"])
    assert metrics.summary({"sum_loss": [[1.0]], "n": [1], "first_seen": [0]}) == {}


def calibrated(rows, **changes):
    return {
        "correct": [[8, None], [6, 9]],
        "n": [10, 10],
        "first_seen": [0, 1],
        "calibration": {"bins": 15, "table": rows},
    } | changes


def cell(n, nll, brier, conf, right):
    empty = [0] * 13
    return {
        "n": n,
        "nll": nll,
        "brier": brier,
        "bin_n": [n, 0, *empty],
        "bin_conf": [*conf, *empty],
        "bin_correct": [*right, *empty],
    }


def test_calibration_by_hand():
    rows = [cell(10, 30.0, 4.0, [6.0, 0.0], [8, 0]), cell(20, 10.0, 5.0, [9.0, 4.0], [10, 5])]
    values = metrics.summary(calibrated(rows))
    assert values["last_ece"] == pytest.approx((1 + 1) / 20) and values["step_ece"] == pytest.approx((0.2 + 0.1) / 2)
    assert values["last_nll"] == 0.5 and values["step_nll"] == pytest.approx((3 + 0.5) / 2) and values["last_brier"] == 0.25
    assert set(metrics.UNBOUNDED) <= set(values)
    values = metrics.summary(calibrated([None, rows[1]]))
    assert values["step_ece"] == values["last_ece"]
    assert "last_ece" not in metrics.summary(calibrated([rows[0], None])) and "step_ece" in metrics.summary(
        calibrated([rows[0], None])
    )


def test_calibration_against_scikit_learn():
    """Sums over samples, as a run would write them, against sklearn's losses."""
    from sklearn.metrics import log_loss

    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(4), 200)
    y = random.integers(0, 4, 200)
    conf, hit = p.max(1), p.argmax(1) == y
    place = np.minimum((conf * 15).astype(int), 14)
    sums = {k: np.bincount(place, w, 15).tolist() for k, w in (("bin_conf", conf), ("bin_correct", hit), ("bin_n", None))}
    row = {"n": 200, "nll": -np.log(p[np.arange(200), y]).sum(), "brier": ((p - np.eye(4)[y]) ** 2).sum()} | sums
    values = metrics.calibration(calibrated([row]))
    assert values["last_nll"] == pytest.approx(log_loss(y, p, labels=range(4)))
    ece = sum(
        abs(conf[place == b].mean() - hit[place == b].mean()) * (place == b).mean() for b in range(15) if (place == b).any()
    )
    assert values["last_ece"] == pytest.approx(ece)


def test_confusion_by_hand():
    entry = {"correct": [[8, None, None], [6, 9, None], [4, 5, 8]], "n": [10] * 3, "first_seen": [0, 1, 2]}
    entry["eval_classes"] = [[0, 1], [2, 3], [4, 5]]
    none = [0, 0, 0]
    entry["task_confusion"] = [
        [[10, 0, 0], none, none],
        [[7, 3, 0], [1, 9, 0], None],
        [[5, 1, 4], [2, 6, 2], [0, 1, 9]],
    ]
    values = metrics.summary(entry)
    assert values["last_task_identity"] == pytest.approx(20 / 30) and values["last_between_task"] == pytest.approx(10 / 30)
    assert values["last_within_task"] == pytest.approx((20 - 17) / 30)
    assert values["last_old_to_new"] == pytest.approx(6 / 20) and values["last_new_to_old"] == pytest.approx(1 / 10)
    assert values["step_task_identity"] == pytest.approx((1 + 16 / 20 + 20 / 30) / 3)
    assert values["step_old_to_new"] == pytest.approx((0.3 + 0.3) / 2) and values["step_new_to_old"] == pytest.approx(
        (0.1 + 0.1) / 2
    )
    parts = [values[f"last_{name}"] for name in ("within_task", "between_task")]
    assert sum(parts) + values["last_micro"] == pytest.approx(1)
    steps = {"experiences": [{"classes": [0, 1]}] * 3}  # domains: classes say nothing of the experience
    assert not metrics.confusion(entry | {"eval_classes": [[0, 1]] * 3, "scenario": steps})
    swap = {"first_seen": [1, 0, 2], "eval_classes": [[2, 3], [0, 1], [4, 5]]}  # sets in another order than experiences
    swap["scenario"] = {"experiences": [{"classes": c} for c in ([0, 1], [2, 3], [4, 5])]}
    for key in ("correct", "task_confusion"):
        swap[key] = [[row[1], row[0], row[2]] for row in entry[key]]
    again = metrics.confusion(entry | swap)
    assert again == pytest.approx(metrics.confusion(entry))
    more = {"first_seen": [0, 0, 1, 2], "eval_classes": [[0], [1], [2, 3], [4, 5]], "n": [5, 5, 10, 10]}
    more |= {"correct": [[4, 4, None, None], [3, 3, 9, None], [2, 2, 5, 8]], "scenario": swap["scenario"]}
    split = [[[5, 0, 0], [5, 0, 0]], [[4, 1, 0], [3, 2, 0]], [[3, 0, 2], [2, 1, 2]]]
    more["task_confusion"] = [halves + table[1:] for halves, table in zip(split, entry["task_confusion"], strict=True)]
    assert metrics.confusion(more) == pytest.approx(metrics.confusion(entry))
    assert "last_task_identity" not in metrics.summary(entry | {"task_confusion": [None, None, None]})


def test_stability_by_hand():
    entry = {"correct": [[8, None], [6, 9]], "n": [10, 10], "first_seen": [0, 1]}
    trace = [
        {"experience": 0, "correct": [5, None], "n": [10, 10]},
        {"experience": 1, "correct": [2, 3], "n": [10, 10]},
        {"experience": 1, "correct": [4, 8], "n": [10, 10]},
    ]
    values = metrics.summary(entry | {"stability": {"trace": trace}})
    assert values["a_auc"] == pytest.approx((0.5 + 0.25 + 0.6) / 3) and values["stability_gap"] == pytest.approx(0.8 - 0.2)
    assert values["min_acc"] == pytest.approx(0.2) and values["wc_acc"] == pytest.approx(0.9 / 2 + 0.1)
    assert "a_auc" not in metrics.summary(entry)
    alone = {"correct": [[8]], "n": [10], "first_seen": [0]}
    values = metrics.summary(alone | {"stability": {"trace": [{"experience": 0, "correct": [5], "n": [10]}]}})
    assert values["wc_acc"] == pytest.approx(0.8) and math.isnan(values["min_acc"]), "of one experience nothing is old"


@pytest.mark.parametrize(
    "damage",
    [
        {"calibration": {"table": [{"n": 0}]}},
        {"calibration": [1]},
        {"calibration": {"table": [{"n": 3, "bin_conf": ["x"], "bin_correct": [1], "nll": 1, "brier": 1}]}},
        {"task_confusion": [[[1]], 7]},
        {"task_confusion": "abc"},
        {"stability": {"trace": [{"experience": 0}]}},
        {"stability": {"trace": [{"experience": 2, "correct": [1, 1], "n": [1, 1]}]}},
        {"stability": {"trace": [{"experience": 1, "correct": [1, 1], "n": [0, 1]}]}},
        {"stability": 5},
        {"eval_classes": [[0]]},
        {"scenario": {"name": "s", "experiences": [{"classes": 3}]}},
        {"scenario": {"name": "s", "experiences": [5, {"classes": [0]}]}},
        {"scenario": {"name": "s", "experiences": "no"}},
    ],
)
def test_a_record_with_damaged_optional_parts_is_none(damage):
    parts = {"scenario": {"name": "s"}, "learner": {"name": "l"}, "model": {"name": "m"}, "config": {}, "seconds": {}}
    counts = {"correct": [[8, None], [6, 9]], "n": [10, 10], "first_seen": [0, 1], "eval_classes": [[0], [1]], "error": None}
    more = {"task_confusion": [None, None], "schema": 1, "run_id": "0" * 16, "status": "ok", "numbers_version": 1, "seed": 0}
    entry = parts | counts | more
    assert fault(entry) is None and "last_macro" in metrics.summary(entry)
    assert next(iter(damage)) in fault(entry | damage)


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_prompt_ports_and_facil(case):
    a, n = case
    low = np.tril(a)
    assert peer_metrics.prompt_pytorch(a, n)["forgetting"] == pytest.approx(
        peer_metrics.pilot(100 * a, n)["forgetting"] / 100, abs=2e-4
    )
    assert peer_metrics.facil(a, n)["forgetting"] >= peer_metrics.continuum(a, n)["forgetting"] - 1e-12
    assert peer_metrics.facil(a, n)["last"] == peer_metrics.gmvandeven(a, n)["last"] == pytest.approx(low[-1].mean())
