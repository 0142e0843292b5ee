"""Function space, exact learners and closed forms: each against a naive version written from its equations."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from test_closed_forms import CLOSE, Flat, data_of, permuted
from test_online import online
from torch.nn import functional as F

from clbench.interfaces import BudgetExceeded, UserError, declared
from clbench.learners import laftr, sfr
from clbench.learners.acil import Acil
from clbench.learners.air import Air
from clbench.learners.gkeal import Gkeal
from clbench.learners.icl import Icl
from clbench.learners.qda import Qda
from clbench.models.heads import LOWEST
from clbench.models.random_features import uniform
from clbench.models.small_networks import Mlp
from clbench.streams import rng
from clbench.training.runtime import Runtime

TEN = {"epochs": 10, "exemplars": 12}
MLP = ("model=mlp", "model.kwargs.hidden=[7,5]", "model.kwargs.img_size=4")


def made(kind, num_features=6, **options):
    return kind(Flat(num_features), Runtime(3, torch.device("cpu")), **options)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the ideal continual learner -------------------------------------------------------------------------------------------


def test_icl_keeps_every_task_of_a_shared_solution_and_is_the_projector_s_recursion():
    """Five consistent tasks of 6 rows in R^40: 10 directions stay free; theta and P of the textbook recursion."""
    truth, own = noise(0, 40, 3), made(Icl, 40, projection=0)
    theta, p, tasks = np.zeros((40, 3)), np.eye(40), []
    for t in range(5):
        x = noise(t + 1, 6, 40)
        tasks.append((x, x @ truth))
        own.update(*tasks[-1])
        q = x.numpy() @ p
        inverse = np.linalg.pinv(q, rcond=1e-10)
        theta += p @ inverse @ ((x @ truth).numpy() - x.numpy() @ theta)
        p -= inverse @ q
        np.testing.assert_allclose(own.weight_MK.numpy(), theta, atol=1e-9)
        np.testing.assert_allclose(np.eye(40) - (own.basis_MR @ own.basis_MR.T).numpy(), p, atol=1e-9)
        assert max(float((x @ own.weight_MK - y).abs().max()) for x, y in tasks) < 1e-8
    assert own.basis_MR.shape == (40, 30)
    together = np.linalg.lstsq(np.concatenate([x for x, _ in tasks]), np.concatenate([y for _, y in tasks]), rcond=None)[0]
    np.testing.assert_allclose(own.weight_MK.numpy(), together, atol=1e-9, err_msg="the joint solution of least norm")


def test_icl_keeps_the_past_and_fits_the_rest_where_tasks_conflict():
    own = made(Icl, 12, projection=0)
    x, y = noise(1, 8, 12), noise(2, 8, 2)
    own.update(x, y)
    more = torch.cat([x[:3], noise(3, 9, 12)])  # three rows whose answers are taken, nine for four directions
    wanted = noise(4, 12, 3)
    residual = own.update(more, wanted)
    assert float((x @ own.weight_MK[:, :2] - y).abs().max()) < 1e-8 and float((x @ own.weight_MK[:, 2]).abs().max()) < 1e-8
    free = torch.linalg.qr(torch.cat([x, noise(9, 4, 12)]).T).Q[:, 8:].numpy()
    for k in range(3):
        start = np.zeros(12) if k == 2 else np.linalg.lstsq(x.numpy(), y[:, k].numpy(), rcond=None)[0]
        step = np.linalg.lstsq(more.numpy() @ free, wanted[:, k].numpy() - more.numpy() @ start, rcond=None)[0]
        np.testing.assert_allclose(own.weight_MK[:, k].numpy(), start + free @ step, atol=1e-9)
    error = (more @ own.weight_MK - wanted).square().mean().sqrt()
    assert residual == pytest.approx(float(error)) and residual > 0.1
    before = own.weight_MK.clone()
    own.update(noise(5, 20, 12), noise(6, 20, 3))
    assert own.basis_MR.shape == (12, 12) and torch.equal(own.weight_MK, before), "no freedom is left"


def test_icl_with_nearly_dependent_rows():
    """A tolerance above what makes them differ spends no direction and takes no large step; below, it does both."""
    x = noise(1, 5, 20)
    close = x + 1e-5 * noise(2, 5, 20)
    sizes = {}
    for tolerance in (1e-10, 1e-3):
        own = made(Icl, 20, projection=0, tolerance=tolerance)
        own.update(x, noise(3, 5, 1))
        own.update(close, noise(4, 5, 1))
        sizes[tolerance] = (own.basis_MR.shape[1], float(own.weight_MK.norm()))
        past = float((x @ own.weight_MK - noise(3, 5, 1)).abs().max())
        assert past < 1e-8
    assert sizes[1e-10][0] == 10 and sizes[1e-3][0] == 5 and sizes[1e-10][1] > 1e3 * sizes[1e-3][1]


def test_icl_learns_a_stream_and_forgets_none_of_it():
    t = online("learner=icl", "learner.projection=200", operators=())
    learner, runtime, pipeline = t.start()
    for i in range(3):
        experience = t.open(i, pipeline)
        runtime.begin(i, len(experience.train))
        log = learner.learn(experience)
        assert log["residual"] < 1e-8
    assert log["freedom"] == 200 - sum(len(e.train) for e in t.scenario.manifest.experiences)
    for i in range(3):
        data = t.open(i, pipeline).train
        z = torch.cat([learner.predict(b) for b in data.test_batches(9)])
        assert float((z - F.one_hot(torch.as_tensor(data.y), 6)[:, : z.shape[1]]).abs().max()) < 1e-4


# --- one Gaussian a class --------------------------------------------------------------------------------------------------


def gaussians(x, y, size, **options):
    own = made(Qda, **options)
    own.grow(4)
    for xs, ys in zip(x.split(size), y.split(size), strict=True):
        own.update(xs, ys)
    return own


def log_density(x, mean, cov):
    gap = x - mean
    return -0.5 * (gap @ np.linalg.inv(cov) * gap).sum(1) - 0.5 * np.linalg.slogdet(cov)[1]


@pytest.mark.parametrize("size", [1, 7, 80])
def test_qda_is_the_batch_estimate_whatever_the_order_and_the_batches(size):
    x, y = data_of(1)
    order = permuted(size)
    own = gaussians(1000 + x[order], y[order], size)
    for c in range(4):
        rows = 1000 + x[y == c].numpy()
        np.testing.assert_allclose(own.means_KD[c].numpy(), rows.mean(0), rtol=0, atol=1e-9)
        np.testing.assert_allclose(
            (own.scatters_KDD[c] / own.counts_K[c]).numpy(), np.cov(rows.T, bias=True), rtol=0, atol=1e-9
        )
    assert own.counts_K.tolist() == np.bincount(y).tolist()


@pytest.mark.parametrize(("shrinkage", "pooling", "prior"), [(0, 0, False), (0.3, 0, True), (0.2, 0.6, False), (0.05, 1, True)])
def test_qda_scores_by_hand(shrinkage, pooling, prior):
    x, y = data_of(2)
    own = gaussians(x, y, 9, shrinkage=shrinkage, pooling=pooling, prior=prior)
    rows, scores = [x[y == c].numpy() for c in range(4)], []
    scatters = [(r - r.mean(0)).T @ (r - r.mean(0)) for r in rows]
    for c in range(4):
        n = (1 - pooling) * len(rows[c]) + pooling * 80
        cov = ((1 - pooling) * scatters[c] + pooling * sum(scatters)) / n
        cov = (1 - shrinkage) * cov + shrinkage * np.trace(cov) / 6 * np.eye(6)
        scores.append(log_density(x.numpy(), rows[c].mean(0), cov) + prior * np.log(len(rows[c]) / 80))
    np.testing.assert_allclose(own.predict(x).numpy(), np.stack(scores, 1), rtol=1e-5, atol=1e-4)
    if shrinkage == 0:
        theirs = QuadraticDiscriminantAnalysis(priors=[0.25] * 4).fit(x, y).predict(x)
        assert (own.predict(x).argmax(1).numpy() == theirs).mean() > 0.96  # their covariance is divided by n - 1
    if pooling == 1:
        lda = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y).predict(x)
        assert (own.predict(x).argmax(1).numpy() == lda).mean() > 0.9


def test_qda_of_single_samples_and_of_classes_that_have_not_come():
    x, y = data_of(3)
    y[:] = y % 2
    own = gaussians(torch.cat([x, x[:1] + 50]), torch.cat([y, torch.tensor([2])]), 81)
    pooled = own.scatters_KDD.sum(0) / 81
    torch.testing.assert_close(own.covariance(2), 0.9 * pooled + 0.1 * pooled.trace() / 6 * torch.eye(6).double())
    z = own.predict(torch.cat([x, x[:1] + 50]))
    assert z[-1].argmax() == 2 and (z[:, 3] == LOWEST).all() and torch.isfinite(z).all()
    alone = gaussians(x[:2], torch.tensor([0, 1]), 1)
    torch.testing.assert_close(alone.covariance(0), torch.eye(6).double())
    assert alone.predict(x[:2])[:, :2].argmax(1).tolist() == [0, 1]
    few = gaussians(x[:8], torch.arange(8) % 2, 8, shrinkage=0)
    assert torch.isfinite(few.predict(x)).all(), "four samples in six dimensions: the least ridge"


# --- GKEAL, AIR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("projection", "sigma"), [(30, 2.0), (500, None)])
def test_gkeal_is_ridge_regression_on_kernels_around_the_first_experience(projection, sigma):
    x, y = data_of(4)
    own = made(Gkeal, projection=projection, sigma=sigma, ridge=0.2)
    y[:50] %= 2
    own.update(x[:50], y[:50], 2)
    for rows in (slice(50, 55), slice(55, 80)):
        own.update(x[rows], y[rows], 4)
    order = rng.permutation(rng.key(3, "centres"), 50)[:projection]
    centres, m = x[:50][torch.as_tensor(order)].numpy(), min(projection, 50)
    assert own.centres_MD.shape == (m, 6)
    first = x[:50].numpy()
    width = sigma or np.sqrt(((first - first.mean(0)) ** 2).sum(1).mean())
    h = np.array([[np.exp(-((f - c) ** 2).sum() / (2 * width**2)) for c in centres] for f in x.numpy()])
    w = np.linalg.solve(h.T @ h + 0.2 * np.eye(m), h.T @ np.eye(4)[y])
    np.testing.assert_allclose(own.predict(x).numpy(), h @ w, rtol=1e-4, atol=1e-5)
    assert own.sigma == pytest.approx(width)


def test_gkeal_needs_features_that_vary_for_a_sigma():
    with pytest.raises(UserError, match=r"set learner\.sigma"):
        made(Gkeal, sigma=None).update(torch.ones(5, 6), torch.zeros(5, dtype=torch.int64), 1)


@pytest.mark.parametrize("projection", [200, 60, 8])
def test_air_weighs_classes_alike(projection):
    """Classes of very different counts, which come back; roots of all, of some and of no class."""
    x, y = data_of(5)
    y[:] = torch.tensor([0] * 50 + [1] * 20 + [2] * 9 + [3])
    order = permuted(2)
    x, y = x[order], y[order]
    own = made(Air, projection=projection, ridge=0.3)
    for xs, ys in zip(x.split(13), y.split(13), strict=True):
        own.update(xs, ys, 4)
    layer = uniform(6, projection, rng.key(3, "projection"))
    h = (x @ layer).clamp_min(0).numpy()
    counts = np.bincount(y)
    weight = (1 / counts) / np.mean(1 / counts)
    gram, cross = 0.3 * np.eye(projection), np.zeros((projection, 4))
    for row, c in zip(h, y.tolist(), strict=True):
        gram += weight[c] * np.outer(row, row)
        cross[:, c] += weight[c] * row
    np.testing.assert_allclose(own.readout().numpy(), np.linalg.solve(gram, cross), rtol=1e-7, atol=1e-8)
    assert own.class_weights().mean() == pytest.approx(1)


def test_air_of_equal_counts_is_acil_and_waits_for_classes():
    x, _ = data_of(6)
    y = torch.arange(80) % 4
    air, acil = made(Air, projection=100), made(Acil, projection=100)
    air.update(x[:7], y[:7] % 2, 4)
    assert (air.predict(x)[:, 2:] == LOWEST).all() and (air.predict(x)[:, :2] > LOWEST / 2).all()
    air = made(Air, projection=100)
    for own in (air, acil):
        own.update(x, y, 4)
    torch.testing.assert_close(air.readout(), acil.readout(), **CLOSE)


# --- SFR -------------------------------------------------------------------------------------------------------------------


def learned(*words, experiences=2, budget=None, **stream):
    t = online(*words, operators=(), **stream, budget=budget or {"epochs": 1, "exemplars": 12})
    learner, runtime, pipeline = t.start()
    for i in range(experiences):
        t.learn(learner, runtime, pipeline, i)
    return t, learner, runtime, pipeline


def test_sfr_points_are_those_of_the_naive_gaussian_process():
    """Jacobians one by one with autograd, sums in loops, inverses in float64."""
    t, learner, _, pipeline = learned("learner=sfr", *MLP, "learner.lr=0.01", "learner.backbone_lr=0.01", experiences=1)
    (site,) = learner.sites
    data = t.open(0, pipeline).train
    params = [p for part in (learner.model, learner.head) for p in part.parameters()]

    def rows(images, c):
        logits = [learner.head(learner.model.features(x[None]))[0, c] for x in images]
        return torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(z, params, allow_unused=False)]) for z in logits]
        )

    x = torch.cat([b.x for b in data.test_batches(7)])
    ids = torch.cat([b.ids for b in data.test_batches(7)]).tolist()
    own = [ids.index(i) for i in site["ids"].tolist()]
    assert len(own) == 12 and len(set(own)) == 12
    assert np.bincount(np.asarray(data.y)[own]).tolist() == [4, 4, 4]
    p = learner.head(learner.model.features(x)).double().softmax(1).detach()
    torch.testing.assert_close(site["logits"], learner.head(learner.model.features(x[own])).detach())
    n = len(x)
    for c in range(3):
        j = rows(x, c).double()
        k = (j[own] @ j.T / (1e-4 * n)).numpy()
        b = sum(float(p[i, c] * (1 - p[i, c])) * np.outer(k[:, i], k[:, i]) for i in range(n))
        k_zz = k[:, own] + 1e-6 * np.eye(12)
        a = np.linalg.inv(k_zz) @ (b + 1e-6 * np.eye(12)) @ np.linalg.inv(k_zz)
        np.testing.assert_allclose(site["precision"][c].numpy(), a, rtol=1e-2, atol=1e-3 * np.abs(a).max())


def test_sfr_curvature_is_bounded_below_and_a_weighs_what_points_stand_for():
    """Two points that stand for one and for three samples of the same place: A is the sum of their curvatures."""
    k = torch.diag(torch.tensor([2.0, 5.0]).double())
    columns = torch.stack([k[:, 0], k[:, 1], k[:, 1], k[:, 1]], dim=1)
    b = torch.tensor([0.1, 0.2, 0.2, 0.05], dtype=torch.float64)
    a = sfr.precision(k, columns * b @ columns.T, 1e-12)
    torch.testing.assert_close(a, torch.diag(torch.tensor([0.1, 0.45], dtype=torch.float64)), rtol=0, atol=1e-9)


def test_sfr_penalty_by_hand_and_its_least_over_points_that_go():
    _, learner, _, _ = learned("learner=sfr", *MLP, experiences=1)
    site = {"logits": noise(1, 4, 2).float(), "precision": noise(2, 2, 4, 4)}
    site["precision"] = site["precision"] @ site["precision"].mT
    z, total = noise(3, 4, 3).float(), 0.0
    for c in range(2):
        gap = (z[:, c] - site["logits"][:, c]).double()
        total += 0.5 / 4 * float(gap @ site["precision"][c] @ gap)
    assert float(learner.distance(z, site)) == pytest.approx(total, rel=1e-5)
    keep = torch.tensor([True, False, True, False])
    small = sfr.reduced(site["precision"], keep)
    gap = noise(4, 2)
    for c in range(2):
        free = torch.zeros(2, dtype=torch.float64, requires_grad=True)

        def form(free, c=c):
            full = torch.stack([gap[0], free[0], gap[1], free[1]])
            return full @ site["precision"][c] @ full

        hessian = torch.autograd.functional.hessian(form, free)
        best = -torch.linalg.solve(hessian, torch.autograd.grad(form(free), free)[0])
        assert float(form(best)) == pytest.approx(float(gap @ small[c] @ gap), rel=1e-6)
    eye = torch.eye(4).double().repeat(2, 1, 1)
    assert torch.equal(sfr.reduced(eye, keep), eye[:, :2, :2])


def test_sfr_points_are_counted_as_exemplars_and_shared_by_experiences():
    t, learner, runtime, pipeline = learned("learner=sfr", *MLP, experiences=3)
    assert len(learner.memory) == 12 and sum(len(site["ids"]) for site in learner.sites) == 12
    assert [site["logits"].shape[1] for site in learner.sites] == [6, 6, 6]
    first = learner.sites[0]
    assert torch.equal(first["precision"][3:], torch.eye(len(first["ids"])).double().repeat(3, 1, 1)), "new to these points"
    assert not torch.equal(first["precision"][:1], first["precision"][3:4])
    steps = -(-len(t.open(2, pipeline).train) // 32)
    assert runtime.used_visits == len(t.open(2, pipeline).train) + 12 * steps
    with pytest.raises(BudgetExceeded, match=r"learner\.memory=13"):
        online("learner=sfr", *MLP, "learner.memory=13", budget={"epochs": 1, "exemplars": 12}).start()


@pytest.mark.parametrize("covariance", ["full", "none"])
def test_sfr_holds_the_points(covariance):
    """A large tau keeps the logits of the first experience's points where tau 0 lets them go."""
    moved = {}
    for tau in (0, 100):
        words = (f"learner.covariance={covariance}", f"learner.tau={tau}", "learner.lr=0.003", "learner.backbone_lr=0.003")
        t, learner, runtime, pipeline = learned("learner=sfr", *MLP, *words, experiences=1, budget=TEN)
        site = learner.sites[0]
        points = learner.memory.data(t.open(0, pipeline).train)
        t.learn(learner, runtime, pipeline, 1)
        with torch.no_grad():
            z = torch.cat([learner.head(learner.model.features(b)) for b in points.test_batches(12)])
        moved[tau] = float(learner.distance(z, site))
    assert moved[100] < 0.3 * moved[0], moved


# --- LAFTR -----------------------------------------------------------------------------------------------------------------


def small_layers(seed, sizes=(3, 3, 2, 2), scale=1.0):
    return [scale * noise(seed + i, n, m + 1) for i, (m, n) in enumerate(itertools.pairwise(sizes))]


def gated_answers(layers, x, gates):
    h = x
    for i, w in enumerate(layers):
        a = F.pad(h, (0, 1), value=1.0) @ w.T
        h = a if i == len(gates) else a * gates[i]
    return h


def test_laftr_is_the_expectation_over_all_gates():
    """Every one of the 2^5 combinations of gates, each on every image, weighed by its probability."""
    old, x = small_layers(0), noise(50, 6, 3)
    new = [w + 0.3 * v for w, v in zip(old, small_layers(20), strict=True)]
    shares = [torch.tensor([0.2, 0.5, 0.9]).double(), torch.tensor([0.7, 0.4]).double()]
    moment = laftr.second_moment(x) / len(x)
    expected = 0.0
    for bits in itertools.product((0.0, 1.0), repeat=5):
        gates = [torch.tensor(bits[:3]).double(), torch.tensor(bits[3:]).double()]
        chance = float(torch.cat([torch.where(g > 0, p, 1 - p) for g, p in zip(gates, shares, strict=True)]).prod())
        gap = gated_answers(new, x, gates) - gated_answers(old, x, gates)
        expected += chance * float(gap.square().sum(1).mean())
    assert float(laftr.distance(new, old, moment, shares)) == pytest.approx(expected, rel=1e-10)
    assert float(laftr.distance(old, old, moment, shares)) == 0


def test_laftr_of_open_gates_is_the_linear_network_s_distance():
    old, new, x = small_layers(0), small_layers(30), noise(51, 200, 3)
    shares = [torch.ones(3).double(), torch.ones(2).double()]
    gap = gated_answers(new, x, shares) - gated_answers(old, x, shares)
    found = laftr.distance(new, old, laftr.second_moment(x) / 200, shares)
    assert float(found) == pytest.approx(float(gap.square().sum(1).mean()), rel=1e-10)
    without = laftr.without_covariances(laftr.second_moment(x) / 200)
    np.testing.assert_allclose(without[-1, :-1], x.mean(0))
    covariance = without[:-1, :-1] - torch.outer(x.mean(0), x.mean(0))
    np.testing.assert_allclose(covariance, np.diag(np.var(x.numpy(), axis=0)), atol=1e-12)


def test_laftr_gradient_is_that_of_finite_differences():
    old, x = small_layers(0), noise(52, 9, 3)
    shares, moment = [torch.full((3,), 0.6).double(), torch.full((2,), 0.3).double()], laftr.second_moment(x) / 9
    new = [(w + 0.2 * v).requires_grad_(True) for w, v in zip(old, small_layers(40), strict=True)]
    assert torch.autograd.gradcheck(lambda *layers: laftr.distance(layers, old, moment, shares), new)


def test_laftr_statistics_and_distance_near_the_real_one():
    """Moments and gates of the images in loops; a small change of weights costs about what it does on the images."""
    t, learner, _, pipeline = learned("learner=laftr", *MLP, "learner.lr=0.01", "learner.backbone_lr=0.01", experiences=1)
    (site,) = learner.sites
    x = torch.cat([b.x.mean(1).flatten(1) for b in t.open(0, pipeline).train.test_batches(5)])
    tilde = F.pad(x.double(), (0, 1), value=1.0)
    np.testing.assert_allclose(site["moment"], sum(np.outer(r, r) for r in tilde.numpy()) / len(x), rtol=1e-4, atol=1e-5)
    h = x
    for i, layer in enumerate(learner.mlp.layers):
        a = layer[0](h).detach()
        np.testing.assert_allclose(site["gates"][i], (a > 0).float().mean(0))
        h = a.relu()
    old = [w.detach() for w in learner.layers(3, None)]
    torch.testing.assert_close(h @ old[-1][:, :-1].T + old[-1][:, -1], learner.head(h).detach())
    for w, kept in zip(old, site["weights"], strict=True):
        assert torch.equal(w, kept) and w.data_ptr() != kept.data_ptr()

    def answers(layers):
        h = x
        for w in layers[:-1]:
            h = F.linear(h, w[:, :-1], w[:, -1]).relu()
        return F.linear(h, layers[-1][:, :-1], layers[-1][:, -1])

    ratios = []
    for seed in range(8):
        new = [w + 0.02 * noise(seed * 7 + i, *w.shape).float() for i, w in enumerate(old)]
        real = float((answers(new) - answers(old)).square().sum(1).mean())
        ratios.append(float(laftr.distance(new, old, site["moment"], site["gates"])) / real)
    assert 0.5 < np.mean(ratios) < 2, ratios


@pytest.mark.parametrize("words", [(), ("learner.inputs=diagonal",), ("learner.reference=latest",)])
def test_laftr_holds_the_function(words):
    moved = {}
    for strength in (0, 10):
        rates = (f"learner.strength={strength}", "learner.lr=0.01", "learner.backbone_lr=0.01", *words)
        t, learner, runtime, pipeline = learned("learner=laftr", *MLP, *rates, experiences=1, budget=TEN, sizes=[3, 3])
        data = t.open(0, pipeline).train
        before = torch.cat([learner.predict(b) for b in data.test_batches(9)]).detach()
        t.learn(learner, runtime, pipeline, 1)
        after = torch.cat([learner.predict(b) for b in data.test_batches(9)]).detach()[:, :3]
        moved[strength] = float((after - before).square().sum(1).mean())
    assert moved[10] < 0.3 * moved[0], moved
    assert (learner.sites[0]["weights"] is None) == ("learner.reference=latest" in words)


def test_laftr_takes_mlps_alone():
    for model in ("model=nano_random", "model=convnet"):
        with pytest.raises(UserError, match="choose model=mlp"):
            online("learner=laftr", model).start()
    with pytest.raises(UserError, match=r"model\.norm=none"):
        online("learner=laftr", *MLP, "model.norm=group").start()
    assert isinstance(online("learner=laftr", *MLP).start()[0].mlp, Mlp)
    assert declared(laftr.Laftr, {"_target_": "", "head": "per_task"}).needs_task_id


# --- all of them -----------------------------------------------------------------------------------------------------------


def test_nan_features_are_named():
    x, y = data_of(1)
    x[3, 2] = float("nan")
    for kind, options in ((Gkeal, {}), (Air, {"projection": 40})):
        with pytest.raises(FloatingPointError, match="features are NaN"):
            made(kind, **options).update(x, y, 4)
    with pytest.raises(FloatingPointError, match="features are NaN"):
        made(Icl, projection=0).update(x, F.one_hot(y))
    with pytest.raises(FloatingPointError, match="features are NaN"):
        gaussians(x, y, 80)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("icl learner.projection=-1", "learner.projection=-1"),
        ("icl learner.tolerance=0", "learner.tolerance=0"),
        ("qda learner.shrinkage=2", "learner.shrinkage=2"),
        ("qda learner.pooling=-0.1", "learner.pooling=-0.1"),
        ("gkeal learner.projection=0", "learner.projection=0"),
        ("gkeal learner.sigma=0", "learner.sigma=0"),
        ("gkeal learner.ridge=-1", "learner.ridge=-1"),
        ("air learner.ridge=0", "learner.ridge=0"),
        ("sfr learner.covariance=diagonal", "learner.covariance=diagonal"),
        ("sfr learner.delta=0", "learner.delta=0"),
        ("sfr learner.tau=-1", "learner.tau=-1"),
        ("laftr model=mlp learner.inputs=half", "learner.inputs=half"),
        ("laftr model=mlp learner.reference=first", "learner.reference=first"),
    ],
)
def test_bad_options_are_one_line(words, line):
    name, *options = words.split()
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as caught:
        online(f"learner={name}", *options).start()
    assert "\n" not in str(caught.value)


def test_sfr_is_for_small_networks(monkeypatch):
    monkeypatch.setattr(sfr, "MOST", 10)
    with pytest.raises(UserError, match="choose a small network"):
        online("learner=sfr", *MLP).start()
    online("learner=sfr", *MLP, "learner.covariance=none").start()
