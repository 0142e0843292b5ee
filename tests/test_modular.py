"""Networks, modules and weights of a task's own: Model Zoo, hypernetworks, PAR, PICLE, against naive versions."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, backbone, convnet, images, mlp
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import Budget, Capabilities, UserError
from clbench.learners import model_zoo, par, picle
from clbench.learners.hypernetwork import Hypernetwork
from clbench.learners.model_zoo import ModelZoo
from clbench.learners.par import Par
from clbench.learners.picle import Picle
from clbench.models.backbone import build_backbone
from clbench.models.chain import chain, inputs_of
from clbench.models.weight_maker import WeightMaker
from clbench.streams.images.data import ImageData, shuffled
from clbench.streams.manifest import EvalEntry, ExperienceEntry, Manifest
from clbench.streams.scenario import ArrayImages, Dataset, Scenario
from clbench.testing.contract import Trial, small_stream
from clbench.training import suffix_search
from clbench.training.state import detached, fingerprint

OWN = Capabilities(needs_task_id=True)
ALL = Capabilities(needs_task_id=True, stores_all_data=True)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


def trial(learner, can=OWN, epochs=2, **options):
    scenario = small_stream("task_incremental", sizes=[2, 2, 2], budget={"epochs": epochs, "exemplars": 12})
    return SmallTrial(lambda: mlp(12, 8), learner, scenario=scenario, can=can, **options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model_zoo learner.tasks_per_round=0", r"learner\.tasks_per_round must be a whole number from 1, got 0"),
        ("model_zoo learner.variant=code", r"unknown learner\.variant=code: choose paper or official"),
        ("model_zoo learner.replay_share=0", r"learner\.replay_share must lie in \(0, 1\]"),
        ("par learner.variant=code", r"unknown learner\.variant=code"),
        ("par learner.linkage=median", r"unknown learner\.linkage=median: choose mean or max or min"),
        ("par learner.related=0.4", r"learner\.related=0\.4 has no effect: choose more than learner\.reuse=0\.5"),
        ("hypernetwork learner.core=gru", r"unknown learner\.core=gru: choose chunk_mlp or lstm"),
        ("hypernetwork learner.offset=both", r"unknown learner\.offset=both"),
        ("hypernetwork learner.chunk=0", r"learner\.chunk must be a whole number from 1, got 0"),
        ("hypernetwork learner.hidden=[4,0]", r"learner\.hidden must be a whole number from 1, got 0"),
        ("hypernetwork learner.core=lstm", r"learner\.hidden=\[50, 50\] does not fit core=lstm"),
        ("hypernetwork learner.beta=-1", r"learner\.beta must be at least 0"),
        ("hypernetwork learner.reg_tasks=0", r"reg_tasks at least 1"),
        ("hypernetwork model=nano", r"weights of model nano anew: learner\.offset=model keeps those it has"),
        ("hypernetwork model.norm=batch", r"model mlp keeps running statistics: choose model\.norm=group or none"),
        ("picle learner.modules=0", r"learner\.modules must be a whole number from 1, got 0"),
        ("picle learner.validation=1", r"learner\.validation must lie in \(0, 1\)"),
        ("picle learner.temperature=0", r"learner\.temperature must be above 0"),
        ("picle model.norm=batch", r"model mlp keeps running statistics: choose model\.norm=group or none"),
        ("picle learner.latent=-1", r"learner\.latent must be a whole number from 0, got -1"),
        ("picle learner.suffix=0", r"learner\.suffix must be a whole number from 1, got 0"),
        ("picle learner.latent=2 learner.search=false", r"learner\.latent=2 has no effect with learner\.search=false"),
        ("picle learner.latent=2", r"learner\.suffix=2 must be below the modules of the network, which are 2"),
        (
            "picle learner.latent=1 learner.suffix=1 learner.epochs=2",
            r"trains 4 paths: .* and so does a smaller learner\.latent",
        ),
        ("hypernetwork learner.grow=-1", r"learner\.grow must be a whole number from 0, got -1"),
        ("picle learner.epochs=2", r"trains 3 paths: it needs as many epochs, got 2; fewer learner\.modules need fewer"),
    ],
)
def test_bad_options_are_named(words, said):
    words = f"learner={words}".split()
    model = [] if "model=nano" in words else ["model=mlp", "model.kwargs.img_size=8", "model.kwargs.hidden=[6,5]"]
    (config,) = compose([*model, *words])
    with pytest.raises(UserError, match=said):
        Trial(config, small_stream("task_incremental"), Capabilities()).start()


# --- Model Zoo


def test_weights_of_tasks_by_hand():
    losses = torch.tensor([0.1, 0.7, 0.4, 2.8])
    naive = [min(max(math.exp((x - 1.0) / 1.0), 1e-4), 1e3) for x in losses.tolist()]
    np.testing.assert_allclose(model_zoo.task_weights(losses).numpy(), naive, rtol=1e-5)
    assert model_zoo.task_weights(torch.tensor([0.0] * 19 + [4.0]))[-1] == 1e3, "e^19 is cut"
    assert torch.isfinite(model_zoo.task_weights(torch.zeros(3))).all()


def test_how_many_earlier_tasks_and_which(monkeypatch):
    losses = {0: 0.2, 1: 0.5, 2: 0.8}
    monkeypatch.setattr(ModelZoo, "loss_of", lambda self, task, data: losses[task])
    for variant, counts in (("paper", [0, 1, 1, 1]), ("official", [0, 0, 1, 1])):
        learner, _, _ = trial(ModelZoo, can=ALL, tasks_per_round=2, variant=variant).begin()
        assert [len(learner.choose(list(range(t)), {0: None, 1: None, 2: None})) for t in range(4)] == counts
    found = np.zeros(3)
    for learner.runtime.experience in range(500):
        (task,) = learner.choose([0, 1, 2], {0: None, 1: None, 2: None})
        found[task] += 1
    weights = np.exp((np.array([0.2, 0.5, 0.8]) - 0.5) / 0.5)
    np.testing.assert_allclose(found / 500, weights / weights.sum(), atol=0.06)


@pytest.mark.parametrize("number", [1, 3])
def test_a_network_is_trained_alone_on_its_tasks(number):
    """One: the isolated control. Three: the second network sees both tasks, each sample under its own head."""
    t = trial(ModelZoo, can=ALL, tasks_per_round=number, batch_size=5, lr=0.1, weight_decay=0.01)
    learner, learn, pipeline = t.begin()
    learn(0)
    first = fingerprint(learner.experts[0].state_dict())
    experience = t.open(1, pipeline)
    learner.runtime.begin(1, len(experience.train))
    model = backbone(mlp(12, 8))
    parts = [(0, experience.past[0]), (1, experience.train)][-min(number, 2) :]
    heads = {}
    for task, _ in parts:
        heads[task] = torch.nn.Linear(8, 2)
        torch.nn.init.trunc_normal_(heads[task].weight, std=0.02, generator=learner.runtime.generator("head", task))
        torch.nn.init.zeros_(heads[task].bias)
    data = ImageData.join([part for _, part in parts])
    owner = [task for task, part in parts for _ in range(len(part))]
    batches = shuffled(data, 5, 2, learner.runtime.key("train"))
    trained = [*model.parameters(), *(p for head in heads.values() for p in head.parameters())]
    optimizer = torch.optim.SGD(trained, 0.1, 0.9, weight_decay=0.01, nesterov=True)
    for step in range(batches.steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / batches.steps)) / 2
        batch, total = batches(step), 0
        for x, y, row in zip(batch.x, batch.y, batches.rows(step), strict=True):
            z = heads[owner[row]](model.features(x[None]))
            total = total + F.cross_entropy(z, y[None] - 2 * owner[row]) / len(batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    learner.learn(experience)
    expert = learner.experts[1]
    assert expert.heads.tasks == [task for task, _ in parts] and fingerprint(learner.experts[0].state_dict()) == first
    for mine, naive in zip(expert.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, naive, atol=1e-5, rtol=1e-4)
    for place, head in enumerate(heads.values()):
        torch.testing.assert_close(expert.heads.at(place).blocks[0].weight, head.weight, atol=1e-5, rtol=1e-4)


def test_the_first_network_of_a_task_counts_more_where_less_is_replayed():
    t = trial(ModelZoo, can=ALL, tasks_per_round=3, replay_share=0.25, batch_size=6)
    learner, learn, pipeline = t.begin()
    for i in range(3):
        learn(i)
    assert learner.runtime.meter.visits == {"new": 2 * 72, "replayed": 2 * (6 + 12)}, "a quarter of 24 samples a task"
    x = images(5)
    for task, number in ((0, 3), (1, 2), (2, 1)):
        x.task = task
        total, weights = 0, [4.0, 1.0, 1.0][:number]
        for weight, expert in zip(weights, list(learner.experts)[task:], strict=True):
            z = expert.heads.at(expert.heads.tasks.index(task))(expert.model.features(x))
            total = total + weight * z.softmax(1)
        z = learner.predict(x)
        torch.testing.assert_close(z.softmax(1)[:, 2 * task : 2 * task + 2], total / sum(weights))
        assert (z[:, [c for c in range(6) if c // 2 != task]] < -1e29).all()
    naive = []
    experience = t.open(2, pipeline)
    for batch in experience.past[1].test_batches(7):
        batch.task = 1
        naive += [-float(row[c]) for row, c in zip(learner.predict(batch).detach(), batch.y, strict=True)]
    assert learner.loss_of(1, experience.past[1]) == pytest.approx(np.mean(naive), rel=1e-5)


# --- PAR


def naive_distance(classes, prototypes):
    total = 0.0
    for f in classes:
        mean = f.mean(0)
        logs = [math.log(min(np.linalg.norm(x - p) for p in prototypes) / np.linalg.norm(x - mean)) for x in f]
        total += max(0.0, sum(logs) / len(logs))
    return min(1 - math.exp(-2 * total), total)


def test_distance_of_tasks():
    for seed, shift in ((0, 0.0), (1, 0.3), (2, 4.0)):
        classes = [draw(n, 5, seed=seed + n) + shift for n in (4, 7)]
        old = draw(3, 5, seed=90 + seed)
        naive = naive_distance([f.double().numpy() for f in classes], old.double().numpy())
        assert par.task_distance(classes, old) == pytest.approx(naive, rel=1e-9)
    far = [draw(6, 5) * 0.01 + 50]
    assert par.task_distance(far, old) == pytest.approx(1, abs=1e-6)
    f = draw(6, 5)
    assert par.task_distance([f], f.mean(0, keepdim=True)) == pytest.approx(0, abs=1e-6), "the same class again"
    assert par.task_distance([f[:1]], old) == pytest.approx(1, abs=1e-6), "one sample is its own mean"


def test_which_expert_takes_a_task():
    learner, _, _ = trial(Par).begin()
    assert learner.allocate(0, 100, []) == (None, False)
    learner.tasks, learner.owners, learner.largest = [3, 5], [0, 1], [1000, 200]
    assert learner.allocate(7, 100, [0.7, 0.5]) == (1, False)
    assert learner.allocate(7, 100, [0.7, 0.51]) == (None, False)
    assert learner.allocate(3, 100, [0.9, 0.1]) == (0, False), "a task that comes back"
    assert learner.allocate(7, 25, [0.9, 0.8]) == (0, True), "the other saw less than ten times 25"
    assert learner.allocate(7, 20, [0.9, 0.8]) == (1, True)
    assert learner.allocate(7, 26, [0.9, 0.8]) == (None, False)
    for linkage, wanted in (("mean", 0.3), ("max", 0.5), ("min", 0.1)):
        learner, _, _ = trial(Par, linkage=linkage).begin()
        learner.owners, learner.prototypes = [0, 0], [draw(1, 2), draw(1, 2)]
        learner.experts.add()
        with pytest.MonkeyPatch.context() as patch:
            found = iter([0.1, 0.5])
            patch.setattr(par, "task_distance", lambda classes, old, found=found: next(found))
            assert learner.distances([draw(2, 2)]) == [pytest.approx(wanted)]


def test_a_distance_of_nothing_is_one_in_the_release():
    near = [torch.tensor([[1.0, 0], [-1, 0]])]  # a prototype at each sample: nearer than the mean
    for variant, wanted in (("paper", 0.0), ("official", 1.0)):
        learner, _, _ = trial(Par, variant=variant).begin()
        learner.owners, learner.prototypes = [0], [torch.tensor([[1.0, 0.1], [-1, 0]])]
        learner.experts.add()
        assert learner.distances(near) == [wanted]


@pytest.mark.parametrize("how", ["distil", "head", "few"])
def test_two_steps_of_reuse_by_hand(how):
    """Two: at the first one an expert is its own teacher."""
    options = {"distil": {"kd": 3.0}, "head": {"small": 1.1}, "few": {"few": 24, "reuse": -1.0}}[how]
    start = {"momentum": 0.0, "weight_decay": 0.1, "lr": 0.5, "clip": None, "batch_size": 100}
    t = trial(Par, **start, **{"reuse": 1.0, "few": 0, **options})
    learner, learn, pipeline = t.begin()
    learn(0)
    if how == "few":
        learner.largest = [240]
    expert, before = learner.experts[0], copy.deepcopy(learner.experts[0])
    experience = t.open(1, pipeline)
    learner.runtime.begin(1, len(experience.train))
    batches = shuffled(experience.train, 100, 2, learner.runtime.key("train"))
    model, old, head = copy.deepcopy(before.model), copy.deepcopy(before.heads), torch.nn.Linear(8, 2)
    torch.nn.init.trunc_normal_(head.weight, std=0.02, generator=learner.runtime.generator("head"))
    torch.nn.init.zeros_(head.bias)
    whole = [*model.parameters(), *old.at(0).parameters()] if how == "distil" else []
    optimizer = torch.optim.SGD([*whole, *head.parameters()], weight_decay=1.0 if how == "few" else 0.1)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = (0.5, 0.25)[step]
        batch = batches(step)
        f = model.features(batch)
        loss = F.cross_entropy(head(f), batch.y - 2)
        if how == "distil":
            soft = (before.heads.at(0)(before.model.features(batch)).detach() / 2).softmax(1)
            loss = loss - 3.0 * 4 * (soft * (old.at(0)(f) / 2).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learner.learn(experience)
    assert len(learner.experts) == 1 and learner.owners == [0, 0]
    for mine, naive in zip(expert.heads.at(1).parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(mine, naive, atol=1e-5, rtol=1e-4)
    for mine, naive in zip(
        [*expert.model.parameters(), *expert.heads.at(0).parameters()],
        [*model.parameters(), *old.at(0).parameters()],
        strict=True,
    ):
        torch.testing.assert_close(mine, naive, **({"atol": 1e-5, "rtol": 1e-4} if how == "distil" else {"atol": 0, "rtol": 0}))


def test_new_experts_leave_the_others_alone():
    t = trial(Par, reuse=-1.0, lr=0.1, batch_size=6)
    learner, learn, pipeline = t.begin()
    learn(0)
    state, z = fingerprint(learner.experts[0].state_dict()), t.answers_of(learner, pipeline, 0)
    learn(1), learn(2)
    assert learner.owners == [0, 1, 2] and fingerprint(learner.experts[0].state_dict()) == state
    assert torch.equal(t.answers_of(learner, pipeline, 0)[:, :2], z)
    starts = []
    for related in (None, 1.0):
        t = trial(Par, reuse=-1.0, related=related, lr=0.0)
        learner, learn, _ = t.begin()
        learn(0)
        with torch.no_grad():
            next(learner.experts[0].model.parameters()).add_(1)
        learn(1)
        new, run = next(learner.experts[1].model.parameters()), next(learner.model.parameters())
        starts.append(float((new - run).detach().mean()))
    assert starts == [0, pytest.approx(1, abs=1e-4)]


# --- hypernetworks


def naive_weights(maker, embedding, count):
    """Chunk by chunk, in NumPy."""
    value = {name: p.detach().double().numpy() for name, p in maker.named_parameters()}
    out, h, c = [], None, None
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for chunk in value["chunks_NC"]:
        x = np.concatenate([embedding.detach().double().numpy(), chunk])
        if maker.cell is not None:
            n = maker.cell.hidden_size
            h, c = (np.zeros(n), np.zeros(n)) if h is None else (h, c)
            gates = value["cell.weight_ih"] @ x + value["cell.bias_ih"] + value["cell.weight_hh"] @ h + value["cell.bias_hh"]
            i, f, g, o = gates.reshape(4, n)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            x = h = sigmoid(o) * np.tanh(c)
        for layer in range(len(maker.layers)):
            x = value[f"layers.{layer}.weight"] @ x + value[f"layers.{layer}.bias"]
            x = np.maximum(x, 0) if layer + 1 < len(maker.layers) else x
        out.append(x)
    return np.concatenate(out)[:count]


@pytest.mark.parametrize(("core", "sizes"), [("chunk_mlp", [6, 5]), ("lstm", [6])])
def test_weights_chunk_by_chunk(core, sizes):
    maker, e = WeightMaker(core, sizes, 7, 3, 4, rng()), draw(3)
    maker.cover(20, rng(1))
    with torch.no_grad():
        for p in maker.parameters():
            p.add_(0.1 * draw(*p.shape, seed=5))
    made = maker(e, 20)
    assert made.shape == (20,) and len(maker.chunks_NC) == 3
    np.testing.assert_allclose(made.detach().numpy(), naive_weights(maker, e, 20), atol=1e-5)
    maker.cover(30, rng(2))
    assert len(maker.chunks_NC) == 5
    torch.testing.assert_close(maker(e, 30)[:20], made)


@pytest.mark.parametrize(("core", "sizes"), [("chunk_mlp", [6, 5]), ("lstm", [6])])
def test_growth_keeps_what_is_made(core, sizes):
    """New units take part in what is made only once they are trained; a grown state fits a fresh network."""
    maker, e = WeightMaker(core, sizes, 7, 3, 4, rng()), draw(3)
    maker.cover(20, rng(1))
    made = maker(e, 20).detach()
    count = sum(p.numel() for p in maker.parameters())
    maker.grow(2, rng(2))
    torch.testing.assert_close(maker(e, 20), made)
    np.testing.assert_allclose(naive_weights(maker, e, 20), made.numpy(), atol=1e-5)
    new = {"chunk_mlp": 2 * 8 + 2 * 7 + 5 * 2 + 2 * 2 + 7 * 2, "lstm": 4 * (2 * 7 + 2 * 6 + 6 * 2 + 2 * 2 + 2 * 2) + 7 * 2}
    assert sum(p.numel() for p in maker.parameters()) == count + new[core]
    maker(e, 20).square().sum().backward()
    last = maker.layers[-1].weight
    assert float(last.detach()[:, -2:].abs().max()) == 0 and float(last.grad[:, -2:].abs().max()) > 0, "they can be trained"
    other = WeightMaker(core, sizes, 7, 3, 4, rng(9))
    other.load_state_dict(maker.state_dict())
    torch.testing.assert_close(other(e, 20), made)
    other.grow(1, rng(3)), other.load_state_dict(maker.state_dict())
    assert [p.shape for p in other.parameters()] == [p.shape for p in maker.parameters()]


def test_a_hypernetwork_grows_with_each_new_task():
    """The first and a task that comes back add nothing; made weights of earlier tasks stay where nothing is trained."""
    t = trial(Hypernetwork, chunk=100, hidden=(6,), batch_size=8, lr=0.0, grow=3)
    learner, learn, pipeline = t.begin()
    widths = []
    for i in range(3):
        learn(i)
        widths.append(learner.maker.layers[0].out_features)
    assert widths == [6, 9, 12]
    learner.place_of(t.open(0, pipeline))
    assert learner.maker.layers[0].out_features == 12
    fresh, answers = t.start()[0], t.answers_of(learner, pipeline, 0)
    fresh.load_state_dict(learner.state_dict())
    assert torch.equal(t.answers_of(fresh, pipeline, 0), answers)


def test_made_weights_are_those_of_network_and_head():
    t = trial(Hypernetwork, chunk=100, hidden=(6,), batch_size=8)
    learner, learn, _ = t.begin()
    learn(0), learn(1)
    x = images(4)
    for place in (0, 1):
        made = naive_weights(learner.maker, learner.embeddings[place], learner.count(place))
        sizes = {(12, 192): 192, (12,): 12, (8, 12): 12, (8,): 8, (2, 8): 8, (2,): 8}  # and what h is divided by the root of
        parts, at = [], 0
        for size, inputs in sizes.items():
            parts.append(made[at : at + math.prod(size)].reshape(size) / math.sqrt(inputs))
            at += math.prod(size)
        assert at == len(made)
        biases = [b.double().numpy() for name, b in learner.model.named_parameters() if name.endswith("bias")]
        f = x.x.flatten(1).double().numpy()
        f = np.maximum(f @ parts[0].T + parts[1] + biases[0], 0)
        f = np.maximum(f @ parts[2].T + parts[3] + biases[1], 0)
        z = f @ parts[4].T + parts[5]
        x.task = place
        np.testing.assert_allclose(learner.predict(x)[:, 2 * place : 2 * place + 2].detach().numpy(), z, atol=1e-4)
        assert (learner.predict(x)[:, 2 - 2 * place : 4 - 2 * place] < -1e29).all()


@pytest.mark.parametrize("lookahead", [True, False])
def test_gradient_of_the_regulariser(lookahead):
    """By a copy of h that is moved by hand; at phi* itself the regulariser has no gradient."""
    learner, _, _ = trial(Hypernetwork, beta=0.7, lookahead=lookahead, hidden=(5,), chunk=9, lr=0.3).begin()
    maker = learner.maker
    maker.cover(30, rng(1))
    old = [(draw(32, seed=i), 25 + i) for i in range(2)]
    targets = [maker(*pair).detach() for pair in old]
    grads = [0.1 * draw(*p.shape, seed=9) for p in maker.parameters()]
    for p, g in zip(maker.parameters(), grads, strict=True):
        p.grad = g.clone()
    learner.protect(old, targets, 0.3)
    twin = copy.deepcopy(maker)
    with torch.no_grad():
        for p, g in zip(twin.parameters(), grads, strict=True):
            p.grad = None
            p.sub_(0.3 * g if lookahead else 0)
    total = sum((twin(*pair) - target).square().sum() for pair, target in zip(old, targets, strict=True)) / 2
    (0.7 * total).backward()
    for p, q, g in zip(maker.parameters(), twin.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g + q.grad)
        assert bool(q.grad.abs().max() > 0) == lookahead
    assert not any(e.requires_grad for e, _ in old)


def test_a_strong_regulariser_keeps_old_weights():
    drift = {}
    for beta in (0.0, 0.01, 1.0):
        t = trial(Hypernetwork, beta=beta, hidden=(20,), chunk=200, batch_size=6)
        learner, learn, _ = t.begin()
        learn(0)
        embedding = learner.embeddings[0].detach().clone()
        before = learner.maker(embedding, learner.count(0)).detach()
        experience = t.open(1, t.start()[2])
        learner.runtime.begin(1, len(experience.train))
        drift[beta] = learner.learn(experience)["drift"]
        moved = (learner.maker(embedding, learner.count(0)) - before).detach().norm() / before.norm()
        assert float(moved) == pytest.approx(drift[beta], rel=1e-4)
        assert torch.equal(learner.embeddings[0], embedding), "an old embedding moved"
    assert drift[1.0] < 0.25 * drift[0.0] and drift[1.0] < drift[0.01] < drift[0.0]


def test_which_old_tasks_a_step_asks():
    learner, _, _ = trial(Hypernetwork, reg_tasks=2).begin()
    assert [sorted(learner.chosen(n, 0)) for n in range(3)] == [[], [0], [0, 1]]
    chosen = [learner.chosen(4, step) for step in range(60)]
    assert all(len(set(some)) == 2 for some in chosen) and {i for some in chosen for i in some} == {0, 1, 2, 3}
    assert chosen == [learner.chosen(4, step) for step in range(60)]


def test_weights_around_those_of_the_network():
    learner, learn, _ = trial(Hypernetwork, offset="model", lr=0.0).begin()
    learn(0)
    with torch.no_grad():
        for p in learner.maker.layers[-1].parameters():
            p.zero_()
    seen = []
    learner.model.net.register_forward_hook(lambda module, args, out: seen.append(out))
    x = images(3)
    learner.logits(x, learner.maker(learner.embeddings[0], learner.count(0)), 0)
    torch.testing.assert_close(seen[0], backbone(mlp(12, 8)).features(x))


# --- PICLE


class Fork(torch.nn.Module):
    """Two layers on one input: no chain."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.second, self.first = torch.nn.Linear(192, 4), torch.nn.Linear(192, 4)

    def forward_features(self, x):
        return self.first(x.flatten(1)) + self.second(x.flatten(1))

    def forward_head(self, x, pre_logits=True):
        return x


def test_networks_as_chains():
    nano = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    vit = build_backbone("nano", "vit_tiny_patch16_224", nano, profile="small")
    small = build_backbone("mlp", "mlp", {"hidden": [6, 5, 4], "img_size": 8}, profile="small", norm="none")
    for model, number, lengths in ((small, 2, [4, 2]), (small, 9, [2, 2, 2]), (backbone(convnet()), 3, [4, 2, 2])):
        links = chain(model, number)
        assert [len(link.names) for link in links] == lengths
        assert [name for link in links for name in link.names] == [name for name, _ in model.named_parameters()]
    links = chain(vit, 4)
    assert {"net.cls_token", "net.pos_embed", "net.patch_embed.proj.weight"} <= set(links[0].names)
    assert all(name.startswith(f"net.blocks.{i}.") for i in range(2) for name in links[i + 1].names)
    assert {"net.norm.weight", "net.blocks.2.mlp.fc1.bias"} <= set(links[3].names)
    x = images(3).x
    z = inputs_of(chain(small, 3)[1], lambda: small.features(x))
    torch.testing.assert_close(z, small.net.layers[0](x.mean(1).flatten(1)).detach())
    with pytest.raises(UserError, match="is no chain of modules"):
        chain(backbone(Fork()), 2)


def test_posterior_by_hand():
    data = [draw(30, 3, seed=i) @ draw(3, 3, seed=40 + i) + i for i in range(3)]
    notes = [[(*picle.gaussian(data[0]), 0.9), (*picle.gaussian(data[1]), 0.7)], [(*picle.gaussian(data[2]), 0.8)]]
    z = draw(5, 3, seed=7)
    naive = []
    for group, best in (([0, 1], 0.9), ([2], 0.8)):
        likely = []
        for i in group:
            f = data[i].double().numpy()
            cov = np.cov(f.T)
            cov = cov + 1e-3 * np.trace(cov) / 3 * np.eye(3)
            gap = z.double().numpy() - f.mean(0)
            quadratic = sum(row @ np.linalg.inv(cov) @ row for row in gap)
            likely.append(-0.5 * (quadratic + 5 * (np.linalg.slogdet(cov)[1] + 3 * math.log(2 * math.pi))))
        naive.append(math.log(math.exp(best / 0.5) / (math.exp(0.9 / 0.5) + math.exp(0.8 / 0.5))) + max(likely))
    np.testing.assert_allclose(picle.log_posterior(z, notes, 0.5).numpy(), naive, rtol=1e-6)
    mean, chol = picle.gaussian(draw(2, 4))
    assert torch.isfinite(chol).all() and float(chol.diagonal().min()) > 0, "fewer samples than dimensions"
    assert torch.isfinite(picle.gaussian(draw(1, 4))[1]).all() and mean.shape == (4,)


def test_inputs_that_come_back_find_their_module():
    """The same images under another task's number: the posterior takes that task's first module, whichever it was."""
    for again in (0, 1, 2):
        t = trial(Picle, epochs=3, modules=2, projection=10, lr=0.01, batch_size=6, temperature=1.0)
        learner, _, pipeline = t.begin()
        with pytest.MonkeyPatch.context() as patch:
            found = []
            patch.setattr(picle, "accuracy_of", lambda *args, found=found: found.pop(0))
            for i in range(3):
                found += [0.9, *([0.5, 0.5] if i else [])]  # new modules for each
                learner.runtime.begin(i)
                learner.learn(t.open(i, pipeline))
        assert learner.paths == {"0": [0, 0], "1": [1, 1], "2": [2, 2]}
        prefixes = learner.prefixes(t.open(again, pipeline).train)
        assert prefixes[0] == [again] and prefixes == [prefixes[1][:1], prefixes[1]]


@pytest.mark.parametrize(("scores", "path"), [([0.5, 0.6, 0.4], [0, 1]), ([0.5, 0.5, 0.5], [0, 0]), ([0.9, 0.5, 0.8], [1, 1])])
def test_the_best_path_is_kept_and_old_ones_never_change(monkeypatch, scores, path):
    t = trial(Picle, epochs=4, modules=2, lr=0.01, batch_size=6)
    learner, learn, pipeline = t.begin()
    learn(0)
    z, library = t.answers_of(learner, pipeline, 0), fingerprint([modules[0] for modules in learner.library])
    trained, real = [], Picle.train

    def train(self, data, path, head, place, candidate, epochs, key):
        log = real(self, data, path, head, place, candidate, epochs, key)
        trained.append((candidate.old, epochs, len(data), detached(path), detached(head.state_dict())))
        return log

    left = list(scores)
    monkeypatch.setattr(Picle, "train", train)
    monkeypatch.setattr(picle, "accuracy_of", lambda *args: left.pop(0))
    learn(1)
    assert [part[:3] for part in trained] == [(old, 1, 24 - round(0.2 * 24)) for old in range(3)]
    assert learner.paths["1"] == path and [len(m) for m in learner.library] == [1 + p for p in path]
    best = trained[path.count(0)]
    kept = [learner.library[place][module] for place, module in enumerate(path)]
    assert fingerprint(kept) == fingerprint(best[3]), "another path was kept than the best one"
    assert fingerprint(learner.heads.at(1).state_dict()) == fingerprint(best[4])
    assert [len(notes[0]) for notes in learner.notes] == [2 - p for p in path]
    assert torch.equal(t.answers_of(learner, pipeline, 0)[:, :2], z)
    assert fingerprint([modules[0] for modules in learner.library]) == library


def test_the_next_suffix_by_hand():
    """Against a Gaussian process and the expected improvement in NumPy; the first two are those in the middle."""
    outputs = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.5], [3.0, 3.0]])
    gaps = np.array([[math.dist(a, b) for b in outputs] for a in outputs])
    order = np.argsort(gaps.mean(1), kind="stable")
    assert (
        suffix_search.next_suffix(outputs, {}) == order[0]
        and suffix_search.next_suffix(outputs, {int(order[0]): 0.5}) == order[1]
    )
    tried = {int(order[0]): 0.55, int(order[1]): 0.75}
    scale = np.median([gaps[i, j] for i in range(4) for j in range(i)])
    kernel = np.exp(-(gaps**2) / (2 * scale**2))
    known, rest = list(tried), [int(i) for i in order[2:]]
    y = np.array(list(tried.values()))
    inverse = np.linalg.inv(kernel[np.ix_(known, known)] + 1e-6 * np.eye(2))
    expected = []
    for i in rest:
        k = kernel[i, known]
        mean = y.mean() + y.std() * float(k @ inverse @ ((y - y.mean()) / y.std()))
        std = y.std() * math.sqrt(1 - float(k @ inverse @ k))
        u = (mean - y.max()) / std
        below = 0.5 * (1 + math.erf(u / math.sqrt(2)))
        expected.append((mean - y.max()) * below + std * math.exp(-u * u / 2) / math.sqrt(2 * math.pi))
    assert max(expected) > 1e-3 and suffix_search.next_suffix(outputs, tried) == rest[int(np.argmax(expected))]
    assert suffix_search.next_suffix(outputs, dict.fromkeys(range(4), 0.5)) is None, "all are tried"
    near = np.concatenate([outputs[:2], outputs[:1] + 1e-4])
    assert suffix_search.next_suffix(near, {0: 0.4, 1: 0.9}) is None, "the third is the first over again"
    assert suffix_search.next_suffix(outputs[:1], {}) == 0 and suffix_search.next_suffix(outputs[:1], {0: 1.0}) is None


def new_inputs_of_an_old_task(epochs: int, few: int = 50, count: int = 256) -> Scenario:
    """BELL's S_in in small: (D1, T1), (D2, T2), then (D6, T1) with `few` samples.

    A picture is a sum of seven patterns with random weights, its pixels permuted by D. T1 asks whether the first weight, one of
    -1, 0, 0, 1, is 0, T2 for the sign of the second. A narrow module that was trained under D1 sees a mixture of all under D6.
    """
    gen = np.random.Generator(np.random.Philox(3))
    total = count + 16
    u = gen.uniform(-1, 1, (total, 7))
    u[:, 0] = gen.choice([-1.0, 0.0, 0.0, 1.0], total)
    patterns = gen.choice([-1.0, 1.0], (7, 192))
    x = (128 + 30 * u @ patterns).reshape(total, 8, 8, 3).clip(0, 255).astype(np.uint8)
    tasks = {1: (np.abs(u[:, 0]) > 0.5).astype(np.int64), 2: (u[:, 1] > 0).astype(np.int64)}
    split = (np.arange(total) >= count).astype(np.uint8)
    data = Dataset("mixed", ArrayImages(x), 2 * tasks[1] + tasks[2], split, tuple("abcd"), "0" * 64)
    steps, sets = [], []
    for i, (domain, task, size) in enumerate([(1, 1, count), (2, 2, count), (6, 1, few)]):
        own: Any = {"classes": (4 * task, 4 * task + 1), "transform": ({"permute": {"seed": 0, "number": domain}},)}
        train, test = np.arange(size), np.arange(count, total)
        steps.append(ExperienceEntry(f"p{i}", i, train=train, labels=4 * task + tasks[task][train], **own))
        sets.append(EvalEntry(f"p{i}", i, ids=test, first_seen=i, labels=4 * task + tasks[task][test], **own))
    budget = Budget(epochs=epochs)
    about = {"name": "mixed", "sha256": "0" * 64, "num_samples": total}
    made = Manifest("task_incremental", about, (4, 5, 8, 9), tuple(steps), tuple(sets), True, budget=budget.rules())
    return Scenario("mixed", made, data, budget, "none")


def test_new_inputs_of_an_old_task_find_its_suffix(monkeypatch):
    """The path of the third problem ends like that of the first, head included, behind a new module; nothing old changes."""
    tried, real = [], picle.accuracy_of
    monkeypatch.setattr(picle, "accuracy_of", lambda *args: tried.append(real(*args)) or tried[-1])
    options: Any = {
        "modules": 3,
        "latent": 2,
        "suffix": 2,
        "lr": 0.01,
        "weight_decay": 0.0,
        "batch_size": 16,
        "validation": 0.4,
    }
    t = SmallTrial(lambda: mlp(3, 16, 8), Picle, scenario=new_inputs_of_an_old_task(120), can=OWN, **options)
    learner, learn, pipeline = t.begin()
    learn(0), learn(1)
    z, library = t.answers_of(learner, pipeline, 0), fingerprint([modules[:1] for modules in learner.library])
    tried.clear()
    learn(2)
    assert len(tried) == 6, "a new path, three prefixes, two suffixes"
    assert max(tried) > max(tried[:4]) + 0.1, "no other path answers as well"
    assert learner.paths["2"][1:] == learner.paths["0"][1:], "the suffix of the first task"
    assert learner.paths["2"][0] == len(learner.library[0]) - 1 and len(learner.notes[0][-1]) == 1, "behind a new module"
    heads = [learner.heads.at(i).state_dict() for i in (0, 2)]
    assert fingerprint(heads[0]) == fingerprint(heads[1])
    assert torch.equal(t.answers_of(learner, pipeline, 0), z)
    assert fingerprint([modules[:1] for modules in learner.library]) == library
    assert [len(z) for z in learner.inputs] == [suffix_search.STORED] * len(learner.library[1])
    fresh, answers = t.start()[0], t.answers_of(learner, pipeline, 2)
    fresh.load_state_dict(learner.state_dict())
    assert torch.equal(t.answers_of(fresh, pipeline, 2), answers)


def test_held_out_samples_are_others():
    t = trial(Picle, epochs=4, modules=2, validation=0.25)
    learner, _, pipeline = t.begin()
    data = t.open(0, pipeline).train
    train, held = picle.split(data, 0.25, 1)
    assert len(held) == 6 and sorted([*train.ids, *held.ids]) == sorted(data.ids)
    alone = data.subset([3])
    assert [len(part) for part in picle.split(alone, 0.25, 1)] == [1, 1] and len(
        picle.split(data.subset([0, 1]), 0.25, 1)[1]
    ) == 1
    experience = replace(t.open(1, pipeline), train=alone)
    learner.runtime.begin(0, 1)
    assert learner.learn(replace(experience, classes=(int(alone.y[0]),)))["paths"] == 1
