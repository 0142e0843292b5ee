"""Regularisers and rehearsal against naive versions of what their papers say."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clbench.config.compose import build, compose
from clbench.config.registry import check
from clbench.interfaces import Capabilities, UserError
from clbench.learners import regularised
from clbench.learners.bic import BiasLayer, balanced_rows
from clbench.learners.derpp import dark_error
from clbench.learners.icarl import exemplar_means
from clbench.learners.wa import align_weights
from clbench.models.heads import LinearHead
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import open_experience
from clbench.testing.contract import Trial, small_stream
from clbench.training import fisher
from clbench.training.distillation import feature_distillation, frozen_copy, prediction_distillation
from clbench.training.fit import Recipe
from clbench.training.losses import masked_cross_entropy
from clbench.training.state import detached


def trial(*overrides, **stream):
    (config,) = compose(list(overrides))
    return Trial(config, small_stream(**stream), Capabilities(stores_exemplars=True))


def learned(*overrides, experiences=2, **stream):
    t = trial(*overrides, **stream)
    learner, runtime, pipeline = t.start()
    seen = [t.learn(learner, runtime, pipeline, i) for i in range(experiences)]
    return t, learner, runtime, pipeline, seen


class Known(regularised.Regularised):
    """A penalty that says how many classes the head knew when it was asked for."""

    def penalty(self, experience):
        if experience.index == 0:
            return None
        known = self.head.num_classes
        return lambda batch, features, z: z.new_tensor(float(known)) + 0 * features.sum()


def test_the_loss_is_local_cross_entropy_and_the_weighted_penalty(monkeypatch):
    got = []

    def spy(runtime, name, learner, groups, loss, batches, recipe):
        batch = batches(0)
        z = learner.head(learner.model.features(batch))
        local = masked_cross_entropy(z, batch.y, "local", tuple(batch.y.unique().tolist()))
        got.append(float((loss(batch) - local).detach()))
        return {}

    monkeypatch.setattr(regularised, "fit", spy)
    t = trial("learner=lwf", sizes=[3, 2, 1])
    model, (_, runtime, pipeline) = build(t.config["model"]), t.start()
    learner = Known(model, runtime, Recipe(), 10.0, lr=0.1, backbone_lr=0.1, epochs=1, batch_size=48)
    for i in range(3):
        t.learn(learner, runtime, pipeline, i)
    assert got == pytest.approx([0.0, 30.0, 50.0], abs=1e-4), "strength x classes known before"


@pytest.mark.parametrize("words", ["lwf", "pred_kd", "feat_kd", "l2_reg", "l2_reg learner.reference=pretrained", "ewc"])
def test_each_penalty_starts_at_0_where_the_network_is_its_own_reference(words):
    """The first experience has none (but from the pre-trained weights); then distances are 0, distillation is the entropy."""
    name, *options = words.split()
    t = trial(f"learner={name}", *options, sizes=[3, 2, 1])
    learner, runtime, pipeline = t.start()
    first, second = (open_experience(t.scenario, i, pipeline) for i in range(2))
    assert (learner.penalty(first) is None) == (words != "l2_reg learner.reference=pretrained")
    if options:
        learner.head.grow(3, torch.Generator().manual_seed(0))
    else:
        t.learn(learner, runtime, pipeline, 0)
    penalty, batch = learner.penalty(second), second.train.batch(range(5))
    learner.head.grow(2, torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = learner.model.eval().features(batch)
        z = learner.head(features)
        p = (z[:, :3] / 2).softmax(1)
        entropy = -(p * p.log()).sum(1).mean() * {"lwf": 1, "pred_kd": 4}.get(name, 0)
        torch.testing.assert_close(penalty(batch, features, z), entropy, atol=1e-5, rtol=1e-4)
        for weight in fisher.trained(learner.model).values():
            weight.add_(0.01)
        for block in learner.head.blocks:
            block.weight.mul_(2)
        features = learner.model.features(batch)
        assert penalty(batch, features, learner.head(features)) > entropy + 1e-6, "and grows away from it"


def test_prediction_distillation_by_hand():
    z, old = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p, q = (old / 2).softmax(1)[0], (z / 2).softmax(1)[0]
    naive = -(p[0] * q[0].log() + p[1] * q[1].log())
    torch.testing.assert_close(prediction_distillation(z, old, 2.0, squared=False), naive)
    torch.testing.assert_close(prediction_distillation(z, old, 2.0), 4 * naive)
    z.requires_grad_()
    (g,) = torch.autograd.grad(prediction_distillation(z, old, 2.0), z)
    kl = 4 * F.kl_div((z / 2).log_softmax(1), (old / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(g, torch.autograd.grad(kl, z)[0])
    assert float(feature_distillation(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))) == 5.0


def test_a_frozen_copy_stays():
    _, learner, *_ = learned("learner=lwf", experiences=1)
    x = torch.randn(2, 3, 32, 32)
    teacher, head = frozen_copy(learner.model, learner.head)
    before = head(teacher.features(x))
    with torch.no_grad():
        for p in (*learner.model.parameters(), *learner.head.parameters()):
            p.add_(0.1)
    assert torch.equal(head(teacher.features(x)), before)
    assert not any(p.requires_grad for m in (teacher, head) for p in m.parameters())


def test_penalty_by_hand():
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.fill_(3.0)
    reference = {"weight": torch.tensor([[0.0, 0.0]]), "bias": torch.tensor([1.0])}
    assert float(fisher.quadratic_penalty(model, reference).detach()) == 0.5 * (1 + 4 + 4)
    weights = {"weight": torch.tensor([[2.0, 0.0]]), "bias": torch.tensor([10.0])}
    assert float(fisher.quadratic_penalty(model, reference, weights).detach()) == 0.5 * (2 + 0 + 40)


def test_fisher_is_the_sum_of_squares_of_single_gradients():
    _, learner, _, _, (e,) = learned("learner=ewc", experiences=1)
    model, head = learner.model.eval(), learner.head
    batch = e.train.batch(range(19))  # more than one chunk
    found = fisher.fisher_per_sample(model, head, batch.x, batch.y, [0, 1, 2])
    naive = {name: torch.zeros_like(p) for name, p in fisher.trained(model).items()}
    for i in range(19):
        model.zero_grad()
        F.cross_entropy(head(model.features(batch.x[i : i + 1]))[:, :3], batch.y[i : i + 1]).backward()
        for name, p in fisher.trained(model).items():
            naive[name] += p.grad.square()
    assert set(found) == {f"net.blocks.{i}.attn.qkv.{part}" for i in range(4) for part in ("weight", "bias")}
    for name in naive:
        torch.testing.assert_close(found[name], naive[name], atol=1e-7, rtol=1e-3)
    mean = fisher.fisher_per_batch(model, lambda b: F.cross_entropy(head(model.features(b)), b.y), batch)
    total = sum(float(f.sum()) for f in found.values()) / 19
    assert sum(float(f.sum()) for f in mean.values()) < total, "squares of means are below the mean of squares"


def test_ewc_adds_up_over_experiences():
    options = ("learner=ewc", "learner.lr=0", "learner.backbone_lr=0")
    t, learner, runtime, pipeline, _ = learned(*options, experiences=1, sizes=[3, 2, 1])
    first = detached(learner.fisher)
    t.learn(learner, runtime, pipeline, 1)
    second = learner._per_sample(open_experience(t.scenario, 1, pipeline))
    for name, value in learner.fisher.items():
        torch.testing.assert_close(value, first[name] + second[name], atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize(("part", "words"), [("qkv", ["qkv"]), ("attention", ["qkv", "proj"]), ("all", [])])
def test_only_the_chosen_part_moves(part, words):
    t = trial("learner=l2_reg", f"learner.trainable={part}", "learner.backbone_lr=0.001")
    learner, runtime, pipeline = t.start()
    before = detached(learner.model.state_dict())
    t.learn(learner, runtime, pipeline, 0)
    moved = {name for name, value in learner.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    if words:
        assert all(".attn." in name and any(f".{word}." in name for word in words) for name in moved)
    else:
        assert any("mlp" in name for name in moved)


def test_a_network_without_attention_is_refused():
    with pytest.raises(UserError, match="trainable=qkv"):
        trial("learner=ewc", "model=resnet32").start()


@pytest.mark.parametrize("reference", ["previous", "pretrained"])
def test_a_strong_penalty_holds_the_weights(reference):
    gaps = []
    for strength in (0.0, 100.0):
        options = (f"learner.strength={strength}", f"learner.reference={reference}", "learner.backbone_lr=0.001")
        t = trial("learner=l2_reg", *options, "learner.batch_size=4", sizes=[3, 3])
        learner, runtime, pipeline = t.start()
        start = fisher.kept(learner.model)
        t.learn(learner, runtime, pipeline, 0)
        if reference == "previous":
            start = fisher.kept(learner.model)
        t.learn(learner, runtime, pipeline, 1)
        gaps.append(float(fisher.quadratic_penalty(learner.model, start).detach()))
    assert gaps[1] < 0.5 * gaps[0]


@pytest.mark.parametrize("name", ["pred_kd", "lwf", "feat_kd"])
def test_distillation_keeps_old_answers(name):
    drift = []
    for strength in (0.0, 30.0):
        options = (f"learner.strength={strength}", "learner.lr=0.003", "learner.backbone_lr=0.003", "learner.batch_size=8")
        t, learner, runtime, pipeline, _ = learned(f"learner={name}", *options, experiences=1, sizes=[3, 3])
        x = open_experience(t.scenario, 1, pipeline).train.batch(range(12))
        teacher = copy.deepcopy((learner.model.eval(), learner.head))
        t.learn(learner, runtime, pipeline, 1)
        with torch.no_grad():
            new, old = learner.model.eval().features(x.x), teacher[0].features(x.x)
            if name != "feat_kd":
                new, old = learner.head(new)[:, :3].softmax(1), teacher[1](old).softmax(1)
        drift.append(float((new - old).norm()))
    assert drift[1] < drift[0]


def test_dark_error_reads_only_what_was_known():
    z, stored = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[0.0, torch.nan], [4.0, 3.0]])
    assert float(dark_error(z, stored)) == pytest.approx((1 + 0 + 4) / 3)


def test_derpp_stores_logits_at_insertion_and_keeps_them():
    t, learner, runtime, pipeline, (e,) = learned("learner=derpp", "learner.lr=0.1", experiences=1, sizes=[3, 2, 1])
    with torch.no_grad():
        data = learner.memory.data(e.train)
        want = learner.head(torch.cat([learner.model.features(b.x) for b in data.test_batches(32)]))
    torch.testing.assert_close(learner.logits_MK, want, atol=1e-5, rtol=1e-4)
    old = {int(i): row.clone() for i, row in zip(learner.memory.ids, learner.logits_MK, strict=True)}
    t.learn(learner, runtime, pipeline, 1)
    stays = [m for m, i in enumerate(learner.memory.ids) if int(i) in old]
    assert 0 < len(stays) < len(learner.memory)
    for m in stays:
        assert torch.equal(learner.logits_MK[m, :3], old[int(learner.memory.ids[m])])
        assert learner.logits_MK[m, 3:].isnan().all()


def test_derpp_passes_three_times_and_counts_the_replayed():
    t, learner, runtime, pipeline, _ = learned("learner=derpp", "learner.batch_size=6", experiences=1, sizes=[3, 2, 1])
    trained = learner.model.passes["train"]
    assert trained == runtime.meter.visits["new"] == 72
    t.learn(learner, runtime, pipeline, 1)  # 2 epochs of 24 images, 4 batches each, two draws of 6
    assert runtime.meter.visits == {"new": 72 + 48, "replayed": 8 * 2 * 6}
    assert learner.model.passes["train"] == 72 + 48 + 96


def test_exemplar_means_by_hand():
    means = exemplar_means(torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]]), torch.tensor([0, 0, 2]), 3)
    mixed = torch.tensor([0.3, 0.9]) / np.hypot(0.3, 0.9)
    torch.testing.assert_close(means[0], mixed.float())
    torch.testing.assert_close(means[2], torch.tensor([1.0, 0.0]))
    assert means[1].isnan().all()


def test_icarl_answers_both_ways():
    t, learner, _, pipeline, _ = learned("learner=icarl", experiences=3)
    batch = open_eval(t.scenario, 1, pipeline).data.batch(range(6))
    with torch.no_grad():
        answer = learner.predict(batch)
        f = F.normalize(learner.model.features(batch), dim=1)
    assert list(answer) == ["nme", "linear"] and learner.means_KD.shape[0] == 6
    naive = torch.stack([-(f - mean).square().sum(1) for mean in learner.means_KD], 1)
    torch.testing.assert_close(answer["nme"], naive)
    learner.answer = "linear"
    with torch.no_grad():
        assert next(iter(learner.predict(batch))) == "linear"


@pytest.mark.parametrize("name", ["icarl", "finetune"])
def test_the_start_of_the_head_can_be_chosen(name):
    bound, found = (3 / 160) ** 0.5, {}
    for init in ("normal", "kaiming_uniform"):
        learner, *_ = trial(f"learner={name}", f"learner.head_init={init}").start()
        learner.head.grow(100, torch.Generator().manual_seed(0))
        found[init] = float(learner.head.blocks[0].weight.detach().abs().max())
    assert found["normal"] < 0.8 * bound and 0.99 * bound < found["kaiming_uniform"] <= bound
    (config,) = compose([f"learner={name}", "learner.head_init=kaiming"])
    with pytest.raises(UserError, match="head_init must be kaiming_uniform or normal, got 'kaiming'; did you mean"):
        check(config)


def test_weight_aligning_makes_mean_norms_equal_and_leaves_biases():
    head, rng = LinearHead(4), torch.Generator().manual_seed(0)
    head.grow(3, rng), head.grow(2, rng)
    with torch.no_grad():
        head.blocks[1].weight.mul_(7)
        head.blocks[1].bias.fill_(2.0)
    old = head.blocks[0].weight.clone()
    align_weights(head, 3)
    norms = [block.weight.norm(dim=1).mean() for block in head.blocks]
    torch.testing.assert_close(norms[0], norms[1])
    assert torch.equal(head.blocks[0].weight, old) and (head.blocks[1].bias == 2).all()


def test_bias_layer_and_balanced_rows_by_hand():
    layer = BiasLayer()
    layer.grow(), layer.grow()
    z = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(layer(z, [2, 1]), z), "the start changes nothing"
    with torch.no_grad():
        layer.rows[1].copy_(torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(layer(z, [2, 1]), torch.tensor([[1.0, 2.0, 0.5]]))
    y = np.array([0] * 5 + [1] * 2 + [2])
    rows = balanced_rows(y, 3, key=1)
    assert np.bincount(y[rows], minlength=3).tolist() == [3, 1, 0], "the last sample of a class stays"


def test_bic_stage_two_trains_two_numbers():
    t, learner, runtime, pipeline, _ = learned("learner=bic", "learner.bias_lr=0.1", experiences=1)
    assert [row.tolist() for row in learner.bias.rows] == [[1.0, 0.0]]
    t.learn(learner, runtime, pipeline, 1)
    assert learner.bias.rows[0].tolist() == [1.0, 0.0] and learner.bias.rows[1].tolist() != [1.0, 0.0]
    assert runtime.used_new == 2 * 12, "new samples are visited once an epoch, in one stage or the other"
    t2, plain, *_ = learned("learner=bic", "learner.bias_lr=0.0")
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), "stage 2 moved the network"
    with torch.no_grad():
        answer = learner.predict(open_eval(t.scenario, 0, pipeline).data.batch(range(3)))
    alpha, beta = learner.bias.rows[1]
    torch.testing.assert_close(answer["corrected"][:, 3], alpha * answer["uncorrected"][:, 3] + beta)
    assert t2 is not None
