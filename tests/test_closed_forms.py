"""Closed forms on frozen features: each formula against a naive version written from its paper, in loops and float64."""

import itertools
import types

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from test_online import online

from clbench.interfaces import UserError, declared
from clbench.learners.acil import Acil
from clbench.learners.dsal import Dsal
from clbench.learners.klda import FLOAT32, Klda
from clbench.learners.randumb import RanDumb
from clbench.models.heads import LOWEST
from clbench.models.random_features import Fourier, uniform
from clbench.training.discriminant import WithinClass
from clbench.training.ridge import RidgeRoot
from clbench.training.runtime import Runtime
from clbench.training.state import detached, fingerprint

CLOSE = {"rtol": 1e-8, "atol": 1e-8}


class Flat:
    """A frozen network that gives back what it gets."""

    def __init__(self, num_features=6):
        self.num_features = num_features

    def freeze(self):
        return self

    def eval(self):
        return self

    def features(self, batch):
        return batch


def data_of(seed, n=80, classes=4):
    made = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=made)
    return torch.randn(n, 6, generator=made).double() + y[:, None] * torch.arange(6) / 3, y


def learned(kind, x, y, size, classes=4, **options):
    """A learner after batches of `size` samples."""
    found = kind(Flat(), Runtime(0, torch.device("cpu")), **options)
    for xs, ys in zip(x.split(size), y.split(size), strict=True):
        found.update(xs, ys, classes)
    return found


def permuted(seed, n=80):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def moments(z, y, classes=4):
    """Means [K, M] and scatter [M, M] by Welford's recursion, one sample at a time."""
    means, scatter, counts = (
        torch.zeros(classes, z.shape[1]).double(),
        torch.zeros(z.shape[1], z.shape[1]).double(),
        [0] * classes,
    )
    for row, c in zip(z.double(), y.tolist(), strict=True):
        gap = row - means[c]
        counts[c] += 1
        means[c] += gap / counts[c]
        scatter += torch.outer(gap, row - means[c])
    return means, scatter, torch.tensor(counts).double()


# --- random layers and the scatter of classes ------------------------------------------------------------------------------


def test_fourier_features_by_hand_and_near_their_kernel():
    x, _ = data_of(0, n=20)
    layer = Fourier(6, 3, key=5)
    for i, j in itertools.product(range(2), range(3)):
        angle = sum(float(np.sqrt(2 * 0.1) * x[i, d] * layer.weight_DM[d, j]) for d in range(6)) + float(layer.phase_M[j])
        assert float(layer(x, 0.1)[i, j]) == pytest.approx(np.sqrt(2 / 3) * np.cos(angle), abs=1e-12)
    kernel, errors = torch.exp(-0.1 * torch.cdist(x, x).square()), []
    for width in (100, 1600, 25_600):
        z = Fourier(6, width, key=5)(x, 0.1)
        errors.append(float((z @ z.T - kernel).square().mean().sqrt()) * width**0.5)
    assert max(errors) < 1.5 and min(errors) > 0.2, "the error falls as M to the power of -1/2"
    assert torch.equal(Fourier(6, 3, key=5).weight_DM, layer.weight_DM)
    assert not torch.equal(Fourier(6, 3, key=6).weight_DM, layer.weight_DM)


def test_the_layer_of_a_linear_starts_as_torchs():
    found, theirs = uniform(16, 4000, key=1), torch.nn.Linear(16, 4000, bias=False).weight.detach().T
    assert float(found.abs().max()) <= 0.25 and float(found.abs().max()) > 0.2499
    assert float(found.std()) == pytest.approx(float(theirs.std()), rel=0.02) and abs(float(found.mean())) < 0.002


@pytest.mark.parametrize(("width", "rows"), [(120, None), (120, 30), (6, None)])
@pytest.mark.parametrize("size", [1, 7, 80])
def test_scatter_from_sums_is_welfords(width, rows, size):
    """A root, a root that becomes sums at 30 rows, sums: with far means, in any order, in batches of any size."""
    x, y = data_of(3)
    z = x + 40 if width == 6 else Fourier(6, width, key=1)(x, 0.05)
    means, scatter, counts = moments(z, y)
    root, order = RidgeRoot(width, rows=rows), permuted(size)
    for zs, ys in zip(z[order].split(size), y[order].split(size), strict=True):
        root.update(zs, ys, 4)
    found = WithinClass(root, counts)
    assert (found.root_RM is None) == (root.sums is not None) == (width == 6 or rows == 30)
    own = found.gram if found.root_RM is None else found.root_RM.T @ found.root_RM
    torch.testing.assert_close(own, scatter, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.means_KM, means, rtol=1e-9, atol=1e-9)
    rho, mean = found.oas()
    assert rho == pytest.approx(OAS(assume_centered=True).fit((z - means[y]).numpy()).shrinkage_, rel=1e-9)
    assert mean == pytest.approx(float(scatter.trace()) / 80 / width, rel=1e-9)
    eye = torch.eye(width).double()
    torch.testing.assert_close(found.solve(0.3, 0.01), means @ torch.linalg.inv(0.3 * scatter + 0.01 * eye), **CLOSE)
    assert torch.equal(found.solve(0.0, 0.5), found.means_KM / 0.5)
    values, vectors = torch.linalg.eigh(scatter)
    naive = sum(
        torch.outer(means @ v, v) / value for value, v in zip(values, vectors.T, strict=True) if value > 1e-3 * values.max()
    )
    torch.testing.assert_close(found.pseudo_solve(1e-3), naive, **CLOSE)


def test_scatter_of_single_samples_is_nothing():
    root = RidgeRoot(50)
    root.update(data_of(1, n=3)[0] @ torch.ones(6, 50).double(), torch.arange(3), 4)
    found = WithinClass(root, torch.tensor([1.0, 1, 1, 0]))
    assert float(found.gram.abs().max()) < 1e-20
    assert (found.means_KM[3] == 0).all() and torch.isfinite(found.solve(0.0, 1e-4)).all()


def test_a_root_takes_targets_as_it_takes_labels():
    x, y = data_of(2)
    for width in (200, 6):
        z = x if width == 6 else Fourier(6, width, key=1)(x, 0.05)
        labels, dense = RidgeRoot(width), RidgeRoot(width)
        for part in (slice(0, 30), slice(30, 80)):
            labels.update(z[part], y[part], 4)
            dense.update(z[part], torch.eye(4).double()[y[part]], 4)
        assert torch.equal(labels.solve(0.1), dense.solve(0.1))


# --- RanDumb ---------------------------------------------------------------------------------------------------------------


def naive_randumb(z, y, shrinkage, priors, classes=4):
    means, scatter, counts = moments(z, y, classes)
    n, width = len(z), z.shape[1]
    covariance = scatter / n
    mu, alpha = float(covariance.trace()) / width, float((covariance**2).mean())
    rho = min(1.0, (alpha + mu**2) / ((n + 1) * (alpha - mu**2 / width)))
    eye = torch.eye(width).double()
    shrunk = (1 - shrinkage) * ((1 - rho) * covariance + rho * mu * eye) + shrinkage * eye
    w = torch.stack([torch.linalg.solve(shrunk, means[c]) for c in range(classes)])
    b = torch.stack([-0.5 * means[c] @ w[c] + (torch.log(counts[c] / n) if priors else 0) for c in range(classes)])
    return w, b


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize(("projection", "size"), [(400, 80), (400, 9), (40, 9), (0, 1), (0, 80)])
def test_randumb_is_the_batch_formula_in_any_order_and_split(variant, projection, size):
    x, y = data_of(7)
    gamma = 0.02 if projection else None
    order = permuted(size + projection)
    found = learned(RanDumb, x[order], y[order], size, variant=variant, projection=projection, gamma=gamma)
    z = found.layer(x, 0.02) if projection else x
    w, b = naive_randumb(z, y, 1e-4, variant == "paper")
    torch.testing.assert_close(found.weights()[0], w, **CLOSE)
    torch.testing.assert_close(found.weights()[1], b, **CLOSE)
    torch.testing.assert_close(found.predict(x), (z @ w.T + b).float(), rtol=1e-5, atol=1e-4)


def test_randumb_takes_gamma_from_the_first_experience():
    t = online("learner=randumb", "learner.projection=300")
    own, runtime, pipeline = t.start()
    first = t.learn(own, runtime, pipeline, 0)
    again, *_ = t.start()
    f = torch.cat([again.model.features(b) for b in t.open(0, pipeline).train.test_batches(50)]).double().numpy()
    assert own.gamma == pytest.approx(1 / (f.shape[1] * f.var()), rel=1e-9) and len(first.train) == len(f)
    t.learn(own, runtime, pipeline, 1)
    given = online("learner=randumb", "learner.projection=300", f"learner.gamma={own.gamma}", "learner.batch_size=5")
    streaming, runtime, pipeline = given.start()
    for i in range(2):
        given.learn(streaming, runtime, pipeline, i)
    assert streaming.streaming and not own.streaming and runtime.used_new == runtime.used_visits > 0
    for a, b in zip(own.weights(), streaming.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert [declared(RanDumb, o).anytime for o in ({}, {"gamma": 0.1}, {"projection": 0})] == [False, True, True]
    resumed, *_ = t.start()
    resumed.load_state_dict(detached(own.state_dict()))
    assert resumed.gamma == own.gamma and fingerprint(resumed.state_dict()) == fingerprint(own.state_dict())


def test_randumb_with_full_shrinkage_is_the_nearest_mean_and_unseen_classes_never_win():
    x, y = data_of(2, classes=3)
    found = learned(RanDumb, x, y, 10, variant="official", projection=0, shrinkage=1.0)
    assert (found.predict(x)[:, 3] == LOWEST).all()
    assert torch.equal(found.predict(x).argmax(1), torch.cdist(x, torch.stack([x[y == c].mean(0) for c in range(3)])).argmin(1))
    one = learned(RanDumb, x[:1], y[:1], 1, projection=0)
    assert torch.isfinite(one.predict(x)).all() and (one.predict(x).argmax(1) == y[0]).all()


# --- KLDA ------------------------------------------------------------------------------------------------------------------


def naive_klda(z, y, divided, classes=4):
    """-(z - mu_c)^T C^+ (z - mu_c), sample by sample."""
    means, scatter, _ = moments(z, y, classes)
    inverse = torch.linalg.pinv(scatter / (len(z) if divided else 1), rtol=len(scatter) * FLOAT32, hermitian=True)
    return torch.stack([torch.stack([-(row - mean) @ inverse @ (row - mean) for mean in means]) for row in z])


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize(("projection", "size"), [(400, 80), (400, 9), (24, 80), (24, 9), (24, 1)])
def test_klda_is_the_batch_formula_in_any_order_and_split(variant, projection, size):
    x, y = data_of(5)
    order = permuted(size)
    found = learned(Klda, x[order], y[order], size, variant=variant, projection=projection, sigma=0.05)
    z = found.layers[0](x, 0.05)
    naive = naive_klda(z, y, variant == "paper")
    ((w, b),) = found.weights()
    own = z @ w.T + b
    scale = float(naive.abs().max())
    torch.testing.assert_close(own - own.mean(1, keepdim=True), naive - naive.mean(1, keepdim=True), rtol=0, atol=1e-8 * scale)
    assert torch.equal(found.predict(x).argmax(1), naive.argmax(1))


def sklearns(z, y):
    """Classes by linear discriminant analysis with equal shares (its own priors would weight the covariances too)."""
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(z.numpy(), y.numpy())
    return torch.from_numpy(theirs.decision_function(z.numpy()) - np.log(theirs.priors_)).argmax(1)


def test_klda_of_full_rank_is_sklearns_discriminant_analysis():
    x, y = data_of(11, n=300)
    found = learned(Klda, x, y, 50, projection=16, sigma=0.2)
    assert torch.equal(found.predict(x).argmax(1), sklearns(found.layers[0](x, 0.2), y))


def test_klda_of_a_wide_kernel_is_linear_discriminant_analysis():
    x, y = data_of(12, n=300)
    found = learned(Klda, x, y, 50, projection=200, sigma=1e-7)
    assert (found.predict(x).argmax(1) == sklearns(x, y)).float().mean() > 0.99


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_klda_e_is_the_mean_of_its_models_probabilities(variant):
    x, y = data_of(6, n=500, classes=2)
    found = learned(Klda, x, y, 100, classes=3, variant=variant, projection=20, sigma=0.05, models=3)
    naive = []
    for layer in found.layers:
        z = layer(x, 0.05)
        naive.append(naive_klda(z, y, variant == "paper", 2).softmax(1))
    torch.testing.assert_close(found.predict(x)[:, :2], (sum(naive) / 3).float(), rtol=1e-5, atol=1e-6)
    assert (found.predict(x)[:, 2] == LOWEST).all()
    best = found.predict(x).amax(1)
    assert bool(best.max() < 0.53) == (variant == "official"), "without the division probabilities are nearly flat"
    assert len({fingerprint(sums.state_dict()) for sums in found.sums}) == 3, "each model has a layer of its own"


# --- ACIL, DS-AL -----------------------------------------------------------------------------------------------------------


def grown(w, k):
    return torch.cat([w, torch.zeros(len(w), k - w.shape[1]).double()], 1)


def recursion(p, w, h, target):
    """One step of recursive least squares -> P, W."""
    gain = torch.linalg.inv(torch.eye(len(h)).double() + h @ p @ h.T)
    p = p - p @ h.T @ gain @ h @ p
    return p, w + p @ h.T @ (target - h @ w)


@pytest.mark.parametrize(("projection", "size"), [(300, 11), (30, 11), (30, 1), (300, 80)])
def test_acil_is_the_recursion_and_the_batch_solution(projection, size):
    """Batches of mixed labels; classes 2 and 3 come first in the middle; all of them come back."""
    x, y = data_of(8)
    y[:30] %= 2
    found = Acil(Flat(), Runtime(3, torch.device("cpu")), projection=projection, ridge=0.1)
    h = (x @ found.layer_DM).clamp_min(0)
    p, w = torch.eye(projection).double() / 0.1, torch.zeros(projection, 0).double()
    for hs, xs, ys in zip(h.split(size), x.split(size), y.split(size), strict=True):
        seen = max(w.shape[1], int(ys.max()) + 1)
        p, w = recursion(p, grown(w, seen), hs, torch.eye(seen).double()[ys])
        found.update(xs, ys, seen)
        torch.testing.assert_close(found.readout(), w, **CLOSE)
    batch = torch.linalg.solve(h.T @ h + 0.1 * torch.eye(projection).double(), h.T @ torch.eye(4).double()[y])
    torch.testing.assert_close(found.readout(), batch, **CLOSE)
    order = permuted(1)
    other = learned(Acil, x[order], y[order], 7, projection=projection)
    other.layer_DM.copy_(found.layer_DM)
    assert (other.sums.sums is None) == (projection == 300 and projection // 4 > 80)
    torch.testing.assert_close(found.predict(x), (h @ batch).float(), rtol=1e-5, atol=1e-6)


def test_acil_in_any_order_and_split():
    x, y = data_of(9)
    first = learned(Acil, x, y, 80, projection=500)
    for size, projection in itertools.product((1, 13), (500, 100)):
        order = permuted(size)
        own = learned(Acil, x[order], y[order], size, projection=projection)
        once = first if projection == 500 else learned(Acil, x, y, 80, projection=projection)
        torch.testing.assert_close(own.readout(), once.readout(), **CLOSE)
    unseen = learned(Acil, x, y % 3, 10, projection=100)
    assert (unseen.predict(x)[:, 3] == LOWEST).all() and (unseen.predict(x)[:, :3] > LOWEST / 2).all()


@pytest.mark.parametrize("projection", [300, 20])
def test_dsal_is_two_recursions_with_cleansed_labels(projection):
    """Experiences of 2, 2 and no new classes, one batch each."""
    x, y = data_of(10)
    parts = [(slice(0, 30), 2, 2), (slice(30, 60), 4, 2), (slice(60, 80), 4, 0)]
    y[:30] %= 2
    options = {"projection": projection, "ridge": 0.2, "compensation": 0.7, "compensation_ridge": 0.3}
    found = Dsal(Flat(), Runtime(0, torch.device("cpu")), **options)
    eye, empty = torch.eye(projection).double(), torch.zeros(projection, 0).double()
    p, w, p_rest, w_rest = eye / 0.2, empty, eye / 0.3, empty
    for rows, seen, new in parts:
        h, t = (x[rows] @ found.layer_DM).clamp_min(0), (x[rows] @ found.layer_DM).tanh()
        target = torch.eye(seen).double()[y[rows]]
        p, w = recursion(p, grown(w, seen), h, target)
        error = target - h @ w
        for c in range(seen):
            if c < seen - new:
                error[:, c] = 0
        p_rest, w_rest = recursion(p_rest, grown(w_rest, seen), t, error)
        found.update(x[rows], y[rows], seen, new)
        torch.testing.assert_close(found.main_MK, w, **CLOSE)
        torch.testing.assert_close(found.rest_MK, w_rest, **CLOSE)
    scores = (x @ found.layer_DM).clamp_min(0) @ w + 0.7 * (x @ found.layer_DM).tanh() @ w_rest
    torch.testing.assert_close(found.predict(x), scores.float(), rtol=1e-5, atol=1e-5)
    assert float(w_rest.abs().max()) > 1e-3, "the compensation counts"


def test_dsal_without_compensation_is_acil_and_ignores_the_order_inside_an_experience(monkeypatch):
    monkeypatch.setattr("clbench.learners.dsal.ROWS", 7)
    x, y = data_of(13)
    y[:40] %= 2
    found = []
    for order in (torch.arange(40), permuted(4, 40)):
        own = Dsal(Flat(), Runtime(0, torch.device("cpu")), projection=60, compensation=0.0 if not found else 0.6)
        own.update(x[:40][order], y[:40][order], 2, 2)
        own.update(x[40:][order], y[40:][order], 4, 2)
        found.append(own)
    torch.testing.assert_close(found[0].rest_MK, found[1].rest_MK, **CLOSE)
    acil = learned(Acil, x, y, 80, projection=60)
    torch.testing.assert_close(found[0].predict(x), acil.predict(x), rtol=1e-5, atol=1e-6)


# --- all of them -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RanDumb, Klda, Acil, Dsal])
def test_nan_features_are_named(kind):
    x, y = data_of(1)
    x[3, 2] = float("nan")
    own = kind(Flat(), Runtime(0, torch.device("cpu")), projection=40)
    own.gamma = 0.1
    with pytest.raises(FloatingPointError, match="features are NaN"):
        own.update(x, y, 4, *([4] if kind is Dsal else []))


def test_features_that_do_not_vary_have_no_gamma(monkeypatch):
    own = RanDumb(Flat(), Runtime(0, torch.device("cpu")), projection=40)
    monkeypatch.setattr("clbench.learners.randumb.extract", lambda *_: (torch.ones(5, 6), torch.zeros(5, dtype=torch.int64)))
    with pytest.raises(UserError, match=r"set learner\.gamma"):
        own.learn(types.SimpleNamespace(train=None, num_seen=1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("randumb learner.variant=code", "learner.variant=code"),
        ("randumb learner.projection=-1", "learner.projection=-1"),
        ("randumb learner.gamma=0", "learner.gamma=0"),
        ("randumb learner.gamma=1 learner.projection=0", "learner.gamma has no effect"),
        ("randumb learner.shrinkage=0", "learner.shrinkage must be above 0"),
        ("klda learner.variant=code", "learner.variant=code"),
        ("klda learner.projection=0", "learner.projection=0"),
        ("klda learner.models=0", "learner.models=0"),
        ("klda learner.sigma=-1", "learner.sigma must be above 0"),
        ("acil learner.ridge=0", "learner.ridge=0"),
        ("acil learner.projection=0", "learner.projection=0"),
        ("dsal learner.compensation=-1", "learner.compensation must be at least 0"),
        ("dsal learner.compensation_ridge=0", "learner.compensation_ridge=0"),
    ],
)
def test_bad_options_are_one_line(words, line):
    name, *options = words.split()
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as caught:
        online(f"learner={name}", *options).start()
    assert "\n" not in str(caught.value)
