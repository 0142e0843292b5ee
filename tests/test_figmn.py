"""FIGMN: the rank-one recursions against covariances that are kept and inverted, in loops and float64."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2, multivariate_normal
from test_online import online

from clbench.interfaces import UserError
from clbench.learners.figmn import Figmn, Mixture
from clbench.models.heads import LOWEST
from clbench.training.runtime import Runtime


def stream(seed, n=60, width=4, groups=3):
    made = np.random.default_rng(seed)
    return made.normal(size=(n, width)) + 6 * made.integers(groups, size=n)[:, None]


def naive(x, start, *, published=False, beta=0.01, v_min=math.inf, sp_min=0.0):
    """The paper's loop with dense covariances: components as (mean, covariance, mass, age), and how often one was given up."""
    parts, given_up, limit = [], 0, chi2.ppf(1 - beta, x.shape[1])
    for row in x:
        d2 = [(row - m) @ np.linalg.inv(c) @ (row - m) for m, c, _, _ in parts]
        if all(d > limit for d in d2):
            parts.append((row.copy(), np.diag(start**2), 1.0, 1.0))
            continue
        total = sum(mass for _, _, mass, _ in parts)
        density = [
            np.linalg.det(c) ** -0.5 * np.exp(-d / 2) * mass / total for (_, c, mass, _), d in zip(parts, d2, strict=True)
        ]
        fresh = []
        for (m, c, mass, age), p in zip(parts, np.array(density) / sum(density), strict=True):
            mass, age = mass + p, age + 1
            w = p / mass
            gap = row - m
            move = w * gap
            left = row - (m + move)
            if published:
                new = (1 - w) * c + w * np.outer(left, left) - np.outer(move, move)
                if np.linalg.eigvalsh(new)[0] <= 0:
                    new, given_up = (1 - w) * c, given_up + 1
            else:
                new = (1 - w) * c + w * (1 - w) * np.outer(gap, gap)
            fresh.append((m + move, new, mass, age))
        parts = [part for part in fresh if not (part[3] > v_min and part[2] < sp_min)]
        parts = parts or [max(fresh, key=lambda part: part[2])]
    return parts, given_up


def learned(x, start, *, beta=0.01, **rules):
    found = Mixture(x.shape[1], limit=float(chi2.isf(beta, x.shape[1])), **rules)
    for row in torch.from_numpy(x):
        found.add(row, torch.from_numpy(start))
    return found


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("scale", "v_min", "sp_min"), [(1.0, math.inf, 0.0), (0.6, 5.0, 3.0), (3.0, 5.0, 3.0)])
def test_recursions_are_those_of_dense_covariances(published, scale, v_min, sp_min):
    sizes = set()
    for seed in range(3):
        x, start = stream(seed), np.array([1.0, 0.8, 1.2, 1.0]) * scale
        parts, given_up = naive(x, start, published=published, v_min=v_min, sp_min=sp_min)
        found = learned(x, start, exact=not published, v_min=v_min, sp_min=sp_min)
        assert len(found.mass_J) == len(parts) and found.indefinite == given_up
        sizes.add(len(parts))
        for j, (mean, covariance, mass, age) in enumerate(parts):
            np.testing.assert_allclose(found.mean_JD[j], mean, rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(found.precision_JDD[j].numpy() @ covariance, np.eye(4), atol=1e-8)
            assert float(found.logdet_J[j]) == pytest.approx(np.linalg.slogdet(covariance)[1], abs=1e-8)
            assert (float(found.mass_J[j]), float(found.age_J[j])) == pytest.approx((mass, age))
        total = sum(mass for _, _, mass, _ in parts)
        density = sum(mass / total * multivariate_normal(m, c).pdf(x[:9]) for m, c, mass, _ in parts)
        np.testing.assert_allclose(found.log_density(torch.from_numpy(x[:9])), np.log(density), rtol=1e-7)
    assert max(sizes) > 1


def test_one_exact_component_is_mean_and_covariance_with_the_prior_once_in_any_order():
    for seed in range(3):
        x, start = stream(seed), np.array([1.0, 2.0, 0.5, 1.5])
        naive_covariance = (np.diag(start**2) + (x - x.mean(0)).T @ (x - x.mean(0))) / len(x)
        for order in (np.arange(60), np.random.default_rng(1).permutation(60)):
            found = learned(x[order], start, beta=0.0)
            assert len(found.mass_J) == 1 and float(found.mass_J) == float(found.age_J) == 60
            np.testing.assert_allclose(found.mean_JD[0], x.mean(0), rtol=1e-10)
            np.testing.assert_allclose(np.linalg.inv(found.precision_JDD[0].numpy()), naive_covariance, rtol=1e-8, atol=1e-8)


def test_by_hand():
    """One dimension, s = 1: after 0 and 1, w = 1/2, mu = 1/2, C = 1/2 + 1/4; published C = 1/2 - 1/8."""
    rows = np.array([[0.0], [1.0]])
    for exact, c in ((True, 0.75), (False, 0.375)):
        found = learned(rows, np.ones(1), exact=exact)
        assert float(found.mean_JD) == 0.5 and float(found.precision_JDD) == pytest.approx(1 / c)
        assert float(found.logdet_J) == pytest.approx(math.log(c)) and found.indefinite == 0
        at = float(found.log_density(torch.ones(1, 1).double()))
        assert at == pytest.approx(-0.5 * (math.log(2 * math.pi * c) + 0.25 / c))
    bad = learned(np.array([[0.0], [2.1]]), np.ones(1), exact=False)  # 1/2 - 4.41/8 is below 0
    assert bad.indefinite == 1 and float(bad.precision_JDD) == 2.0


def test_where_a_component_begins_and_when_it_goes():
    edge = float(chi2.isf(0.05, 1)) ** 0.5  # 1.96
    for at, number in ((edge - 1e-6, 1), (edge + 1e-6, 2)):
        assert len(learned(np.array([[0.0], [at]]), np.ones(1), beta=0.05).mass_J) == number
    x = np.array([[9.0], *[[0.0]] * 6])
    assert learned(x, np.ones(1), v_min=5, sp_min=2).mean_JD[:, 0].tolist() == pytest.approx([0.0], abs=1e-6)
    assert len(learned(x[:-1], np.ones(1), v_min=5, sp_min=2).mass_J) == 2, "not older than v_min yet"
    assert len(learned(x, np.ones(1), v_min=0, sp_min=100).mass_J) == 1, "the last one stays"


class Flat:
    num_features = 4

    def freeze(self):
        return self

    def eval(self):
        return self

    def features(self, batch):
        return batch


def test_classes_do_not_touch_each_other_and_batches_do_not_count():
    x = torch.from_numpy(stream(5)).float()
    y = torch.arange(60) % 2
    found = {}
    for size in (1, 7, 60):
        found[size] = Figmn(Flat(), Runtime(0, torch.device("cpu")), projection=0, scale=1.0)
        found[size].grow(3)
        for xs, ys in zip(x.split(size), y.split(size), strict=True):
            found[size].update(xs, ys)
    for size in (1, 7):
        torch.testing.assert_close(found[size].predict(x), found[60].predict(x), rtol=1e-6, atol=1e-6)
    alone = Figmn(Flat(), Runtime(0, torch.device("cpu")), projection=0, scale=1.0)
    alone.grow(2)
    alone.update(x[y == 1], y[y == 1])
    assert torch.equal(alone.predict(x)[:, 1], found[60].predict(x)[:, 1])
    assert (alone.predict(x)[:, 0] == LOWEST).all() and (found[60].predict(x)[:, 2] == LOWEST).all()
    again = Figmn(Flat(), Runtime(0, torch.device("cpu")), projection=0, scale=1.0)
    again.load_state_dict(found[7].state_dict())
    assert torch.equal(again.predict(x), found[7].predict(x))


def test_new_components_are_as_wide_as_the_first_batch():
    x = torch.from_numpy(stream(6)).float()
    x[:, 2] = 1.0  # does not vary
    own = Figmn(Flat(), Runtime(0, torch.device("cpu")), projection=0, delta=0.5)
    own.grow(1)
    own.update(x[:20], torch.zeros(20, dtype=torch.int64))
    std = x[:20].double().numpy().std(0)
    std[2] = std[[0, 1, 3]].mean()
    np.testing.assert_allclose(own.start_D, 0.5 * std, rtol=1e-6)
    own.update(100 * x[20:], torch.zeros(40, dtype=torch.int64))
    np.testing.assert_allclose(own.start_D, 0.5 * std, rtol=1e-6)
    narrow = Figmn(Flat(), Runtime(0, torch.device("cpu")), projection=2)
    assert narrow.project(x).shape == (60, 2)
    with pytest.raises(UserError, match=r"learner\.batch_size"):
        Figmn(Flat(), Runtime(0, torch.device("cpu"))).update(x[:1], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(FloatingPointError, match="features are NaN"):
        narrow.update(x * float("nan"), torch.zeros(60, dtype=torch.int64))


def test_the_published_recursion_loses_definiteness_and_says_so():
    logs = {}
    for variant in ("exact", "published"):
        t = online("learner=figmn", f"learner.variant={variant}")
        learner, runtime, pipeline = t.start()
        experience = t.open(0, pipeline)
        runtime.begin(0, len(experience.train))
        logs[variant] = learner.learn(experience)
        for mixture in learner.mixtures:
            assert all(np.linalg.eigvalsh(p.numpy())[0] > 0 for p in mixture.precision_JDD)
    assert logs["exact"]["indefinite"] == 0 < logs["published"]["indefinite"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("learner.variant=paper", "learner.variant=paper"),
        ("learner.projection=-1", "learner.projection=-1"),
        ("learner.delta=0", "learner.delta=0"),
        ("learner.beta=1", "learner.beta=1"),
        ("learner.scale=0", "learner.scale=0"),
        ("learner.v_min=-1", "learner.v_min=-1"),
    ],
)
def test_bad_options_are_one_line(words, line):
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as caught:
        online("learner=figmn", *words.split()).start()
    assert "\n" not in str(caught.value)
