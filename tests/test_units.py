"""Hidden units are found; CBP, HAT and PackNet against hand-worked values and naive versions; L2 Init, shrink and perturb."""

import math

import pytest
import torch
from small_networks import Net, SmallTrial, backbone, convnet, images, mlp
from torch import nn

from clbench.config.compose import build, compose
from clbench.interfaces import UserError
from clbench.learners.cbp import Cbp
from clbench.learners.finetune import Finetune
from clbench.learners.hat import Hat, compensation
from clbench.learners.l2_init import L2Init
from clbench.learners.packnet import PackNet
from clbench.learners.shrink_perturb import ShrinkPerturb
from clbench.models.heads import LinearHead
from clbench.models.units import hidden_units
from clbench.testing.contract import small_stream
from clbench.training.entry_adam import EntryAdam
from clbench.training.state import detached, fingerprint


class Residual(nn.Module):
    """Two layers around which the input is led."""

    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))


def found(net):
    units = hidden_units(backbone(net))
    return [(one.name, one.count, one.each, one.norm is not None, one.reader is None) for one in units]


def test_hidden_units_of_plain_networks():
    assert found(mlp(7, 5)) == [("net.1", 7, 1, False, False), ("net.3", 5, 1, False, True)]
    assert found(convnet()) == [
        ("net.0", 6, 1, True, False), ("net.4", 5, 4, False, False), ("net.8", 12, 1, False, True),
    ]  # fmt: skip
    layers = [nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), Residual(8), nn.LayerNorm(8), nn.Linear(8, 4), nn.ReLU()]
    assert [name for name, *_ in found(Net(*layers, num_features=4))] == ["net.3.inner", "net.5"]
    grouped = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten()]
    assert found(Net(*grouped, num_features=64)) == [], "a grouped layer neither makes nor reads hidden units"
    twice = nn.Linear(6, 6)
    shared = [nn.Flatten(), nn.Linear(192, 6), twice, nn.ReLU(), twice, nn.ReLU()]
    assert "net.2" not in [name for name, *_ in found(Net(*shared, num_features=6))]


def test_finding_units_changes_nothing():
    model = build(compose(["model=resnet32"])[0]["model"])
    model.net.layer1.requires_grad_(False)
    model.train()
    before = fingerprint(model.state_dict())
    units = hidden_units(model)
    assert fingerprint(model.state_dict()) == before and model.passes == {"train": 0, "eval": 0, "stored": 0}
    assert all(m.training for m in model.modules()) and not next(model.net.layer1.parameters()).requires_grad
    assert len(units) == 15 and all(one.name.endswith("conv1") and one.norm is not None for one in units)


@pytest.mark.parametrize("make", [lambda: mlp(7, 5), convnet])
def test_a_gate_of_0_is_an_outgoing_weight_of_0(make):
    """Gates, views of outgoing weights and activations agree on what a unit is."""
    model = backbone(make()).eval()
    head = LinearHead(model.num_features)
    head.grow(3, torch.Generator().manual_seed(0))
    x = images(4).x
    for one in hidden_units(model):
        gate, taken = torch.ones(one.count), []
        gate[[0, 2]] = 0
        watch = model if one.reader is None else one.reader

        def see(module, args, one=one, taken=taken, gate=gate):
            taken.append(one.apart(args[0]))
            return (one.gated(args[0], gate), *args[1:])

        if one.reader is None:
            f = model.features(x)
            taken.append(one.apart(f))
            gated = head(one.gated(f, gate))
        else:
            hook = watch.register_forward_pre_hook(see)
            gated = head(model.features(x))
            hook.remove()
        assert taken[0].shape[:2] == (4, one.count)
        kept = [w.clone() for w, _ in one.outgoing(head.blocks)]
        with torch.no_grad():
            for w, _ in one.outgoing(head.blocks):
                w[:, [0, 2]] = 0
        torch.testing.assert_close(head(model.features(x)), gated, atol=1e-6, rtol=1e-4)
        with torch.no_grad():
            for (w, _), old in zip(one.outgoing(head.blocks), kept, strict=True):
                w.copy_(old)


# --- CBP


def cbp(make=lambda: mlp(4, 3), **options):
    learner, learn, pipeline = SmallTrial(make, Cbp, **options).begin()
    return learner, learn, pipeline


@pytest.mark.parametrize("utility", ["adaptable", "contribution"])
def test_utility_by_hand(utility):
    """Two batches; decay 0.5."""
    learner, _, _ = cbp(utility=utility, decay=0.5, rate=0.0)
    one = learner.units[0]
    with torch.no_grad():
        one.layer.weight.copy_(torch.arange(1.0, 5)[:, None].expand(4, 192) * torch.tensor([1.0, -1.0] * 96))
        one.reader.weight.copy_(torch.tensor([[1.0, 0, 2, -1], [3.0, 0, -2, 1], [-2.0, 0, 2, 1]]))
    batches = [torch.tensor([[1.0, 2, 0, 4], [3.0, 2, 0, 0]]), torch.tensor([[2.0, 2, 1, 0], [0.0, 2, 3, 0]])]
    out = torch.tensor([2.0, 0, 2, 1])
    mean, u = torch.zeros(4), torch.zeros(4)
    for age, h in enumerate(batches, 1):
        learner.renew(one, h[:, :, None], torch.Generator())
        mean = 0.5 * mean + 0.5 * h.mean(0)
        corrected = mean / (1 - 0.5**age)
        y = out * h.abs().mean(0) if utility == "contribution" else out * (h - corrected).abs().mean(0) / torch.arange(1.0, 5)
        u = 0.5 * u + 0.5 * y
    own = learner.counters[one.name]
    torch.testing.assert_close(own["mean"], mean)
    torch.testing.assert_close(own["utility"], u)
    assert own["age"].tolist() == [2.0] * 4 and float(own["due"]) == 0


@pytest.mark.parametrize("make", [lambda: mlp(8, 6), lambda: convnet(norm=False)])
@pytest.mark.parametrize("place", [0, -1])
def test_a_replaced_unit_that_is_constant_changes_no_output(make, place):
    """A unit that gives h-hat for every sample: weights 0, bias b, so h = h-hat = b; the reader's bias takes it over."""
    learner, _, _ = cbp(make)
    learner.head.grow(3, torch.Generator().manual_seed(0))
    one = learner.units[place]
    rows = torch.tensor([1, 3])
    with torch.no_grad():
        one.layer.weight[rows] = 0
        one.layer.bias[rows] = torch.tensor([0.7, 0.2])
    mean = torch.zeros(one.count)
    mean[rows] = torch.tensor([0.7, 0.2])
    data = images(5)
    learner.model.eval()
    if isinstance(one.reader, nn.Conv2d):  # zero padding at the border is no h-hat
        one.reader.padding = (0, 0)
        below = nn.Sequential(*list(learner.model.net)[: list(learner.model.net).index(one.reader)])
        before = one.reader(below(data.x))
        learner.start_anew(one, rows, mean, torch.Generator().manual_seed(1))
        after = one.reader(below(data.x))
    else:
        before = learner.head(learner.model.features(data))
        learner.start_anew(one, rows, mean, torch.Generator().manual_seed(1))
        after = learner.head(learner.model.features(data))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)
    bound = one.layer.weight[0].numel() ** -0.5 * (6**0.5 if isinstance(one.layer, nn.Linear) else 1)
    fresh = one.layer.weight[rows].detach()
    assert 0.5 * bound < float(fresh.abs().max()) <= bound and one.layer.bias[rows].tolist() == [0.0, 0.0]
    assert all(float(w.detach()[:, rows].abs().max()) == 0 for w, _ in one.outgoing(learner.head.blocks))


def test_the_official_variant_leaves_the_readers_bias():
    learner, _, _ = cbp(variant="official_mlp", rate=1.0, maturity=0, decay=0.5)
    one = learner.units[0]
    bias = one.reader.bias.detach().clone()
    assert learner.renew(one, torch.rand(3, 4, 1) + 1, torch.Generator()) == 4
    assert torch.equal(one.reader.bias, bias)
    paper, _, _ = cbp(rate=1.0, maturity=0, decay=0.5)
    one = paper.units[0]
    bias, weight = one.reader.bias.detach().clone(), one.reader.weight.detach().clone()
    h = torch.rand(3, 4, 1) + 1
    paper.renew(one, h, torch.Generator())
    torch.testing.assert_close(one.reader.bias.detach(), bias + weight @ h.mean((0, 2)))


def test_the_official_variant_for_resnets_by_hand():
    """Sums without decay, that go on; a share of all units once one is eligible; normal weights; moments and biases stay."""
    learner, _, _ = cbp(convnet, variant="official_resnet", utility="contribution", decay=0.75, rate=0.25, maturity=1)
    learner.head.grow(2, torch.Generator())
    one = learner.units[0]  # 6 channels behind BatchNorm
    own, total = learner.counters[one.name], torch.zeros(6)
    bias, out = one.reader.bias.detach().clone(), one.reader.weight.detach().abs().mean((0, 2, 3))
    made = torch.Generator().manual_seed(1)
    batches = [torch.randn(3, 6, 4, generator=made) for _ in range(3)]
    (optimizer,) = [learner.recipe.build([{"params": [one.layer.weight, one.reader.weight], "lr": 0.1}])]
    for p in (one.layer.weight, one.reader.weight):
        optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)
    gone = [learner.renew(one, h, torch.Generator().manual_seed(3)) for h in batches[:1]]
    assert gone == [0] and float(own["due"]) == 0, "nobody is mature"
    total += 0.25 * batches[0].abs().mean((0, 2))
    torch.testing.assert_close(own["utility"], out * total)
    own["age"][:3] = 5
    own["due"][:] = 0.4
    total += 0.25 * batches[1].abs().mean((0, 2))
    worth = (out * total)[:3]
    own["age"][3:] = 0
    assert learner.renew(one, batches[1], torch.Generator().manual_seed(3)) == 1, "0.4 + a quarter of 6 are 1.9"
    row = int(worth.argmin())
    assert float(own["due"]) == pytest.approx(0.9) and float(own["age"][row]) == 0 == float(own["utility"][row])
    torch.testing.assert_close(own["mean"], total)
    assert torch.equal(one.reader.bias, bias) and float(one.reader.weight[:, row].detach().abs().max()) == 0
    fresh = torch.empty(1, *one.layer.weight.shape[1:]).normal_(0, (2 / 27) ** 0.5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(one.layer.weight.detach()[row], fresh[0])
    norm = one.norm
    assert [float(x[row].detach()) for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var)] == [
        1.0,
        0.0,
        0.0,
        1.0,
    ]
    assert all(float(optimizer.state[p]["momentum_buffer"].min()) == 1 for p in (one.layer.weight, one.reader.weight))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_by_entry(decay):
    """torch's Adam where nothing starts anew; what does start anew steps like a parameter of its own from there on."""
    made = torch.Generator().manual_seed(0)
    grads = torch.randn(7, 3, 2, generator=made)
    p, twin = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    own = EntryAdam([{"params": [p], "lr": 0.1}], (0.8, 0.99), decay)
    theirs = torch.optim.Adam([{"params": [twin], "lr": 0.1}], betas=(0.8, 0.99), weight_decay=decay)
    for g in grads[:4]:
        for q, optimizer in ((p, own), (twin, theirs)):
            q.grad = g.clone()
            optimizer.step()
        torch.testing.assert_close(p, twin)
    for value in own.state[p].values():
        value[1] = 0
    row = torch.nn.Parameter(p.detach()[1].clone())
    alone = torch.optim.Adam([row], lr=0.1, betas=(0.8, 0.99), weight_decay=decay)
    again = EntryAdam([{"params": [p], "lr": 0.1}], (0.8, 0.99), decay)
    again.load_state_dict(own.state_dict())
    for g in grads[4:]:
        p.grad, twin.grad, row.grad = g.clone(), g.clone(), g[1].clone()
        again.step(), theirs.step(), alone.step()
        torch.testing.assert_close(p[1], row)
        torch.testing.assert_close(p[::2], twin[::2])
    assert int(again.state[p]["steps"][1, 0]) == 3 and int(again.state[p]["steps"][0, 0]) == 7


def test_the_least_useful_mature_units_go_at_the_rate():
    """rate x eligible units a step in the mean; nobody below maturity; the least utility first."""
    learner, _, _ = cbp(lambda: mlp(50, 3), rate=0.01, maturity=10, decay=0.9)
    one = learner.units[0]
    gone, eligible = 0, 0
    for step in range(200):
        age = learner.counters[one.name]["age"].clone()
        eligible += int((age + 1 > 10).sum())
        own = learner.counters[one.name]
        number = learner.renew(one, torch.rand(4, 50, 1, generator=torch.Generator().manual_seed(step)), torch.Generator())
        fresh = own["age"] == 0
        assert int(fresh.sum()) == number and (age[fresh] + 1 > 10).all()
        gone += number
    assert gone == pytest.approx(0.01 * eligible, abs=1.01) and gone > 20
    own["utility"][:] = torch.arange(50.0).flip(0)
    own["age"][:], own["due"][:] = 1000.0, 2.9
    learner.decay = 0.999999
    learner.renew(one, torch.zeros(4, 50, 1), torch.Generator())
    assert (own["age"] == 0).nonzero().flatten().tolist() == [47, 48, 49]


def test_rate_0_is_finetune_to_the_last_bit():
    ends = []
    for kind, options in ((Cbp, {"rate": 0.0}), (Finetune, {})):
        t = SmallTrial(lambda: mlp(9), kind, lr=0.05, backbone_lr=0.05, batch_size=8, momentum=0.0, weight_decay=0.0, **options)
        learner, learn, _ = t.begin()
        for i in range(3):
            learn(i)
        ends.append(fingerprint({"model": learner.model.state_dict(), "head": learner.head.state_dict()}))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_moments_and_batch_norm_of_a_new_unit_start_anew(optimizer):
    t = SmallTrial(convnet, Cbp, rate=0.0, optimizer=optimizer, momentum=0.9, batch_size=6)
    learner, learn, _ = t.begin()
    learn(0)
    one = learner.units[0]
    assert one.norm is not None
    rows = torch.tensor([2])
    (optimizer,) = learner.recipe.built
    moments = [v for p in (one.layer.weight, one.norm.weight) for v in optimizer.state[p].values() if v.ndim]
    assert moments and all(float(v[2].abs().sum()) > 0 for v in moments)
    learner.start_anew(one, rows, torch.zeros(6), torch.Generator())
    assert all(float(v[2].abs().sum()) == 0 and float(v[1].abs().sum()) > 0 for v in moments)
    reader = [v for v in optimizer.state[one.reader.weight].values() if v.ndim]
    assert all(float(v[:, 2].abs().sum()) == 0 and float(v[:, 1].abs().sum()) > 0 for v in reader)
    norm = one.norm
    assert [float(x[2].detach()) for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var)] == [1.0, 0.0, 0.0, 1.0]


def test_units_start_anew_in_training():
    learner, learn, _ = cbp(lambda: mlp(40, 30), rate=0.05, maturity=2, batch_size=4, lr=0.05)
    learn(0)
    assert learner.replaced > 10
    assert all(float(own["age"].max()) > float(own["age"].min()) for own in learner.counters.values())


# --- HAT


def test_compensation():
    """At e = 0 the compensated gradient of the gate is that of s_max, whatever s; elsewhere it is the formula."""
    for s in (1 / 400, 1.0, 37.0, 400.0):
        e = torch.zeros(3, requires_grad=True)
        torch.sigmoid(s * e).sum().backward()
        torch.testing.assert_close(e.grad * compensation(e.detach(), s, 400.0), torch.full((3,), 100.0))
    got = compensation(torch.tensor([0.5, -6.0]), 20.0, 400.0)
    expected = [20 * (math.cosh(10) + 1) / (math.cosh(0.5) + 1), 20 * (math.cosh(50) + 1) / (math.cosh(6) + 1)]
    torch.testing.assert_close(got, torch.tensor(expected))


def hat(make, **options):
    t = SmallTrial(make, Hat, "task_incremental", **options)
    return t, *t.begin()


def test_gradient_factors_by_hand():
    _, learner, _, _ = hat(lambda: mlp(3, 2))
    first, second = torch.tensor([1.0, 0.25, 0.0]), torch.tensor([0.5, 0.0])
    factors = learner.factors(torch.cat([first, second]))
    assert factors["net.1.weight"].flatten().tolist() == [0.0, 0.75, 1.0] == factors["net.1.bias"].tolist()
    assert factors["net.3.weight"].tolist() == [[0.5, 0.75, 1.0], [1.0, 1.0, 1.0]]
    assert factors["net.3.bias"].tolist() == [0.5, 1.0]
    _, learner, _, _ = hat(convnet)
    sizes = [one.count for one in learner.units]
    factors = learner.factors(torch.cat([torch.linspace(0, 1, n) for n in sizes]))
    assert {n: tuple(f.shape) for n, f in factors.items()}["net.4.weight"] == (5, 6, 1, 1)
    flat = factors["net.8.weight"]  # 12 units from 5 channels of 4 pixels
    a, b = torch.linspace(0, 1, 12), torch.linspace(0, 1, 5).repeat_interleave(4)
    torch.testing.assert_close(flat, 1 - torch.minimum(a[:, None], b[None]))
    torch.testing.assert_close(factors["net.1.weight"], 1 - torch.linspace(0, 1, 6))


@pytest.mark.parametrize("make", [lambda: mlp(20, 10), convnet])
def test_binary_gates_keep_old_answers_to_the_last_bit(make):
    """With the first task's gates at exactly 0 and 1, training the others moves nothing that it uses."""
    t, learner, learn, pipeline = hat(make, lr=0.1, backbone_lr=0.1, batch_size=6)
    learn(0)
    total = len(learner.embeddings[0])
    with torch.no_grad():  # sigmoid(400 x +-6) is 1 or 0 in float32
        learner.embeddings[0].copy_(torch.where(torch.arange(total) % 2 == 0, 6.0, -6.0))
    z = t.answers_of(learner, pipeline, 0)[:, :2]
    weights = detached(learner.model.state_dict())
    learn(1)
    learn(2)
    assert torch.equal(t.answers_of(learner, pipeline, 0)[:, :2], z)
    now = learner.model.state_dict()
    moved = {n: float((now[n] != weights[n]).float().mean()) for n in weights if n.endswith("weight")}
    assert max(moved.values()) > 0.3, "what is free does learn"
    used = learner.used(1)
    assert used is not None and float(used[0]) == 1.0


def test_gates_and_the_term_that_closes_them(monkeypatch):
    """The loss, the annealed s and the clamp against a naive version."""
    from clbench.learners import hat as module

    _, _, learn, _ = hat(lambda: mlp(5), strength=2.0, batch_size=10, s_max=50.0)
    seen = []

    def spy(runtime, name, owner, groups, loss, batches, recipe, at_place, before_step, after_step):
        from clbench.interfaces import Place

        for step in (0, 1, 2, batches.per_epoch + 1):
            at_place(Place(runtime.experience, step, batches.steps, step))
            seen.append(owner.s)
        place = len(owner.embeddings) - 1
        batch, e = batches(1), owner.embeddings[place]
        gate = torch.sigmoid(owner.s * e)
        w = owner.model.net[1]
        z = owner.heads.at(place)(torch.relu(w(batch.x.flatten(1))) * gate)
        used = torch.zeros(5) if place == 0 else torch.sigmoid(50 * owner.embeddings[0]).detach()
        closing = (gate * (1 - used)).sum() / (1 - used).sum()
        expected = nn.functional.cross_entropy(z, batch.y - 2 * place) + 2.0 * closing
        torch.testing.assert_close(loss(batch), expected)
        with torch.no_grad():
            e[0] = 9.0
        after_step(None, batch)
        assert float(e[0].detach()) == 6.0
        return {}

    monkeypatch.setattr(module, "fit", spy)
    learn(0)
    learn(1)
    low, n = 1 / 50, 24  # samples of two classes
    torch.testing.assert_close(seen[:4], [low + (50 - low) * i / n for i in (0, 10, 20, 10)])
    paper = hat(lambda: mlp(5), variant="paper", batch_size=10, s_max=50.0)
    seen.clear()

    def spy_on_places(*rest, at_place, **hooks):
        for place in places:
            at_place(place)
            seen.append(paper[1].s)
        return {}

    monkeypatch.setattr(module, "fit", spy_on_places)
    from clbench.interfaces import Place

    places = [Place(0, step, 6, step) for step in (0, 1, 2)]
    paper[2](0)
    torch.testing.assert_close(seen, [low, low + (50 - low) / 2, 50.0])


def test_the_same_classes_in_several_tasks():
    """Permuted images, task disclosed: a head for each task over the same classes; a task that was not learned has no head."""
    stream = small_stream("task_incremental", sizes=[4], num_classes=4, operators=[{"permute": {"experiences": 3}}])
    for kind in (Hat, PackNet):
        t = SmallTrial(lambda: mlp(30), kind, scenario=stream, batch_size=8)
        learner, learn, pipeline = t.begin()
        for i in range(3):
            learn(i)
            z = [t.answers_of(learner, pipeline, j) for j in range(3)]
            assert all(one.shape == (24, 4) for one in z)
        assert learner.heads.tasks == [0, 1, 2] and [learner.heads.at(i).widths for i in range(3)] == [[4]] * 3
        assert not torch.equal(z[0], z[1])


# --- PackNet


def packnet(make=lambda: mlp(20, 10), **options):
    t = SmallTrial(make, PackNet, "task_incremental", **({"lr": 0.05, "retrain_lr": 0.01, "batch_size": 6} | options))
    return t, *t.begin()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("make", [lambda: mlp(20, 10), convnet])
def test_weights_of_a_task_never_move_again(make, optimizer):
    """Momentum and Adam on: after task 3, the weights of task 1 and its answers are equal to the last bit."""
    t, learner, learn, pipeline = packnet(make, optimizer=optimizer)
    learn(0)
    owners = {n: o.clone() for n, o in learner.owners.items()}
    weights = detached(dict(learner.model.state_dict()))
    z = t.answers_of(learner, pipeline, 0)[:, :2]
    learn(1)
    second = t.answers_of(learner, pipeline, 1)[:, 2:4]
    between = {n: o.clone() for n, o in learner.owners.items()}
    learn(2)
    now = learner.model.state_dict()
    for n, owner in owners.items():
        own = owner == 1
        assert 0 < int(own.sum()) < own.numel() and torch.equal(now[n][own], weights[n][own])
        assert torch.equal(learner.owners[n][own], owner[own]) and (between[n][owner == 1] == 1).all()
        assert (weights[n][owner == 0] == 0).all() and (now[n][learner.owners[n] == 0] == 0).all()
        assert {1, 2, 3} <= set(learner.owners[n].unique().tolist())
    for n in weights.keys() - owners.keys():
        assert torch.equal(now[n], weights[n]), f"{n} was trained after the first task"
    assert torch.equal(t.answers_of(learner, pipeline, 0)[:, :2], z)
    assert torch.equal(t.answers_of(learner, pipeline, 1)[:, 2:4], second)


def test_shares_and_which_weights_go():
    _, learner, _, _ = packnet()
    weights = dict(learner.model.named_parameters())
    for share, place in ((0.5, 0), (0.75, 1)):
        for owner in learner.owners.values():
            owner[owner == 0] = place + 1
        with torch.no_grad():
            for key in learner.owners:
                weights[key].copy_(torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(place)))
        before = {key: weights[key].detach().clone() for key in learner.owners}
        mine = {key: owner == place + 1 for key, owner in learner.owners.items()}
        learner.give_back(place, share)
        for key, owner in learner.owners.items():
            gone = mine[key] & (owner == 0)
            stay = mine[key] & (owner == place + 1)
            assert int(gone.sum()) == round(share * int(mine[key].sum()))
            assert float(before[key][gone].abs().max()) <= float(before[key][stay].abs().min())
            assert float(weights[key].detach()[gone].abs().max()) == 0
            assert torch.equal(weights[key][~gone], before[key][~gone])


def test_an_epoch_before_and_one_after():
    with pytest.raises(UserError, match="needs 2 epochs, got 1"):
        SmallTrial(lambda: mlp(4), PackNet, "task_incremental", epochs=1).start()


# --- L2 Init, shrink and perturb


def test_l2_init_by_hand():
    t = SmallTrial(lambda: mlp(6), L2Init, strength=0.5, optimizer="sgd", lr=0.1, backbone_lr=0.1, batch_size=24, epochs=1)
    learner, learn, pipeline = t.begin()
    first = detached(learner.model.state_dict())
    learn(0)
    moved = detached(learner.model.state_dict())
    heads = {n: p.detach().clone() for n, p in learner.head.named_parameters()}
    drawn = {n: p.detach().clone() for n, p in learner.first_head.named_parameters()}
    assert any(not torch.equal(heads[n], drawn[n]) for n in heads)
    from clbench.streams.images.data import open_experience, shuffled
    from clbench.training.losses import masked_cross_entropy

    experience = open_experience(t.scenario, 0, pipeline)  # the same again: one step from here, worked out with autograd
    learner.runtime.begin(1)
    batch = shuffled(experience.train, 24, 1, learner.runtime.key("train"))(0)
    learner.model.zero_grad(), learner.head.zero_grad()
    loss = masked_cross_entropy(learner.head(learner.model.features(batch)), batch.y, "local", (0, 1))
    loss = loss + 0.5 * sum((p - first[n]).square().sum() for n, p in learner.model.named_parameters())
    loss = loss + 0.5 * sum((p - drawn[n]).square().sum() for n, p in learner.head.named_parameters())
    loss.backward()
    expected = {n: moved[n] - 0.1 * p.grad for n, p in learner.model.named_parameters()}
    head = {n: heads[n] - 0.1 * p.grad for n, p in learner.head.named_parameters()}
    from dataclasses import replace

    learner.learn(replace(experience, index=1, new_classes=()))
    for n, p in learner.model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n])
    for n, p in learner.head.named_parameters():
        torch.testing.assert_close(p.detach(), head[n])


def test_l2_init_of_0_is_the_loss_alone_and_a_large_one_keeps_the_first_weights():
    gaps = []
    for strength in (0.0, 3.0):
        t = SmallTrial(lambda: mlp(6), L2Init, strength=strength, optimizer="sgd", lr=0.1, backbone_lr=0.1, batch_size=4)
        learner, learn, _ = t.begin()
        for i in range(3):
            learn(i)
        first = {n: p.detach() for n, p in learner.first_head.named_parameters()}
        gap = sum(float((p.detach() - learner.first[n]).square().sum()) for n, p in learner.model.named_parameters())
        gaps.append(gap + sum(float((p.detach() - first[n]).square().sum()) for n, p in learner.head.named_parameters()))
    assert gaps[1] < 0.1 * gaps[0]


def shrink(**options):
    t = SmallTrial(lambda: mlp(6), ShrinkPerturb, batch_size=8, lr=0.05, backbone_lr=0.05, momentum=0.0, **options)
    return t.begin()


def test_shrink_1_and_sigma_0_is_finetune():
    ends = []
    for variant in ({"shrink": 1.0, "sigma": 0.0}, {"variant": "official", "sigma": 0.0}):
        learner, learn, _ = shrink(**variant)
        for i in range(3):
            learn(i)
        ends.append(fingerprint(learner.state_dict()))
    t = SmallTrial(lambda: mlp(6), Finetune, batch_size=8, lr=0.05, backbone_lr=0.05, momentum=0.0, weight_decay=0.0)
    learner, learn, _ = t.begin()
    for i in range(3):
        learn(i)
    assert ends == [fingerprint(learner.state_dict())] * 2


def test_weights_are_shrunk_and_noise_is_added():
    learner, learn, _ = shrink()
    learn(0)
    before = [p.detach().clone() for p in (*learner.model.parameters(), *learner.head.parameters())]
    learner.change(0.6, torch.Generator().manual_seed(3))
    now = [p.detach() for p in (*learner.model.parameters(), *learner.head.parameters())]
    noise = torch.cat([(a - 0.6 * b).flatten() for a, b in zip(now, before, strict=True)])
    assert float(noise.std()) == pytest.approx(0.01, rel=0.1) and abs(float(noise.mean())) < 1e-3
    first = [p.detach().clone() for p in learner.model.parameters()]
    learner.lr = learner.backbone_lr = 0.0
    learn(1)
    gaps = torch.cat([(a - 0.6 * b).flatten() for a, b in zip(learner.model.parameters(), first, strict=True)]).detach()
    assert float(gaps.std()) == pytest.approx(0.01, rel=0.1), "once, before the experience"
    learner, learn, _ = shrink(variant="official")
    learner.lr = learner.backbone_lr = 0.0
    first = [p.detach().clone() for p in learner.model.parameters()]
    learn(0)  # 2 epochs of 3 batches
    gaps = torch.cat([(a - b).flatten() for a, b in zip(learner.model.parameters(), first, strict=True)]).detach()
    assert float(gaps.std()) == pytest.approx(0.01 * 6**0.5, rel=0.1), "after every step, from the first on"


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Cbp, {"rate": 2.0}, r"learner\.rate"),
        (Cbp, {"variant": "official"}, r"learner\.variant=official: choose paper, official_mlp, official_resnet"),
        (Cbp, {"variant": "official_resnet"}, r"learner\.utility=contribution alone"),
        (Hat, {"s_max": 1.0}, r"learner\.s_max"),
        (PackNet, {"prune": 1.0}, r"learner\.prune"),
        (ShrinkPerturb, {"shrink": 1.5}, r"learner\.shrink"),
        (ShrinkPerturb, {"shrink": 0.5, "variant": "official"}, "has no effect"),
    ],
)
def test_bad_options(kind, options, words):
    with pytest.raises(UserError, match=words) as caught:
        SmallTrial(lambda: mlp(4), kind, **options).start()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Cbp, Hat])
def test_a_network_without_hidden_units_is_refused(kind):
    net = Net(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), num_features=8)
    with pytest.raises(UserError, match="no layer whose units"):
        SmallTrial(lambda: net, kind).start()
