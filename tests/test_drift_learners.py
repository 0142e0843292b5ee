"""SLDC, RSIAT and MACIL: learners whose Gaussians follow the drift, against naive versions of their formulas."""

import math

import numpy as np
import pytest
import torch
from conftest import NARROW
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, Place, UserError
from clbench.learners import macil, rsiat, sldc
from clbench.streams.images.pixels import Pipeline
from clbench.testing.contract import Trial, small_stream
from clbench.training.drift import shifted
from clbench.training.features import extract
from clbench.training.state import detached

CPU = torch.device("cpu")


def trial(*overrides, **stream):
    (config,) = compose([*NARROW, *overrides])
    return Trial(config, small_stream(**stream), Capabilities())


def learned(*overrides, experiences=2, **stream):
    t = trial(*overrides, **stream)
    learner, runtime, pipeline = t.start()
    return t, learner, runtime, pipeline, [t.learn(learner, runtime, pipeline, i) for i in range(experiences)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(pet, size=0.1, seed=3):
    """Other values than those of a module, near them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + size * torch.randn(value.shape, generator=generator) for name, value in pet.state().items()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sldc pet=none", "pet=none has nothing to tune"),
        ("sldc learner.variant=code", r"learner\.variant=code: choose paper or official"),
        ("sldc learner.drift=line", r"learner\.drift=line"),
        ("rsiat pet=none", "pet=none has nothing to tune"),
        ("rsiat learner.variant=code", r"learner\.variant=code: choose paper or official"),
        ("rsiat learner.variant=official learner.drift=linear", r"goes with learner\.drift=shift alone"),
        ("rsiat learner.first=1.5", r"learner\.first and learner\.later are shares"),
        ("rsiat learner.later=0", r"learner\.later"),
        ("rsiat learner.rs_warmup=-1", r"learner\.rs_warmup"),
        ("rsiat learner.code=0", r"learner\.code"),
        ("macil pet=adapter", "choose pet=lora"),
        ("macil pet=lora_lae", "choose pet=lora"),
        ("macil learner.variant=code", r"learner\.variant=code"),
        ("macil learner.variant=official learner.drift=null", r"goes with learner\.drift=shift alone"),
        ("macil learner.later=0", r"learner\.later"),
        ("macil learner.patches=-1", r"learner\.pairs and learner\.patches"),
        ("sldc learner.kd=-1", r"learner\.kd and learner\.norm are weights from 0"),
    ],
)
def test_bad_options_are_named(words, said):
    with pytest.raises(UserError, match=said):
        trial(*f"learner={words}".split()).start()


# --- SLDC


class Fits:
    """Every call of `fit` in a module: its arguments, with the loss asked once where `inside` says; training is as it is."""

    def __init__(self, monkeypatch, module, inside=None):
        self.calls, real = {}, module.fit

        def spy(runtime, name, learner, groups, loss, batches, recipe, **options):
            self.calls.setdefault(name, []).append(([group["lr"] for group in groups], batches, recipe))
            if inside is not None:
                inside(name, learner, loss, batches, options)
            return real(runtime, name, learner, groups, loss, batches, recipe, **options)

        monkeypatch.setattr(module, "fit", spy)


SHORT = ("learner.align_epochs=2", "learner.align_samples=20")


def naive_sce(z, y, a, b):
    """a CE + b RCE, one image after another."""
    total = 0.0
    for row, label in zip(z.double(), y.tolist(), strict=True):
        p = torch.exp(row) / torch.exp(row).sum()
        reverse = -sum(float(p[c]) * (0.0 if c == label else math.log(1e-4)) for c in range(len(row)))
        total += -a * math.log(float(p[label])) + b * reverse
    return total / len(z)


def test_sldc_loss_is_the_naive_sum(monkeypatch):
    seen = []

    def inside(name, learner, loss, batches, options):
        if name != "train":
            return
        own, batch = learner.pet.state(), batches(0)
        learner.pet.insert(moved(learner.pet))
        found = loss(batch)
        learner.pet.insert(own)
        first = len(learner.gaussians)
        with torch.no_grad():
            old = learner.model.features(batch.x)
            with learner.pet.use(moved(learner.pet)):
                f = learner.model.features(batch.x)
            naive = naive_sce(learner.head.blocks[-1](f), batch.y - first, 0.3, 0.7)
            terms = 0.0
            for i in range(len(f)):
                terms += 2.0 * float((f[i] - old[i]).square().mean()) + 0.4 * float(f[i].norm() - old[i].norm()) ** 2
            naive += terms / len(f) if first else 0.0
        assert found.item() == pytest.approx(naive, rel=1e-4)
        seen.append(terms / len(f))

    Fits(monkeypatch, sldc, inside)
    options = ("learner.sce_a=0.3", "learner.sce_b=0.7", "learner.kd=2", "learner.norm=0.4", *SHORT)
    learned("learner=sldc", *options)
    assert len(seen) == 2 and seen[1] > 0.01


def test_sldc_rates_steps_and_batches(monkeypatch):
    fits = Fits(monkeypatch, sldc)
    learned("learner=sldc", *SHORT, sizes=[4, 2])
    assert [rates for rates, *_ in fits.calls["train"]] == [pytest.approx([1e-4, 1e-3])] * 2
    recipe = fits.calls["train"][0][2]
    assert recipe.optimizer == "adamw" and recipe.weight_decay == 3e-5 and recipe.floor == pytest.approx(1e-4 / 3)
    for (rates, batches, recipe), k in zip(fits.calls["align"], (4, 6), strict=True):
        size = 32 * k // 10
        assert rates == [5e-4] and recipe.optimizer == "adam" and recipe.weight_decay == 1e-4
        assert batches.steps == 2 * math.ceil(20 * k / size) and len(batches(0)[1]) == size
        assert batches.y.bincount().tolist() == [20] * k


def test_sldc_samples_are_of_the_gaussians_and_the_training_head_stays(monkeypatch):
    fits = Fits(monkeypatch, sldc)
    _, learner, *_ = learned(
        "learner=sldc", "learner.align_epochs=1", "learner.align_samples=1000", experiences=1, sizes=[2, 4]
    )
    ((_, batches, _),) = fits.calls["align"]
    for k in range(2):
        x = batches.features[batches.y == k].double()
        mean, cov = learner.gaussians.mean_KD[k], learner.gaussians.cov_KDD[k]
        torch.testing.assert_close(x.mean(0).float(), mean, atol=4 * float(cov.diag().max().sqrt()) / 30, rtol=0)
        assert float((x.T.cov().float() - cov).norm() / cov.norm()) < 0.2
    assert not torch.equal(learner.head.blocks[0].weight, learner.aligned.blocks[0].weight)  # in experience 0 too
    _, plain, *_ = learned("learner=sldc", "learner.align_epochs=0", experiences=1, sizes=[2, 4])
    assert torch.equal(plain.head.blocks[0].weight, learner.head.blocks[0].weight), "alignment is of the copy alone"
    assert torch.equal(plain.aligned.blocks[0].weight, plain.head.blocks[0].weight)


def test_sldc_of_a_network_that_does_not_change():
    """Old = new network: distances are 0, so is the shift of every mean."""
    ends = []
    for options in (
        ("learner.kd=5", "learner.norm=5", "learner.drift=shift"),
        ("learner.kd=0", "learner.norm=0", "learner.drift=null"),
    ):
        _, learner, *_ = learned("learner=sldc", "learner.lr=0", *options, *SHORT)
        ends.append(detached(learner.state_dict()))
    for part in ("head", "aligned", "gaussians"):
        for name, value in ends[0][part].items():
            torch.testing.assert_close(value, ends[1][part][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_sldc_pairs_are_of_one_image(variant):
    """As the features of one view, with the terms of then and of now; the official view is augmented."""
    t = trial("learner=sldc", f"learner.variant={variant}", "learner.drift=nonlinear", *SHORT)
    learner, runtime, _ = t.start()
    assert learner.drift.penalty == (0.5 if variant == "paper" else 0.0)
    pipeline = Pipeline(learner.model.profile, CPU, "shift")
    experience = t.learn(learner, runtime, pipeline, 0)
    old = moved(learner.pet)
    before, after, y = learner._features(experience, old)
    with learner.pet.use(old):
        plain = extract(runtime, learner.model, experience.train, 16)
    order, plain_order = y.argsort(stable=True), plain[1].argsort(stable=True)
    assert torch.equal(y[order], plain[1][plain_order])
    assert torch.equal(learner._features(experience, learner.pet.state())[0], after), "one view"
    shared = int(((before[:, None] - plain[0]).norm(dim=2).min(1).values < 1e-3).sum())
    assert shared == 36 if variant == "paper" else shared < 12
    assert not torch.allclose(before, after, atol=1e-2)
    assert learner._features(experience, None)[0] is None
    mean = torch.stack([after[y == k].mean(0) for k in range(3)])
    torch.testing.assert_close(learner.gaussians.mean_KD, mean, atol=1e-4, rtol=1e-4)


# --- RSIAT


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]])
def test_rsiat_separation_is_a_double_loop(labels):
    f, y = drawn(6, 4), torch.tensor(labels)
    near, far = [], []
    for i in range(6):
        for j in range(6):
            cos = float(f[i] @ f[j] / f[i].norm() / f[j].norm())
            if labels[i] != labels[j]:
                far.append(max(0.0, cos - 0.1))
            elif i != j:
                near.append(max(0.0, 1 - cos))
    naive = sum(near) / max(1, len(near)) + 0.7 * sum(far) / max(1, len(far))
    assert float(rsiat.separation(f, y, 0.7, 0.1)) == pytest.approx(naive)


def test_rsiat_forecast_by_hand():
    g = rsiat.Forecast(5, 3, torch.Generator().manual_seed(0))
    assert [tuple(layer.weight.shape) for layer in g.layers] == [(64, 5), (3, 64), (64, 3), (5, 64)]
    x = drawn(2, 5).float()
    for row, found in zip(x, g(x), strict=True):
        y = row
        for n, layer in enumerate(g.layers):
            y = layer.weight @ y + layer.bias
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2))) if n < 3 else 1 / (1 + torch.exp(-y))
        torch.testing.assert_close(found, row + y)


def naive_cosface(cosines, y, s, m):
    """Mean over images of -log of the own class's share."""
    total = 0.0
    for row, label in zip(cosines.double(), y.tolist(), strict=True):
        z = torch.stack([s * (c - (m if k == label else 0.0)) for k, c in enumerate(row)])
        total -= float(z[label] - z.exp().sum().log())
    return total / len(y)


RSIAT = ("learner=rsiat", "learner.pet.dropout=0", "learner.pet.scale=1", "learner.batch_size=16", "learner.align_epochs=1")


def test_rsiat_loss_is_the_naive_sum_and_beta_alone_reaches_the_adapter(monkeypatch):
    seen = []

    def inside(name, learner, loss, batches, options):
        if name != "train":
            return
        own, batch, first = learner.pet.state(), batches(0), len(learner.gaussians)
        learner.pet.insert(moved(learner.pet, 0.3))
        options["at_place"](Place(0, 5, 9, 5))  # the second epoch of two: 1/4 of the way to E_w = 4
        total = loss(batch)
        with torch.no_grad():
            f = learner.model.features(batch.x)
            with learner.pet.use(own):
                old = learner.model.features(batch.x)
            naive = naive_cosface(learner.head(f)[:, first:], batch.y - first, 40, 0.1)
            if first == 0:
                naive += 0.2 * 0.25 * float(rsiat.separation(f, batch.y, 0.5, 0.3))
            else:
                g = learner.forecast
                terms = [
                    F.cosine_similarity(g(m[None])[0], g(x[None])[0], dim=0) for m in learner.gaussians.mean_KD for x in old
                ]
                naive += 2.0 * float((f - g(old)).square().mean()) + 0.5 * float(sum(terms)) / len(terms)
        assert total.item() == pytest.approx(naive, rel=1e-4)
        grads = []
        for beta, gamma in ((0.0, 0.0), (0.0, 5.0), (5.0, 0.0)) if first else ():
            learner.beta, learner.gamma = beta, gamma
            parts = [*learner.pet.parameters(), *learner.forecast.parameters()]
            found = torch.autograd.grad(loss(batch), parts, allow_unused=True)
            flat = [torch.zeros(1) if one is None else one.flatten() for one in found]
            count = len(list(learner.pet.parameters()))
            grads.append((torch.cat(flat[:count]), torch.cat(flat[count:])))
        if first:
            (pet, _), (pet_gamma, g_gamma), (pet_beta, g_beta) = grads
            torch.testing.assert_close(pet, pet_gamma)
            assert not torch.allclose(pet, pet_beta, atol=1e-4) and g_gamma.abs().max() > 0 and g_beta.abs().max() > 0
        learner.beta, learner.gamma = 2.0, 0.5
        learner.pet.insert(own)
        seen.append(first)

    fits = Fits(monkeypatch, rsiat, inside)
    options = ("learner.beta=2", "learner.gamma=0.5", "learner.rs_warmup=4", "learner.later=0.5")
    learned(*RSIAT, *options)
    assert seen == [0, 3] and [rates for rates, *_ in fits.calls["train"]] == [[0.01, 0.01], [0.0185, 0.0185, 5.6e-4]]
    assert [batches.steps for _, batches, _ in fits.calls["train"]] == [2 * 3, 1]


def test_rsiat_of_a_network_that_does_not_change():
    """Old = new network: the shift is 0, and g is made before it is used and kept."""
    ends = []
    for drift in ("shift", "null"):
        _, learner, *_ = learned(*RSIAT, "learner.lr=0", "learner.first_lr=0", f"learner.drift={drift}")
        ends.append(detached(learner.state_dict()))
    for part in ("head", "gaussians", "forecast"):
        for name, value in ends[0][part].items():
            torch.testing.assert_close(value, ends[1][part][name], atol=1e-6, rtol=1e-5)
    start = trial(*RSIAT).start()[0].forecast.layers[0].weight
    assert not torch.equal(ends[0]["forecast"]["layers.0.weight"], start)


@pytest.mark.parametrize("words", ["rsiat", "rsiat learner.variant=official"])
def test_rsiat_pairs(words):
    """Rows are of one image; as released they are not."""
    t = trial(*RSIAT, f"learner={words}".split()[-1])
    learner, runtime, _ = t.start()
    pipeline = Pipeline(learner.model.profile, CPU, "shift")
    experience = t.learn(learner, runtime, pipeline, 0)
    features = extract(runtime, learner.model, experience.train, 16)[0]
    before, after = learner._before_and_after(experience, learner.pet.state(), features)
    assert before.shape == after.shape == (36, learner.model.num_features)
    assert torch.allclose(before, after, atol=1e-5) == ("official" not in words)


# --- MACIL


def naive_metric(f):
    """P of a class's features [N, D], eigenvalue by eigenvalue."""
    cov = torch.from_numpy(np.cov(f.T.numpy()))
    d, eye = len(cov), torch.eye(len(cov)).double()
    off = [cov[i, j] for i in range(d) for j in range(d) if i != j and cov[i, j] != 0]
    shrunk = cov + 10 * cov.diagonal().mean() * eye + 10 * sum(off) / len(off) * (1 - eye) + 1e-3 * eye
    values, vectors = torch.linalg.eigh(shrunk)
    total = torch.zeros(d, d, dtype=torch.float64)
    for value, v in zip(values, vectors.T, strict=True):
        total += torch.outer(v, v) / value if value > 0 else 0
    return total, float(values[0])


def opposed(n=9):
    """Two features that vary against each other and four that do not: all covariances that are not 0 are negative."""
    f = drawn(n, 1, seed=4)
    return torch.cat([f, 0.5 - f, torch.ones(n, 4)], dim=1)


def test_macil_metric_and_what_is_clipped():
    for f, definite in ((drawn(30, 6) @ (1 + drawn(6, 6, seed=1).abs()), True), (opposed(), False)):
        p, least = naive_metric(f)
        assert (least > 0) == definite
        w = macil.metric(f)
        torch.testing.assert_close(w.double().T @ w.double(), p, atol=1e-4, rtol=1e-4)


def test_macil_pair_loss_is_a_double_loop():
    y = torch.tensor([3, 4, 3, 3, 5, 4, 3])
    f, old = drawn(7, 6, seed=2), drawn(7, 6, seed=3)
    metrics = {3: macil.metric(drawn(9, 6, seed=7)).double(), 4: macil.metric(opposed()).double()}
    metrics[5] = metrics[3]
    total = 0.0
    for i in range(7):
        for j in range(i + 1, 7):
            if y[i] == y[j]:
                p, d = metrics[int(y[i])].T @ metrics[int(y[i])], []
                for x in (old, f):
                    delta = x[i] / x[i].norm() - x[j] / x[j].norm()
                    d.append(math.sqrt(float(delta @ p @ delta) + 1e-8))
                total += abs(d[0] - d[1]) / 7
    assert float(macil.pair_loss(f, old, y, metrics)) == pytest.approx(total, rel=1e-6)
    same = f.clone().requires_grad_()
    loss = macil.pair_loss(same, f, y, metrics)
    loss.backward()
    assert float(loss.detach()) == 0 and torch.isfinite(same.grad).all()


def test_macil_patch_loss_is_a_double_loop_with_constant_weights():
    now, old = drawn(2, 5, 6).requires_grad_(), drawn(2, 5, 6, seed=1)
    terms, weights = [], []
    for b in range(2):
        for n in range(2, 5):  # the class token, another one, three patches
            cls, p, q = now[b, 0].detach(), now[b, n], old[b, n]
            weights.append(math.acos(float(cls @ p.detach() / cls.norm() / p.detach().norm())) / math.pi)
            terms.append((p / p.norm() - q / q.norm()).norm())
    naive = sum(w * d for w, d in zip(weights, terms, strict=True)) / 6
    found = macil.patch_loss(now, old, 2)
    torch.testing.assert_close(found, naive)
    torch.testing.assert_close(*(torch.autograd.grad(one, now)[0] for one in (found, naive)))
    loss = macil.patch_loss(now, now.detach(), 2)
    assert float(loss.detach()) == 0 and torch.autograd.grad(loss, now)[0].abs().max() == 0


MACIL = ("learner=macil", "learner.batch_size=16", "learner.pet.rank=4", "learner.align_epochs=1")


def test_macil_loss_terms_and_weights(monkeypatch):
    seen = []

    def inside(name, learner, loss, batches, options):
        if name != "train":
            return
        own, batch, first = learner.pet.state(), batches(0), len(learner.gaussians)
        assert all((value == 0).all() for name, value in own.items() if name.endswith("/b"))
        start = float(loss(batch).detach())
        with torch.no_grad(), learner.pet.off():
            old = learner.model.tokens(batch.x)
            z = learner.head(learner.model.features(batch.x))[:, first:]
        assert start == pytest.approx(naive_cosface(z, batch.y - first, 20, 0.0), rel=1e-4), "nothing else where old = new"
        learner.pet.insert(moved(learner.pet, 0.2))
        found = float(loss(batch).detach())
        with torch.no_grad():
            f, tokens = learner.model.features(batch.x), learner.model.tokens(batch.x)
        naive = naive_cosface(learner.head(f).detach()[:, first:], batch.y - first, 20, 0.0)
        if first:
            y, data = batch.y.tolist(), experience_data[-1]
            with torch.no_grad(), learner.pet.off():
                known = learner.model.features(data.batch(range(len(data))).x).double()
            total = 0.0
            for c in set(y):
                p, _ = naive_metric(known[torch.as_tensor(data.y) == c])
                for i in range(len(y)):
                    for j in range(i + 1, len(y)):
                        if y[i] == y[j] == c:
                            d = [x[i] / x[i].norm() - x[j] / x[j].norm() for x in (old[:, 0].double(), f.double())]
                            d = [math.sqrt(float(one @ p @ one) + 1e-8) for one in d]
                            total += 0.7 * abs(d[0] - d[1]) / len(y)
            naive += total + 0.3 * float(macil.patch_loss(tokens, old, 1))
            assert total > 1e-3
        assert found == pytest.approx(naive, rel=1e-4)
        learner.pet.insert(own)
        seen.append(first)

    fits = Fits(monkeypatch, macil, inside)
    t = trial(*MACIL, "learner.pairs=0.7", "learner.patches=0.3", "learner.lr=0.05", sizes=[3, 2, 1])
    learner, runtime, pipeline = t.start()
    experience_data, merged = [], []
    real = learner.pet.merge
    monkeypatch.setattr(learner.pet, "merge", lambda: (merged.append(learner.pet.state()), real()))
    for index in range(2):
        experience_data.append(t.open(index, pipeline).train)
        before, rows = detached(learner.model.state_dict()), detached(learner.weights)
        old_row = learner.head.blocks[0].weight.clone() if index else None
        experience = t.learn(learner, runtime, pipeline, index)
        changed = {name for name, value in learner.model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {f"net.blocks.{i}.attn.qkv.weight" for i in range(len(learner.model.net.blocks))}
        for name, weight in learner.weights.items():
            a, b = merged[-1][f"{name}/a"], merged[-1][f"{name}/b"]
            assert b.abs().max() > 0
            torch.testing.assert_close(weight, rows[name] + b @ a)
        assert old_row is None or not torch.equal(learner.head.blocks[0].weight, old_row), "alignment is of all classifiers"
    assert not torch.equal(merged[0]["0/k/a"], merged[1]["0/k/a"]) and seen == [0, 3]
    assert [rates for rates, *_ in fits.calls["train"]] == [[0.05, 0.05]] * 2
    assert [batches.steps for _, batches, _ in fits.calls["train"]] == [2 * 3, 2]
    batch = experience.train.batch(range(4))
    torch.testing.assert_close(learner.predict(batch), learner.head(learner.model.features(batch.x)), atol=1e-5, rtol=1e-4)


def test_macil_means_follow_by_a_narrow_shift():
    """sigma 1; and no change, no shift."""
    t, learner, runtime, pipeline, _ = learned(*MACIL, "learner.lr=0.05", "learner.align_epochs=0", experiences=1, sizes=[3, 3])
    old = learner.gaussians.mean_KD.clone()
    data = t.open(1, pipeline).train
    before = extract(runtime, learner.model, data, 16)[0]
    t.learn(learner, runtime, pipeline, 1)
    after = extract(runtime, learner.model, data, 16)[0]
    torch.testing.assert_close(learner.gaussians.mean_KD[:3], shifted(old, before, after, 1.0), atol=1e-4, rtol=1e-3)
    assert (after - before).norm(dim=1).mean() > 1e-2
    _, still, *_ = learned(*MACIL, "learner.lr=0")
    _, plain, *_ = learned(*MACIL, "learner.lr=0", "learner.drift=null")
    torch.testing.assert_close(still.gaussians.mean_KD, plain.gaussians.mean_KD, atol=1e-6, rtol=1e-5)


def test_macil_pairs_as_released():
    t = trial(*MACIL, "learner.variant=official")
    learner, runtime, _ = t.start()
    pipeline = Pipeline(learner.model.profile, CPU, "shift")
    experience = t.learn(learner, runtime, pipeline, 0)
    before, after = learner._unpaired(experience)  # one network, for the terms have been added
    assert before.shape == after.shape and not torch.allclose(before, after, atol=1e-2)
