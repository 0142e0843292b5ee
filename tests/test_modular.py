"""Networks, modules and weights of a task's own: Model Zoo, hypernetworks, PAR, PICLE, against naive versions."""

import math

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, backbone, images, mlp
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError
from clbench.learners import model_zoo
from clbench.learners.model_zoo import ModelZoo
from clbench.streams.images.data import ImageData, shuffled
from clbench.testing.contract import Trial, small_stream
from clbench.training.state import fingerprint

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
