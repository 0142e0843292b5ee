"""Rates that follow the run: golden values, the optimisers they stand on, refusals, exact resume inside `Pretrain`."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpt_train import experiences, learn, learner, run_with_kills, weights
from torch import nn

from clbench.interfaces import Place, UserError
from clbench.learners.pretrain import Pretrain
from clbench.training.pretraining.adaptive_rate import FedHyper, Hypergradient, Plateau, last_step
from clbench.training.pretraining.weight_averaging import Average


def test_plateau_golden():
    made, found = Plateau(factor=0.1, patience=2), []
    for loss in (5, 4, 4, 4, 4, 3.9999, 3.99):
        made.look(loss)
        found.append(made.factor)
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1]) and made.bad == 0  # 3.9999 was bad: 4 (1 - 1e-4) = 3.9996
    made.begin(nn.Linear(1, 1))
    assert made.factor == 1 and made.best == math.inf
    kept = Plateau(restart=False)
    kept.factor = 0.5
    kept.begin(nn.Linear(1, 1))
    assert kept.factor == 0.5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=30), st.integers(0, 3), st.sampled_from([0.0, 1e-4, 0.1]))
def test_plateau_against_torch(losses, patience, threshold):
    made = Plateau(factor=0.5, patience=patience, threshold=threshold)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=threshold, eps=0.0
    )
    for loss in losses:
        made.look(loss)
        reference.step(loss)
        assert made.factor == pytest.approx(optimizer.param_groups[0]["lr"])


def test_plateau_looks_at_means():
    made = Plateau(every=2, patience=0)
    for loss in (3.0, 1.0, 1.0, 5.0):  # means 2 and 3
        made.seen(torch.full((2, 4), loss))
    assert made.best == 2 and made.factor == 0.1 and made.schedule(lambda place: 0.5)(Place(0, 0, 1, 0)) == 0.05


@pytest.mark.parametrize(
    ("form", "want"),
    [
        ("additive", [0.1, 0.145, 0.179628, 0.203916, 0.219778, 0.229631]),
        ("multiplicative", [0.1, 0.105, 0.11025, 0.1157625]),
    ],
)
def test_hypergradient_golden(form, want):
    """f = x^2 / 2 from x = 1 with plain gradients: a grows while they agree."""
    made, x, before, found = Hypergradient(rate=0.05, form=form), 1.0, None, []
    for _ in want:
        g = x
        if before is not None:
            made.factor = made.moved(g * before, abs(g * before), 0.1 * made.factor)
        found.append(0.1 * made.factor)
        x, before = x - found[-1] * g, g
    assert found == pytest.approx(want, abs=6e-7)
    assert made.moved(1e9, 1.0, 0.1) == 100
    assert Hypergradient(form="additive").moved(-1e9, 1.0, 0.1) == 0.01


def test_the_direction_is_that_of_adams_step_and_rates_follow_it():
    p = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    made, gradients = Hypergradient(rate=0.5), ([1.0, 2.0], [0.5, -1.0], [0.3, 0.3])
    for i, g in enumerate(gradients):
        p.grad, was = torch.tensor(g), p.detach().clone()
        u = last_step(optimizer.state[p], (0.9, 0.95), 1e-8).numpy() if i else None
        optimizer.param_groups[0]["lr"] = 0.1 * (before := made.factor)
        made.before_step(optimizer)
        if u is None:
            assert made.factor == 1
        else:
            cosine = np.dot(g, u) / np.linalg.norm(g) / np.linalg.norm(u)
            assert made.factor == pytest.approx(before * (1 + 0.5 * cosine))
        optimizer.step()
        step = 0.1 * made.factor * last_step(optimizer.state[p], (0.9, 0.95), 1e-8)
        np.testing.assert_allclose((was - p.detach()).numpy(), step.numpy(), rtol=1e-5)


def test_fedhyper_golden():
    model, made, found = nn.Linear(2, 1, bias=False), FedHyper(), []
    for change in ([1.0, 0.0], [0.5, 0.5], [-2.0, 0.0]):
        made.begin(model)
        start = model.weight.detach().clone()
        with torch.no_grad():
            model.weight += torch.tensor([change])
        made.end(model)
        found.append(made.factor)
        torch.testing.assert_close(model.weight.detach() - start, made.factor * torch.tensor([change]))
    assert found == pytest.approx([1, 1.5, 0.5])
    made.most, made.before = 3.0, [torch.tensor([[100.0, 0.0]])]
    for sign, want in ((1.0, 3.0), (-1.0, 1 / 3)):
        made.begin(model)
        with torch.no_grad():
            model.weight += torch.tensor([[sign, 0.0]])
        made.end(model)
        assert made.factor == pytest.approx(want)
        made.before = [torch.tensor([[100.0, 0.0]])]


OPTIONS = [
    {"plateau": {"every": 2, "patience": 0, "threshold": 0.1, "restart": False}},
    {"hypergradient": {"rate": 0.2}},
    {"hypergradient": {"rate": 1e-4, "form": "additive", "restart": True}},
    {"fedhyper": {"normalise": "cosine"}},
]


@pytest.mark.parametrize("adapt", OPTIONS, ids=["plateau", "multiplicative", "additive", "fedhyper"])
def test_pretraining_goes_on_exactly(tmp_path, adapt):
    straight = learn(learner(adapt=adapt), experiences(2))
    again = run_with_kills(tmp_path, Pretrain, {"adapt": adapt}, [5, 17])
    assert weights(again) == weights(straight) and again.adapt.factor == straight.adapt.factor != 1
    assert weights(straight) != weights(learn(learner(), experiences(2)))


def test_without_an_effect_nothing_changes():
    plain = weights(learn(learner(), experiences(1)))
    assert weights(learn(learner(adapt="fedhyper"), experiences(1))) == plain  # the first change counts once
    assert weights(learn(learner(adapt={"plateau": {"every": 1000}}), experiences(1))) == plain
    assert "adapt" not in learner().state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt": "cosine"}, "unknown learner.adapt=cosine: choose plateau, hypergradient, fedhyper, auto_lrs or null"),
        ({"adapt": {"plateau": {"patients": 1}}}, "learner.adapt plateau has no option 'patients': choose every, factor"),
        ({"adapt": {"plateau": {"factor": 1.0}}}, "learner.adapt plateau needs every from 1"),
        ({"adapt": {"hypergradient": {"rate": 0}}}, "learner.adapt hypergradient needs rate above 0"),
        ({"adapt": {"fedhyper": {"most": 0.5}}}, "learner.adapt fedhyper needs most from 1"),
        ({"adapt": {"auto_lrs": {"least": 2, "most": 1}}}, "learner.adapt auto_lrs needs 0 < least < most"),
        ({"adapt": "plateau", "branch": 0.25}, "learner.adapt needs learner.branch=0"),
        ({"adapt": "plateau", "average": Average("ema")}, "learner.adapt does not go with an average"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError) as found:
        learner(**options)
    assert str(found.value).startswith(message) and "\n" not in str(found.value)
