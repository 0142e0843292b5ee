"""Gaussians, ridge regression, FeCAM and SEED: every formula against a naive version on small numbers."""

import math

import numpy as np
import pytest
import torch
from conftest import NARROW
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError
from clbench.learners import fecam, seed_ensemble
from clbench.models.heads import LinearHead
from clbench.streams.images.data import open_experience
from clbench.testing.contract import Trial, check_learner, repeated_stream, small_stream
from clbench.training import cholesky, ridge
from clbench.training.fit import fit
from clbench.training.gaussians import (
    ClassGaussians,
    GaussianBatches,
    align,
    alignment,
    class_rows,
    kmeans,
    shrunken_means,
)
from clbench.training.runtime import Runtime
from clbench.training.state import detached, num_bytes

CNN = ("model=resnet32", "learner.form=cnn")
VARIANTS = [
    ("fecam", "learner.variant=pilot"),
    ("fecam", *CNN),
    ("fecam", *CNN, "learner.train_first=true"),
    ("seed_ensemble", "learner.experts=2", "learner.alpha=0.5"),
]


@pytest.mark.parametrize("words", VARIANTS, ids=" ".join)
def test_contract(words):
    (config,) = compose([f"learner={words[0]}", *([] if CNN[0] in words else NARROW), *words[1:]])
    assert [f"{check}: {message}" for check, ok, message in check_learner(config) if not ok] == []


def trial(*words, scenario=None, **stream):
    (config,) = compose(list(words))
    return Trial(config, scenario or small_stream(**stream), Capabilities())


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


# Gaussians


def test_rows_of_classes():
    y = torch.tensor([2, 0, 5, 2, 0, 2])
    rows = {c: r.tolist() for c, r in class_rows(y, (5, 2, 1)).items()}
    assert rows == {5: [2], 2: [0, 3, 5], 1: []}


def test_diagonal_statistics_and_moments():
    f = normal(300, 3) * torch.tensor([0.5, 1.0, 3.0]) + 2
    g = ClassGaussians(1e-3, kind="diagonal")
    g.add(f)
    g.add(f[:1])
    torch.testing.assert_close(g.var_KD[0], f.var(0) + 1e-3, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(g.var_KD[1], torch.full((3,), 1e-3))
    x, y = g.sample(20000, torch.tensor([0.5, 1.0]), rng())
    torch.testing.assert_close(x[y == 0].mean(0), 0.5 * f.mean(0), rtol=0, atol=0.08)
    torch.testing.assert_close(x[y == 0].std(0), f.std(0), rtol=0.03, atol=0)
    correlations = torch.corrcoef(x[y == 0].T)
    assert (correlations - torch.eye(3)).abs().max() < 0.03
    assert g.state_dict().keys() == {"mean_KD", "var_KD"}


def clustered():
    """40 points around (0, 0), 20 around (10, 0) with another spread, one at (0, 30)."""
    return torch.cat([normal(40, 2), normal(20, 2, seed=1) * 0.1 + torch.tensor([10.0, 0.0]), torch.tensor([[0.0, 30.0]])])


def test_multi_centroid_statistics_and_moments():
    f = clustered()
    g = ClassGaussians(1e-4, kind="multi-centroid", centroids=3)
    g.add(f)
    order = g.members_KC[0].argsort(descending=True)
    assert g.members_KC[0][order].tolist() == [40, 20, 1]
    for c, part in zip(order, (f[:40], f[40:60], f[60:]), strict=True):
        torch.testing.assert_close(g.centre_KCD[0, c], part.mean(0))
        torch.testing.assert_close(g.var_KCD[0, c], part.var(0, correction=0) + 1e-4)
    torch.testing.assert_close(g.mean_KD[0], f.mean(0))
    x, _ = g.sample(30000, torch.ones(1), rng())
    near = torch.cdist(x, torch.stack([f[:40].mean(0), f[40:60].mean(0), f[60]])).argmin(1)
    assert (near == 2).sum() == 0, "a centroid of one image was sampled"
    assert (near == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(x[near == 0].std(0), f[:40].std(0, correction=0), rtol=0.03, atol=0)
    torch.testing.assert_close(x[near == 1].mean(0), f[40:60].mean(0), rtol=0, atol=0.01)
    x, _ = g.sample(5000, torch.tensor([0.5]), rng())
    torch.testing.assert_close(x.mean(0), 0.25 * (f[:40].mean(0) + f[40:60].mean(0)), rtol=0, atol=0.15)


def test_multi_centroid_of_few_images():
    g = ClassGaussians(1e-4, kind="multi-centroid", centroids=4)
    g.add(torch.ones(1, 3))
    g.add(torch.tensor([[1.0, 0, 0], [0, 2, 0]]))
    g.add(torch.ones(6, 3))
    assert (g.members_KC > 0).sum(1).tolist() == [1, 2, 1] and g.centres().shape == (4, 3)
    x, y = g.sample(200, torch.ones(3), rng())
    assert torch.isfinite(x).all() and (x[y == 0] - 1).abs().max() < 0.06
    assert {tuple(r) for r in x[y == 1].round().abs().tolist()} == {(1.0, 0.0, 0.0), (0.0, 2.0, 0.0)}


@pytest.mark.parametrize("kind", ["full", "diagonal", "multi-centroid"])
def test_state_of_gaussians(kind):
    one, two = (ClassGaussians(1e-4, kind=kind, centroids=3, seed=4) for _ in range(2))
    one.add(clustered())
    one.add(clustered() + 5)
    two.load_state_dict(detached(one.state_dict()))
    for g in (one, two):
        g.add(clustered() * 2)
    assert len(one) == len(two) == 3
    a, b = (g.sample(7, torch.ones(3), rng())[0] for g in (one, two))
    assert torch.equal(a, b) and a.shape == (21, 2)


def test_kmeans_is_seeded_and_leaves_the_global_generators_alone():
    np.random.seed(1)  # noqa: NPY002 the global generator is what is checked
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    f = normal(50, 4).double()
    assert torch.equal(kmeans(f, 5, 11), kmeans(f, 5, 11)) and kmeans(f, 5, 11).unique().tolist() == [0, 1, 2, 3, 4]
    assert not torch.equal(kmeans(f, 5, 11), kmeans(f, 5, 12))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_unknown_kinds_are_refused():
    with pytest.raises(UserError, match="unknown kind 'round'"):
        ClassGaussians(kind="round")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1 centroid"):
        ClassGaussians(kind="multi-centroid", centroids=0)


@pytest.mark.parametrize("kind", ["full", "diagonal", "multi-centroid"])
def test_classes_come_one_by_one_or_together(kind):
    """The same statistics to the bit; factors of covariances too, where some were computed before the others came."""
    parts = [torch.randn(12, 6, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    single, at_once = (ClassGaussians(1e-3, kind=kind, centroids=3, seed=2) for _ in range(2))
    for part in parts:
        single.add(part)
        single.add()
        if kind == "full":
            assert len(single.cholesky()) == len(single)
    at_once.add(*parts)
    for name, value in at_once.state_dict().items():
        assert torch.equal(value, single.state_dict()[name]), name
    if kind == "full":
        assert torch.equal(single.cholesky(), at_once.cholesky())


def test_samples_shrink_with_their_age():
    g = ClassGaussians(1e-12)
    g.add(torch.full((1, 2), 4.0))
    g.add(torch.full((1, 2), 8.0))
    batches = GaussianBatches(g, torch.ones(2), 3000, 1, 5, torch.tensor([3, 0]), (0.01, 0.03))
    x, y = (torch.cat(parts) for parts in zip(batches(0), batches(1), strict=True))
    rho = (4.0 / x[y == 0][:, 0] - 1) / 3
    assert rho.min() > 0.0099 and rho.max() < 0.0301 and rho.mean().item() == pytest.approx(0.02, abs=2e-4)
    assert rho.std().item() == pytest.approx(0.02 / math.sqrt(12), rel=0.05)
    torch.testing.assert_close(x[y == 0][:, 0], x[y == 0][:, 1], rtol=1e-4, atol=0)
    torch.testing.assert_close(x[y == 1], torch.full((3000, 2), 8.0), rtol=1e-4, atol=0)
    again = GaussianBatches(g, torch.ones(2), 3000, 1, 5, torch.tensor([3, 0]), (0.01, 0.03))
    assert torch.equal(again(1)[0], batches(1)[0]), "a batch depends on those before it"


def test_mean_factors():
    torch.testing.assert_close(shrunken_means([0, 0, 1], 1), torch.tensor([0.95, 0.95, 1.0]))


def two_heads():
    head, g = LinearHead(3), ClassGaussians()
    head.grow(2, rng())
    head.grow(1, rng(1))
    for i in range(3):
        g.add(normal(30, 3, seed=i) + 3 * F.one_hot(torch.tensor(i), 3))
    return head, g, Runtime(0, torch.device("cpu"))


class Owner:
    def __init__(self, head):
        self.head = head

    def state_dict(self):
        return self.head.state_dict()

    def load_state_dict(self, state):
        self.head.load_state_dict(state)


def test_options_of_alignment():
    head, g, runtime = two_heads()
    x, y = normal(5, 3), torch.tensor([0, 1, 2, 2, 0])
    _, loss, batches, recipe = alignment(runtime, head, g, samples=10, epochs=4, multiplier=20.0, lr=0.3)
    torch.testing.assert_close(loss((x, y)), F.cross_entropy(20 * head(x), y))
    assert batches.steps == 4 * 3 and len(batches(0)[0]) == 10 and recipe.momentum == 0.9
    z = head(x)
    norms = (z[:, :2].norm(dim=1) + z[:, 2:].norm(dim=1)) / 2
    _, loss, _, _ = alignment(runtime, head, g, temperature=0.1, widths=head.widths)
    torch.testing.assert_close(loss((x, y)), F.cross_entropy(z / norms[:, None] / 0.1, y), rtol=1e-4, atol=1e-4)
    _, _, halved, _ = alignment(runtime, head, g, samples=2000, mean_scale_K=torch.tensor([0.5, 1, 1]))
    x, y = (torch.cat(parts) for parts in zip(*(halved(i) for i in range(3)), strict=True))
    torch.testing.assert_close(x[y == 0].mean(0), 0.5 * g.mean_KD[0], rtol=0, atol=0.1)


def test_alignment_learns_and_is_the_fit_it_prepares():
    (head, g, runtime), (other, _, _) = two_heads(), two_heads()
    log = align(runtime, Owner(head), head, g, samples=64, lr=0.1)
    x, y = g.sample(200, torch.ones(3), rng(9))
    assert (head(x).argmax(1) == y).float().mean() > 0.9 and log["align_steps"] == 15
    joined = other.joined()
    fit(runtime, "align", Owner(joined), *alignment(runtime, joined, g, samples=64, lr=0.1))
    other.take(joined)
    assert torch.equal(head.blocks[0].weight, other.blocks[0].weight)
    apart, _, _ = two_heads()  # block by block: products of other shapes, whose last bits depend on the processor
    fit(runtime, "align", Owner(apart), *alignment(runtime, apart, g, samples=64, lr=0.1))
    torch.testing.assert_close(head.blocks[0].weight, apart.blocks[0].weight, rtol=1e-5, atol=1e-6)


# Ridge regression


def naive_ridge(h, y, k, lam):
    h, target = h.double().numpy(), np.eye(k)[y.numpy()]
    return torch.from_numpy(np.linalg.inv(h.T @ h + lam * np.eye(h.shape[1])) @ h.T @ target)


def test_ridge_sums_in_any_order_are_the_batch_solution(monkeypatch):
    monkeypatch.setattr(ridge, "ROWS", 7)
    h, y = normal(60, 8), torch.randint(5, (60,), generator=rng())
    order = y.argsort()
    sums = ridge.RidgeSums(8)
    for part in (order[:25], order[25:]):
        sums.update(h[part], y[part], int(y[part].max()) + 1)
    assert sums.cross_MK.shape == (8, 5) and sums.gram_MM.dtype == torch.float64
    torch.testing.assert_close(sums.solve(0.7), naive_ridge(h, y, 5, 0.7))
    again = ridge.RidgeSums(8)
    again.load_state_dict(detached(sums.state_dict()))
    assert torch.equal(again.solve(0.7), sums.solve(0.7))


def test_ridge_of_an_indefinite_sum():
    h = normal(3, 6).double()
    gram, cross = h.T @ h, h.T @ torch.eye(3, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -1e-6  # rounding took it below 0
    w = ridge.solve((vectors * values) @ vectors.T, cross, 1e-8)
    assert torch.isfinite(w).all()
    torch.testing.assert_close(h @ w, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    w = ridge.solve(torch.diag(torch.tensor([1.0, -1e-6])), torch.eye(2), 1e-4)
    torch.testing.assert_close(w, torch.diag(torch.tensor([1 / 1.0001, 1 / (1e-4 - 1e-6)])))
    w = ridge.solve(torch.diag(torch.tensor([1.0, -1e-4])), torch.eye(2), 1e-6)
    torch.testing.assert_close(w, torch.diag(torch.tensor([1 / 1.000001, 1e6])))
    with pytest.raises(UserError, match="must be above 0"):
        ridge.solve(gram, cross, 0.0)


@pytest.mark.parametrize(("n", "m"), [(50, 12), (30, 70)], ids=["primal", "dual"])
def test_search_of_the_ridge_is_the_naive_one(n, m):
    h, y = normal(n, m), torch.randint(3, (n,), generator=rng())
    h[:, 0] += y
    fitted = int(0.8 * n)
    errors = ridge.validation_errors(h, y, 3, fitted)
    assert len(errors) == 17 and ridge.CANDIDATES[0] == pytest.approx(1e-8) and ridge.CANDIDATES[-1] == pytest.approx(1e8)
    target = F.one_hot(y[fitted:], 3).double()
    for lam, error in zip(ridge.CANDIDATES, errors, strict=True):
        naive = (h[fitted:].double() @ naive_ridge(h[:fitted], y[:fitted], 3, lam) - target).square().mean()
        torch.testing.assert_close(error, naive, rtol=1e-3 if lam < 1e-5 else 1e-7, atol=1e-10)
    wider = ridge.validation_errors(h, y, 30, fitted)
    torch.testing.assert_close(wider * 10, errors)  # columns of other classes only scale the error


def test_the_search_reads_a_block_of_samples_at_a_time(monkeypatch):
    monkeypatch.setattr(ridge, "ROWS", 8)
    f, y, w = normal(90, 5).double(), torch.randint(3, (90,), generator=rng()), normal(5, 12, seed=3).double()
    seen = []

    def expand(part):
        seen.append(len(part))
        return torch.relu(part @ w)

    errors = ridge.validation_errors(f, y, 3, 70, expand=expand)
    assert max(seen) == 8 and sum(seen) == 91, "each sample once, and one for the width"
    torch.testing.assert_close(errors, ridge.validation_errors(torch.relu(f @ w), y, 3, 70), rtol=1e-6, atol=1e-12)
    assert ridge.choose_ridge(f, y, 3, 5, expand=expand) == ridge.choose_ridge(torch.relu(f @ w), y, 3, 5)


def signed(rows, by=None):
    """Rows whose leading number in `by` (themselves) is positive."""
    by = rows if by is None else by
    return rows * by.diagonal().sign()[:, None]


@pytest.mark.parametrize("parts", [(7, 5, 12), (24,), (30, 1, 29), (1, 1, 38, 20)])
def test_a_root_is_the_ridge_of_all_samples(parts, monkeypatch):
    """Fewer samples than the 40 features, and more, in any parts: the solution in one piece, and nothing of a sample."""
    monkeypatch.setattr(ridge, "ROWS", 8)
    count = sum(parts)
    f, y, w = normal(count, 6).double(), torch.arange(count) % 4, normal(6, 40, seed=5).double()
    widest, root = [], ridge.RidgeRoot(40)

    def expand(part):
        widest.append(len(part))
        return torch.relu(part @ w)

    for a, b in zip(np.cumsum((0, *parts)), np.cumsum(parts), strict=False):
        root.update(f[a:b], y[a:b], int(y[:b].max()) + 1, expand)
    h = torch.relu(f @ w)
    for lam in (1e-2, 1.0, 1e4):
        torch.testing.assert_close(root.solve(lam), naive_ridge(h, y, 4, lam), rtol=1e-8, atol=1e-10)
    assert (root.sums is None) == (count < 40) and max(widest) < 40
    if count < 40:
        torch.testing.assert_close(root.root_RM.T @ root.root_RM, h.double().T @ h.double(), rtol=1e-12, atol=1e-12)
        target = F.one_hot(y, 4).double()
        torch.testing.assert_close(root.root_RM.T @ root.cross_RK, h.double().T @ target, rtol=1e-12, atol=1e-12)
        other, order = ridge.RidgeRoot(40), torch.randperm(count, generator=rng(9))
        other.update(f[order], y[order], 4, expand)
        torch.testing.assert_close(signed(other.root_RM), signed(root.root_RM), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(
            signed(other.cross_RK, other.root_RM), signed(root.cross_RK, root.root_RM), rtol=1e-6, atol=1e-8
        )
        alike = F.normalize(root.root_RM, dim=1) @ F.normalize(h.double(), dim=1).T
        assert alike.abs().max() < 1 - 1e-3, "a row of the state is a sample"


def test_the_state_of_a_ridge_does_not_grow_beyond_its_sums():
    f, y, sizes = normal(300, 20), torch.arange(300) % 4, []
    root = ridge.RidgeRoot(20)
    for a in range(0, 300, 5):
        root.update(f[a : a + 5], y[a : a + 5], 4)
        sizes.append(num_bytes(root.state_dict()))
    assert max(sizes) == 8 * (20 * 20 + 20 * 4) and len(set(sizes[3:])) == 1


def test_choice_of_the_ridge():
    y = torch.randint(3, (200,), generator=rng())
    noise = normal(200, 40)
    assert ridge.choose_ridge(noise, y, 3, key=1) >= 10.0, "pure noise asks for a large ridge"
    clean = F.one_hot(y, 3) + 1e-3 * noise[:, :3]
    assert ridge.choose_ridge(clean, y, 3, key=1) <= 1e-2, "clean features ask for none"
    assert ridge.choose_ridge(noise[:1], y[:1], 3, key=1) == 1.0, "one sample cannot be split"


# FeCAM


def spread(n=40, d=5):
    return normal(n, d) @ (torch.eye(d) + 0.5 * normal(d, d, seed=1)) + normal(d, seed=2)


def test_shrinkage_by_hand():
    cov = torch.tensor([[1.0, 0.5, 0.0], [0.5, 2.0, 0.0], [0.0, 0.0, 3.0]])  # V1 = 2, V2 = 0.5 over the two that are not 0
    expected = torch.tensor([[3.0, 1.0, 0.5], [1.0, 4.0, 0.5], [0.5, 0.5, 5.0]])
    torch.testing.assert_close(fecam.shrink(cov, 1.0, 1.0), expected)
    torch.testing.assert_close(fecam.correlation(expected)[0, 1], torch.tensor(1 / math.sqrt(12)))
    assert torch.equal(fecam.correlation(expected).diagonal(), torch.ones(3))
    assert torch.equal(fecam.correlation(torch.zeros(3, 3)), torch.eye(3))
    assert torch.equal(fecam.shrink(torch.eye(3), 0.0, 5.0), torch.eye(3))


def test_distance_is_the_form_of_the_pseudo_inverse():
    x, mean = normal(6, 5), normal(3, 5, seed=3)
    matrices = [fecam.correlation(torch.cov(spread().T + i).double()) for i in range(3)]
    whiten = torch.stack([fecam.whitener(s).float() for s in matrices])
    naive = torch.stack(
        [((x - m) @ torch.linalg.pinv(s).float() * (x - m)).sum(1) for m, s in zip(mean, matrices, strict=True)]
    )
    torch.testing.assert_close(fecam.distances(x, mean, whiten), naive.T, rtol=1e-4, atol=1e-5)
    singular = torch.corrcoef(matrices[0])
    assert torch.linalg.matrix_rank(singular) == 4
    whiten = fecam.whitener(singular, singular=True)
    torch.testing.assert_close(whiten.T @ whiten, torch.linalg.pinv(singular, rtol=1e-6))
    broken = torch.eye(3, dtype=torch.float64) - 1.0 / 3 - 1e-9 * torch.eye(3)
    assert torch.isfinite(fecam.whitener(broken)).all()


def test_the_least_ridge_of_the_series():
    """[[1, 2], [2, 1]] has eigenvalues 3 and -1: of 0, 0.02, 0.2, 2, 20 the ridge 2 is the first above 1."""
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    chol, ridge_added = cholesky.repaired(matrix, "it", ridge=0.02)
    assert ridge_added == pytest.approx(2.0)
    torch.testing.assert_close(chol @ chol.T, matrix + 2 * torch.eye(2))
    healthy = torch.tensor([[4.0, 2.0], [2.0, 5.0]], dtype=torch.float64)
    chol, ridge_added = cholesky.repaired(healthy, "it", ridge=0.02)
    assert ridge_added == 0 and torch.equal(chol, torch.tensor([[2.0, 0.0], [1.0, 2.0]], dtype=torch.float64))
    assert cholesky.repaired(healthy, "it", ridge=0.02, always=True)[1] == 0.02
    _, ridge_added = cholesky.repaired(torch.diag(torch.tensor([1.0, 0.0])).double(), "it", ridge=1e-3, least=0.05)
    assert ridge_added == pytest.approx(0.1)  # 0.01 / 1.01 is below 0.05, 0.1 / 1.1 is not
    assert cholesky.repaired(torch.zeros(3, 3), "it", ridge=1e-3)[1] == 1e-3
    assert math.isfinite(cholesky.repaired(torch.full((4, 4), -1e300, dtype=torch.float64), "it", ridge=1e-8)[1])


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_numbers_that_are_none_are_named(wrong):
    f = normal(20, 3)
    f[4, 1] = wrong
    cov = torch.eye(3).double()
    cov[0, 1] = cov[1, 0] = wrong
    with pytest.raises(FloatingPointError, match="numbers of a thing are NaN or infinite"):
        cholesky.repaired(cov, "a thing", ridge=1e-6)
    for singular in (False, True):
        with pytest.raises(FloatingPointError, match="numbers of the covariance of class 7 are NaN"):
            fecam.whitener(cov, singular, "the covariance of class 7")
    with pytest.raises(FloatingPointError, match="features of class 2 are NaN or infinite"):
        seed_ensemble.gaussian(f, "class 2")
    for kind in ("full", "diagonal", "multi-centroid"):
        with pytest.raises(FloatingPointError, match="features of class 1 are NaN or infinite"):
            ClassGaussians(kind=kind).add(normal(20, 3), f)


@pytest.mark.parametrize("variant", ["official", "pilot"])
def test_fecam_stops_at_features_that_are_none(variant):
    t = trial("learner=fecam", f"learner.variant={variant}")
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    learner.scatter_KDD[1] = math.nan
    with pytest.raises(FloatingPointError, match="numbers of the covariance of class 1 after experience 0 are NaN"):
        t.scores(learner, pipeline, 0, 9)
    with torch.no_grad():
        next(learner.model.parameters()).fill_(math.nan)
    learner.model.forget()
    with pytest.raises(FloatingPointError, match="features of class 3 in experience 1 are NaN"):
        t.learn(learner, runtime, pipeline, 1)


def test_alignment_repairs_a_covariance_and_no_other():
    """Ridge 0.1, eigenvalues 3 and -1: 0.9 does not do, 9 does; the classes beside it keep their factors to the last bit."""
    made = ClassGaussians(0.1)
    made.add(spread(), spread() + 1, spread(n=30))
    alone = made.cholesky().clone()
    made = ClassGaussians(0.1)
    made.add(spread(), spread() + 1, spread(n=30))
    made.cov_KDD[1] = torch.eye(5)
    made.cov_KDD[1, :2, :2] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    chol = made.cholesky()
    assert torch.equal(chol[0], alone[0]) and torch.equal(chol[2], alone[2])
    torch.testing.assert_close(chol[1] @ chol[1].T, made.cov_KDD[1] + 9 * torch.eye(5), rtol=1e-6, atol=1e-6)


def parts_of(t, learner, pipeline, experiences=3):
    every = [open_experience(t.scenario, i, pipeline).train for i in range(experiences)]
    f = torch.cat([learner.model.features(b).detach() for data in every for b in data.test_batches(100)])
    return f, torch.cat([torch.as_tensor(data.y) for data in every])


def naive_fecam(f, y, x, k, form, gamma=1.0):
    """The authors' scripts (vit, cnn) and LAMDA-PILOT (pilot), class by class in NumPy."""
    out = []
    for c in range(k):
        own = f[y == c].double()
        own = F.normalize(own, dim=1) if form == "vit" else own
        mean, own = own.mean(0), own.sqrt() if form == "cnn" else own
        cov = np.cov(own.numpy().T)
        for _ in range({"vit": 1, "cnn": 2, "pilot": 0}[form]):
            off = cov[~np.eye(len(cov), dtype=bool)]
            v1, v2 = np.diag(cov).mean(), off[off != 0].mean() if form == "cnn" else 0.0
            cov = cov + gamma * v1 * np.eye(len(cov)) + v2 * (1 - np.eye(len(cov)))
        if form == "pilot":
            matrix = np.corrcoef(cov + 100 * np.eye(len(cov)))
        else:
            matrix = cov / np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
        point = x.double().sqrt() if form == "cnn" else x.double()
        mean = mean.sqrt() if form == "cnn" else mean
        gap = (F.normalize(point, dim=1) - (mean if form == "vit" else F.normalize(mean, dim=0))).numpy()
        out.append(((gap @ np.linalg.pinv(matrix, rcond=1e-5)) * gap).sum(1))
    return torch.from_numpy(np.stack(out, 1))


@pytest.mark.parametrize(
    ("form", "words"),
    [("vit", ()), ("cnn", CNN), ("pilot", ("learner.variant=pilot",)), ("vit", ("learner.gamma1=3.0",))],
    ids=["vit", "cnn", "pilot", "gamma"],
)
def test_fecam_is_the_naive_one(form, words):
    t = trial("learner=fecam", *words)
    learner, runtime, pipeline = t.start()
    for i in range(3):
        data = t.learn(learner, runtime, pipeline, i).train
    f, y = parts_of(t, learner, pipeline)
    x = torch.cat([learner.model.features(b).detach() for b in data.test_batches(100)])
    z = torch.cat([learner.predict(b) for b in data.test_batches(9)])
    naive = -naive_fecam(f, y, x, 6, form, 3.0 if "learner.gamma1=3.0" in words else 1.0)
    torch.testing.assert_close(z, naive.float(), rtol=1e-3, atol=1e-4)
    for c in range(6) if form != "pilot" else ():
        assert torch.equal(learner.normalised_covariance(c).diagonal(), torch.ones(f.shape[1], dtype=torch.float64))
    assert not learner.model.training and not any(p.requires_grad for p in learner.model.parameters())
    assert learner.state_dict().keys() == {"counts_K", "proto_KD", "mean_KD", "scatter_KDD"}


def test_fecam_with_much_shrinkage_is_the_nearest_mean_of_normalised_features():
    t = trial("learner=fecam", "learner.gamma1=1e9")
    learner, runtime, pipeline = t.start()
    for i in range(3):
        t.learn(learner, runtime, pipeline, i)
    f, y = parts_of(t, learner, pipeline)
    f = F.normalize(f, dim=1)
    means = torch.stack([f[y == c].mean(0) for c in range(6)])
    z = t.scores(learner, pipeline, 0, 50)
    x = torch.cat([F.normalize(learner.model.features(b), dim=1) for b, _ in open_eval_batches(t, pipeline)]).detach()
    torch.testing.assert_close(z, -torch.cdist(x, means).square(), rtol=1e-4, atol=1e-5)


def open_eval_batches(t, pipeline):
    from clbench.streams.eval_sets import open_eval

    return open_eval(t.scenario, 0, pipeline).batches(50)


@pytest.mark.parametrize("words", [(), CNN], ids=["vit", "cnn"])
def test_a_class_that_comes_back_has_the_moments_of_all_its_samples(words):
    t = trial("learner=fecam", *words, scenario=repeated_stream(2))
    learner, runtime, pipeline = t.start()
    for i in range(2):
        t.learn(learner, runtime, pipeline, i)
    f, y = parts_of(t, learner, pipeline, 2)
    raw = f[y == 1] if words else F.normalize(f[y == 1], dim=1)
    used = raw.sqrt() if words else raw
    assert learner.counts_K.tolist() == [24.0, 24.0, 24.0]
    torch.testing.assert_close(learner.proto_KD[1], raw.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(learner.scatter_KDD[1] / 23, torch.cov(used.T), rtol=1e-3, atol=1e-5)


def test_a_class_of_one_image_has_the_identity():
    t = trial("learner=fecam", limit_train=1)
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    assert torch.equal(learner.normalised_covariance(2), torch.eye(learner.model.num_features, dtype=torch.float64))
    assert torch.isfinite(t.scores(learner, pipeline, 0, 9)).all()


def test_fecam_trains_a_network_once_where_it_is_asked_to():
    t = trial("learner=fecam", *CNN, "learner.train_first=true")
    learner, runtime, pipeline = t.start()
    before = detached(learner.model.state_dict()["net.conv1.weight"])
    t.learn(learner, runtime, pipeline, 0)
    trained = detached(learner.model.state_dict())
    assert not torch.equal(trained["net.conv1.weight"], before) and learner.model.frozen
    t.learn(learner, runtime, pipeline, 1)
    assert all(torch.equal(value, trained[name]) for name, value in learner.model.state_dict().items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("learner.variant=pilot", "learner.form=cnn"), "have no effect with learner.variant=pilot"),
        (("learner.variant=pilot", "learner.gamma2=1.0"), "have no effect with learner.variant=pilot"),
        (("learner.variant=pilot", "learner.gamma1=0.0"), "must be above 0"),
        (("learner.epochs=1",), "learner.epochs has no effect with learner.train_first=false"),
    ],
)
def test_fecam_refuses_options_without_effect(words, message):
    with pytest.raises(UserError, match=message):
        trial("learner=fecam", *words).start()


def test_fecam_takes_no_roots_of_negative_features():
    t = trial("learner=fecam", "learner.form=cnn")
    learner, runtime, pipeline = t.start()
    with pytest.raises(UserError, match=r"use learner\.form=vit"):
        t.learn(learner, runtime, pipeline, 0)


# SEED


def test_gaussian_and_its_ridge():
    f = normal(200, 4) @ torch.tensor([[1.0, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0.3, 0.1]]) + 3
    mean, chol = seed_ensemble.gaussian(f)
    torch.testing.assert_close(mean, f.mean(0))
    torch.testing.assert_close(chol @ chol.T, torch.cov(f.T, correction=0), rtol=1e-4, atol=1e-4)
    flat = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # variances 1 and 0: 1e-7 is below 2 eps (1 + 1e-7), 1e-6 is not
    _, chol = seed_ensemble.gaussian(flat)
    torch.testing.assert_close((chol @ chol.T).diagonal(), torch.tensor([1.0, 1e-6]), rtol=1e-3, atol=0)
    _, chol = seed_ensemble.gaussian(torch.ones(1, 3))
    torch.testing.assert_close(chol @ chol.T, 1e-8 * torch.eye(3))


def three_gaussians():
    factors = torch.stack([torch.linalg.cholesky(torch.cov(spread(seed_d).T)) for seed_d in (20, 30, 40)])
    return normal(3, 5, seed=7), factors


def test_log_density():
    mean, chol = three_gaussians()
    x = normal(6, 5, seed=8)
    naive = torch.stack([MultivariateNormal(m, scale_tril=c).log_prob(x) for m, c in zip(mean, chol, strict=True)], dim=1)
    torch.testing.assert_close(seed_ensemble.log_density(x, mean, chol).float(), naive, rtol=1e-4, atol=1e-4)


def test_mean_divergence():
    mean, chol = three_gaussians()
    each = [MultivariateNormal(m.double(), scale_tril=c.double()) for m, c in zip(mean, chol, strict=True)]
    naive = sum(float(kl_divergence(a, b)) for a in each for b in each) / 9
    assert seed_ensemble.mean_divergence(mean, chol) == pytest.approx(naive, rel=1e-6) and naive > 0.1
    assert seed_ensemble.mean_divergence(mean[:1], chol[:1]) == pytest.approx(0.0, abs=1e-9)


def test_vote_by_hand():
    a, b = torch.tensor([[0.0, 0.0, 3 * math.log(2.0)]]), torch.tensor([[3 * math.log(3.0), 0.0]])
    z = seed_ensemble.vote([a, b], 3, 3.0)  # 1/4 1/4 1/2 and - 3/4 1/4
    torch.testing.assert_close(z, torch.tensor([[0.25, 0.5, 0.375]]))


def seed_run(*words, experiences=3, **stream):
    t = trial("learner=seed_ensemble", *words, **stream)
    learner, runtime, pipeline = t.start()
    logs, states = [], []
    for i in range(experiences):
        runtime.begin(i, None)
        logs.append(learner.learn(open_experience(t.scenario, i, pipeline)))
        states.append(detached(learner.state_dict()))
    return t, learner, pipeline, logs, states


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_seed_adds_experts_then_tunes_the_one_that_overlaps_least():
    t, learner, pipeline, logs, states = seed_run("learner.experts=2", sizes=[2, 2, 2])
    assert len(learner.experts) == 2 and [log["expert"] for log in logs[:2]] == [0.0, 1.0]
    assert same(states[0]["experts"][0], states[1]["experts"][0]), "expert 0 moved while expert 1 was trained"
    chosen = int(logs[2]["expert"])
    assert same(states[1]["experts"][1 - chosen], states[2]["experts"][1 - chosen])
    assert not same(states[1]["experts"][chosen], states[2]["experts"][chosen])
    assert [len(m) for m in learner.means] == [6, 4], "expert 1 knows no class of experience 0"
    for name in ("means", "factors"):
        assert all(torch.equal(new[: len(old)], old) for old, new in zip(states[1][name], states[2][name], strict=True))
    learner.load_state_dict(states[1])
    last = open_experience(t.scenario, 2, pipeline)
    scores = [seed_ensemble.mean_divergence(*learner._gaussians(expert, last)) for expert in learner.experts]
    assert chosen == int(np.argmax(scores)) and logs[2]["divergence"] == max(scores) and scores[0] != scores[1]


def test_seed_gaussians_see_mirror_images_and_the_tuned_network():
    t, learner, pipeline, _, _ = seed_run("learner.experts=1")
    data = open_experience(t.scenario, 2, pipeline).train
    x = torch.cat([b.x for b in data.test_batches(100)])[torch.as_tensor(data.y) == 4]
    f = learner.experts[0](torch.cat([x, x.flip(3)])).detach()
    torch.testing.assert_close(learner.means[0][4], f.mean(0), rtol=1e-4, atol=1e-4)
    cov = learner.factors[0][4] @ learner.factors[0][4].T
    torch.testing.assert_close(cov, torch.cov(f.T, correction=0), rtol=0.02, atol=1e-2)


def test_seed_fine_tuning_keeps_features_and_the_statistics_of_normalisation():
    *_, states = seed_run("learner.experts=1", "learner.alpha=1.0", "model=resnet32", experiences=2)
    assert same(states[0]["experts"][0], states[1]["experts"][0]), "distillation alone moves nothing"
    *_, states = seed_run("learner.experts=1", "learner.alpha=0.0", "model=resnet32", sizes=[3, 3], experiences=2)
    before, after = (s["experts"][0] for s in states)
    assert all(torch.equal(before[name], after[name]) for name in before if "running" in name or "num_batches" in name)
    assert not torch.equal(before["net.conv1.weight"], after["net.conv1.weight"])


def test_seed_epochs(monkeypatch):
    steps = {}
    real = seed_ensemble.fit

    def spy(runtime, name, learner, groups, loss, batches, recipe):
        steps[name] = batches.steps, recipe.weight_decay
        return real(runtime, name, learner, groups, loss, batches, recipe)

    monkeypatch.setattr(seed_ensemble, "fit", spy)
    budget = {"epochs": 4, "exemplars": 0}
    seed_run("learner.experts=1", budget=budget, experiences=2)
    assert steps == {"train": (4, 5e-4), "finetune": (2, 0.0)}
    with pytest.raises(UserError, match="experts must be at least 1"):
        trial("learner=seed_ensemble", "learner.experts=0").start()
