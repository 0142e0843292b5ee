"""Gaussian naive Bayes against densities in loops, scikit-learn and numbers by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from sklearn.naive_bayes import GaussianNB
from test_closed_forms import Flat
from test_online import online

from clbench.interfaces import UserError
from clbench.learners.naive_bayes import NaiveBayes
from clbench.models.heads import LOWEST
from clbench.training.runtime import Runtime

TINY = ("model=mlp", "model.kwargs.hidden=[24,16]")


def runtime(seed=0):
    return Runtime(seed, torch.device("cpu"))


def blobs(seed, n=60, width=6, classes=3):
    made = np.random.default_rng(seed)
    y = made.integers(classes, size=n)
    return torch.from_numpy(made.normal(size=(n, width)) + 2 * y[:, None] * np.arange(width) / 3), torch.from_numpy(y)


def bayes(x, y, size, classes=3, **options):
    found = NaiveBayes(Flat(), runtime(), **options)
    for xs, ys in zip(x.split(size), y.split(size), strict=True):
        found.update(xs, ys, classes)
    return found


@pytest.mark.parametrize("prior", ["counts", "uniform"])
def test_naive_bayes_is_that_of_densities_in_any_order_and_batches(prior):
    x, y = blobs(0)
    z = np.zeros((len(x), 3))
    for c in range(3):
        rows = x[y == c].numpy()
        variance = rows.var(0) + 1e-9 * x.numpy().var(0).max()
        z[:, c] = multivariate_normal(rows.mean(0), np.diag(variance)).logpdf(x.numpy())
        z[:, c] += math.log(len(rows) / len(x)) if prior == "counts" else 0
    z -= np.log(np.exp(z).sum(1, keepdims=True))
    made = np.random.default_rng(1)
    for size, order in ((1, np.arange(60)), (7, made.permutation(60)), (60, np.argsort(y.numpy(), kind="stable"))):
        found = bayes(x[order], y[order], size, prior=prior, pseudo=0)
        np.testing.assert_allclose(found.predict(x), z, rtol=1e-5, atol=1e-5)
    if prior == "counts":
        np.testing.assert_allclose(found.predict(x), GaussianNB().fit(x, y).predict_log_proba(x), rtol=1e-5, atol=1e-5)


def test_naive_bayes_variances_by_hand():
    """Class 0: 0, 2 (m = 2); class 1: 5 alone; s = 2 / 3, t = 38 / 9."""
    x, y = torch.tensor([[0.0], [5.0], [2.0]]), torch.tensor([0, 1, 0])
    found = bayes(x, y, 2, 2, smoothing=1e-3)
    assert found.gaps_KD.tolist() == [[2.0], [0.0]] and found.means_KD.tolist() == [[1.0], [5.0]]
    least = 1e-3 * 38 / 9
    np.testing.assert_allclose(found.variances(), [[(2 + 2 / 3) / 3 + least], [2 / 3 / 2 + least]])
    np.testing.assert_allclose(bayes(x, y, 3, 2, smoothing=1e-3, variance="shared").variances(), [[2 / 3 + least]] * 2)
    odds = float(torch.diff(found.predict(torch.tensor([[4.0]])).double()))
    densities = [norm(m, v**0.5).logpdf(4) for m, v in zip([1, 5], found.variances()[:, 0].tolist(), strict=True)]
    assert odds == pytest.approx(densities[1] - densities[0] + math.log(1 / 2), rel=1e-5)


def test_naive_bayes_with_a_shared_variance_is_linear_and_with_equal_ones_the_nearest_mean():
    x, y = blobs(2)
    found = bayes(x, y, 10, prior="uniform", variance="shared", smoothing=1e3)
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    assert torch.equal(found.predict(x).argmax(1), torch.cdist(x, means).argmin(1))


def test_naive_bayes_one_sample_of_a_class_and_none():
    x, y = blobs(3, classes=2)
    found = bayes(torch.cat([x, x[:1] + 40]), torch.cat([y, torch.tensor([2])]), 61, classes=4)
    z = found.predict(x[:5] + 40)
    assert z.argmax(1).tolist() == [2] * 5 and (z[:, 3] == LOWEST).all() and torch.isfinite(z).all()
    same = bayes(torch.ones(2, 3), torch.tensor([0, 1]), 1, classes=2)
    torch.testing.assert_close(same.predict(torch.ones(1, 3)), torch.full((1, 2), math.log(0.5)))


def test_naive_bayes_on_pixels():
    t = online("learner=naive_bayes", "learner.features=pixels", *TINY)
    learner, its_runtime, pipeline = t.start()
    t.learn(learner, its_runtime, pipeline, 0)
    data = t.open(0, pipeline).train
    x, y = (torch.cat(part) for part in zip(*((b.x.flatten(1).double(), b.y) for b in data.test_batches(7)), strict=True))
    np.testing.assert_allclose(learner.means_KD, torch.stack([x[y == c].mean(0) for c in range(3)]), atol=1e-6)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("learner.prior=equal", "learner.prior=equal"),
        ("learner.variance=full", "learner.variance=full"),
        ("learner.features=raw", "learner.features=raw"),
        ("learner.pseudo=-1", "learner.pseudo=-1"),
        ("learner.smoothing=0", "learner.smoothing=0"),
    ],
)
def test_bad_options_are_one_line(words, line):
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as caught:
        online("learner=naive_bayes", *TINY, words).start()
    assert "\n" not in str(caught.value)
