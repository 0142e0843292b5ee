"""Optimisers by name: one step worked by hand, and what fit does with each."""

from typing import get_args

import pytest
import torch

from clbench.interfaces import UserError
from clbench.training import optimizers
from clbench.training.fit import Recipe

NAMES = get_args(optimizers.Optimizer)


def stepped(name, grads, lr=0.1, start=(1.0, -2.0), decay=0.0):
    """A weight [2] after steps along given gradients."""
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    made = Recipe(name, momentum=0.9, weight_decay=decay).build([{"params": [p], "lr": lr}])
    for g in grads:
        p.grad = torch.tensor(g, dtype=torch.float64)
        made.step()
    return p.detach()


def test_lion_by_hand():
    """The step is the sign of 0.9 m + 0.1 g, then m <- 0.99 m + 0.01 g; decay is decoupled."""
    assert stepped("lion", [(3.0, -1.0)]).tolist() == pytest.approx([0.9, -1.9])
    assert stepped("lion", [(3.0, -1.0), (-0.1, -0.1)]).tolist() == pytest.approx([0.8, -1.8]), "m outweighs: 0.027 - 0.01 > 0"
    assert stepped("lion", [(3.0, -1.0)], decay=0.5).tolist() == pytest.approx([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1])


def test_lamb_by_hand():
    """Gradient clipped to norm 1; step m / (sqrt(v) + eps) without bias, times |theta| / |step| where decay is on."""
    p = stepped("lamb", [(0.3, -0.4)], decay=0.01)
    r = torch.tensor([1.0, -1.0], dtype=torch.float64) + 0.01 * torch.tensor([1.0, -2.0], dtype=torch.float64)
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    expected = start - 0.1 * start.norm() / r.norm() * r
    torch.testing.assert_close(p, expected, atol=1e-4, rtol=1e-4)


def test_adafactor_has_the_rate_that_it_is_given():
    """The first step has no past: g / sqrt(g^2) = sign g, times the rate, whatever the size of the weight."""
    for start in ((1.0, -2.0), (100.0, -200.0)):
        moved = stepped("adafactor", [(0.3, -0.4)], start=start) - torch.tensor(start, dtype=torch.float64)
        assert moved.tolist() == pytest.approx([-0.1, 0.1], rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_keeps_its_own_rate_and_a_quadratic_falls(name):
    a, b = (torch.nn.Parameter(torch.full((4, 20), 2.0)) for _ in range(2))
    made = Recipe(name).build([{"params": [a], "lr": 0.02}, {"params": [b], "lr": 0.0}])
    for _ in range(20):
        made.zero_grad()
        (a.square().sum() + b.square().sum()).backward()
        made.step()
    assert torch.equal(b, torch.full((4, 20), 2.0)) and float(a.detach().abs().max()) < 1.99


@pytest.mark.parametrize("name", NAMES)
def test_the_state_goes_on(name):
    """Six steps are three steps, a state dict, and three more, to the last bit."""
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(5, 20, generator=g) for _ in range(6)]

    def run(p, made, some):
        for grad in some:
            p.grad = grad.clone()
            made.step()

    def fresh(value):
        p = torch.nn.Parameter(value.clone())
        return p, Recipe(name, weight_decay=0.01).build([{"params": [p], "lr": 0.01}])

    p, made = fresh(torch.ones(5, 20))
    run(p, made, grads)
    q, first = fresh(torch.ones(5, 20))
    run(q, first, grads[:3])
    r, second = fresh(q.detach())
    second.load_state_dict(first.state_dict())
    run(r, second, grads[3:])
    assert torch.equal(p, r)


def test_an_unknown_name():
    with pytest.raises(UserError, match="unknown optimizer=sdg: choose sgd, adam, adamw, lion, lamb, adafactor"):
        Recipe("sdg").build([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1}])
