"""What the rehearsal methods and the regularisers minimise, against naive versions; their variants under the contract."""

import copy
import itertools
import sys

import pytest
import torch
from conftest import NARROW
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError
from clbench.streams.images.data import shuffled
from clbench.testing.contract import Trial, check_learner, repeated_stream, small_stream
from clbench.training.fisher import fisher_per_sample

VARIANTS = [
    ("l2_reg", "learner.reference=pretrained"),
    ("ewc", "learner.fisher=batch"),
    ("icarl", "learner.answer=linear"),
    ("bic", "learner.double_softmax=true"),
]


class Stopped(Exception):
    """The loss was seen; nothing needs training."""


@pytest.mark.parametrize(("name", "option"), VARIANTS)
def test_contract_of_variants(name, option):
    (config,) = compose([f"learner={name}", *NARROW, option])
    assert [f"{check}: {message}" for check, ok, message in check_learner(config) if not ok] == []


def trial(*overrides, scenario=None, **stream):
    (config,) = compose(list(overrides))
    return Trial(config, scenario or small_stream(**stream), Capabilities(stores_exemplars=True))


class Seen:
    """The loss of one `fit` call in an experience after the first, with all that a naive version needs.

    `old` is the learner as that experience found it; `new` is moved away from it before the loss is taken.
    """

    def __init__(self, monkeypatch, *overrides, name="train", scenario=None, prepare=lambda learner: None):
        t = trial(*overrides, scenario=scenario, sizes=[3, 2, 1])
        self.new, runtime, pipeline = t.start()
        t.learn(self.new, runtime, pipeline, 0)
        prepare(self.new)
        self.old = copy.deepcopy(self.new)
        module = next(m for kind in type(self.new).__mro__ if hasattr(m := sys.modules[kind.__module__], "fit"))
        real = module.fit

        def spy(runtime, called, learner, groups, loss, batches, recipe):
            if called != name:
                return real(runtime, called, learner, groups, loss, batches, recipe)
            with torch.no_grad():
                for p in learner.model.parameters():
                    p.add_(0.01 * p.sign() * p.requires_grad)
            self.batch, self.recipe, self.groups = batches(0), recipe, groups
            self.loss = loss(self.batch).detach()
            raise Stopped

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(module, "fit", spy)
            t.learn(self.new, runtime, pipeline, 1)

    def z(self, learner, batch=None):
        """Logits [B, K]."""
        with torch.no_grad():
            return learner.head(learner.model.eval().features((batch or self.batch).x))

    def ce(self, local=False):
        """Cross-entropy over all classes, or over those of the second experience."""
        z, y = self.z(self.new), self.batch.y
        return F.cross_entropy(z[:, 3:], y - 3) if local else F.cross_entropy(z, y)

    def kd(self):
        """The cross-entropy of softened old answers, T = 2, without T^2."""
        p, q = (self.z(self.old) / 2).softmax(1), (self.z(self.new)[:, :3] / 2).softmax(1)
        return -(p * q.log()).sum(1).mean()

    def gap(self, weigh=lambda name: 1.0):
        """Half the weighted squared distance of the two networks."""
        old, new = self.old.model.state_dict(), self.new.model.state_dict()
        return 0.5 * sum((weigh(name) * (new[name] - old[name]).square()).sum() for name in new)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_loss_of_l2_and_ewc(monkeypatch):
    s = Seen(monkeypatch, "learner=l2_reg", "learner.strength=0.7")
    assert s.gap() > 0.1
    same(s.loss, s.ce(local=True) + 0.7 * s.gap())
    s = Seen(monkeypatch, "learner=ewc", "learner.strength=1e5")
    fisher = s.old.fisher
    assert 1e5 * s.gap(lambda name: fisher.get(name, 0.0)) > 0.01
    same(s.loss, s.ce(local=True) + 1e5 * s.gap(lambda name: fisher.get(name, 0.0)))


def test_loss_of_the_distilling_regularisers(monkeypatch):
    s = Seen(monkeypatch, "learner=pred_kd", "learner.strength=0.7")
    same(s.loss, s.ce(local=True) + 0.7 * 4 * s.kd())
    s = Seen(monkeypatch, "learner=lwf")
    same(s.loss, s.ce(local=True) + 3 * s.kd())
    s = Seen(monkeypatch, "learner=feat_kd", "learner.strength=0.7")
    with torch.no_grad():
        f, old = (learner.model.eval().features(s.batch.x) for learner in (s.new, s.old))
    same(s.loss, s.ce(local=True) + 0.7 * (f - old).square().sum(1).mean())


def test_loss_of_icarl_and_wa(monkeypatch):
    s = Seen(monkeypatch, "learner=icarl", "learner.batch_size=36")
    assert 0 < s.batch.replayed < 36 and len(s.batch) == 36, "24 new and 12 stored samples, shuffled together"
    same(s.loss, s.ce() + s.kd())
    s = Seen(monkeypatch, "learner=wa", "learner.batch_size=36")
    assert s.batch.replayed == 12
    same(s.loss, (1 - 3 / 5) * s.ce() + 3 / 5 * s.kd())


def test_loss_of_bic_uses_the_corrections(monkeypatch):
    def prepare(learner):
        with torch.no_grad():
            learner.bias.rows[0].copy_(torch.tensor([1.5, 0.2]))

    s = Seen(monkeypatch, "learner=bic", "learner.batch_size=36", prepare=prepare)
    z, old = s.z(s.new), 1.5 * s.z(s.old) + 0.2
    z[:, :3] = 1.5 * z[:, :3] + 0.2
    kd = -((old / 2).softmax(1) * (z[:, :3] / 2).log_softmax(1)).sum(1).mean()
    same(s.loss, (1 - 3 / 5) * F.cross_entropy(z, s.batch.y) + 3 / 5 * kd)


@pytest.mark.parametrize("double", ["false", "true"])
def test_loss_of_bics_second_stage(monkeypatch, double):
    s = Seen(monkeypatch, "learner=bic", f"learner.double_softmax={double}", "learner.lr=0.1", name="bias")
    assert [p.shape for group in s.groups for p in group["params"]] == [(2,)] and s.groups[0]["params"][0] is s.new.bias.rows[1]
    z = s.z(s.new)
    same(s.loss, F.cross_entropy(z.softmax(1) if double == "true" else z, s.batch.y))
    assert sorted(s.batch.y.tolist()) == [0, 1, 2, 3, 4], "one of each class was set aside"


def test_loss_of_derpp(monkeypatch):
    s = Seen(monkeypatch, "learner=derpp", "learner.alpha=0.7", "learner.beta=0.3", "learner.replay=5")
    dark, labelled = s.batch.dark, s.batch.labelled
    assert len(dark) == len(labelled) == 5 and dark.ids.tolist() != labelled.ids.tolist()
    assert dark.ids.tolist() == [s.old.memory.ids[row] for row in s.batch.rows]
    squares = (s.z(s.new, dark)[:, :3] - s.old.logits_MK[s.batch.rows]).square()
    first = F.cross_entropy(s.z(s.new, s.batch.new), s.batch.new.y)
    assert float(squares.mean()) > 1e-3
    same(s.loss, first + 0.7 * squares.mean() + 0.3 * F.cross_entropy(s.z(s.new, labelled), labelled.y))


@pytest.mark.parametrize("name", ["bic", "wa"])
def test_an_experience_without_new_classes_still_teaches_labels(monkeypatch, name):
    s = Seen(monkeypatch, f"learner={name}", "learner.batch_size=24", scenario=repeated_stream(2))
    same(s.loss, 0.5 * s.ce() + 0.5 * s.kd())


def test_batch_fisher_is_merged_by_the_share_of_known_classes():
    options = ("learner=ewc", "learner.fisher=batch", "learner.lr=0", "learner.backbone_lr=0", "learner.batch_size=12")
    t = trial(*options, sizes=[3, 2, 1])
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    learner.fisher = {name: torch.full_like(f, 2.0) for name, f in learner.fisher.items()}
    second = t.learn(learner, runtime, pipeline, 1)
    weight, naive = learner.model.net.blocks[3].attn.qkv.weight, 0.0
    batches = shuffled(second.train, 12, 1, runtime.key("fisher"))
    for i in range(2):
        loss = F.cross_entropy(learner.head(learner.model.features(batches(i))), batches(i).y)
        naive = naive + torch.autograd.grad(loss, weight)[0].square() / 2
    name = "net.blocks.3.attn.qkv.weight"
    assert (naive > 1e-4).any(), "nothing to clip"
    same(learner.fisher[name], 3 / 5 * 2.0 + 2 / 5 * naive.clamp_max(1e-4))


def test_per_sample_fisher_of_a_residual_network():
    t = trial("learner=ewc", "model=resnet32", "learner.trainable=all", sizes=[2, 2], num_classes=4, limit_train=3)
    learner, runtime, pipeline = t.start()
    first = t.learn(learner, runtime, pipeline, 0)
    batch = first.train.batch([0, 5])
    learner.model.eval()
    naive = 0.0
    for i in range(2):
        loss = F.cross_entropy(learner.head(learner.model.features(batch.x[i : i + 1])), batch.y[i : i + 1])
        naive = naive + torch.autograd.grad(loss, learner.model.net.conv1.weight)[0].square()
    found = fisher_per_sample(learner.model, learner.head, batch.x, batch.y, first.classes)
    torch.testing.assert_close(found["net.conv1.weight"], naive, rtol=1e-3, atol=1e-8)
    assert set(learner.fisher) == set(found)


def test_a_class_that_shrinks_keeps_the_front_of_its_herded_list():
    t = trial("learner=icarl", sizes=[3, 1, 2])
    learner, runtime, pipeline = t.start()
    lists = []
    for i in range(3):
        t.learn(learner, runtime, pipeline, i)
        lists.append([learner.memory.ids[learner.memory.y == c].tolist() for c in range(3)])
    for earlier, later in itertools.pairwise(lists):
        for a, b in zip(earlier, later, strict=True):
            assert 0 < len(b) < len(a) and a[: len(b)] == b


def test_bic_leaves_stage_two_out_where_it_cannot_be_balanced():
    for memory, limit in ((3, 12), (12, 1)):  # one stored sample a class; one new sample a class
        t = trial("learner=bic", f"learner.memory={memory}", sizes=[3, 2], num_classes=5, limit_train=limit)
        learner, runtime, pipeline = t.start()
        t.learn(learner, runtime, pipeline, 0)
        t.learn(learner, runtime, pipeline, 1)
        assert learner.bias.rows[1].tolist() == [1.0, 0.0]
        assert runtime.used_new == 2 * 2 * limit, "all new samples go into stage 1"


def test_icarl_without_exemplars_says_so():
    t = trial("learner=icarl", "learner.memory=0")
    learner, runtime, pipeline = t.start()
    with pytest.raises(UserError, match=r"learner\.memory"):
        t.learn(learner, runtime, pipeline, 0)


@pytest.mark.parametrize(("name", "part"), [("ewc", "fisher"), ("derpp", "logits_MK"), ("icarl", "means_KD")])
def test_a_restored_state_goes_to_the_device_of_the_run(name, part):
    t = trial(f"learner={name}")
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    state = copy.deepcopy(learner.state_dict())
    fresh, its_runtime, _ = t.start()
    its_runtime.device = torch.device("meta")  # stands for an accelerator; a journal's tensors come back on the CPU
    fresh.load_state_dict(state)
    value = getattr(fresh, part)
    assert {v.device.type for v in (value.values() if isinstance(value, dict) else [value])} == {"meta"}
