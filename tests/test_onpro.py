"""OnPro: its views, losses, shares of pairs and draws against naive versions, and what it minimises."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_online import online
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.learners import onpro
from clbench.streams import rng
from clbench.streams.images.pixels import make_profile
from clbench.training.contrastive import equilibrium, grey, instance_loss, mild_view

TINY = ("model=mlp", "model.kwargs.hidden=[24,16]")


def test_turned_copies():
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    assert torch.equal(onpro.turned(x, 1), x)
    four = onpro.turned(x, 4)
    for turn in range(4):
        np.testing.assert_array_equal(four[2 * turn : 2 * turn + 2], np.rot90(x.numpy(), turn, (2, 3)))
    sixteen = onpro.turned(x, 16)
    halves = {}
    for a, b in itertools.product((False, True), repeat=2):
        picture = x.numpy().copy()
        for flip, part in ((a, slice(0, 2)), (b, slice(2, 4))):
            if flip:
                picture[..., part] = picture[..., part][:, :, ::-1, ::-1]
        halves[a, b] = picture
    expected = [np.rot90(picture, turn, (2, 3)) for turn in range(4) for picture in halves.values()]
    np.testing.assert_array_equal(sixteen, np.concatenate(expected))
    assert torch.equal(sixteen[:2], x) and len({image.numpy().tobytes() for image in sixteen}) == 32


@pytest.mark.parametrize("alone", [True, False])
def test_instance_loss(alone):
    made = np.random.default_rng(0)
    s, y = made.normal(size=(10, 10)), np.array([0, 1, 0, 2, 1])
    classes, total = np.tile(y, 2), 0.0
    for i in range(10):
        others = [j for j in range(10) if j != i or not alone]
        log_p = {j: s[i, j] - np.log(sum(np.exp(s[i, o]) for o in others)) for j in others}
        own = [log_p[j] for j in others if classes[j] == classes[i]]
        total += -np.mean(own) if not alone else -2 * np.mean(own) - log_p[(i + 5) % 10]
    found = instance_loss(torch.from_numpy(s), torch.from_numpy(y), alone)
    assert float(found) == pytest.approx(total / 10)


def test_equilibrium():
    made = np.random.default_rng(1)
    views, y = made.normal(size=(2, 6, 4)), np.array([3, 0, 3, 5, 0, 3])
    means = [[view[y == c].mean(0) for c in (0, 3, 5)] for view in views]
    z = [m / np.linalg.norm(m) for m in itertools.chain(*means)]
    total = 0.0
    for i in range(6):
        other = sum(math.exp(z[i] @ z[j] / 0.5) for j in range(6) if j != i)
        total -= z[i] @ z[(i + 3) % 6] / 0.5 - math.log(other)
    loss, classes, prototypes = equilibrium(tuple(torch.from_numpy(views)), torch.from_numpy(y), 0.5)
    assert float(loss) == pytest.approx(total / 6) and classes.tolist() == [0, 3, 5]
    np.testing.assert_allclose(prototypes, (np.array(means[0]) + np.array(means[1])) / 2)
    one = equilibrium(tuple(torch.from_numpy(views)), torch.zeros(6), 0.5)[0]
    assert float(one) == 0.0, "one class finds itself"


def test_shares_follow_the_distances():
    prototypes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 4.0], [0.2, 0.0]])
    weight = np.exp([1 / math.dist(a, b) for a, b in itertools.combinations(prototypes.tolist(), 2)])
    weight /= weight.sum()
    for number in (1, 5, 40, 1001):
        found = np.array(onpro.shares(prototypes, number, 7))
        assert found.sum() == number and (found >= 0).all()
        assert np.abs(found - weight * number).max() <= 1.5
    assert np.argmax(onpro.shares(prototypes, 100, 7)) == 2, "0 and 3 are the nearest"
    assert sum(onpro.shares(torch.zeros(3, 2), 5, 3)) == 5


def test_mild_views():
    profile = make_profile("unit", 8)
    x = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one = mild_view(x, 5, profile, mirror=False)
    assert one.shape == x.shape and float(one.min()) >= 0 and float(one.max()) <= 1
    is_grey = (one - one.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-6
    assert 0.18 < float(is_grey.float().mean()) < 0.32
    torch.testing.assert_close(one[is_grey].mean(1).mean(), grey(x[is_grey]).mean(), atol=0.03, rtol=0)
    assert torch.equal(mild_view(x, 5, profile, mirror=False)[:7], one[:7]), "a function of the key"
    flipped = mild_view(x, 5, profile, mirror=True)
    assert 0.4 < float((flipped == one).flatten(1).all(1).float().mean()) < 0.6
    flat = torch.full((4, 3, 8, 8), 0.3)
    torch.testing.assert_close(mild_view(flat, 1, profile), flat, atol=1e-3, rtol=0)


def pro(*options, experiences=1, **stream):
    t = online("learner=onpro", "learner.batch_size=6", "learner.replay=8", *TINY, *options, **stream)
    learner, its_runtime, pipeline = t.start()
    for i in range(experiences):
        t.learn(learner, its_runtime, pipeline, i)
    return learner, t, its_runtime, pipeline


def test_draws_are_ordinary_samples_and_pairs_of_near_classes():
    learner, *_ = pro("learner.base_rate=0.25", "learner.replay=8")
    assert learner.draw_size() == 8 and len(learner.choose(1, mixes=False)) == 8
    learner.prototypes_KP.zero_()
    assert len(learner.choose(1, mixes=True)) == 8, "no prototypes, no pairs"
    learner.prototypes_KP[0, 0], learner.prototypes_KP[1, 0], learner.prototypes_KP[2, 1] = 1.0, 1.001, 9.0
    rows = learner.choose(1, mixes=True)
    assert len(rows) == 8 + 2 * 6 and len(set(rows[:8].tolist())) == 8
    assert (learner.memory.y[rows[8:14]] == 0).all() and (learner.memory.y[rows[14:]] == 1).all()
    assert rows.tolist() == learner.choose(1, mixes=True).tolist() != learner.choose(2, mixes=True).tolist()


def test_mixing():
    made = torch.Generator().manual_seed(0)
    x, y = torch.randn(100 + 2 * 60, 3, 2, 2, generator=made), torch.arange(220)
    mixed, a, b, lam = onpro.mixed(x, y, 100, 9, 1.0, 0.6)
    torch.testing.assert_close(mixed, (1 - lam)[:, None, None, None] * x[a] + lam[:, None, None, None] * x[b])
    assert a[40:].tolist() == list(range(100, 160)) and b[40:].tolist() == list(range(160, 220))
    assert sorted(a[:40].tolist()) == sorted(b[:40].tolist()) and int(a[:40].max()) < 100 and len(set(a[:40].tolist())) == 40
    assert float(lam[:40].max()) < 0.6 < float(lam[40:].max()) and abs(float(lam[40:].mean()) - 0.5) < 0.15
    edges = ((lam[40:] < 0.1) | (lam[40:] > 0.9)).float().mean()
    assert float(edges) > 0.25, "Beta(0.4, 0.4) has its mass at both ends"
    mixed, a, _, lam = onpro.mixed(x, y, 100, 9, 0.0, 0.6)
    assert not lam.any() and torch.equal(mixed, x[a])


@pytest.mark.parametrize("views", [1, 4])
def test_what_onpro_minimises(monkeypatch, views):
    """Loss of a step of the second experience, from its parts, with the views that the learner draws."""
    learner, t, its_runtime, pipeline = pro(f"learner.views={views}", "learner.mix_p=1", "learner.base_rate=0.5")
    found, real = [], onpro.fit

    def spy(runtime, name, own, groups, loss, batches, recipe, **hooks):
        def noted(batch):
            old = own.prototypes_KP.clone()
            value = loss(batch)
            if batch.old is not None and not found:
                found.append((batch, old, value.detach().clone(), copy.deepcopy(own)))
            return value

        return real(runtime, name, own, groups, noted, batches, recipe, **hooks)

    monkeypatch.setattr(onpro, "fit", spy)
    t.learn(learner, its_runtime, pipeline, 1)
    batch, old, value, own = found[0]
    profile, key, m = t.open(1, pipeline).train.pipeline.profile, batch.key, 8
    own.prototypes_KP = old
    assert len(batch.old) > m, "some pairs were drawn"
    y, x = batch.new.y, batch.new.x

    def parts(x, key):
        copies = onpro.turned(x, views)
        f = own.model.features(torch.cat([copies, mild_view(copies, rng.key(key, "view"), profile, True)]))
        p, f = F.normalize(own.projector(f), dim=1), F.normalize(f, dim=1)
        return p, (p @ f.T + p @ p.T) / 0.07  # 16 features: the window is all of them

    p, s = parts(x, rng.key(key, "new"))
    copies = torch.cat([y + 100 * r for r in range(views)])
    total = instance_loss(s, copies, True) + equilibrium((p[:6], p[6 * views : 6 * views + 6]), y, 0.5)[0]
    mixed, a, b, lam = onpro.mixed(batch.old.x, batch.old.y, m, key, 1.0, 0.6)
    ids = torch.tensor([100 + i if lam[i] > 0 else int(a[i]) for i in range(m)])
    _, s = parts(mixed, rng.key(key, "old"))
    total = total + instance_loss(s, torch.cat([ids + 1000 * r for r in range(views)]), False)
    logits = own.head(own.model.features(mild_view(mixed, rng.key(key, "answer"), profile, True))).log_softmax(1)
    rows = torch.arange(m)
    total = total - ((1 - lam) * logits[rows, a] + lam * logits[rows, b]).mean()
    pair = torch.cat([batch.old.x[:m], mild_view(batch.old.x[:m], rng.key(key, "equilibrium"), profile, True)])
    p = F.normalize(own.projector(own.model.features(pair)), dim=1)
    loss, classes, prototypes = equilibrium((p[:m], p[m:]), batch.old.y[:m], 0.5)
    torch.testing.assert_close(value, total + loss)
    assert classes.tolist() and torch.isfinite(prototypes).all()


def test_onpro_first_experience_and_what_may_be_hidden():
    """No pairs and no cross-entropy of the memory before the second experience; `second_batch` needs no boundaries."""
    t = online("learner=onpro", *TINY)
    learner, its_runtime, pipeline = t.start()
    first, second = (SimpleNamespace(index=i, train=t.open(i, pipeline).train) for i in (0, 1))
    its_runtime.begin(0, 36)
    assert not onpro.Feedback(learner, first).mixes and onpro.Feedback(learner, second).mixes
    learner.start = "second_batch"
    assert onpro.Feedback(learner, first).mixes
    assert onpro.OnPro.capabilities_of().needs_boundaries
    assert not onpro.OnPro.capabilities_of(start="second_batch").needs_boundaries


def test_prototypes_are_those_of_the_last_draw():
    learner, *_ = pro(experiences=2, sizes=[2, 1], num_classes=3)
    drawn = {int(c) for c in np.unique(learner.memory.y)}
    held = {c for c in range(3) if bool(learner.prototypes_KP[c].any())}
    assert held and held <= drawn | {0, 1, 2} and learner.prototypes_KP.shape == (3, 16)
    assert float(learner.prototypes_KP.norm(dim=1).max()) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("learner.views=2", "learner.views=2"),
        ("learner.start=first", "learner.start=first"),
        ("learner.base_rate=1.5", "learner.base_rate=1.5"),
        ("learner.ins_t=0", "learner.ins_t=0"),
        ("learner.replay=0", "learner.replay=0"),
    ],
)
def test_bad_options_are_one_line(words, line):
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as caught:
        online("learner=onpro", *TINY, words).start()
    assert "\n" not in str(caught.value)
