"""AutoLRS: the forecast, where it looks next, what goes back after a trial, what it costs, exact resume."""

import math

import numpy as np
import pytest
import torch
from test_cpt_train import STEPS, experiences, learn, learner, run_with_kills, weights
from torch import nn

from clbench.interfaces import Place, UserError
from clbench.learners.pretrain import Pretrain
from clbench.training.pretraining.auto_lrs import GRID, AutoLrs, deviation, forecast

FEW = {"auto_lrs": {"trials": 2, "first": 2}}


def test_an_exact_exponential_is_continued_exactly():
    n = np.arange(1, 101)
    assert forecast(list(2 + np.exp(-0.01 * n)), 1000) == pytest.approx(2 + math.exp(-10), abs=1e-6)
    assert forecast(list(2 + np.exp(-0.05 * n)), 1000) == pytest.approx(2, abs=1e-6)
    assert forecast(list(3 - 0.5 * np.exp(-0.02 * n)), 500) == pytest.approx(3 - 0.5 * math.exp(-10), abs=1e-6)
    assert forecast([5.0, 1.0, 2.0], 1000) == 2.0  # too few to fit


def test_where_least_is_known_by_a_loop():
    grid, tried = np.linspace(-2.0, 2.0, GRID), np.array([-1.0, 0.3, 1.9])
    scale = 4.0 / 5
    k = np.array([[math.exp(-0.5 * ((a - b) / scale) ** 2) + (1e-4 if a == b else 0) for b in tried] for a in tried])
    inverse = np.linalg.inv(k)
    found = deviation(grid, tried)
    for place in (0, 20, 40, 63):
        across = np.array([math.exp(-0.5 * ((grid[place] - b) / scale) ** 2) for b in tried])
        assert found[place] ** 2 == pytest.approx(1 - across @ inverse @ across, abs=1e-9)
    assert abs(grid[found.argmax()] - tried).min() > 0.8


def descended(steps, **options):
    """Gradient descent on x^2 / 2, h = 1, from x = 1 -> the rates by update, weights before each update, the Rate."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer, made = torch.optim.SGD(model.parameters(), lr=0.0), AutoLrs(**options)
    made.model, seen = model, []
    made.begin(model)
    rate = made.schedule(lambda place: 0.5)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(Place(0, step, steps, step))
        seen.append((optimizer.param_groups[0]["lr"], float(model.weight.detach()), made.searching))
        loss = 0.5 * model.weight.square().sum()
        loss.backward()
        made.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        made.seen(loss.detach().reshape(1, 1))
    made.end(model)
    return seen, made


def test_trials_start_from_the_same_weights_and_the_best_rate_goes_on():
    trials, first = 8, 12
    seen, made = descended(2 * trials * first, least=0.05, most=3.0, trials=trials, first=first)
    starts = [seen[i * first][1] for i in range(trials + 1)]
    assert starts == [1.0] * (trials + 1)
    rates = [seen[i * first][0] for i in range(trials)]
    assert len(set(rates)) == trials and all(0.0249 < rate < 1.501 for rate in rates)
    assert [s for _, _, s in seen] == [True] * (trials * first) + [False] * (trials * first)
    chosen = {rate for rate, _, _ in seen[trials * first :]}
    assert chosen == {rates[int(np.argmin(made.forecasts))]}
    true = [0.5 * (1 - rate) ** (2 * trials * first) for rate in rates]  # the loss after as many updates at that rate
    assert true[int(np.argmin(made.forecasts))] < 1e-6 < max(true)


def test_the_next_stage_is_twice_as_long_and_none_begins_that_would_not_end():
    seen, made = descended(8 + 16 + 11, trials=2, first=2, doublings=1)
    assert [s for _, _, s in seen] == [True] * 4 + [False] * 4 + [True] * 8 + [False] * 8 + [True] * 4 + [False] * 7
    assert made.stage == 3
    with pytest.raises(UserError, match=r"searches 10 x 16 updates .* an experience of 99 updates is too short"):
        descended(99)


def test_searched_tokens_are_in_the_ledger():
    plain, made = learn(learner(), experiences(2)), learn(learner(adapt=FEW), experiences(2))
    a, b = plain.runtime.ledger, made.runtime.ledger
    assert a.trained == b.trained and a.branch_new == 0
    assert STEPS == 12 and b.branch_new == 2 * 4 * a.trained // 24  # of 12 updates an experience, 4 are searched
    assert weights(made) != weights(plain)


def test_it_goes_on_exactly(tmp_path):
    straight = learn(learner(adapt=FEW), experiences(2))
    again = run_with_kills(tmp_path, Pretrain, {"adapt": FEW}, [3, 5, 17])
    assert weights(again) == weights(straight) and again.adapt.factor == straight.adapt.factor != 1
