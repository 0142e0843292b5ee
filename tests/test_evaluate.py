"""What one pass over an evaluation set gives: counts, calibration and confusion, by hand and whatever the batches."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.evaluation import metrics
from clbench.evaluation.accuracy import BINS, calibration, evaluate, of_samples, sums_of, together
from clbench.interfaces import UserError
from clbench.streams.eval_sets import EvalSet, opaque
from clbench.streams.images.data import ImageData
from clbench.streams.scenario import ArrayImages


@dataclass
class Set:
    z: torch.Tensor
    y: torch.Tensor
    classes: tuple[int, ...]
    task: int | None = None
    batch_size: int | None = None


class Echo:
    """Answers with the scores that its sets were made with, found by id, and counts how often it was asked."""

    def __init__(self, *sets):
        self.z, self.sizes = torch.cat([one.z for one in sets]), []
        self.places = {number: place for place, number in enumerate(opaque(np.arange(len(self.z))).tolist())}

    def predict(self, batch):
        assert batch.y is None
        self.sizes.append(len(batch))
        return self.z[[self.places[number] for number in batch.ids.tolist()]]


def look(sets, seen, size=128, learner=None, **options):
    """Evaluate `learner(*sets)`, an `Echo` unless told."""
    first = np.cumsum([0] + [len(one.y) for one in sets])
    bare = SimpleNamespace(device=torch.device("cpu"))
    evals = []
    for one, start in zip(sets, first, strict=False):
        ids = np.arange(start, start + len(one.y))
        data = ImageData(ArrayImages(np.zeros((1, 1, 1, 3), np.uint8)), ids, ids, one.y.numpy(), bare, one.task, "made")
        evals.append(EvalSet("made", data, one.classes, one.task, 0, one.batch_size))
    made = learner if isinstance(learner, Echo) else (learner or Echo)(*sets)
    return evaluate(made, evals, seen, size, **options)


def test_three_samples_by_hand():
    """p = softmax(log p): sample 1 right at 0.77, sample 2 wrong at 0.5 (true 0.3), sample 3 right at 0.57."""
    p = torch.tensor([[0.77, 0.13, 0.1], [0.5, 0.3, 0.2], [0.22, 0.21, 0.57]], dtype=torch.float64)
    (found,) = look([Set(p.log().float(), torch.tensor([0, 1, 2]), (0, 1, 2))], 3, class_to_experience=[0, 0, 1])
    c = found.calibration
    assert (found.correct, found.n, found.by_experience, c["n"]) == (2, 3, [2, 1], 3)
    assert math.isclose(c["nll"], -math.log(0.77) - math.log(0.3) - math.log(0.57), rel_tol=1e-6)
    by_hand = (0.23**2 + 0.13**2 + 0.1**2) + (0.5**2 + 0.7**2 + 0.2**2) + (0.22**2 + 0.21**2 + 0.43**2)
    assert math.isclose(c["brier"], by_hand, rel_tol=1e-6)
    assert {b: c["bin_n"][b] for b in range(15) if c["bin_n"][b]} == {7: 1, 8: 1, 11: 1}  # 7 / 15 < 0.5 < 8 / 15 < 0.57 ...
    assert {b for b in range(15) if c["bin_correct"][b]} == {8, 11}
    assert [round(c["bin_conf"][b], 6) for b in (7, 8, 11)] == [0.5, 0.57, 0.77]


@pytest.mark.parametrize("joined", [True, False])
def test_a_set_with_a_batch_size_of_its_own_is_answered_in_its_batches(joined):
    """Ten samples in batches of 3, alone; the sets beside it share a batch of the run where they may."""
    sets = [
        Set(torch.eye(2)[[0] * n], torch.zeros(n, dtype=torch.long), (0, 1), None, own)
        for n, own in ((2, None), (10, 3), (2, None), (2, None))
    ]
    echo = Echo(*sets)
    counts = look(sets, 2, 8, echo, joined=joined)
    assert echo.sizes == [2, 3, 3, 3, 1, *([4] if joined else [2, 2])]
    assert [one.correct for one in counts] == [2, 10, 2, 2]


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
    (whole,) = look([Set(z, y, (0, 1, 2, 3))], 4, class_to_experience=[0, 1, 1, 2])
    mixed = torch.tensor(rng.permutation(n))
    (parts,) = look([Set(z[mixed], y[mixed], (0, 1, 2, 3))], 4, size, class_to_experience=[0, 1, 1, 2])
    assert parts == whole
    assert (
        sum(whole.by_experience) == n == sum(whole.calibration["bin_n"])
        and sum(whole.calibration["bin_correct"]) == whole.correct
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12), st.booleans())
def test_sets_that_share_a_batch_count_as_if_alone(seed, lengths, size, tasks):
    """Pieces of a set are as without sharing; a batch takes as many neighbours as fit, and none of another disclosed task."""
    rng = np.random.default_rng(seed)
    sets = []
    for n in lengths:
        own = tuple(int(c) for c in rng.permutation(7)[: rng.integers(1, 4)])
        y, z = torch.tensor(rng.choice(own, n)), torch.tensor(rng.normal(0, 3, (n, 7)), dtype=torch.float32)
        sets.append(Set(z.round(), y, own, task=int(rng.integers(0, 2)) if tasks else None))
    alone, shared = Echo(*sets), Echo(*sets)
    class_to_experience = [0, 0, 1, 1, 2, 2, 3]
    expected = look(sets, 7, size, alone, class_to_experience=class_to_experience, joined=False)
    assert look(sets, 7, size, shared, class_to_experience=class_to_experience) == expected
    pieces = [(one.task, min(size, len(one.y) - first)) for one in sets for first in range(0, len(one.y), size)]
    by_hand, task = [], -1
    for its_task, n in pieces:
        if by_hand and by_hand[-1] + n <= size and its_task == task:
            by_hand[-1] += n
        else:
            by_hand.append(n)
        task = its_task
    assert shared.sizes == by_hand and alone.sizes == [n for _, n in pieces]
    for one, found in zip(sets, expected, strict=True):
        inside = torch.full_like(one.z, -math.inf)
        inside[:, list(one.classes)] = one.z[:, list(one.classes)]
        given = (one.z if one.task is None else inside).argmax(1)
        hit = given == one.y
        assert (found.n, found.correct, found.masked) == (len(one.y), int(hit.sum()), int((inside.argmax(1) == one.y).sum()))
        assert found.class_n == [int((one.y == c).sum()) for c in one.classes]
        assert found.class_correct == [int(hit[one.y == c].sum()) for c in one.classes]
        assert found.by_experience == [int(sum(class_to_experience[g] == t for g in given.tolist())) for t in range(4)]
        # a score that fewer than 5 others beat is among the best 5; ties may fall either way
        mine = one.z[torch.arange(len(one.y)), one.y][:, None]
        assert int(((one.z >= mine).sum(1) <= 5).sum()) <= found.top5 <= int(((one.z > mine).sum(1) < 5).sum())


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
    (found,) = look([Set(z, torch.tensor([2, 2]), (2, 3), task=1)], 4, class_to_experience=[0, 0, 1, 1])
    right = 1 / (1 + math.exp(-0.5))
    assert found.correct == 1 and found.by_experience == [0, 2]
    assert math.isclose(found.calibration["nll"], -math.log(right) - math.log(1 - right), rel_tol=1e-9)
    assert math.isclose(sum(found.calibration["bin_conf"]), 2 * right, rel_tol=1e-9)


def test_only_the_first_head_is_the_answer():
    class Two(Echo):
        def predict(self, batch):
            z = super().predict(batch)
            return {"a": z, "b": -z}

    z = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    (found,) = look([Set(z, torch.tensor([0, 1]), (0, 1))], 2, learner=Two, class_to_experience=[0, 0])
    assert found.heads == {"a": 2, "b": 0} and found.calibration["n"] == 2 and found.by_experience == [2]


def test_unseen_sets_are_not_asked():
    z = torch.zeros(2, 2)
    first, second = look(
        [Set(z, torch.tensor([0, 1]), (0, 1)), Set(z, torch.tensor([2, 2]), (2,))], 2, class_to_experience=[0, 0, 1]
    )
    assert second is None and first.by_experience == [2, 0]
    made = sums_of([first, second], [True, True], 4)
    assert made["sums"]["task_confusion"] == [[2, 0, 0, 0], None] and made["sums"]["correct"] == [1, None]
    assert made["total"] == first.calibration
    first.by_experience = None  # of a snapshot that an earlier version wrote
    assert "task_confusion" not in sums_of([first, second], [True, True], 4)["sums"]
    assert together([first.calibration, None]) is None and together([]) is None


def test_wrong_scores_are_named():
    for z, words in ((torch.zeros(2, 3), "must return"), (torch.tensor([[math.nan, 0.0], [0.0, 0.0]]), "NaN")):
        with pytest.raises(UserError, match=words):
            look([Set(z, torch.tensor([0, 1]), (0, 1))], 2)
