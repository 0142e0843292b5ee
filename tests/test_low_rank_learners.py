"""InfLoRA, SD-LoRA, CoFiMA, TUNA and alignment that follows the drift, against naive versions of their formulas."""

import math

import pytest
import torch
from conftest import NARROW

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, Place, UserError
from clbench.learners import inflora
from clbench.testing.contract import Trial, small_stream
from clbench.training.state import detached


def trial(*overrides, narrow=NARROW, **stream):
    (config,) = compose([*narrow, *overrides])
    return Trial(config, small_stream(**stream), Capabilities())


def learned(*overrides, experiences=2, **stream):
    t = trial(*overrides, **stream)
    learner, runtime, pipeline = t.start()
    return t, learner, runtime, pipeline, [t.learn(learner, runtime, pipeline, i) for i in range(experiences)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("inflora pet=adapter", "choose pet=lora"),
        ("inflora learner.pet.learn_scale=true", "choose pet=lora"),
        ("inflora learner.pet.targets=[k,fc1]", "choose pet=lora"),
        ("inflora learner.pet.rank=33", r"learner\.pet\.rank=33"),
        ("inflora learner.energy=0", r"learner\.energy"),
        ("inflora learner.energy_end=0.9", r"learner\.energy"),
        ("inflora learner.experiences=0", r"learner\.experiences"),
        ("inflora learner.variant=code", r"learner\.variant=code"),
    ],
)
def test_bad_options_are_named(words, said):
    with pytest.raises(UserError, match=said):
        trial(*f"learner={words}".split()).start()


# --- InfLoRA


def covariance(seed, d=12, spread=0.6):
    """Of inputs whose energy falls geometrically, in directions of the seed."""
    q = torch.linalg.qr(drawn(d, d, seed=seed)).Q
    return (q * spread ** torch.arange(d).double()) @ q.T


def naive_gpm(cov, used, share, power, first):
    """DualGPM as one growing basis of directions in use: columns one by one."""
    whole = (torch.linalg.svdvals(cov) ** power).sum()
    if first:
        u, s, _ = torch.linalg.svd(cov)
        held, m = 0.0, 0
        for i in range(len(s)):
            held += float(s[i] ** power / whole)
            if held >= share:
                break
            m += 1
        return u[:, : max(1, m)]
    u, s, _ = torch.linalg.svd(cov - used @ used.T @ cov)
    held = float(1 - (s**power).sum() / whole)
    for i in range(len(s)):
        if held >= share:
            break
        used = torch.cat([used, u[:, i : i + 1]], dim=1)
        held += float(s[i] ** power / whole)
    return used


@pytest.mark.parametrize("power", [1, 2])
def test_dual_gpm_is_one_growing_basis(power):
    kept, used, switched = (torch.zeros(12, 0).double(), False), None, []
    for t in range(8):
        cov, share = covariance(t % 5, spread=0.5), 0.9 + 0.1 * t / 8
        before = kept
        kept = inflora.dual_gpm(cov, kept, share, power)
        used = naive_gpm(cov, used, share, power, t == 0)
        basis, is_free = kept
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-10, rtol=0)
        assert basis.shape[1] <= 6, "the smaller of both subspaces is kept"
        free = basis @ basis.T if is_free else torch.eye(12).double() - basis @ basis.T
        torch.testing.assert_close(free, torch.eye(12).double() - used @ used.T, atol=1e-7, rtol=0)
        a = inflora.design(covariance(40 + t), kept, 4)
        outside = basis.T @ a.T if not is_free else a.T - basis @ (basis.T @ a.T)
        assert outside.abs().max() < 1e-6, "A reads no direction in use"
        switched.append(is_free and not before[1])
    assert sum(switched) == 1, "the other subspace was kept from some experience on"


def test_first_experience_and_energies_by_hand():
    cov = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0, 1.0, 1.0]).double())  # shares of S: .4 .2 .1 ..; of S^2: 2/3, 1/6, ..
    none = (torch.zeros(6, 0).double(), False)
    for share, power, m in ((0.5, 2, 1), (0.8, 2, 1), (0.85, 2, 2), (0.65, 1, 2), (0.35, 1, 1)):
        basis, is_free = inflora.dual_gpm(cov, none, share, power)
        assert (basis.shape[1], is_free) == (m, False)
    basis, is_free = inflora.dual_gpm(cov, none, 0.95, 1)  # .4 .6 .7 .8 .9 are below it
    assert (basis.shape[1], is_free) == (1, True), "five of six directions are in use: the one that is free is kept"
    a = inflora.design(cov, none, 2)
    torch.testing.assert_close(a.abs(), torch.eye(6).double()[:2] / math.sqrt(3))


def test_where_no_direction_is_free_the_term_is_nothing():
    cov = covariance(1)
    for kept in ((torch.zeros(12, 0).double(), True), (torch.eye(12).double(), False)):
        assert torch.equal(inflora.design(cov, kept, 3), torch.zeros(3, 12).double())
        basis, is_free = inflora.dual_gpm(cov, kept, 1.0, 2)
        assert is_free and basis.shape == (12, 0)


def test_inflora_rate_falls_once_an_epoch():
    rates = [inflora.falling(Place(0, step, 12, step), 3) for step in (0, 3, 4, 8, 11)]
    assert rates == pytest.approx([1, 1, math.cos(0.2475 * math.pi), math.cos(0.495 * math.pi), math.cos(0.495 * math.pi)])
    assert rates[-1] == pytest.approx(0.0157, abs=1e-4) and inflora.falling(Place(0, 2, 5, 2), 1) == 1


def qkv_inputs(learner, data):
    """Inputs of every block's attention over all training images [N, D], by a hook of the test's own."""
    seen = {i: [] for i in learner.layers}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, i=i: seen[i].append(args[0].flatten(0, 1)))
        for i, layer in learner.layers.items()
    ]
    with torch.no_grad(), learner.pet.off():
        for batch in data.test_batches(5):
            learner.model.features(batch.x)
    for hook in hooks:
        hook.remove()
    return {i: torch.cat(parts) for i, parts in seen.items()}


def test_inflora_designs_trains_and_adds(monkeypatch):
    """On images without augmentation: C by a loop, both terms one A, trained B, the sum in the weights, k and v unchanged."""
    options = ("learner.lr=0.05", "learner.energy=0.7")
    t, learner, runtime, pipeline, (first,) = learned("learner=inflora", *options, sizes=[2, 2, 2], experiences=1)
    x = {i: f.double() for i, f in qkv_inputs(learner, first.train).items()}
    again = learner.covariances(first, "again")
    for i, f in x.items():
        torch.testing.assert_close(again[i], sum(row[:, None] * row for row in f) / len(f), atol=1e-4, rtol=1e-4)
        m, n = learner.kept[i][0], inflora.dual_gpm(again[i], (torch.zeros(32, 0).double(), False), 0.7, 2)[0]
        torch.testing.assert_close(m @ m.T, n @ n.T, atol=1e-3, rtol=0)
    start = {name: weight.clone() for name, weight in learner.weights.items()}
    before, kept, seen = detached(learner.model.state_dict()), dict(learner.kept), {}
    real = inflora.fit

    def spy(*args, **options):
        log = real(*args, **options)
        seen.update(learner.pet.state())
        batch = first.train.batch(range(6)).x
        seen["unmerged"] = learner.model.features(batch).detach()
        return log

    monkeypatch.setattr(inflora, "fit", spy)
    second = t.learn(learner, runtime, pipeline, 1)
    for name, weight in learner.weights.items():
        a, b = seen[f"{name}/a"], seen[f"{name}/b"]
        assert torch.equal(a, seen[name.split("/")[0] + "/k/a"]) and b.abs().max() > 0
        torch.testing.assert_close(weight, start[name] + b @ a)
        m, is_free = kept[name.split("/")[0]]
        assert not is_free and (a.double() @ m).abs().max() < 1e-6
        inside = drawn(5, m.shape[1]) @ m.T  # inputs that lie in the directions in use
        torch.testing.assert_close(inside @ weight.double().T, inside @ start[name].double().T, atol=1e-5, rtol=0)
    changed = {name for name, value in learner.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"net.blocks.{i}.attn.qkv.weight" for i in learner.layers}
    for i in learner.layers:
        assert torch.equal(learner.layers[i].weight[:32], before[f"net.blocks.{i}.attn.qkv.weight"][:32]), "queries stay"
    with torch.no_grad(), learner.pet.off():
        torch.testing.assert_close(
            learner.model.features(first.train.batch(range(6)).x), seen["unmerged"], atol=1e-5, rtol=1e-4
        )
    assert second.index == 1 and learner.head.widths == [2, 2]
