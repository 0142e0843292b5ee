"""Regions of weights: FISH masks and grafts against naive versions; what moves and what stays; what is refused."""

import math

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, mlp
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError, declared
from clbench.learners import sparse_mask
from clbench.learners.sparse_mask import SparseMask, region, relaxed
from clbench.testing.contract import Trial, small_stream

CAN = Capabilities(needs_random_access=True)


def trial(kind="class_incremental", epochs=3, **options):
    stream = small_stream(kind, sizes=[2, 2, 2], budget={"epochs": epochs})
    given = {"share": 0.1, "lr": 0.1, "backbone_lr": 0.1, "batch_size": 8, "momentum": 0.0} | options
    return SmallTrial(lambda: mlp(6, 5), SparseMask, scenario=stream, can=CAN, **given)


def weights_of(learner):
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def test_regions_by_hand():
    values = {"a": torch.tensor([[3.0, 1.0], [2.0, 2.0]]), "b": torch.tensor([2.0, 5.0])}
    assert [mask.tolist() for mask in region(values, 0.5).values()] == [[[True, False], [True, False]], [False, True]]
    assert sum(int(mask.sum()) for mask in region(values, 0.01).values()) == 1, "one at least"
    base, s = torch.tensor([True, False, True]), torch.tensor([0.0, 0.0, 12.0])
    part = [1 / (1 + math.exp(10 - x)) for x in (0.0, 0.0, 12.0)]
    np.testing.assert_allclose(relaxed(base, s).numpy(), [1 - part[0], part[1], 1 - part[2]], rtol=1e-4)


def test_fisher_information_of_single_samples():
    t = trial(samples=5)
    learner, learn, pipeline = t.begin()
    learn(0)
    experience = t.open(1, pipeline)
    learner.runtime.begin(1, len(experience.train))
    sparse_mask.grow(learner.head, experience, lambda: learner.runtime.generator("head"))
    rows = np.sort(torch.randperm(len(experience.train), generator=learner.runtime.generator("fisher")).numpy()[:5])
    naive = {name: torch.zeros_like(p) for name, p in learner.model.named_parameters()}
    for row in rows:
        batch = experience.train.batch([row])
        loss = F.cross_entropy(learner.head(learner.model.features(batch)), batch.y)
        for (name, _), g in zip(
            learner.model.named_parameters(), torch.autograd.grad(loss, list(learner.model.parameters())), strict=True
        ):
            naive[name] += g.square() / 5
    for name, found in learner.information(experience).items():
        np.testing.assert_allclose(found.numpy(), naive[name].numpy(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_fish_mask_moves_its_region_alone(monkeypatch, momentum):
    t = trial(momentum=momentum, weight_decay=0.1)
    learner, learn, _ = t.begin()
    found, real = [], SparseMask.information
    monkeypatch.setattr(SparseMask, "information", lambda self, e: found.append(real(self, e)) or found[-1])
    for i in range(3):
        before = weights_of(learner)
        learn(i)
        after, chosen = weights_of(learner), region(found[-1], 0.1)
        flat = torch.cat([value.flatten() for value in found[-1].values()])
        least = flat.sort(descending=True).values[round(0.1 * len(flat)) - 1]
        for name, mask in chosen.items():
            assert torch.equal(after[name][~mask], before[name][~mask]), "weights outside stay to the last bit"
            assert (found[-1][name][mask] >= least).all() and torch.equal(learner.regions.get(name, i), mask)
        assert any(not torch.equal(after[name], before[name]) for name in chosen)


def test_a_graft_is_after_inside_and_before_outside(monkeypatch):
    """Of the region that the mask's training gives, which starts with the largest movements."""
    kept, real = [], SparseMask.trained_mask

    def spied(self, experience, before, after):
        log, chosen = real(self, experience, before, after)
        kept.append((before, after, chosen))
        return log, chosen

    monkeypatch.setattr(SparseMask, "trained_mask", spied)
    t = trial(how="graft", mask_lr=0.0)
    learner, learn, _ = t.begin()
    for i in range(2):
        learn(i)
        before, after, chosen = kept[-1]
        movement = {name: (after[name] - before[name]).abs() for name in before}
        assert all(torch.equal(chosen[name], mask) for name, mask in region(movement, 0.1).items()), (
            "an untrained mask is its base"
        )
        for name, p in weights_of(learner).items():
            assert torch.equal(p, torch.where(chosen[name], after[name], before[name]))
            assert torch.equal(learner.regions.get(name, i), chosen[name])


def test_the_mask_follows_the_gradient(monkeypatch):
    """One step by hand: d gamma / d s = (1 - 2 B) sigmoid'(s - 10); a trained mask answers better than its base."""
    t = trial(how="graft", epochs=6, mask_epochs=1, mask_lr=1e12, batch_size=64)
    learner, _, pipeline = t.begin()
    experience = t.open(0, pipeline)
    learner.runtime.begin(0, len(experience.train))
    sparse_mask.grow(learner.head, experience, lambda: learner.runtime.generator("head"))
    before = weights_of(learner)
    learner.train(experience, before, None, 5)
    after = weights_of(learner)
    base = region({name: (after[name] - before[name]).abs() for name in before}, 0.1)
    small = 1 / (1 + math.exp(10))
    theta = {n: (before[n] + torch.where(base[n], 1 - small, small) * (after[n] - before[n])).requires_grad_() for n in before}
    batch = experience.train.batch(np.arange(len(experience.train)))
    z = learner.head(torch.func.functional_call(learner.model, theta, (batch.x,)))
    grads = torch.autograd.grad(F.cross_entropy(z, batch.y), list(theta.values()))
    naive = {}
    for (name, mask), g in zip(base.items(), grads, strict=True):
        slope = torch.where(mask, -1.0, 1.0) * small * (1 - small)
        naive[name] = relaxed(mask, -1e12 * g * (after[name] - before[name]) * slope) >= 0.5
    _, chosen = learner.trained_mask(experience, before, after)
    assert any(not torch.equal(chosen[name], base[name]) for name in base), "the rate moves the mask"
    agree = sum(int((chosen[n] == naive[n]).sum()) for n in base) / sum(mask.numel() for mask in base.values())
    assert agree > 0.99


def test_overlap_by_hand():
    learner, *_ = trial().begin()
    (name, first), *rest = learner.model.named_parameters()
    none = {other: torch.zeros_like(p, dtype=torch.bool) for other, p in rest}
    masks = [torch.zeros(first.numel(), dtype=torch.bool) for _ in range(3)]
    for mask, places in zip(masks, ([0, 1, 2, 3], [2, 3, 4, 5], [1, 2, 3, 7]), strict=True):
        mask[places] = True
    masks = [mask.view_as(first) for mask in masks]
    assert learner.overlap({name: masks[0], **none}) == 0
    for i, expected in ((0, 0.5), (1, 0.75)):
        for key, mask in {name: masks[i], **none}.items():
            learner.regions.put(key, i, mask)
        assert learner.overlap({name: masks[i + 1], **none}) == expected


def test_the_same_data_again_have_the_same_region():
    """Overlap of a task with itself is far above that of chance, which is the share."""
    t = trial(epochs=2, backbone_lr=1e-4)
    learner, learn, pipeline = t.begin()
    learn(0)
    experience = t.open(0, pipeline)
    learner.runtime.begin(0, len(experience.train))
    assert learner.overlap(region(learner.information(experience), 0.1)) > 0.6


def test_capabilities_and_refusals():
    for words, passes, task in (("", 1, False), ("graft", 3, False), ("per_task", 1, True)):
        options = {"graft": {"how": "graft", "mask_epochs": 2}, "per_task": {"head": "per_task"}}.get(words, {})
        can = declared(SparseMask, {"_target_": "x", **options})
        assert (can.needs_passes, can.needs_task_id, can.needs_random_access) == (passes, task, True)
    for words, said in {
        "learner.how=sift": "unknown learner.how=sift: choose fish or graft",
        "learner.share=0": r"learner\.share must lie in \(0, 1\]",
        "learner.samples=0": r"learner\.samples must be a whole number from 1",
        "learner.mask_epochs=0": r"learner\.mask_epochs must be a whole number from 1",
        "learner.mask_epochs=2": r"learner\.mask_epochs=2 has no effect with learner\.how=fish",
        "learner.how=graft learner.samples=9": r"learner\.samples=9 has no effect with learner\.how=graft",
        "learner.how=graft learner.epochs=1": r"learner\.mask_epochs=1 leave no pass to train in",
    }.items():
        (config,) = compose(["learner=sparse_mask", *words.split()])
        with pytest.raises(UserError, match=said):
            Trial(config, small_stream(), Capabilities()).start()
