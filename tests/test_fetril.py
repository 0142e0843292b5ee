"""FeTrIL: the translation and the classifiers, against naive versions."""

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC
from test_online import online
from torch.nn import functional as F

from clbench.interfaces import UserError, declared
from clbench.learners import fetril
from clbench.learners.fetril import Fetril, translated

FAST = ("learner.head_epochs=3", "learner.batch_size=16")


def experience(seed=0, n=60):
    """Features of classes 3, 4, 5 of six, and means of all: 3 to 5 have those of their features."""
    made = torch.Generator().manual_seed(seed)
    y = 3 + torch.arange(n) % 3
    x = torch.randn(n, 5, generator=made).double() * (1 + y[:, None]) + y[:, None]
    means = torch.randn(6, 5, generator=made).double() * 3 + 3
    for c in (3, 4, 5):
        means[c] = x[y == c].mean(0)
    return x, y, means


@pytest.mark.parametrize("nearest", ["euclidean", "cosine"])
def test_translated_features_have_their_class_s_mean_and_the_nearest_one_s_covariance(nearest):
    met = set()
    for seed in range(4):
        x, y, means = experience(seed)
        found, labels = translated(x, y, means, nearest)
        assert torch.equal(found[: len(x)], x) and torch.equal(labels[: len(y)], y)
        for c in range(3):

            def distance(k, c=c, means=means):
                if nearest == "euclidean":
                    return float(((means[c] - means[k]) ** 2).sum())
                return -float(means[c] @ means[k] / (means[c].norm() * means[k].norm()))

            near = min((3, 4, 5), key=distance)
            met.add(near)
            own = found[labels == c]
            naive = torch.stack([row - means[near] + means[c] for row in x[y == near]])
            torch.testing.assert_close(own, naive, rtol=0, atol=1e-12)
            torch.testing.assert_close(own.mean(0), means[c], rtol=0, atol=1e-12)
            torch.testing.assert_close(own.T.cov(), x[y == near].T.cov(), rtol=1e-10, atol=1e-10)
    assert len(met) > 1


def test_the_order_of_samples_and_classes_does_not_count():
    x, y, means = experience()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    a, b = translated(x, y, means, "euclidean"), translated(x[order], y[order], means, "euclidean")
    for c in range(6):
        one, two = (found[labels == c] for found, labels in (a, b))
        torch.testing.assert_close(one[one[:, 0].argsort()], two[two[:, 0].argsort()])


def test_a_class_that_comes_back_keeps_its_features_and_lends_them_from_their_own_mean():
    x, y, means = experience()
    means[4] += 0.5  # of all its samples, not of those at hand
    found, labels = translated(x, y, means, "euclidean")
    assert (labels == 4).sum() == (y == 4).sum() and torch.equal(found[labels == 4], x[y == 4])
    for c in range(3):
        torch.testing.assert_close(found[labels == c].mean(0), means[c], rtol=0, atol=1e-12)


def test_by_hand():
    x, y = torch.tensor([[0.0, 1.0], [2.0, 1.0], [9.0, 9.0]]), torch.tensor([1, 1, 2])
    found, labels = translated(x, y, torch.tensor([[3.0, 0.0], [1.0, 1.0], [9.0, 9.0]]).double(), "euclidean")
    assert labels.tolist() == [1, 1, 2, 0, 0] and found[3:].tolist() == [[2.0, 0.0], [4.0, 0.0]]


@pytest.mark.parametrize("classifier", ["fc", "svm"])
def test_learned_from_real_and_translated_features(monkeypatch, classifier):
    """The third experience: every class has rows, real ones first; the classifier is trained from new on all of them."""
    t = online("learner=fetril", f"learner.classifier={classifier}", "learner.train_first=false", *FAST)
    learner, runtime, pipeline = t.start()
    given, real = [], fetril.translated

    def spied(*args):
        given.append(real(*args))
        return given[-1]

    monkeypatch.setattr(fetril, "translated", spied)
    means = []
    for i in range(3):
        t.learn(learner, runtime, pipeline, i)
        f = torch.cat([learner.model.features(b) for b in t.open(i, pipeline).train.test_batches(50)]).double()
        own = torch.as_tensor(np.concatenate([b.y for b in t.open(i, pipeline).train.test_batches(50)]))
        means += [f[own == c].mean(0) for c in own.unique()]
        x, labels = given[-1]
        assert labels.unique().tolist() == list(range(len(means)))
        for c, mean in enumerate(means):
            torch.testing.assert_close(x[labels == c].double().mean(0), mean, rtol=1e-4, atol=1e-4)
    assert learner.head.widths == [len(means)]
    if classifier == "svm":
        rows, theirs = F.normalize(x, dim=1).numpy(), LinearSVC(C=1.0, tol=1e-4, max_iter=10_000, random_state=0)
        scores = theirs.fit(rows, labels.numpy()).decision_function(rows)
        found = learner.head(F.normalize(x, dim=1)).detach().numpy()
        np.testing.assert_allclose(found, scores, rtol=1e-3, atol=1e-3)
    else:
        assert runtime.meter.by_name["classifier"] > 0 and runtime.used_visits == 0


def test_machines_of_one_and_of_two_classes():
    t = online("learner=fetril", "learner.classifier=svm", "learner.train_first=false", sizes=[1, 1, 1], num_classes=3)
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    assert t.scores(learner, pipeline, 0, 9).abs().max() == 0
    t.learn(learner, runtime, pipeline, 1)
    z = torch.cat([t.scores(learner, pipeline, j, 9) for j in range(2)])
    torch.testing.assert_close(z[:, 0], -z[:, 1])
    truth = torch.arange(2).repeat_interleave(len(z) // 2)
    assert (z.argmax(1) == truth).float().mean() > 0.8


def test_the_network_is_trained_once_and_then_rests():
    t = online("learner=fetril", "learner.lr=0.01", *FAST, operators=())
    learner, runtime, pipeline = t.start()
    start = {k: v.clone() for k, v in learner.model.state_dict().items()}
    t.learn(learner, runtime, pipeline, 0)
    once = {k: v.clone() for k, v in learner.model.state_dict().items()}
    assert any(not torch.equal(once[k], start[k]) for k in start) and learner.first_head.num_classes == 3
    t.learn(learner, runtime, pipeline, 1)
    assert all(torch.equal(v, once[k]) for k, v in learner.model.state_dict().items()) and learner.model.frozen
    found = [(declared(Fetril, o).trains, declared(Fetril, o).needs_random_access) for o in (
        {}, {"train_first": False}, {"train_first": False, "classifier": "svm"}, {"classifier": "svm"}
    )]  # fmt: skip
    assert found == [(True, True), (True, False), (False, False), (True, True)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("learner.classifier=ncm", "learner.classifier=ncm"),
        ("learner.nearest=far", "learner.nearest=far"),
        ("learner.head_epochs=0", "learner.head_epochs=0"),
        ("learner.c=0", "learner.c=0"),
        ("learner.train_first=false learner.epochs=1", "learner.epochs has no effect"),
    ],
)
def test_bad_options_are_one_line(words, line):
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as caught:
        online("learner=fetril", *words.split()).start()
    assert "\n" not in str(caught.value)
