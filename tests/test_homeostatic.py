"""Homeostatic networks: the decision and the rate against a plain loop; what is refused; the stream that they are for."""

import numpy as np
import pytest
import torch
from test_online import online
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.learners import homeostatic
from clbench.learners.homeostatic import changed, effect
from clbench.streams.images.data import ImageBatch
from clbench.training.state import fingerprint

OPTIONS = ("learner.recent=6", "learner.batch_size=6", "learner.lr=0.05", "learner.step=0.4", "learner.augment=none")


def started(*options, **stream):
    t = online("learner=homeostatic", *OPTIONS, *options, **stream)
    return t, *t.start()


def test_effects_by_hand():
    assert [effect(c) for c in range(4)] == [-1, 1, -1, 1]
    assert changed(0.3, 0.1, 1) == 0.4 and changed(0.3, 0.1, 2) == pytest.approx(0.2)
    assert changed(0.05, 0.1, 0) == 1e-8 and changed(1e-8, 0.1, 3) == pytest.approx(0.1)


def test_a_decision_by_hand():
    """Imagined networks are copies; the rate goes where the label says, whatever was predicted."""
    t, learner, runtime, pipeline = started()
    t.learn(learner, runtime, pipeline, 0)
    params = [p for module in (learner.model, learner.head) for p in module.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(1)
    recent = ImageBatch.of(torch.randn(6, 3, 32, 32, generator=g), torch.tensor([0, 1, 2, 0, 1, 2]))
    before, seen = fingerprint([p.detach() for p in params]), set()
    for seed in range(6):
        for y in range(3):
            g = torch.Generator().manual_seed(seed)
            new = ImageBatch.of(torch.randn(3, 3, 32, 32, generator=g), torch.tensor([y, 0, 0]))
            rate = learner.rate = 0.05 + seed
            learner.model.eval()
            z = learner.head(learner.model.features(new.select(torch.tensor([0]))))
            grads = torch.autograd.grad(F.cross_entropy(z, torch.tensor([y])), params)
            right = []
            for one in (rate, changed(rate, learner.step, int(z.argmax()))):
                kept = [p.detach().clone() for p in params]
                with torch.no_grad():
                    for p, part in zip(params, grads, strict=True):
                        p -= one * (part / 3)
                    answers = learner.head(learner.model.features(recent)).argmax(1)
                    right.append(int((answers == recent.y).sum()))
                    for p, value in zip(params, kept, strict=True):
                        p.copy_(value)
            took = learner.decide(new, recent, params)
            assert took == (right[1] > right[0])
            assert learner.rate == (changed(rate, learner.step, y) if took else rate)
            seen.add(took)
    assert fingerprint([p.detach() for p in params]) == before and False in seen


def test_steps_follow_the_rate(monkeypatch):
    """Where every effect is taken, the rate goes up and down with the labels; the memory holds the newest samples."""
    found = []

    def decide(self, new, recent, params):
        assert len(recent) == 6 and recent.ids.tolist() == list(self.memory.ids)
        self.rate = changed(self.rate, self.step, int(new.y[0]))
        found.append((int(new.y[0]), self.rate))
        return True

    monkeypatch.setattr(homeostatic.Homeostatic, "decide", decide)
    t, learner, runtime, pipeline = started()
    t.learn(learner, runtime, pipeline, 0)
    t.learn(learner, runtime, pipeline, 1)
    rate = 0.05
    for y, value in found:
        rate = changed(rate, 0.4 * 0.05, y)
        assert value == pytest.approx(rate)
    assert len(found) > 3 and len({y for y, _ in found}) > 2, "both experiences"
    assert len(learner.memory) == 6, "the newest samples, of the last experience alone"
    newest = t.scenario.manifest.experiences[1].train[-6:]
    assert sorted(learner.memory.ids.tolist()) == sorted(newest.tolist())


def test_no_step_is_plain_online_training():
    """Against SGD by hand on the same batches."""
    t, learner, runtime, pipeline = started("learner.step=0")
    t.learn(learner, runtime, pipeline, 0)
    _, plain, other, pipeline = started("learner.step=0")
    experience = t.open(0, pipeline)
    other.begin(0, len(experience.train))
    homeostatic.grow(plain, experience)
    stream = homeostatic.OnlineStream(plain, experience, replay=None, trained=0)
    for step in range(stream.steps):
        plain.model.train()
        batch = stream.new(step)
        plain.head.see(batch.y)
        loss = F.cross_entropy(plain.head(plain.model.features(batch)), batch.y)
        loss.backward()
        with torch.no_grad():
            for p in (*plain.model.parameters(), *plain.head.parameters()):
                if p.grad is not None:
                    p -= 0.05 * p.grad
                    p.grad = None
    assert learner.rate == 0.05
    for a, b in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("learner.step=-1", "at least 0"),
        ("learner.lr=0", "above 0"),
        ("learner.recent=0", "whole number from 1"),
        ("learner.recent=13", "the scenario's budget allows 12"),
    ],
)
def test_refusals(words, said):
    with pytest.raises(UserError, match=said) as caught:
        started(words)
    assert "\n" not in str(caught.value)
