"""SI, MAS, RWalk and online EWC against what is worked out by hand and against naive versions."""

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, images, mlp
from torch import nn
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.learners.ewc import Ewc
from clbench.learners.mas import Mas
from clbench.learners.rwalk import RWalk
from clbench.learners.si import Si
from clbench.training import fisher
from clbench.training.fit import fit
from clbench.training.path_integral import Step, scaled, zeros


class Quadratic(nn.Module):
    """Loss sum a (theta - c)^2 / 2 of two numbers."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def loss(self):
        return (torch.tensor([3.0, 0.5]) * (self.theta - torch.tensor([0.0, 1.0])).square()).sum() / 2


def test_path_integral_on_a_quadratic():
    """One step of plain SGD: omega = rate g^2; many small ones add up to the decrease of the loss."""
    net = Quadratic()
    step, total = Step(net), zeros(net)
    start, rate = float(net.loss().detach()), 1e-4
    for number in range(2000):
        net.theta.grad = None
        net.loss().backward()
        step.before()
        with torch.no_grad():
            net.theta -= rate * net.theta.grad
        gained = step.after()
        if number == 0:  # gradients 3 x 1 and 0.5 x -3
            torch.testing.assert_close(gained["theta"], rate * torch.tensor([9.0, 2.25], dtype=torch.float64))
        total["theta"] += gained["theta"]
    assert float(total["theta"].sum()) == pytest.approx(start - float(net.loss().detach()), rel=1e-3)


def test_the_penalty_gradient_is_taken_off():
    net = Quadratic()
    reference, weight = {"theta": torch.tensor([0.5, 0.5])}, {"theta": torch.tensor([2.0, 4.0])}
    (net.loss() + 7 * 2 * fisher.quadratic_penalty(net, reference, weight)).backward()
    step = Step(net)
    step.before(7.0, reference, weight)
    torch.testing.assert_close(step.grads["theta"], torch.tensor([3.0, -1.5], dtype=torch.float64))


@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_si_against_a_naive_version(monkeypatch, variant, optimizer):
    """omega from autograd of the task loss alone and the weights before and after each step."""
    options = {"variant": variant, "optimizer": optimizer, "strength": 3.0, "lr": 0.05, "backbone_lr": 0.05, "batch_size": 6}
    options |= {"momentum": 0.9} if optimizer == "sgd" else {}
    t = SmallTrial(lambda: mlp(10), Si, **options)
    learner, learn, _ = t.begin()
    omega, steps = {}, []

    def watched(runtime, name, owner, groups, loss, batches, recipe, before_step, after_step):
        omega.clear()
        omega.update({n: torch.zeros_like(p) for n, p in owner.model.named_parameters()})
        strength, current = owner.strength, {}

        def task_gradient(batch):
            owner.strength = 0.0
            names = list(omega)
            grads = torch.autograd.grad(loss(batch), [p for _, p in owner.model.named_parameters()])
            owner.strength = strength
            current.update(zip(names, grads, strict=True))
            current["before"] = {n: p.detach().clone() for n, p in owner.model.named_parameters()}

        def loss_of(batch):
            task_gradient(batch)
            return loss(batch)

        def after(place, batch):
            after_step(place, batch)
            for n, p in owner.model.named_parameters():
                omega[n] -= current[n] * (p.detach() - current["before"][n])
            steps.append(place.step)

        return fit(runtime, name, owner, groups, loss_of, batches, recipe, before_step=before_step, after_step=after)

    from clbench.learners import regularised

    monkeypatch.setattr(regularised, "fit", watched)
    expected = {n: torch.zeros_like(p) for n, p in learner.model.named_parameters()}
    for i in range(3):
        start = fisher.kept(learner.model)
        learn(i)
        for n, p in learner.model.named_parameters():
            expected[n] = expected[n] + omega[n] / ((p.detach() - start[n]).square() + 0.1)
            if variant == "official":
                expected[n] = expected[n].clamp_min(0)
            torch.testing.assert_close(learner.importance[n], expected[n], atol=1e-7, rtol=1e-3)
    assert len(steps) > 6 and learner.path == {}


@pytest.mark.parametrize(("variant", "expected"), [("official", 0.0), ("paper", -10.0)])
def test_si_of_a_path_that_went_up(monkeypatch, variant, expected):
    """Weights that stood still while the loss rose by 1: -1 / damping, cut off in the release."""
    from clbench.learners import regularised

    def fit_nothing(runtime, name, owner, *rest, **hooks):
        owner.path = {n: torch.full_like(v, -1.0) for n, v in owner.path.items()}
        return {}

    monkeypatch.setattr(regularised, "fit", fit_nothing)
    learner, learn, _ = SmallTrial(lambda: mlp(4), Si, variant=variant).begin()
    learn(0)
    assert {float(x) for v in learner.importance.values() for x in v.unique()} == {expected}


@pytest.mark.parametrize(("kind", "options"), [(Si, {}), (Mas, {}), (RWalk, {"interval": 2})])
def test_penalties_have_no_half(kind, options):
    """strength x sum importance x gap^2, and 0 where the weights have not moved."""
    t = SmallTrial(lambda: mlp(10), kind, strength=5.0, **options)
    learner, learn, pipeline = t.begin()
    learn(0)
    from clbench.streams.images.data import open_experience

    if isinstance(learner, Si):
        learner.reference = fisher.kept(learner.model)
    penalty = learner.penalty(open_experience(t.scenario, 1, pipeline))
    none = torch.zeros(1)
    assert float(penalty(none, none, none).detach()) == 0
    with torch.no_grad():
        for p in learner.model.parameters():
            p += 0.5
    if isinstance(learner, RWalk):
        importance = {n: scaled(learner.fisher)[n] + scaled(learner.score)[n] for n in learner.fisher}
    else:
        importance = learner.importance
    total = sum(float(v.double().sum()) for v in importance.values())
    assert total > 0 and float(penalty(none, none, none).detach()) == pytest.approx(0.25 * total, rel=1e-4)


@pytest.mark.parametrize("name", ["si", "mas", "rwalk"])
def test_a_strong_penalty_holds_the_weights(name):
    gaps = []
    for strength in (0.0, 1e4):
        extra = {"interval": 2} if name == "rwalk" else {}
        kind = {"si": Si, "mas": Mas, "rwalk": RWalk}[name]
        t = SmallTrial(lambda: mlp(10), kind, strength=strength, lr=0.01, backbone_lr=0.01, batch_size=6, **extra)
        learner, learn, _ = t.begin()
        learn(0)
        held = fisher.kept(learner.model)
        importance = getattr(learner, "importance", None) or learner.score
        learn(1)
        now = fisher.kept(learner.model)
        top = {n: v >= v.flatten().quantile(0.9) for n, v in importance.items()}
        gaps.append(sum(float((now[n] - held[n]).abs()[top[n]].sum()) for n in now))
    assert gaps[1] < 0.6 * gaps[0]


def test_mas_of_a_linear_map():
    """Features W x and head V: d |V W x|^2 / dW = 2 V^T V W x x^T."""
    t = SmallTrial(lambda: mlp(4), Mas)
    learner, _, _ = t.begin()
    learner.model.net[2] = nn.Identity()  # no ReLU: the network is linear
    learner.model.net[1].bias.data.zero_()
    learner.head.grow(3, torch.Generator().manual_seed(1))
    data = images(5, y=[0, 1, 2, 0, 1])

    class Once:
        def __len__(self):
            return 5

        def test_batches(self, size):
            return iter([data.select(torch.arange(3)), data.select(torch.tensor([3, 4]))])

    from types import SimpleNamespace

    experience = SimpleNamespace(train=Once(), task=None, classes=(0, 1))
    found = learner.importance_of(experience)["net.1.weight"]
    w, v = learner.model.net[1].weight.detach().double(), learner.head.blocks[0].weight.detach().double()
    expected = torch.zeros_like(w)
    for x in data.x.flatten(1).double():
        expected += 2 * (v.T @ v @ w @ torch.outer(x, x)).abs() / 5
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-4)
    learner.per_sample = False
    batched = learner.importance_of(experience)["net.1.weight"].double()
    expected = torch.zeros_like(w)
    for part in (data.x[:3], data.x[3:]):
        x = part.flatten(1).double()
        expected += 2 * (v.T @ v @ w @ (x.T @ x)).abs() / 5
    torch.testing.assert_close(batched, expected, atol=1e-6, rtol=1e-4)
    assert float(batched.sum()) < float(found.double().sum()), "samples cancel in a batch"
    experience.task = 0
    learner.per_sample = True
    own = learner.importance_of(experience)["net.1.weight"].double()
    two = v[:2]
    x = data.x.flatten(1).double()
    torch.testing.assert_close(own, sum(2 * (two.T @ two @ w @ torch.outer(a, a)).abs() / 5 for a in x), atol=1e-6, rtol=1e-4)


def test_mas_adds_up_over_experiences():
    t = SmallTrial(lambda: mlp(10), Mas, lr=0.0, backbone_lr=0.0)
    learner, learn, _ = t.begin()
    learn(0)
    first = {n: v.clone() for n, v in learner.importance.items()}
    second = learn(1)
    new = learner.importance_of(second)
    for n, v in learner.importance.items():
        torch.testing.assert_close(v, first[n] + new[n])


@pytest.mark.parametrize(("variant", "half", "old"), [("paper", 0.5, 0.5), ("official", 1.0, 1.5)])
def test_rwalk_score_by_hand(variant, half, old):
    """Two intervals of two steps each with known gradients and displacements, then the end of two experiences."""
    t = SmallTrial(lambda: mlp(2), RWalk, variant=variant, alpha=0.9, interval=2, damping=0.01)
    learner, _, _ = t.begin()
    p = learner.model.net[1].bias
    name = "net.1.bias"
    learner.gained, learner.path, learner.squares = (zeros(learner.model) for _ in range(3))
    learner.start = fisher.kept(learner.model)
    hooks = learner.hooks()
    moves = [([1.0, -2.0], [-0.1, 0.2]), ([3.0, 1.0], [-0.3, 0.1]), ([2.0, 1.0], [-0.2, 0.3]), ([0.0, 4.0], [0.5, 0.1])]
    f, s = np.zeros(2), np.zeros(2)
    for i in (0, 2):
        pair = [(np.array(g), np.array(d)) for g, d in moves[i : i + 2]]
        omega = sum(-g * d for g, d in pair)
        f = 0.1 * f + 0.9 * sum(g * g for g, _ in pair) / 2
        s = s + np.maximum(omega / (half * f * sum(d for _, d in pair) ** 2 + 0.01), 0)
    for g, d in moves:
        for q in learner.model.parameters():
            q.grad = torch.zeros_like(q)
        p.grad = torch.tensor(g)
        hooks["before_step"]([], [])
        with torch.no_grad():
            p += torch.tensor(d)
        hooks["after_step"](None, None)
    np.testing.assert_allclose(learner.fisher[name].numpy(), f, rtol=1e-5)
    np.testing.assert_allclose(learner.gained[name].numpy(), s, rtol=1e-4)
    assert s[0] > 0 and learner.taken == 0


@pytest.mark.parametrize(("variant", "old"), [("paper", 0.5), ("official", 1.5)])
def test_rwalk_merges_scores(monkeypatch, variant, old):
    t = SmallTrial(lambda: mlp(10), RWalk, variant=variant, interval=3, batch_size=6)
    learner, learn, _ = t.begin()
    got = []
    close = RWalk.close_interval

    def spy(self):
        close(self)
        got.append({n: v.clone() for n, v in self.gained.items()})

    monkeypatch.setattr(RWalk, "close_interval", spy)
    learn(0)
    first = {n: v.clone() for n, v in learner.score.items()}
    for n in first:
        assert torch.equal(first[n], got[-1][n])
    learn(1)
    for n, v in learner.score.items():
        torch.testing.assert_close(v, old * first[n] + 0.5 * got[-1][n])
    assert learner.path == learner.start == {}


def test_scaled_maps_the_whole_network_together():
    made = scaled({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([5.0])})
    assert made["a"].tolist() == [0.0, 0.5] and made["b"].tolist() == [1.0]
    assert scaled({"a": torch.ones(2)})["a"].tolist() == [0.0, 0.0]


def test_true_fisher_of_softmax_regression():
    """F[k, j] of the first layer's bias with head V: sum_c p_c (V^T (p - onehot_c))_k^2; and Mammoth's weight p_y."""
    t = SmallTrial(lambda: mlp(4), Ewc, fisher="true", trainable="all")
    learner, _, _ = t.begin()
    learner.model.net[2] = nn.Identity()
    learner.head.grow(3, torch.Generator().manual_seed(1))
    learner.head.blocks[0].weight.data *= 20
    data = images(4, y=[0, 1, 2, 0])
    v = learner.head.blocks[0].weight.detach().double()
    p = learner.head(learner.model.features(data)).detach().double().softmax(1)
    for kind in ("true", "mammoth", "per_sample"):
        learner.kind = kind
        learner.model.eval()
        found = learner._of(data, [0, 1, 2], learner.head)["net.1.bias"].double()
        expected = torch.zeros(4, dtype=torch.float64)
        for i, y in enumerate(data.y.tolist()):
            for c in range(3):
                g = v.T @ (p[i] - F.one_hot(torch.tensor(c), 3))
                weight = {"true": p[i, c], "mammoth": p[i, c] * (c == y), "per_sample": float(c == y)}[kind]
                expected += weight * g.square()
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Si, {"damping": 0.0}, r"learner\.damping"),
        (RWalk, {"interval": 0}, r"learner\.interval"),
        (RWalk, {"alpha": 0.0}, "alpha in"),
    ],
)
def test_bad_options(kind, options, words):
    with pytest.raises(UserError, match=words) as caught:
        SmallTrial(lambda: mlp(4), kind, **options).start()
    assert "\n" not in str(caught.value)
