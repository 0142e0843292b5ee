"""Learners of disclosed tasks against naive versions: task-aware optimisers, sparse masks, low-rank updates."""

import math

import numpy as np
import pytest
import torch
from small_networks import Net, SmallTrial, convnet, mlp
from torch.nn import functional as F

from clbench.interfaces import Place, UserError
from clbench.learners import tag
from clbench.learners.dst import Dst
from clbench.learners.rank_updates import RankUpdates, key
from clbench.learners.tag import Tag
from clbench.models.backbone import build_backbone
from clbench.models.heads import TaskHead
from clbench.streams.images.data import open_experience, shuffled
from clbench.training import sparse_masks
from clbench.training.runtime import Runtime
from clbench.training.state import detached


def refused(learner, message, make=lambda: mlp(4), **options):
    with pytest.raises(UserError, match=message):
        SmallTrial(make, learner, "task_incremental", **options).start()


# --- TAG


def tag_steps(monkeypatch, **options):
    """Three tasks with TAG -> for each task its steps, each as {name: (weights before, raw gradient, weights after)}."""
    tasks, real = [], tag.fit

    def spy(runtime, name, learner, groups, loss, batches, recipe, before_step, **hooks):
        named = dict(learner.model.named_parameters())
        head = learner.heads.at(len(learner.heads.tasks) - 1)
        named |= {f"head.{n}": p for n, p in head.named_parameters()}
        steps = []

        def before(params, grads):
            steps.append({n: [p.detach().clone(), p.grad.clone(), None] for n, p in named.items()})
            before_step(params, grads)

        def after(place, batch):
            for n, p in named.items():
                steps[-1][n][2] = p.detach().clone()

        log = real(runtime, name, learner, groups, loss, batches, recipe, before_step=before, after_step=after, **hooks)
        tasks.append(steps)
        return log

    monkeypatch.setattr(tag, "fit", spy)
    t = SmallTrial(lambda: mlp(5), Tag, "task_incremental", **({"batch_size": 10, "lr": 0.01} | options))
    learner, learn, _ = t.begin()
    for i in range(3):
        learn(i)
    return learner, tasks


def naive_tag(tasks, optimizer, b, beta2, per_epoch, lr=0.01, eps=1e-8):
    """Weights after each step of each task, from the raw gradients, weight by weight in float64."""
    found, old = [], {}
    for t, steps in enumerate(tasks):
        m, v, found_t = {}, {}, []
        for s, step in enumerate(steps):
            n, out = s % per_epoch + 1, {}
            for name, (theta, g, _) in step.items():
                theta, g = theta.double().numpy(), g.double().numpy()
                m[name] = 0.9 * m.get(name, 0 * g) + 0.1 * g
                keep, add = (1, 1) if optimizer == "adagrad" else (beta2, 1 - beta2)
                v[name] = keep * v.get(name, 0 * g) + add * g**2
                total = (1.0 if t == 0 else math.exp(-b)) * v[name]
                for frozen, squares in [] if name.startswith("head") else old.get(name, []):
                    norm = np.sqrt((m[name] ** 2).sum())
                    cosine = (frozen * m[name]).sum() / norm if norm > 0 else 0.0
                    total = total + math.exp(-b * cosine) * squares
                if optimizer == "adam":
                    out[name] = theta - lr * m[name] / (1 - 0.9**n) / (np.sqrt(total) / math.sqrt(1 - beta2**n) + eps)
                else:
                    out[name] = theta - lr * g / (np.sqrt(total) + eps)
            found_t.append(out)
        for name in m:
            norm = np.sqrt((m[name] ** 2).sum())
            old.setdefault(name, []).append((m[name] / norm if norm > 0 else m[name], v[name]))
        found.append(found_t)
    return found


@pytest.mark.parametrize(
    ("optimizer", "variant", "beta2"),
    [("rmsprop", "official", 0.99), ("adagrad", "official", 0.0), ("adam", "official", 0.999), ("adam", "paper", 0.999)],
)
def test_tag_against_the_paper(monkeypatch, optimizer, variant, beta2):
    learner, tasks = tag_steps(monkeypatch, optimizer=optimizer, variant=variant, sensitivity=2.0)
    per_epoch = 3 if variant == "official" else 6  # two epochs of 24 samples
    assert [len(steps) for steps in tasks] == [6, 6, 6]
    for steps, wanted in zip(tasks, naive_tag(tasks, optimizer, 2.0, beta2, per_epoch), strict=True):
        for step, out in zip(steps, wanted, strict=True):
            for name, (_, _, after) in step.items():
                np.testing.assert_allclose(after.numpy(), out[name], rtol=1e-4, atol=2e-6, err_msg=name)
    assert {len(v) for n, v in learner.squares.items() if n.startswith("model")} == {3}
    assert {len(v) for n, v in learner.squares.items() if n.startswith("heads")} == {1}


@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad", "adam"])
def test_tag_of_one_task_is_the_plain_optimiser(monkeypatch, optimizer):
    _, (steps, *_) = tag_steps(monkeypatch, optimizer=optimizer, variant="paper")
    params = {n: torch.nn.Parameter(before.clone()) for n, (before, _, _) in steps[0].items()}
    plain = {
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99, eps=1e-8),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1e-8),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-8),
    }[optimizer](list(params.values()))
    for step in steps:
        for n, (_, g, _) in step.items():
            params[n].grad = g.clone()
        plain.step()
        for n, (_, _, after) in step.items():
            torch.testing.assert_close(params[n].detach(), after, rtol=1e-5, atol=1e-6)


def test_tag_weighs_tasks_by_agreement():
    m = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [0.0, 0.0], [5.0, 0.0]])
    wanted = [math.exp(-5), math.exp(5), 1.0, 1.0, math.exp(-5)]
    torch.testing.assert_close(tag.weights(m, 4, 5.0), torch.tensor(wanted))
    assert tag.weights(m, 4, 0.0).tolist() == [1.0] * 5
    none = tag.weights(torch.zeros(2, 3), 1, 5.0)  # a moment of 0: the cosine is 0, and not a number in the release
    torch.testing.assert_close(none, torch.tensor([1.0, math.exp(-5)]))


def test_tag_refuses():
    refused(Tag, r"unknown learner\.optimizer=sgd: choose rmsprop, adagrad or adam", optimizer="sgd")
    refused(Tag, r"unknown learner\.variant=code: choose official or paper", variant="code")
    refused(Tag, r"learner\.beta1 must lie in \[0, 1\), got 1", beta1=1.0)
    refused(Tag, r"learner\.beta2=0\.9 has no effect on learner\.optimizer=adagrad", beta2=0.9, optimizer="adagrad")
    refused(Tag, r"learner\.sensitivity must be at least 0, got -1", sensitivity=-1.0)
    refused(Tag, r"learner\.eps must be above 0, got 0", eps=0.0)


# --- dynamic sparse training


def dst(make=lambda: mlp(20, 10), **options):
    t = SmallTrial(make, Dst, "task_incremental", **({"batch_size": 8, "lr": 0.01, "interval": 2, "density": 0.3} | options))
    return t, *t.begin()


def test_densities_of_layers():
    shapes = [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (10, 128)]
    for density, wanted in ((0.2, [1.0, 0.31, 0.15, 1.0]), (0.05, [0.48, 0.056, 0.027, 1.0])):
        found = sparse_masks.densities(shapes, density, "erk")
        assert found == pytest.approx(wanted, rel=0.03)
        sizes = [math.prod(s) for s in shapes]
        assert sum(d * n for d, n in zip(found, sizes, strict=True)) == pytest.approx(density * sum(sizes))
    assert sparse_masks.densities(shapes, 1.0, "erk") == [1.0] * 4
    assert sparse_masks.densities(shapes, 0.05, "uniform") == [0.05] * 4


def test_masks_of_many_tasks_take_a_bit_each():
    draw = torch.Generator().manual_seed(0)
    masks, wanted = sparse_masks.TaskMasks({"w": torch.zeros(3, 4)}), []
    for task in range(11):
        wanted.append(torch.rand(3, 4, generator=draw) < 0.2)
        masks.put("w", task, wanted[-1])
    wanted[4] = ~wanted[4]
    masks.put("w", 4, wanted[4])
    again = sparse_masks.TaskMasks({"w": torch.zeros(3, 4)})
    again.load_state_dict(detached(masks.state_dict()))
    for task in range(11):
        others = torch.stack([m for i, m in enumerate(wanted) if i != task]).any(0)
        assert torch.equal(again.get("w", task), wanted[task]) and torch.equal(again.others("w", task), others)
    assert again.packed["w"].shape == (2, 3, 4) and again.tasks == 11


class Jittered(torch.nn.Flatten):
    """Pixels of one colour, each with a constant of its own: no two have the same gradient."""

    def forward(self, x):
        return x[:, 0].flatten(1) + torch.linspace(-1, 1, 64).cos()


def plain_net():
    """Two layers without biases."""
    layers = [torch.nn.Linear(64, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 10, bias=False), torch.nn.ReLU()]
    return Net(Jittered(), *layers, num_features=10)


def naive_pruned(w, g, mask, count, how):
    """Positions that leave, from sorted lists."""
    at = [i for i in np.ndindex(*w.shape) if mask[i]]
    if how == "set":
        positive = sorted((i for i in at if w[i] >= 0), key=lambda i: w[i])[: count // 2]
        return {*positive, *sorted((i for i in at if w[i] < 0), key=lambda i: -w[i])[: count - count // 2]}
    return set(sorted(at, key=lambda i: abs(w[i]) if how == "magnitude" else (w[i] * g[i]) ** 2)[:count])


@pytest.mark.parametrize("how", ["magnitude", "set", "taylor"])
def test_who_leaves_a_mask(how):
    draw = torch.Generator().manual_seed(1)
    for count in (0, 1, 7, 12):
        w, g = (torch.randn(6, 5, generator=draw) for _ in range(2))
        mask = torch.rand(6, 5, generator=draw) < 0.6
        gone = sparse_masks.pruned(w, g, mask, count, how)
        found = set(zip(*(i.tolist() for i in gone.nonzero(as_tuple=True)), strict=True))
        assert found == naive_pruned(w.numpy(), g.numpy(), mask.numpy(), count, how)


def naive_dst(t, place, start, masks, grow, official):
    """A task of a bias-free MLP by plain SGD on its sparse weights -> dense weights, mask of the task, head.

    start  dense weights by layer; masks: those of the tasks before, and this one's as it was drawn
    """
    pipeline = t.start()[2]
    experience = open_experience(t.scenario, place, pipeline)
    runtime = Runtime(t.seed, torch.device("cpu"), t.scenario.budget)
    runtime.begin(place)
    head = TaskHead(10)
    head.grow(place, experience.classes, runtime.generator("head"))
    rows, bias = (p.detach().clone().requires_grad_() for p in head.at(0).parameters())
    others = [torch.zeros_like(start[i]).bool() for i in range(2)]
    for m in masks[:-1]:
        others = [a | b for a, b in zip(others, m, strict=True)]
    mask = [m.clone() for m in masks[-1]]
    w = [(a * m).requires_grad_() for a, m in zip(start, mask, strict=True)]
    m1, m2 = ([torch.zeros_like(a) for a in start] for _ in range(2))
    sgd = torch.optim.SGD([*w, rows, bias], lr=0.1, momentum=0.9)
    batches = shuffled(experience.train, 8, 2, runtime.key("train"))
    for step in range(batches.steps):
        batch = batches(step)
        f = ((Jittered()(batch.x) @ w[0].T).relu() @ w[1].T).relu()
        sgd.zero_grad()
        F.cross_entropy(f @ rows.T + bias, head.targets(0, batch.y)).backward()
        sgd.step()
        for i in range(2):
            g = w[i].grad * ~others[i] if official else w[i].grad
            m1[i], m2[i] = 0.9 * m1[i] + 0.1 * g, 0.999 * m2[i] + 0.001 * g**2
            with torch.no_grad():
                w[i].copy_(torch.where(others[i], start[i], w[i]) * mask[i])
            if (step + 1) % 2 or step + 1 == batches.steps:
                continue
            zeta = 0.005 + 0.495 * (1 + math.cos(math.pi * step / batches.steps)) / 2
            count = round(zeta * int(mask[i].sum()))
            order = sorted((abs(w[i][j].item()), j) for j in np.ndindex(*w[i].shape) if mask[i][j])
            for _, j in order[:count]:
                mask[i][j] = False
            score = g.abs() if grow == "gradient" else m1[i].abs() / (m2[i].sqrt() + 1e-38)
            order = sorted((-score[j].item(), j) for j in np.ndindex(*w[i].shape) if not mask[i][j])
            new = torch.zeros_like(mask[i])
            for _, j in order[:count]:
                new[j] = True
            mask[i] |= new
            with torch.no_grad():
                w[i].copy_(torch.where(new, start[i] * others[i], w[i] * mask[i]))
    dense = [torch.where(m, a.detach(), b) for m, a, b in zip(mask, w, start, strict=True)]
    return dense, mask, rows.detach()


@pytest.mark.parametrize(("grow", "variant"), [("gradient", "paper"), ("gradient", "official"), ("momentum", "paper")])
def test_dst_against_the_paper(monkeypatch, grow, variant):
    bound = 1e-3 if grow == "momentum" else 1e-5  # |m| / sqrt(v) of gradients that are rounding alone is about 1 all the same
    t, learner, learn, _ = dst(plain_net, grow=grow, variant=variant, optimizer="sgd", lr=0.1)
    drawn, real = [], Dst.begin
    names = list(learner.weights)

    def begin(self, place):
        real(self, place)
        drawn.append([self.masks.get(n, place) for n in names])

    monkeypatch.setattr(Dst, "begin", begin)
    masks = []
    for place in range(2):
        start = [learner.weights[n].detach().clone() for n in names]
        learn(place)
        dense, mask, rows = naive_dst(t, place, start, [*masks, drawn[-1]], grow, variant == "official")
        assert any(not torch.equal(a, b) for a, b in zip(mask, drawn[-1], strict=True)), "the mask has never changed"
        for n, a, m in zip(names, dense, mask, strict=True):
            assert torch.equal(learner.masks.get(n, place), m)
            torch.testing.assert_close(learner.weights[n].detach(), a, rtol=bound, atol=bound)
        torch.testing.assert_close(learner.heads.at(place).blocks[0].weight.detach(), rows, rtol=bound, atol=bound)
        masks.append(mask)


@pytest.mark.parametrize("grow", ["random", "unfired", "gradient", "momentum"])
@pytest.mark.parametrize("make", [lambda: mlp(20, 10), convnet])
def test_dst_forgets_nothing_and_keeps_its_density(make, grow):
    t, learner, learn, pipeline = dst(make, grow=grow, prune="set" if grow == "random" else "magnitude", init="uniform")
    first, kept = detached(dict(learner.weights)), []
    for place in range(3):
        learn(place)
        kept.append(t.answers_of(learner, pipeline, place)[:, 2 * place : 2 * place + 2])
        for name, p in learner.weights.items():
            assert int(learner.masks.get(name, place).sum()) == max(1, round(0.3 * p.numel()))
            never = (learner.masks.packed[name] == 0).all(0)
            assert torch.equal(p[never], first[name][never]), "a weight of no mask has moved"
    assert not learner.fired and not learner.moments
    for place, z in enumerate(kept):
        assert torch.equal(t.answers_of(learner, pipeline, place)[:, 2 * place : 2 * place + 2], z)


def test_dst_official_shares_biases_and_statistics():
    t, learner, learn, pipeline = dst(convnet, variant="official")
    learn(0)
    z, before = t.answers_of(learner, pipeline, 0)[:, :2], detached(learner.model.state_dict())
    learn(1)
    now = learner.model.state_dict()
    moved = {name for name in now if not torch.equal(now[name], before[name])}
    assert moved >= {"net.0.bias", "net.1.weight", "net.1.running_mean"}
    assert not torch.equal(t.answers_of(learner, pipeline, 0)[:, :2], z)
    for name in learner.weights:
        own = learner.masks.get(name, 0)
        assert torch.equal(now[name][own], before[name][own])


def test_unfired_weights_grow_first():
    _, learner, learn, _ = dst(grow="unfired")
    learn(0)
    learner.begin(0)
    name = next(iter(learner.weights))
    mask = learner.masks.get(name, 0)
    never = (~mask).flatten().nonzero()[:9, 0]
    learner.fired[name] = torch.ones_like(mask)
    learner.fired[name].view(-1)[never] = False
    left, new = learner.changed(name, mask, torch.zeros(mask.shape), Place(0, 1, 4, 1))
    assert int(new.sum()) == round((0.005 + 0.495 * (1 + math.cos(math.pi / 4)) / 2) * int(mask.sum()))
    assert new.flatten()[never].all() and int(left.sum()) == int(mask.sum()) and learner.fired[name].all()


def test_dst_refuses():
    choices = {"variant": "official or paper", "init": "uniform or erk", "prune": "magnitude or set or taylor"}
    for name, message in choices.items():
        refused(Dst, rf"unknown learner\.{name}=code: choose {message}", **{name: "code"})
    refused(Dst, r"unknown learner\.grow=code: choose random or unfired or gradient or momentum", grow="code")
    refused(Dst, r"learner\.density must lie in \(0, 1\], got 0", density=0.0)
    refused(Dst, r"learner\.fraction=0\.5 must lie in \[0, 1\) and learner\.fraction_end=0\.6 below it", fraction_end=0.6)
    refused(Dst, r"learner\.interval must be at least 1, got 0", interval=0)


# --- incremental rank updates


def ranks(make=lambda: mlp(9, 7), **options):
    options = {"batch_size": 8, "lr": 0.02, "rank_first": 3, "rank": 2} | options
    t = SmallTrial(make, RankUpdates, "task_incremental", **options)
    return t, *t.begin()


@pytest.mark.parametrize("make", [lambda: mlp(9, 7), convnet])
def test_layers_are_sums_of_selected_outer_products(make):
    _, learner, learn, _ = ranks(make)
    for i in range(3):
        learn(i)
    for place in range(3):
        values = learner.values(place)
        for name, shape in learner.layers.items():
            columns = []  # (u, v) of the tasks up to this one
            for part in list(learner.updates)[: place + 1]:
                up, down = (part[key(what, name)].detach().numpy() for what in ("up", "down"))
                columns += [(up[:, k], down[:, k]) for k in range(up.shape[1])]
            select = learner.updates[place][key("select", name)].detach().numpy()
            limit = min(shape[0], shape[1:].numel())
            assert len(select) == len(columns) == min(3, limit) + place * min(2, limit)
            naive = sum(s * np.outer(u, v) for s, (u, v) in zip(select, columns, strict=True))
            np.testing.assert_allclose(values[name].detach().numpy(), naive.reshape(shape), atol=1e-5)
            if place:
                assert np.abs(select[:3]).min() > 0, "the selector of old columns was not trained"


def test_how_a_task_starts():
    _, learner, learn, _ = ranks()
    learn(0)
    made = learner.update(1)
    for name in learner.layers:
        assert made[key("select", name)].tolist() == [0.0] * 3 + [1.0] * 2
        for what in ("up", "down"):
            torch.testing.assert_close(made[key(what, name)].T @ made[key(what, name)], torch.eye(2), atol=1e-5, rtol=0)
    assert all(not value.any() for name, value in made.items() if name.startswith("own"))
    assert {p.requires_grad for p in learner.model.parameters()} == {False}


@pytest.mark.parametrize("selector", ["full", "new_only"])
@pytest.mark.parametrize("make", [lambda: mlp(9, 7), convnet])
def test_answers_of_earlier_tasks_stay(make, selector):
    t, learner, learn, pipeline = ranks(make, selector=selector)
    kept = []
    for place in range(3):
        learn(place)
        kept.append(t.answers_of(learner, pipeline, place)[:, 2 * place : 2 * place + 2])
    for place, z in enumerate(kept):
        assert torch.equal(t.answers_of(learner, pipeline, place)[:, 2 * place : 2 * place + 2], z)
    lengths = [len(part[key("select", name)]) for part in learner.updates for name in learner.layers]
    assert len(set(lengths)) == (3 if selector == "full" else 2)
    columns = detached([dict(part.items()) for part in learner.updates])
    learn(0)  # comes back when others use its columns
    for old, part in zip(columns, learner.updates, strict=True):
        assert all(torch.equal(part[name], value) for name, value in old.items() if name.startswith(("up", "down")))
    assert not torch.equal(t.answers_of(learner, pipeline, 0)[:, :2], kept[0])
    assert torch.equal(t.answers_of(learner, pipeline, 2)[:, 4:6], kept[2])


def test_numbers_of_parameters():
    """Of a later task of permuted MNIST: (784 + 256) r + 512 r, selectors, 522 biases, 2560 weights of the head."""
    model = build_backbone("m", "mlp", {"hidden": [256, 256], "img_size": 28}, profile="small", norm="none")
    learner = RankUpdates(model, Runtime(0, torch.device("cpu")), rank=1)
    for t in range(3):
        update = learner.update(t)
        learner.updates.append(torch.nn.ParameterDict(update))
        if t:
            assert sum(value.numel() for value in update.values()) + 2560 + 10 == 4634 + 2 * (11 + t)


def test_rank_updates_refuse():
    refused(RankUpdates, r"learner\.rank must be at least 1, got 0", rank=0)
    refused(RankUpdates, r"learner\.rank_first must be at least 1, got 0", rank_first=0)
    refused(RankUpdates, r"unknown learner\.selector=old: choose full or new_only", selector="old")
