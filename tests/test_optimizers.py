"""Optimisers by name: steps worked by hand, and what fit does with each."""

import sys
from importlib.util import find_spec
from typing import get_args

import pytest
import torch

from clbench.config.compose import build, compose
from clbench.interfaces import UserError
from clbench.training import looks, optimizers
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime

HAS_PRODIGY = pytest.mark.skipif(find_spec("prodigyopt") is None, reason="needs the extra 'optimizers'")
NAMES = [pytest.param(n, marks=HAS_PRODIGY) if n == "prodigy" else n for n in get_args(optimizers.Optimizer)]
FINDS_RATE = [pytest.param("prodigy", marks=HAS_PRODIGY), "dadapt_adam"]


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
    finds = name in optimizers.FINDS_RATE
    made = Recipe(name).build([{"params": [a], "lr": 1.0 if finds else 0.02}, {"params": [b], "lr": 0.0}])
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
        return p, Recipe(name, weight_decay=0.01).build([{"params": [p], "lr": 1.0 if name in optimizers.FINDS_RATE else 0.01}])

    p, made = fresh(torch.ones(5, 20))
    run(p, made, grads)
    q, first = fresh(torch.ones(5, 20))
    run(q, first, grads[:3])
    r, second = fresh(q.detach())
    second.load_state_dict(first.state_dict())
    run(r, second, grads[3:])
    assert torch.equal(p, r) and not torch.equal(p, q)
    assert [g.get("d") for g in second.param_groups] == [g.get("d") for g in made.param_groups]


def test_an_unknown_name():
    with pytest.raises(UserError, match="unknown optimizer=sdg: choose sgd, adam, adamw, lion, lamb, adafactor, prodigy"):
        Recipe("sdg").build([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1}])


def falling(name, loss, start, steps, rates=lambda step: 1.0, decay=0.0):
    """Weights from `start` -> (d before each step and after the last, the weights) on `loss`."""
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    made = Recipe(name, weight_decay=decay).build([{"params": [p], "lr": 1.0}])
    seen = [made.param_groups[0]["d"]]
    for step in range(steps):
        made.param_groups[0]["lr"] = rates(step)
        made.zero_grad()
        loss(p).backward()
        made.step()
        seen.append(made.param_groups[0]["d"])
    return seen, p.detach()


GOLDEN = {  # d after steps 1, 2, 3, 4, 6, 10, 20, 60 on x^2 / 2 from 1, by the authors' code
    "prodigy": (1e-6, 1.581531e-6, 4.822393e-6, 1.349606e-5, 8.858481e-5, 3.873503e-3, 0.4197734, 0.4197734),
    "dadapt_adam": (1e-6, 1.581531e-5, 4.147841e-5, 2.401233e-4, 3.301526e-3, 0.4546384, 2.863337, 2.863337),
}


@pytest.mark.parametrize("name", FINDS_RATE)
def test_d_on_a_quadratic_is_that_of_the_authors(name):
    seen, _ = falling(name, lambda p: p.square().sum() / 2, (1.0,), 60)
    assert [seen[i] for i in (1, 2, 3, 4, 6, 10, 20, 60)] == pytest.approx(GOLDEN[name], rel=1e-6)


def naive_dadapt(grad, x, rates, decay, b1=0.9, b2=0.999, eps=1e-8):
    """Number by number, in Python."""
    n, d, weighted, root = len(x), 1e-6, 0.0, 0.999**0.5
    m, v, s = [0.0] * n, [0.0] * n, [0.0] * n
    for lr in rates:
        g, rate = grad(x), d * lr
        r = sum(rate * g[i] * s[i] / (v[i] ** 0.5 + eps) for i in range(n))
        for i in range(n):
            m[i] = b1 * m[i] + (1 - b1) * rate * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            s[i] = root * s[i] + (1 - root) * rate * g[i]
            x[i] = x[i] - rate * decay * x[i] - m[i] / (v[i] ** 0.5 + eps)
        weighted = root * weighted + (1 - root) * r
        d = max(d, weighted / ((1 - root) * sum(map(abs, s))))
    return d, x


def test_dadapt_adam_against_its_equations():
    rates = [1.0] * 10 + [0.5] * 15
    curve, goal = (1.0, 4.0, 0.3), (0.5, -2.0, 1.0)
    want = naive_dadapt(
        lambda x: [c * (xi - t) for c, xi, t in zip(curve, x, goal, strict=True)], [1.0, 1.0, -3.0], rates, 0.01
    )
    c, t = (torch.tensor(v, dtype=torch.float64) for v in (curve, goal))
    seen, x = falling("dadapt_adam", lambda p: (c * (p - t).square()).sum() / 2, (1.0, 1.0, -3.0), 25, rates.__getitem__, 0.01)
    assert seen[-1] == pytest.approx(want[0], rel=1e-9) and x.tolist() == pytest.approx(want[1], rel=1e-9)


@pytest.mark.parametrize("name", FINDS_RATE)
@pytest.mark.parametrize("distance", [0.01, 1.0, 100.0])
def test_d_never_falls_and_grows_to_the_distance(name, distance):
    """On |x - c| from 0; the rate is 1 whatever the scale."""
    seen, x = falling(name, lambda p: (p - distance).abs().sum(), (0.0, 0.0), 400, lambda step: 1 - step / 400)
    assert seen == sorted(seen)
    assert 0.1 * distance < seen[-1] < 5 * distance, "moving averages let the bound pass the distance by a small factor"
    assert (x / distance).tolist() == pytest.approx([1.0, 1.0], abs=0.1)


@pytest.mark.parametrize("name", FINDS_RATE)
def test_one_rate_for_all_groups(name):
    with pytest.raises(
        UserError, match=f"learner.optimizer={name} finds one rate .* got learner.lr=0.01, learner.backbone_lr=0.001"
    ):
        optimizers.check(name, lr=0.01, backbone_lr=0.001)
    optimizers.check(name, lr=1.0, backbone_lr=0.0)
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    with pytest.raises(UserError, match=r"got group 0=1, group 1=0\.5"):
        Recipe(name).build([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.5}])


@HAS_PRODIGY
def test_prodigy_says_nothing_and_decays_as_adamw(capsys):
    """With the gradient 0 in all but one number, the others shrink by rate * decay; the rate is d."""
    start = (1.0, 2.0)
    seen, x = falling("prodigy", lambda p: p[0] * 3, start, 1, decay=0.5)
    assert float(x[1]) == pytest.approx(2.0 * (1 - seen[0] * 0.5), rel=1e-12) and capsys.readouterr().out == ""


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(UserError, match=r"learner.optimizer=prodigy needs prodigyopt .*pip install 'clbench\[optimizers\]'"):
        optimizers.check("prodigy")


@pytest.mark.parametrize(("name", "beta"), [("schedule_free_sgd", 0.9), ("schedule_free_adamw", 0.9)])
def test_schedule_free_against_its_equations(name, beta):
    """On a quadratic, with rates that change; number by number."""
    curve, goal, rates, decay = (1.0, 4.0), (0.5, -2.0), (0.1, 0.3, 0.3, 0.2), 0.01
    x, z, v, total = [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], 0.0
    p = torch.nn.Parameter(torch.tensor(x, dtype=torch.float64))
    made = Recipe(name, weight_decay=decay).build([{"params": [p], "lr": 0.1}])
    for t, lr in enumerate(rates, 1):
        total += lr**2
        for i in range(2):
            y = (1 - beta) * z[i] + beta * x[i]
            g = curve[i] * (y - goal[i])
            v[i] = 0.999 * v[i] + 0.001 * g * g
            move = g if name.endswith("sgd") else g / ((v[i] / (1 - 0.999**t)) ** 0.5 + 1e-8)
            z[i] -= lr * (move + decay * y)
            x[i] += lr**2 / total * (z[i] - x[i])
        made.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(curve, dtype=torch.float64) * (p.detach() - torch.tensor(goal, dtype=torch.float64))
        made.step()
        assert p.tolist() == pytest.approx([(1 - beta) * z[i] + beta * x[i] for i in range(2)], rel=1e-12)
    training = p.detach().clone()
    made.evaluate()
    assert p.tolist() == pytest.approx(x, rel=1e-12)
    made.train()
    assert torch.equal(p.detach(), training)


def test_fit_shows_and_leaves_the_average():
    """A constant gradient of 1, rate 0.1, beta 0.9: z is -0.1 t, and with equal rates the average is the mean of all z."""
    w, seen = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)), []

    class Watch(looks.Observer):
        def at_step(self, name, place, lr, visits):
            seen.append(w.item())
            return 0.0

    class Batches:
        steps = 4

        def __call__(self, step):
            return None

    class Line:
        def state_dict(self):
            return {}

    groups = [{"params": [w], "lr": 0.1}]
    with looks.observed_by(Watch()):
        fit(Runtime(0, torch.device("cpu")), "train", Line(), groups, lambda _: w.sum(), Batches(), Recipe("schedule_free_sgd"))
    assert seen == pytest.approx([0.0, -0.1, -0.15, -0.2, -0.25]) and w.item() == pytest.approx(-0.25)


def test_weights_that_are_set_beside_an_average():
    (job,) = compose(["learner=finetune", "learner.optimizer=schedule_free_sgd", "pet=adalora", "model=nano"])
    with pytest.raises(UserError, match=r"learner\.optimizer=schedule_free_sgd averages weights, which .* pet=adalora set"):
        build(job["learner"], model=build(job["model"]), runtime=Runtime(0, torch.device("cpu")))
