"""Statistics that follow the drift of features, and the learners made for that, against naive versions of their formulas."""

import math

import numpy as np
import pytest
import torch
from conftest import NARROW

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError
from clbench.streams.images.data import open_experience
from clbench.testing.contract import Trial, small_stream
from clbench.training import drift
from clbench.training.drift import Drift
from clbench.training.features import extract
from clbench.training.gaussians import ClassGaussians


def trial(*overrides, **stream):
    (config,) = compose([*NARROW, *overrides])
    return Trial(config, small_stream(**stream), Capabilities())


def learns(t, learner, runtime, pipeline, index):
    """An experience's numbers for the log."""
    kept, learn = [], learner.learn
    learner.learn = lambda experience: kept.append(learn(experience)) or kept[0]
    t.learn(learner, runtime, pipeline, index)
    learner.learn = learn
    return kept[0]


def learned(*overrides, experiences=2, **stream):
    t = trial(*overrides, **stream)
    learner, runtime, pipeline = t.start()
    logs = [learns(t, learner, runtime, pipeline, i) for i in range(experiences)]
    return t, learner, runtime, pipeline, logs


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Owner:
    """A learner without a state."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert not state


@pytest.fixture
def runtime():
    return trial("learner=finetune").start()[1]


def moments(count=3, d=6, seed=0):
    """Means [K, D] and covariances [K, D, D] of random classes."""
    a = drawn(count, d, d, seed=seed)
    return 2 * drawn(count, d, seed=seed + 1), a @ a.transpose(1, 2) / d + 0.1 * torch.eye(d)


def rotation(d, seed=5):
    return torch.linalg.qr(drawn(d, d, seed=seed)).Q


def turn(size, d=6):
    """A rotation that is the nearer to the identity the smaller `size`."""
    a = drawn(d, d, seed=40)
    return torch.linalg.matrix_exp(size * (a - a.T))


def relative(found, true):
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("slca learner.drift=line", r"learner\.drift=line: choose null, shift, linear or nonlinear"),
        ("ssiat learner.drift=none", r"learner\.drift=none"),
        ("ssiat learner.compat_unpaired=true learner.drift=linear", r"goes with learner\.drift=shift alone"),
    ],
)
def test_bad_options_are_named(words, said):
    with pytest.raises(UserError, match=said):
        trial(*f"learner={words}".split()).start()


# --- the maps


@pytest.mark.parametrize(("n", "alpha"), [(4, 1.0), (40, 1.0), (40, 20.0)])
def test_linear_map_is_the_naive_ridge_regression(n, alpha):
    old, new = drawn(n, 5), drawn(n, 5, seed=1)
    x, y = (np.array([row / np.sqrt((row**2).sum()) for row in f.numpy()]) for f in (old, new))
    gram, cross = 1e-4 * np.eye(5), np.zeros((5, 5))
    for i in range(n):
        gram += np.outer(x[i], x[i])
        cross += np.outer(x[i], y[i])
    share = math.exp(-n / (alpha * 5))
    naive = (1 - share) * np.linalg.inv(gram) @ cross + share * np.eye(5)
    np.testing.assert_allclose(drift.linear_map(old, new, 1e-4, alpha).numpy(), naive, rtol=1e-8, atol=1e-8)


def test_linear_drift_of_no_change_and_of_a_rotation(runtime):
    old, (mean, cov), q, eye = drawn(3000, 6), moments(), rotation(6), torch.eye(6)
    for new, mean_true, cov_true in ((old, mean, cov), (old @ q, mean @ q, q.T @ cov @ q)):
        moved = Drift("linear", runtime, Owner())
        moved.fit(old, new)
        found = moved.move(mean, cov)
        torch.testing.assert_close(found[0], mean_true, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1], cov_true + 1e-2 * eye, atol=1e-4, rtol=1e-4)


def test_few_images_move_little(runtime):
    mean, cov = moments()
    distance = []
    for n in (1, 12, 600):
        old = drawn(n, 6)
        moved = Drift("linear", runtime, Owner())
        moved.fit(old, old @ rotation(6))
        distance.append(relative(moved.move(mean, cov)[0], mean @ rotation(6)))
    assert distance[0] > distance[1] > distance[2] and distance[2] < 1e-3


def test_shift_is_a_naive_double_loop_and_leaves_covariances(runtime):
    (mean, cov), old, new = moments(), 2 * drawn(9, 6, seed=7), 2 * drawn(9, 6, seed=8)
    moved = Drift("shift", runtime, Owner(), sigma=2.0)
    assert moved.fit(old, new) == {}
    found, same = moved.move(mean, cov)
    assert same is cov
    for c in range(3):
        w = [math.exp(-float((old[i] - mean[c]).square().sum()) / 8) + 1e-5 for i in range(9)]
        naive = mean[c] + sum(w[i] * (new[i] - old[i]) for i in range(9)) / sum(w)
        torch.testing.assert_close(found[c], naive)
    moved.fit(old, old)
    assert torch.equal(moved.move(mean, cov)[0], mean), "no drift, no shift"
    nothing = Drift(None, runtime, Owner())
    nothing.fit(old, new)
    assert nothing.move(mean, cov)[0] is mean


def test_transition_is_a_mixture_that_starts_near_the_identity():
    before = torch.random.get_rng_state()
    g, x = drift.Transition(4, torch.Generator().manual_seed(0)), drawn(3, 4).float()
    assert torch.equal(before, torch.random.get_rng_state()), "drawn from the generator that is given"
    w = np.exp([1.0, 0, 0]) / np.exp([1.0, 0, 0]).sum()
    first, _, second = g.network
    for i in range(3):
        hidden = (first.weight @ x[i] + first.bias).clamp_min(0)
        naive = (w[0] + w[1]) * x[i] + w[2] * (second.weight @ hidden + second.bias)
        torch.testing.assert_close(g(x)[i], naive.float(), atol=1e-5, rtol=1e-5)


def test_nonlinear_drift_of_no_change_and_of_a_rotation(runtime):
    old, (mean, cov), q = drawn(2000, 6).float(), moments(), turn(0.15).float()
    mean, cov = mean.float(), cov.float()
    for new, mean_true, cov_true in ((old, mean, cov), (old @ q, mean @ q, q.T @ cov @ q)):
        moved = Drift("nonlinear", runtime, Owner(), steps=500)
        log = moved.fit(old, new)
        assert log["drift_steps"] == 500
        found = moved.move(mean, cov)
        assert relative(found[0], mean_true) < 0.1 + 0.3 * relative(mean, mean_true), "60 samples a class"
        assert relative(found[1], cov_true) < 0.4


def test_nonlinear_penalty_keeps_the_network_out(runtime):
    old = drawn(200, 6).float()
    new, shares = old.abs() + old, []
    for penalty in (0.0, 0.5):
        moved = Drift("nonlinear", runtime, Owner(), penalty=penalty, steps=200)
        moved.fit(old, new)
        shares.append(float(moved.transition.mix.detach().softmax(0)[2]))
    assert shares[1] < shares[0] - 0.02


def test_nonlinear_moments_are_those_of_samples_behind_the_map(runtime):
    mean, cov = moments(2, 24)
    moved = Drift("nonlinear", runtime, Owner(), steps=1)
    moved.fit(drawn(50, 24).float(), drawn(50, 24, seed=1).float())
    with torch.no_grad():  # |x| g(x / |x|) = 3 x
        moved.transition.linear.weight.copy_(3 * torch.eye(24))
        moved.transition.mix.copy_(torch.tensor([-40.0, 40.0, -40.0]))
    found = moved.move(mean.float(), cov.float())
    assert relative(found[0], 3 * mean) < 0.1 and relative(found[1], 9 * cov) < 0.35
    again = moved.move(mean.float(), cov.float())
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1]), "samples are drawn from the seed"


@pytest.mark.parametrize("kind", ["shift", "linear", "nonlinear"])
def test_moved_statistics_are_nearer_to_those_refitted_from_old_images(runtime, kind):
    """Two clouds of old classes near the images of the new ones; the features turn a little and bend."""
    mean, cov = moments(2)
    clouds = [
        m + drawn(800, 6, seed=20 + i) @ torch.linalg.cholesky(c).T for i, (m, c) in enumerate(zip(mean, cov, strict=True))
    ]
    images = torch.cat([m + 1.5 * drawn(600, 6, seed=30 + i) for i, m in enumerate(mean)])

    def later(f):
        return f @ turn(0.15) + 0.1 * f.abs()

    before, after = ClassGaussians(), ClassGaussians()
    before.add(*clouds)
    after.add(*[later(f) for f in clouds])
    before.cholesky()
    moved = Drift(kind, runtime, Owner(), steps=400)
    old_mean, old_cov = before.mean_KD, before.cov_KDD
    log = moved.follow(before, images, later(images))
    assert log["drift"] == pytest.approx(float((before.mean_KD - old_mean).norm(dim=1).mean()))
    assert relative(before.mean_KD, after.mean_KD) < 0.6 * relative(old_mean, after.mean_KD)
    if kind != "shift":
        assert relative(before.cov_KDD, after.cov_KDD) < relative(old_cov, after.cov_KDD)
        torch.testing.assert_close(before.cholesky()[0] @ before.cholesky()[0].T, before.cov_KDD[0], atol=1e-4, rtol=1e-4)
    else:
        assert before.cov_KDD is old_cov


# --- as options of SLCA, SSIAT and SLDC


def features_of(t, learner, runtime, pipeline, index):
    return extract(runtime, learner.model, open_experience(t.scenario, index, pipeline).train, 16)[0]


@pytest.mark.parametrize("words", ["slca learner.slow=1", "ssiat learner.pet.scale=1", "sldc learner.align_samples=20"])
@pytest.mark.parametrize("kind", ["null", "shift", "linear"])
def test_learners_move_their_old_classes(words, kind):
    options = (*f"learner={words}".split(), "learner.lr=0.05", "learner.batch_size=4", f"learner.drift={kind}")
    t, learner, runtime, pipeline, _ = learned(*options, "learner.align_epochs=0", experiences=1, sizes=[2, 4])
    old = features_of(t, learner, runtime, pipeline, 1)
    before = learner.gaussians.mean_KD.clone(), learner.gaussians.cov_KDD.clone()
    log = learns(t, learner, runtime, pipeline, 1)
    new, count = features_of(t, learner, runtime, pipeline, 1), len(before[0])
    assert not torch.allclose(old, new, atol=1e-3)
    found = learner.gaussians.mean_KD[:count], learner.gaussians.cov_KDD[:count]
    if kind == "null":
        expected = before
        assert "drift" not in log
    elif kind == "shift":
        expected = drift.shifted(before[0], old, new, 4.0), before[1]
    else:
        w = drift.linear_map(old, new, 1e-4, 1.0).float()
        expected = before[0] @ w, w.T @ before[1] @ w + 1e-2 * torch.eye(len(w))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert kind == "null" or log["drift"] > 1e-3


def test_ssiat_may_train_a_nonlinear_map():
    t = trial("learner=ssiat", "learner.pet.scale=1", "learner.align_epochs=1", "learner.drift=nonlinear")
    learner, runtime, pipeline = t.start()
    learner.drift.steps = 30
    learns(t, learner, runtime, pipeline, 0)
    log = learns(t, learner, runtime, pipeline, 1)
    assert log["drift_steps"] == 30 and log["drift"] > 0
    assert torch.isfinite(learner.gaussians.cholesky()).all()
