"""What one pass over an evaluation set gives: counts, calibration and confusion, by hand and whatever the batches."""

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench import metrics
from clbench.evaluate import BINS, calibration, evaluate, of_samples, together
from clbench.interfaces import UserError
from clbench.walk import confusion


@dataclass
class Set:
    z: torch.Tensor
    y: torch.Tensor
    classes: tuple[int, ...]
    task: int | None = None
    first_seen: int = 0

    def batches(self, size):
        for first in range(0, len(self.y), size):
            yield self.z[first : first + size], self.y[first : first + size]


class Echo:
    """Answers with the scores that the batch is."""

    def predict(self, batch):
        return batch


def look(sets, seen, size=128, learner=None, **options):
    return evaluate(learner or Echo(), sets, seen, size, contextlib.nullcontext, **options)


def test_three_samples_by_hand():
    """p = softmax(log p): sample 1 right at 0.77, sample 2 wrong at 0.5 (true 0.3), sample 3 right at 0.57."""
    p = torch.tensor([[0.77, 0.13, 0.1], [0.5, 0.3, 0.2], [0.22, 0.21, 0.57]], dtype=torch.float64)
    (found,) = look([Set(p.log().float(), torch.tensor([0, 1, 2]), (0, 1, 2))], 3, origin=[0, 0, 1])
    c = found.calibration
    assert (found.correct, found.n, found.into, c["n"]) == (2, 3, [2, 1], 3)
    assert math.isclose(c["nll"], -math.log(0.77) - math.log(0.3) - math.log(0.57), rel_tol=1e-6)
    by_hand = (0.23**2 + 0.13**2 + 0.1**2) + (0.5**2 + 0.7**2 + 0.2**2) + (0.22**2 + 0.21**2 + 0.43**2)
    assert math.isclose(c["brier"], by_hand, rel_tol=1e-6)
    assert {b: c["bin_n"][b] for b in range(15) if c["bin_n"][b]} == {7: 1, 8: 1, 11: 1}  # 7 / 15 < 0.5 < 8 / 15 < 0.57 ...
    assert {b for b in range(15) if c["bin_correct"][b]} == {8, 11}
    assert [round(c["bin_conf"][b], 6) for b in (7, 8, 11)] == [0.5, 0.57, 0.77]


def test_bins_are_closed_above():
    edges = np.array([1 / 15, 2 / 15, 0.2, 1.0, 1 / 15 + 1e-12, 1e-9])
    c = calibration(edges, np.zeros(6), np.zeros(6), np.ones(6, bool))
    assert c["bin_n"] == [2, 2, 1, *[0] * 11, 1] and c["bin_correct"] == c["bin_n"]


def test_a_hopeless_answer_is_finite():
    confidence, nll, brier = of_samples(np.array([[1000.0, -1000.0]], np.float32), np.array([1]))
    assert confidence == 1 and brier == 2 and math.isclose(nll[0], -math.log(np.finfo(np.float32).tiny))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 7))
def test_batches_and_order_do_not_matter(seed, n, size):
    rng = np.random.default_rng(seed)
    z, y = torch.tensor(rng.normal(0, 3, (n, 4)), dtype=torch.float32), torch.tensor(rng.integers(0, 4, n))
    (whole,) = look([Set(z, y, (0, 1, 2, 3))], 4, origin=[0, 1, 1, 2])
    mixed = torch.tensor(rng.permutation(n))
    (parts,) = look([Set(z[mixed], y[mixed], (0, 1, 2, 3))], 4, size, origin=[0, 1, 1, 2])
    assert parts == whole
    assert sum(whole.into) == n == sum(whole.calibration["bin_n"]) and sum(whole.calibration["bin_correct"]) == whole.correct


def test_against_plain_formulas():
    """ECE over bins, NLL and Brier of the record's form, as `metrics` reads it, against formulas on all samples at once."""
    rng = np.random.default_rng(1)
    z, y = torch.tensor(rng.normal(0, 2, (500, 6)), dtype=torch.float32), torch.tensor(rng.integers(0, 6, 500))
    sets = [Set(z[:200], y[:200], tuple(range(6))), Set(z[200:], y[200:], tuple(range(6)))]
    row = together([found.calibration for found in look(sets, 6)])
    p = torch.softmax(z.double(), 1)
    sure, answer = p.max(1)
    hit = (answer == y).double()
    ece = sum(
        abs(float((hit - sure)[inside].sum())) / 500 for b in range(15) for inside in [(sure > b / 15) & (sure <= (b + 1) / 15)]
    )
    values = metrics.calibration({"calibration": {"bins": BINS, "table": [row]}})
    assert math.isclose(values["last_ece"], ece, rel_tol=1e-9)
    assert math.isclose(values["last_nll"], float(torch.nn.functional.nll_loss(p.log(), y)), rel_tol=1e-9)
    truth = torch.nn.functional.one_hot(y, 6)
    assert math.isclose(values["last_brier"], float(((p - truth) ** 2).sum(1).mean()), rel_tol=1e-9)


def test_a_disclosed_task_asks_among_its_own_classes():
    z = torch.tensor([[9.0, 0.0, 1.0, 0.5], [9.0, 0.0, 0.5, 1.0]])
    (found,) = look([Set(z, torch.tensor([2, 2]), (2, 3), task=1)], 4, origin=[0, 0, 1, 1])
    right = 1 / (1 + math.exp(-0.5))
    assert found.correct == 1 and found.into == [0, 2]
    assert math.isclose(found.calibration["nll"], -math.log(right) - math.log(1 - right), rel_tol=1e-9)
    assert math.isclose(sum(found.calibration["bin_conf"]), 2 * right, rel_tol=1e-9)


def test_only_the_first_head_is_the_answer():
    class Two:
        def predict(self, batch):
            return {"a": batch, "b": -batch}

    z = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    (found,) = look([Set(z, torch.tensor([0, 1]), (0, 1))], 2, learner=Two(), origin=[0, 0])
    assert found.heads == {"a": 2, "b": 0} and found.calibration["n"] == 2 and found.into == [2]


def test_unseen_sets_are_not_asked():
    z = torch.zeros(2, 2)
    first, second = look([Set(z, torch.tensor([0, 1]), (0, 1)), Set(z, torch.tensor([2, 2]), (2,))], 2, origin=[0, 0, 1])
    assert second is None and first.into == [2, 0] and confusion([first, second], 4) == [[2, 0, 0, 0], None]
    first.into = None  # of a snapshot that an earlier version wrote
    assert confusion([first, second], 4) is None
    assert together([first.calibration, None]) is None and together([]) is None


def test_wrong_scores_are_named():
    for z, words in ((torch.zeros(2, 3), "must return"), (torch.tensor([[math.nan, 0.0], [0.0, 0.0]]), "NaN")):
        with pytest.raises(UserError, match=words):
            look([Set(z, torch.tensor([0, 1]), (0, 1))], 2)
