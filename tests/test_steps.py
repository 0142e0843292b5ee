"""What a learner may do around its steps (refresh, half fine-tuning, LISA, Bloop), and the grid of rehearsal-free learning."""

import re

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, backbone, convnet, images, mlp
from torch.nn import functional as F

from clbench.interfaces import Budget, Capabilities, UserError
from clbench.learners.derpp import DerPP
from clbench.learners.er import ExperienceReplay
from clbench.learners.ewc import Ewc
from clbench.learners.feat_kd import FeatKd
from clbench.learners.finetune import Finetune
from clbench.learners.l2_reg import L2Reg
from clbench.learners.lwf import Lwf
from clbench.learners.mas import Mas
from clbench.learners.pred_kd import PredKd
from clbench.learners.rehearsal_free import RehearsalFree, binary
from clbench.learners.rwalk import RWalk
from clbench.learners.si import Si
from clbench.models.heads import LinearHead
from clbench.streams.images.data import open_experience
from clbench.training import chosen_layers
from clbench.training.bloop import Bloop, orthogonal
from clbench.training.chosen_layers import Half, Lisa, blocks_of
from clbench.training.refresh import Refresh
from clbench.training.runtime import Runtime
from clbench.training.state import detached, fingerprint
from clbench.training.steps import Steps, joined

CPU = torch.device("cpu")
SMALL = {"epochs": 1, "batch_size": 8}


def learned(learner, make=lambda: mlp(10, 8), experiences=2, **options):
    """A learner on a small network after some experiences of two digits."""
    t = SmallTrial(make, learner, can=Capabilities(stores_exemplars=True), **{**SMALL, **options})
    made, step, _ = t.begin()
    for i in range(experiences):
        step(i)
    return made


def same(a, b):
    return all(fingerprint(a[name]) == fingerprint(b[name]) for name in ("model", "head"))


def runtime():
    return Runtime(3, CPU, Budget())


# --- refresh


@pytest.mark.parametrize(
    ("learner", "make"),
    [(Finetune, convnet), (Lwf, mlp), (ExperienceReplay, mlp), (DerPP, mlp), (Ewc, mlp)],
    ids=lambda x: x.__name__,
)
def test_a_refresh_of_size_0_changes_nothing(learner, make):
    """Not the noise, not the extra passes: neither random numbers nor statistics of BatchNorm know of them."""
    network = convnet if make is convnet else (lambda: mlp(10, 8))
    options = {"trainable": "all"} if learner is Ewc else {}
    refresh = {"fisher": "none"} if make is convnet else {}  # BatchNorm of one image is none
    plain = learned(learner, network, **options).state_dict()
    for more in ({"variant": "official", "size": 0.0}, {"variant": "paper", "size": 0.0, "noise": 3.0}):
        assert same(plain, learned(learner, network, refresh={**more, **refresh}, **options).state_dict()), more
    assert not same(plain, learned(learner, network, refresh={"size": 1e-2, **refresh}, **options).state_dict())
    assert "stepping" not in plain


@pytest.mark.parametrize("seed", range(3))
def test_a_change_is_what_the_release_and_the_paper_write(seed):
    rng = np.random.default_rng(seed)
    p, g, xi = (rng.standard_normal((3, 4)) for _ in range(3))
    f = rng.random((3, 4)) * 1e3
    got = Refresh(runtime(), size=0.2, noise=0.5).change(*map(torch.tensor, (p, g, xi, f)))
    u = 0.01 * g
    u = np.sqrt((p**2).sum()) / np.sqrt((u**2).sum()) * u
    np.testing.assert_allclose(got, 0.2 * (u + 0.5 * xi) / (1 + f / 1000))
    got = Refresh(runtime(), variant="paper", size=0.2, noise=0.5).change(*map(torch.tensor, (p, g, xi, f)))
    np.testing.assert_allclose(got, 0.2 * g / (1 + f) + 0.5 * np.sqrt(0.4 / (1 + f)) * xi)


def test_the_official_step_is_a_share_of_each_tensors_norm_whatever_the_gradient():
    layer = torch.nn.Linear(5, 3)
    before = detached(layer.state_dict())
    x, y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 100, torch.tensor([0, 1, 2, 0, 1, 2])
    loss = F.cross_entropy(layer(x), y)
    Refresh(runtime(), size=1e-3, noise=0.0).unlearn({"layer": layer}, lambda: F.cross_entropy(layer(x), y), 0)
    for name, p in layer.named_parameters():
        assert float((p.detach() - before[name]).norm() / before[name].norm()) == pytest.approx(1e-3, rel=1e-3)
    assert F.cross_entropy(layer(x), y) > loss, "the loss of what is at hand rises"
    zero = torch.nn.Linear(5, 3)
    torch.nn.init.zeros_(zero.weight)
    Refresh(runtime(), size=1e-3, noise=0.0).unlearn({"layer": zero}, lambda: F.cross_entropy(zero(x), y), 0)
    assert not zero.weight.any(), "a tensor of zeros has no norm to move by"


class Samples:
    """Images in batches."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def test_batches(self, size):
        assert size == 1
        return ((self.x[i : i + 1], self.y[i : i + 1]) for i in range(len(self)))


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_fisher_information_of_a_linear_softmax_worked_out(variant):
    """d CE / dW = (p - y) x^T; the release weighs each square by the probability of the label; 1e-5 of the old is left."""
    rng = np.random.default_rng(1)
    layer = torch.nn.Linear(4, 3, bias=False)
    x, y = rng.standard_normal((5, 4)).astype(np.float32), np.array([0, 2, 1, 1, 0])
    refresh, data = Refresh(runtime(), variant=variant), Samples(torch.tensor(x), torch.tensor(y))
    for _ in range(2):
        refresh.measure({"layer": layer}, data, lambda batch: F.cross_entropy(layer(batch[0]), batch[1]))
    want = np.zeros((3, 4))
    for one, label in zip(x, y, strict=True):
        z = layer.weight.detach().numpy() @ one
        p = np.exp(z) / np.exp(z).sum()
        g = np.outer(p - np.eye(3)[label], one)
        want += (p[label] if variant == "official" else 1) * g**2 / len(x)
    np.testing.assert_allclose(refresh.fisher["layer.weight"], want * (1 + 1e-5), rtol=1e-4)


def test_noise_and_fisher_information_of_a_refresh():
    """Noise is another one in each step, and the same when a step is made again; information lies where it was measured."""
    one, two, again = (torch.nn.Linear(2, 2) for _ in range(3))
    for layer, step in ((one, 0), (two, 1), (again, 0)):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        Refresh(runtime(), variant="paper", size=0.5).unlearn(
            {"layer": layer}, lambda layer=layer: 0 * layer.weight.sum(), step
        )
    assert torch.equal(one.weight, again.weight) and not torch.equal(one.weight, two.weight)
    draws = Refresh(runtime(), variant="paper", size=0.5)
    wide = torch.nn.Linear(100, 100)
    torch.nn.init.zeros_(wide.weight)
    draws.fisher = {"layer.weight": torch.full((100, 100), 3.0)}
    draws.unlearn({"layer": wide}, lambda: 0 * wide.weight.sum(), 0)
    assert float(wide.weight.detach().std()) == pytest.approx((2 * 0.5 / 4) ** 0.5, rel=0.05)
    learner = learned(Lwf, refresh={})
    state = learner.state_dict()["stepping"]["refresh"]["fisher"]
    assert {name.split(".")[0] for name in state} == {"model", "head"} and all((f >= 0).all() for f in state.values())


def test_what_reads_samples_again_says_so():
    for kind, other in ((Finetune, {}), (ExperienceReplay, {}), (Lwf, {}), (DerPP, {"online": True})):
        assert kind.capabilities_of(refresh={}, **other).needs_random_access, kind
        for refresh in (None, {"fisher": "none"}):
            assert not kind.capabilities_of(refresh=refresh, **other).needs_random_access, kind
    assert Finetune.capabilities_of(trainable="half").needs_boundaries
    assert ExperienceReplay.capabilities_of(project="bloop").needs_boundaries


# --- a part of the blocks

VIT = {
    f"net.blocks.{i}": {
        "norm": [f"{i}.norm1", f"{i}.norm2"],
        "attention": [f"{i}.qkv", f"{i}.proj"],
        "feed-forward": [f"{i}.fc1", f"{i}.fc2"],
    }
    for i in range(6)
}
LLAMA = {f"b{i}": {"attention": [f"{i}{c}" for c in "qkvo"], "feed-forward": [f"{i}{c}" for c in "gud"]} for i in range(6)}


def test_blocks_are_what_names_count():
    found = blocks_of(backbone(mlp(10, 8)))
    assert list(found) == ["net.1", "net.3"] and found["net.1"] == {"feed-forward": ["net.1"]}
    found = blocks_of(backbone(convnet()))
    assert found["net.1"] == {"norm": ["net.1"]}


def test_half_of_every_category_is_drawn():
    """Two of four attention matrices, one or two of three others; two draws share a quarter, T rounds leave 2^-T."""
    seen, shared, layers = [], [], [x for kinds in LLAMA.values() for names in kinds.values() for x in names]
    for key in range(300):
        drawn = Half()(LLAMA, key)
        counts = [sum(x in drawn for x in kinds["attention"]) for kinds in LLAMA.values()]
        threes = [sum(x in drawn for x in kinds["feed-forward"]) for kinds in LLAMA.values()]
        assert counts == [2] * 6 and sorted(threes) == [1, 1, 1, 2, 2, 2] and len(drawn) == len(layers) / 2
        if seen:
            shared.append(len(drawn & seen[-1]) / len(layers))
        seen.append(drawn)
    assert np.mean(shared) == pytest.approx(0.25, abs=0.02)
    untouched = [np.mean([all(x not in d for d in seen[i : i + 3]) for i in range(0, 300, 3)]) for x in layers]
    assert np.mean(untouched) == pytest.approx(1 / 8, abs=0.02)
    assert min(np.mean([x in d for d in seen]) for x in layers) > 0.35, "every layer has its turn"


def test_units_of_half():
    for key in range(20):
        whole = Half(unit="layer")(VIT, key)
        assert (
            sorted(len(whole & {x for names in kinds.values() for x in names}) for kinds in VIT.values()) == [0] * 3 + [6] * 3
        )
        assert len(Half(unit="model", ratio=0.25)(VIT, key)) == 9
        assert len(Half(ratio=0.25)(VIT, key)) == 9
        assert Half(ratio=1)(VIT, key) == {x for kinds in VIT.values() for names in kinds.values() for x in names}
        assert len({x[0] for x in Lisa(blocks=2)(VIT, key)}) == 2 and len(Lisa(blocks=2)(VIT, key)) == 12


def changed(before, after):
    return {name.rsplit(".", 1)[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(("kind", "options"), [(Finetune, {}), (Lwf, {}), (L2Reg, {}), (Ewc, {}), (Si, {}), (RWalk, {})])
def test_half_leaves_the_rest_as_it_was_to_the_last_bit(kind, options):
    t = SmallTrial(lambda: mlp(9, 8, 7, 6), kind, trainable="half", **SMALL, **options)
    learner, clock, pipeline = t.start()
    drawn = []
    for i in range(3):
        before = detached(learner.model.state_dict())
        t.learn(learner, clock, pipeline, i)
        trained = changed(before, learner.model.state_dict())
        assert trained == Half()(blocks_of(learner.model), clock.key("half")) and len(trained) == 2
        drawn.append(trained)
        assert all(p.requires_grad for p in learner.model.parameters()), "between experiences everything is as before"
    assert len(set(map(frozenset, drawn))) > 1, "each experience has a draw of its own"
    if kind is Ewc:
        assert learner.fisher.keys() == dict(learner.model.named_parameters()).keys()


@pytest.mark.parametrize("kind", [Finetune, L2Reg])  # momentum, Adam
def test_lisa_trains_its_blocks_until_the_next_draw(kind, monkeypatch):
    t = SmallTrial(lambda: mlp(9, 8, 7, 6), kind, trainable={"lisa": {"blocks": 1, "every": 2}}, epochs=1, batch_size=4)
    learner, clock, pipeline = t.start()
    states, real = [], chosen_layers.rng.permutation
    calls = []
    monkeypatch.setattr(chosen_layers.rng, "permutation", lambda key, n: calls.append(key) or real(key, n))
    clock.progress = lambda *_: states.append(detached(learner.model.state_dict()))
    first = detached(learner.model.state_dict())
    t.learn(learner, clock, pipeline, 0)
    moved = [changed(a, b) for a, b in zip([first, *states], states, strict=False)]
    assert len(moved) >= 4 and all(len(one) <= 1 for one in moved), "Adam does not move what sleeps either"
    keys = [clock.key("lisa", step // 2) for step in range(len(moved))]
    wanted = [{list(blocks_of(learner.model))[real(key, 4)[0]]} for key in keys]
    assert [one or w for one, w in zip(moved, wanted, strict=True)] == wanted and sum(map(bool, moved)) > 2
    assert all(p.requires_grad for p in learner.model.parameters())


# --- Bloop


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_directions_against_loops(rate):
    rng = np.random.default_rng(0)
    bloop, m = Bloop(runtime(), rate=rate), None
    params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(5))]
    for _ in range(4):
        g, a = rng.standard_normal(10), rng.standard_normal(10)
        g[6:] = 0  # only the second loss reaches the middle; nothing the last
        params[0].grad, params[1].grad, params[2].grad = torch.tensor(g[:6]).float().view(2, 3), None, None
        parts = [torch.tensor(a[:6]).float().view(2, 3), torch.tensor(a[6:]).float(), None]
        m = g if m is None else (1 - rate) * m + rate * g
        bloop.combine(params, [p.grad for p in params], parts)
        want = g + a - (a @ m) / (m @ m) * m
        got = np.concatenate([params[0].grad.numpy().ravel(), params[1].grad.numpy()])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert (got - g) @ m == pytest.approx(0, abs=1e-5) and params[2].grad is None
    torch.testing.assert_close(orthogonal(-5 * bloop.mean, bloop.mean), 0 * bloop.mean)  # what goes against it has no effect
    assert torch.equal(orthogonal(bloop.mean, 0 * bloop.mean), bloop.mean)


def naive_lwf(project):
    """LwF by hand on two experiences, plain SGD, the distillation projected."""
    t = SmallTrial(lambda: mlp(10, 8), Lwf, momentum=0.0, weight_decay=0.0, lr=0.1, backbone_lr=0.1, **SMALL)
    learner, clock, pipeline = t.start()
    from clbench.learners import regularised

    t.learn(learner, clock, pipeline, 0)
    model, head = learner.model, learner.head
    teacher, old = mlp(10, 8), LinearHead(8)
    teacher.load_state_dict(model.net.state_dict())
    old.load_state_dict(head.state_dict())
    clock.begin(1)
    head.grow(2, clock.generator("head"))
    experience = open_experience(t.scenario, 1, pipeline, False)
    batches = regularised.shuffled(experience.train, 8, 1, clock.key("train"))
    params, mean = [*model.parameters(), *head.parameters()], None
    for step in range(batches.steps):
        batch = batches(step)
        z = head(model.net(batch.x))
        main = F.cross_entropy(z[:, 2:], batch.y - 2)
        soft = (old(teacher(batch.x)) / 2).softmax(1).detach()
        aux = 3 * -(soft * (z[:, :2] / 2).log_softmax(1)).sum(1).mean()
        pairs = [torch.autograd.grad(part, params, retain_graph=True, allow_unused=True) for part in (main, aux)]
        g, a = (
            torch.cat([torch.zeros(p.numel()) if d is None else d.flatten() for p, d in zip(params, found, strict=True)])
            for found in pairs
        )
        mean = g if mean is None else 0.9 * mean + 0.1 * g
        a = a - (a @ mean) / (mean @ mean) * mean if project else a
        with torch.no_grad():
            for p, d in zip(params, (g + a).split([p.numel() for p in params]), strict=True):
                p -= 0.1 * d.view_as(p)
    return [p.detach() for p in params]


def test_distillation_gives_way_to_the_cross_entropy():
    for project, word in ((True, "bloop"), (False, None)):
        got = learned(Lwf, momentum=0.0, weight_decay=0.0, lr=0.1, backbone_lr=0.1, project=word)
        for p, want in zip([*got.model.parameters(), *got.head.parameters()], naive_lwf(project), strict=True):
            torch.testing.assert_close(p.detach(), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [Lwf, PredKd, FeatKd, L2Reg, Ewc, Si, Mas, RWalk])
def test_bloop_needs_a_second_part(kind):
    """The first experience has none: it is the same without; the second one has, and differs."""
    options = {} if kind is Lwf else {"trainable": "all"}
    options |= {"strength": 1e3} if kind in (Ewc, Si, Mas, RWalk) else {}
    one, other = (learned(kind, experiences=1, project=word, **options).state_dict() for word in (None, "bloop"))
    assert same(one, other)
    one, other = (learned(kind, project=word, **options).state_dict() for word in (None, "bloop"))
    assert not same(one, other) and other["stepping"]["bloop"]["mean"].numel() == 0


@pytest.mark.parametrize("kind", [Si, RWalk])
def test_the_path_of_a_projected_learner_is_that_of_the_cross_entropy(kind, monkeypatch):
    from clbench.training import path_integral

    seen, before = [], path_integral.Step.before

    def spy(self, strength=0.0, reference=path_integral.NONE, importance=path_integral.NONE):
        before(self, strength, reference, importance)
        seen.append(strength)
        assert all(torch.equal(self.grads[name], p.grad) for name, p in self.model.named_parameters())

    monkeypatch.setattr(path_integral.Step, "before", spy)
    learned(kind, trainable="all", project="bloop")
    assert set(seen) == {0.0}


def test_replay_gives_way():
    """Drawn samples in a second pass, whose gradient is projected; the losses are those of combine=added."""
    plain, other = (learned(ExperienceReplay, combine="added", project=word) for word in (None, {"bloop": {"rate": 0.3}}))
    assert not same(plain.state_dict(), other.state_dict())
    assert torch.equal(plain.memory.state_dict()["y"], other.memory.state_dict()["y"])


# --- options


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Finetune, {"refresh": {"variant": "code"}}, "refresh variant=code: choose official or paper"),
        (Finetune, {"refresh": {"gamma": 1}}, "refresh has no option 'gamma': choose variant, size"),
        (Finetune, {"refresh": {"size": -1.0}}, "size and noise from 0"),
        (Finetune, {"refresh": {}, "accumulate": 2}, "accumulate must be 1"),
        (Lwf, {"trainable": {"half": {"unit": "head"}}}, "unit=head: choose matrix, layer, model"),
        (Lwf, {"trainable": {"half": {"ratio": 2}}}, "ratio must lie in"),
        (Lwf, {"trainable": {"lisa": {"blocks": 0}}}, "blocks and every must be at least 1"),
        (Lwf, {"trainable": "qkv"}, "learner.trainable=qkv"),
        (L2Reg, {"trainable": "some"}, "unknown part 'some'"),
        (Lwf, {"project": "pcgrad"}, "unknown learner.project=pcgrad: choose bloop or null"),
        (Lwf, {"project": {"bloop": {"rate": 0}}}, "rate must lie in"),
        (Lwf, {"project": {"bloop": {"beta": 0}}}, "project bloop has no option 'beta': choose rate"),
        (ExperienceReplay, {"project": "bloop"}, "choose learner.combine=added"),
        (RehearsalFree, {"kd": "logits"}, "unknown learner.kd=logits: choose none, pred, feat"),
        (RehearsalFree, {"reg": "ewc"}, "choose learner.reg=l2 or anchor=previous"),
        (RehearsalFree, {"trainable": "head"}, "choose learner.reg=none"),
        (RehearsalFree, {"trainable": "norm"}, "has no normalisation layers"),
    ],
)
def test_refused(kind, options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        SmallTrial(lambda: mlp(8), kind, **options).start()


def test_refused_where_the_network_is_known():
    with pytest.raises(UserError, match="blocks=3, the network has 2"):
        learned(Lwf, trainable={"lisa": {"blocks": 3}})
    with pytest.raises(UserError, match=r"fisher: none"):
        learned(Finetune, lambda: mlp_with_batch_norm(), refresh={})


def mlp_with_batch_norm():
    net = mlp(8)
    net.append(torch.nn.BatchNorm1d(8))
    return net


def test_hooks_of_both_are_called_in_turn():
    calls = []
    both = joined({"a": lambda x: calls.append(("old", x))}, {"a": lambda x: calls.append(("new", x)), "b": len})
    both["a"](1)
    assert calls == [("old", 1), ("new", 1)] and both["b"] is len
    assert Steps(runtime()).state == () and Steps(runtime(), refresh={"fisher": "none"}).state == ()


# --- the grid of rehearsal-free learning

CELLS = {  # options of the grid that are another learner's
    "pred_kd": (PredKd, {"strength": 2.5}, {"head_loss": "softmax", "kd": "pred", "reg": "none", "kd_strength": 2.5}),
    "feat_kd": (FeatKd, {"strength": 2.5}, {"head_loss": "softmax", "kd": "feat", "reg": "none", "kd_strength": 2.5}),
    "l2": (L2Reg, {"strength": 7.0}, {"head_loss": "softmax", "kd": "none", "anchor": "previous", "reg_strength": 7.0}),
    "l2 from the first": (
        L2Reg, {"strength": 7.0, "reference": "pretrained"}, {"head_loss": "softmax", "kd": "none", "reg_strength": 7.0}
    ),
    "ewc": (
        Ewc, {"strength": 99.0},
        {"head_loss": "softmax", "kd": "none", "reg": "ewc", "anchor": "previous", "reg_strength": 99.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_cells_of_the_grid_are_their_learners_to_the_last_bit(name):
    kind, own, cell = CELLS[name]
    rates = {"trainable": "all", "lr": 1e-2, "backbone_lr": 1e-2}
    one, other = learned(kind, experiences=3, **own, **rates), learned(RehearsalFree, experiences=3, **cell, **rates)
    assert same(one.state_dict(), other.state_dict())
    if name == "ewc":
        assert fingerprint(one.fisher) == fingerprint(other.fisher)
    bce = learned(RehearsalFree, experiences=3, **{**cell, "head_loss": "bce"}, **rates)
    assert not same(other.state_dict(), bce.state_dict())


def test_binary_cross_entropy_by_hand():
    rng = np.random.default_rng(0)
    z, y = rng.standard_normal((4, 3)), np.array([0, 2, 2, 1])
    want = 0.0
    for row, label in zip(z, y, strict=True):
        for c in range(3):
            p = 1 / (1 + np.exp(-row[c]))
            want -= np.log(p if c == label else 1 - p) / 4
    assert float(binary(torch.tensor(z), torch.tensor(y))) == pytest.approx(want)


def test_the_loss_is_the_sum_of_what_is_chosen(monkeypatch):
    """BCE of the experience's classes, T^2 CE to the old answers, half the squared distance: their values at one batch."""
    from clbench.learners import regularised

    t = SmallTrial(lambda: mlp(10, 8), RehearsalFree, trainable="all", lr=1e-2, backbone_lr=1e-2, reg_strength=0.3, **SMALL)
    learner, clock, pipeline = t.start()
    first = [p.detach().clone() for p in learner.model.parameters()]
    t.learn(learner, clock, pipeline, 0)
    teacher, old = mlp(10, 8), LinearHead(8)
    teacher.load_state_dict(learner.model.net.state_dict())
    old.load_state_dict(learner.head.state_dict())
    got = {}
    monkeypatch.setattr(regularised, "fit", lambda *args, **hooks: got.update(loss=args[4]) or {})
    t.learn(learner, clock, pipeline, 1)
    batch = images(5, y=[2, 3, 3, 2, 2])
    z = learner.head(learner.model.net(batch.x))
    soft = (old(teacher(batch.x)) / 2).softmax(1)
    kd = -4 * (soft * (z[:, :2] / 2).log_softmax(1)).sum(1).mean()
    gap = sum(((p - q) ** 2).sum() for p, q in zip(learner.model.parameters(), first, strict=True))
    target = torch.eye(2)[batch.y - 2]
    p = z[:, 2:].sigmoid()
    bce = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(got["loss"](batch), bce + kd + 0.15 * gap, rtol=1e-5, atol=1e-5)


def test_parts_that_train():
    t = SmallTrial(convnet, RehearsalFree, trainable="norm", reg="none", lr=1e-2, backbone_lr=1e-2, **SMALL)
    learner, clock, pipeline = t.start()
    before = detached(dict(learner.model.named_parameters()))
    t.learn(learner, clock, pipeline, 0)
    assert changed(before, dict(learner.model.named_parameters())) == {"net.1"}
    learner = learned(RehearsalFree, convnet, trainable="head", reg="none", lr=1e-2)
    assert fingerprint(learner.model.state_dict()) == fingerprint(backbone(convnet()).state_dict()), "statistics too"
    assert (
        RehearsalFree.capabilities_of(reg="ewc").needs_random_access and not RehearsalFree.capabilities_of().needs_random_access
    )
