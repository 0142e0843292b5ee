"""Online ensembles: Sinkhorn iterations, answers and additive learning in loops."""

import numpy as np
import pytest
import torch
from test_closed_forms import Flat
from test_naive_bayes import runtime
from test_online import online
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.learners.online_ensemble import OnlineEnsemble, hard_top, soft_top

TINY = ("model=mlp", "model.kwargs.hidden=[24,16]")


def test_soft_top_is_sinkhorns_fixed_point_and_its_derivative():
    x = torch.from_numpy(np.random.default_rng(0).uniform(-0.4, 0.6, size=(3, 7)))
    epsilon, k = 0.3, 2
    naive = np.zeros((3, 7))
    for b in range(3):
        kernel = np.exp(-((x[b].numpy()[:, None] - np.array([0.0, 1.0])) ** 2) / epsilon)
        u, v = np.ones(7), np.ones(2)
        for _ in range(2000):
            u = (1 / 7) / (kernel @ v)
            v = np.array([5 / 7, 2 / 7]) / (kernel.T @ u)
        naive[b] = 7 * u * kernel[:, 1] * v[1]
    s = soft_top(x, k, epsilon)
    np.testing.assert_allclose(s, naive, atol=1e-9)
    np.testing.assert_allclose(s.sum(1), k)
    assert torch.autograd.gradcheck(lambda x: soft_top(x, k, epsilon), (x.clone().requires_grad_(),))
    torch.testing.assert_close(soft_top(x, k, 1e-4), hard_top(x, k), atol=1e-6, rtol=0)
    torch.testing.assert_close(soft_top(x, 7, epsilon), torch.ones(3, 7).double())


def ensemble(**options):
    found = OnlineEnsemble(Flat(), runtime(), **({"members": 9, "chosen": 3, "epochs": 1} | options))
    for count in (2, 1):  # two experiences
        found.head.grow(found.members * count, runtime().generator("x"))
        found.seen_K = F.pad(found.seen_K, (0, count), value=True)
    return found


def test_answers_of_an_ensemble_in_loops():
    made = torch.Generator().manual_seed(0)
    for top, keys in (("hard", "fixed"), ("soft", "trained")):
        found = ensemble(top=top, keys=keys, epsilon=0.2, bound=0.02)
        x = torch.randn(5, 6, generator=made)
        weights = np.concatenate([b.weight.detach().numpy().reshape(9, -1, 6) for b in found.head.blocks], 1)
        naive = np.zeros((5, 3))
        for b in range(5):
            q = x[b].numpy() / np.linalg.norm(x[b].numpy())
            keys_of = found.keys_ND.detach().numpy()
            cosines = np.array([q @ key / np.linalg.norm(key) for key in keys_of])
            shares = np.isin(np.arange(9), np.argsort(-cosines)[:3]).astype(float)
            if top == "soft":
                shares = soft_top(torch.from_numpy(cosines)[None], 3, 0.2)[0].numpy()
                shares[shares < 0.3] = 0
            votes = shares * np.maximum(cosines, 0)
            for j in range(9):
                naive[b] += votes[j] * 0.02 * np.tanh(weights[j] @ q / 0.02) / votes.sum()
        np.testing.assert_allclose(found.predict(x), naive, atol=1e-6)


def test_learning_adds_to_the_rows_of_the_own_class_alone():
    """E&E far from its bound: a step adds lr x vote x q / B to the rows of each sample's class, and to nothing else."""
    words = "keys=fixed top=hard weight_decay=0 members=5 chosen=2 lr=0.1 bound=1e6 batch_size=7"
    t = online("learner=online_ensemble", *TINY, *(f"learner.{word}" for word in words.split()))
    learner, its_runtime, pipeline = t.start()
    before = learner.keys_ND.clone()
    t.learn(learner, its_runtime, pipeline, 0)
    data, naive = t.open(0, pipeline).train, np.zeros((5, 3, 16))
    rows = [(f, int(c), len(b)) for b in data.test_batches(7) for f, c in zip(learner.model.features(b), b.y, strict=True)]
    for f, c, size in rows:
        q = F.normalize(f.double(), dim=0)
        cosines = F.normalize(before.double(), dim=1) @ q
        votes = cosines.clamp_min(0) * hard_top(cosines[None], 2)[0]
        naive[:, c] += 0.1 / size * np.outer(votes / votes.sum().clamp_min(1e-12), q)
    np.testing.assert_allclose(learner.head.blocks[0].weight.detach().reshape(5, 3, 16), naive, atol=1e-6)
    first = learner.head.blocks[0].weight.detach().clone()
    t.learn(learner, its_runtime, pipeline, 1)
    assert torch.equal(learner.head.blocks[0].weight, first) and torch.equal(learner.keys_ND, before), "nothing is forgotten"
    assert learner.head.blocks[1].weight.any()


def test_trained_keys_move_by_adam_towards_what_they_see():
    found = ensemble(epsilon=0.1, key_lr=0.01)
    twin = torch.nn.Parameter(found.keys_ND.detach().clone())
    adam = torch.optim.Adam([twin], lr=0.01)
    made = torch.Generator().manual_seed(1)
    for _ in range(4):
        g = torch.randn(9, 6, generator=made)
        twin.grad = g.clone()
        adam.step()
        given = g.clone()
        found.adam([], [given])
        with torch.no_grad():
            found.keys_ND -= 0.01 * given
    torch.testing.assert_close(found.keys_ND.detach(), twin.detach(), atol=1e-7, rtol=1e-5)
    t = online("learner=online_ensemble", *TINY, "learner.members=8", "learner.chosen=2", "learner.key_lr=0.01")
    learner, its_runtime, pipeline = t.start()
    data = t.open(0, pipeline).train
    f = torch.cat([learner.model.features(b) for b in data.test_batches(36)]).detach()
    distances = []
    for _ in range(2):
        cosines = F.normalize(f, dim=1) @ F.normalize(learner.keys_ND.detach(), dim=1).T
        distances.append(float((1 - cosines.topk(2, dim=1).values).mean()))
        if len(distances) == 1:
            t.learn(learner, its_runtime, pipeline, 0)
    assert distances[1] < distances[0] - 0.02 and learner.steps == 4


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("learner.keys=random", "learner.keys=random"),
        ("learner.top=sinkhorn", "learner.top=sinkhorn"),
        ("learner.chosen=200", "learner.chosen=200"),
        ("learner.epsilon=0", "learner.epsilon=0"),
        ("learner.cut=1", "learner.cut=1"),
    ],
)
def test_bad_options_are_one_line(words, line):
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as caught:
        online("learner=online_ensemble", *TINY, words).start()
    assert "\n" not in str(caught.value)
