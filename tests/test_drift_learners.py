"""SLDC, RSIAT and MACIL: learners whose Gaussians follow the drift, against naive versions of their formulas."""

import math

import pytest
import torch
from conftest import NARROW

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError
from clbench.learners import sldc
from clbench.streams.images.pixels import Pipeline
from clbench.testing.contract import Trial, small_stream
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
        "learner=sldc", "learner.align_epochs=1", "learner.align_samples=4000", experiences=1, sizes=[2, 4]
    )
    ((_, batches, _),) = fits.calls["align"]
    for k in range(2):
        x = batches.features[batches.y == k].double()
        mean, cov = learner.gaussians.mean_KD[k], learner.gaussians.cov_KDD[k]
        torch.testing.assert_close(x.mean(0).float(), mean, atol=4 * float(cov.diag().max().sqrt()) / 60, rtol=0)
        assert float((x.T.cov().float() - cov).norm() / cov.norm()) < 0.1
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
    shared = int((torch.cdist(before, plain[0]).min(1).values < 1e-3).sum())
    assert shared == 36 if variant == "paper" else shared < 12
    assert not torch.allclose(before, after, atol=1e-2)
    assert learner._features(experience, None)[0] is None
    mean = torch.stack([after[y == k].mean(0) for k in range(3)])
    torch.testing.assert_close(learner.gaussians.mean_KD, mean, atol=1e-4, rtol=1e-4)
