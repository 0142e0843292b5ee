"""Bayesian online changepoint detection against a full recursion over summaries, and SI that finds its own boundaries."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from test_online import hidden, online

from clbench.interfaces import UserError, declared, mismatch
from clbench.learners.si import Si
from clbench.testing.contract import small_stream
from clbench.training.changepoint import Boundaries, RunLengths
from clbench.training.state import fingerprint

TINY = ("model=mlp", "model.kwargs.hidden=[24,16]", "learner.batch_size=6")


def naive(x, hazard, kappa, alpha):
    """P(r) after each of x [T, D]: every predictive from all summaries of its run, nothing recursive."""
    weights, found = np.array([1.0]), []
    for now, row in enumerate(x):
        predictive = []
        for r in range(len(weights)):
            past, n = x[now - r : now], r
            mean = past.mean(0) if n else np.zeros(x.shape[1])
            k, a = kappa + n, alpha + n / 2
            mu = n * mean / k
            beta = alpha + 0.5 * ((past - mean) ** 2).sum(0) + kappa * n * mean**2 / (2 * k)
            predictive.append(np.prod(student.pdf(row, 2 * a, mu, np.sqrt(beta * (k + 1) / (a * k)))))
        joint = weights * predictive
        weights = np.append(joint.sum() * hazard, joint * (1 - hazard))
        weights /= weights.sum()
        found.append(weights)
    return found


def steps(seed, lengths=(15, 12), gap=4.0, width=2):
    made = np.random.default_rng(seed)
    return np.concatenate([made.normal(size=(n, width)) + gap * i for i, n in enumerate(lengths)])


@pytest.mark.parametrize("width", [1, 3])
def test_run_lengths_are_those_of_the_full_recursion(width):
    x = steps(width, width=width)
    runs = RunLengths(width, 0.05, kappa=0.3, alpha=2.0)
    for row, expected in zip(x, naive(x, 0.05, 0.3, 2.0), strict=True):
        runs.update(torch.from_numpy(row))
        np.testing.assert_allclose(runs.log_R.exp(), expected, rtol=1e-8, atol=1e-14)
        assert runs.run_R.tolist() == list(range(len(expected)))
        assert float(runs.log_R[0].exp()) == pytest.approx(0.05), "the weight of a run of 0 is the hazard"
    assert runs.likeliest() == 12
    pruned = RunLengths(width, 0.05, kappa=0.3, alpha=2.0, least=1e-6)
    for row in x:
        pruned.update(torch.from_numpy(row))
    assert len(pruned.run_R) < len(runs.run_R) and pruned.likeliest() == 12
    for r in (3, 12, 20):
        assert pruned.shorter(r) == pytest.approx(runs.shorter(r), abs=1e-4)


def test_boundaries_are_found_soon_after_changes_and_nowhere_else():
    lengths, hits, false = (40, 25, 30, 50), 0, 0
    for seed in range(4):
        finder = Boundaries(2, 0.01)
        found = [i for i, row in enumerate(torch.from_numpy(7 + 3 * steps(seed, lengths))) if finder.see(row)]
        changes = np.cumsum(lengths)[:-1]
        near = [[f for f in found if c <= f <= c + 3] for c in changes]
        hits += sum(len(f) == 1 for f in near)
        false += len(found) - sum(len(f) for f in near)
        still = Boundaries(2, 0.01)
        false += sum(still.see(row) for row in torch.from_numpy(steps(seed, (145,))))
    assert hits == 12 and false <= 2, (hits, false)


def test_the_finder_goes_on_from_its_state():
    x = torch.from_numpy(steps(3, (30, 30)))
    for at in (4, 8, 33):
        finder = Boundaries(2, 0.01)
        for row in x[:at]:
            finder.see(row)
        again = Boundaries(2, 0.01)
        again.load_state_dict(copy.deepcopy(finder.state_dict()))
        assert [finder.see(row) for row in x[at:]] == [again.see(row) for row in x[at:]]
        assert fingerprint(finder.state_dict()) == fingerprint(again.state_dict())
    constant = Boundaries(2, 0.01)
    assert not any(constant.see(torch.ones(2)) for _ in range(20))


def si(*options, experiences=2, patch=None):
    t = online("learner=si", "learner.strength=50", *TINY, *options)
    learner, runtime, pipeline = t.start()
    if patch is not None:
        patch(learner)
    for i in range(experiences):
        t.learn(learner, runtime, pipeline, i)
    return learner


def test_si_that_finds_the_true_boundary_is_si_that_is_told():
    """36 samples of three classes in batches of 6: the seventh batch is the second experience's first."""

    def at_the_seventh(learner):
        seen = []
        learner.finder.see = lambda x: seen.append(x) or len(seen) == 7
        learner.masking = "local"

    found, told = si("learner.boundaries=found", patch=at_the_seventh), si()
    for name in ("model", "head"):
        assert fingerprint(getattr(found, name).state_dict()) == fingerprint(getattr(told, name).state_dict())
    assert found.found == 1 and any(value.any() for value in found.importance.values())
    never = si("learner.boundaries=found", patch=lambda learner: setattr(learner.finder, "see", lambda x: False))
    assert not never.importance and never.found == 0
    assert fingerprint(never.model.state_dict()) != fingerprint(told.model.state_dict())


def test_si_finds_boundaries_where_they_are_hidden():
    options = {"boundaries": "found"}
    stream = hidden(small_stream(operators=["single_pass"], budget={"epochs": 1}))
    assert mismatch("si", declared(Si, options), stream.facts(), True) is None
    assert "needs_boundaries" in str(mismatch("si", declared(Si, {}), stream.facts(), True))
    learner = si("learner.boundaries=found", "learner.batch_size=2", experiences=3)
    assert learner.finder.first_WD.shape == (8, 4) and learner.path and learner.reference


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("boundaries=guessed", "learner.boundaries=guessed"),
        ("boundaries=found hazard=0", "learner.hazard=0"),
        ("boundaries=found certain=1", "learner.certain=1"),
        ("boundaries=found summary=0", "learner.summary"),
    ],
)
def test_bad_options_are_one_line(words, line):
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as caught:
        si(*(f"learner.{word}" for word in words.split()))
    assert "\n" not in str(caught.value)
