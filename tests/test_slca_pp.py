"""SLCA++: low-rank terms, rates, loss and head scaling against naive versions of the paper's formulas."""

import copy
import math

import pytest
import torch
from conftest import NARROW
from torch import nn
from torch.nn import functional as F

from clbench.config.compose import build, compose
from clbench.interfaces import Capabilities, UserError
from clbench.learners import slca_pp
from clbench.models import low_rank
from clbench.models.backbone import Backbone
from clbench.models.low_rank import LowRank, right_singular_vectors
from clbench.testing.contract import Trial, check_learner, small_stream
from clbench.training import losses
from clbench.training.fit import FlooredRecipe
from clbench.training.state import detached

BARE = ["learner.restore_heads=false", "learner.fresh_norm=false", "learner.logit_norm=null", "learner.head_scale=0"]
VARIANTS = [
    [*BARE, "learner.align_epochs=1"],
    ["learner.align_epochs=0", "learner.slow=0", "learner.sce_a=0.5", "learner.rank=1"],
]


@pytest.mark.parametrize("options", VARIANTS)
def test_contract(options):
    (config,) = compose(["learner=slca_pp", *NARROW, *options])
    assert [f"{check}: {message}" for check, ok, message in check_learner(config) if not ok] == []


def model(name="nano"):
    (config,) = compose([f"model={name}"])
    return build(config["model"])


def images(n=3):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def trial(*options):
    (config,) = compose(["learner=slca_pp", *options])
    return Trial(config, small_stream(), Capabilities())


@pytest.mark.parametrize("shape", [(12, 7), (5, 11), (6, 6)])
def test_first_right_singular_vectors(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    a = right_singular_vectors(weight, 4)
    exact = torch.linalg.svd(weight.double()).Vh[:4]
    torch.testing.assert_close((a.double() @ exact.T).abs(), torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all(), "the sign of a vector is left to chance"


def test_terms_start_at_nothing_and_are_a_change_of_the_weights():
    plain, tuned = model(), model()
    keys = list(plain.state_dict())
    terms = LowRank(tuned, rank=4, scale=0.8)
    assert list(tuned.state_dict()) == keys, "the network's own names changed"
    assert torch.equal(plain.features(images()), tuned.features(images())), "the start is not the pre-trained network"
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, b in terms.terms.items():
            if name.endswith("/b"):
                b.normal_(0, 0.05, generator=generator)
        for i, block in enumerate(plain.net.blocks):
            for path in ("attn.qkv", "mlp.fc1", "mlp.fc2"):
                key = f"{i}/{path.replace('.', '/')}"
                block.get_submodule(path).weight += 0.8 * terms.terms[f"{key}/b"] @ terms.terms[f"{key}/a"]
        changed = tuned.features(images())
        torch.testing.assert_close(changed, plain.features(images()), atol=1e-4, rtol=1e-4)
        assert (changed - model().features(images())).abs().max() > 0.1


def test_a_deep_copy_is_a_pair_of_its_own():
    first = model()
    terms = LowRank(first)
    twin, twin_terms = copy.deepcopy((first, terms))
    before = first.features(images()).detach()
    with torch.no_grad():
        for p in twin_terms.parameters():
            p += 0.1
    assert torch.equal(first.features(images()), before), "the copy's values work in the original"
    assert (twin.features(images()) - before).abs().max() > 0.1, "the copy's values do not work in the copy"
    names = dict(twin.named_parameters())
    assert all(p is names[name.replace("/", ".")] for name, p in twin_terms.own.items())


def test_number_of_values_in_a_vit_base(monkeypatch):
    import timm

    monkeypatch.setattr(low_rank, "right_singular_vectors", lambda w, rank: torch.zeros(rank, w.shape[1], device="meta"))
    with torch.device("meta"):
        net = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert LowRank(Backbone(net, None, {"name": "vit"}, False)).num_values() == 516_096  # type: ignore[arg-type]


def test_only_norms_biases_class_token_and_terms_train():
    t = trial()
    learner, runtime, pipeline = t.start()
    before = detached(learner.model.state_dict())
    terms = detached(learner.tuned.terms.state_dict())
    for i in range(2):
        t.learn(learner, runtime, pipeline, i)
    for name, value in learner.model.state_dict().items():
        own = any(word in name for word in ("norm", "bias", "cls_token"))
        assert own or torch.equal(value, before[name]), f"{name} was trained"
    assert not torch.equal(learner.model.state_dict()["net.cls_token"], before["net.cls_token"])
    assert not torch.equal(learner.model.state_dict()["net.norm.weight"], before["net.norm.weight"])
    after = learner.tuned.terms.state_dict()
    assert all(not torch.equal(after[name], terms[name]) for name in terms if name.endswith("/b"))
    assert all(p.requires_grad == any(w in name for w in low_rank.OWN) for name, p in learner.model.named_parameters())
    assert learner.model.net.norm.eps == 1e-5


def test_refuses_networks_that_are_no_vit():
    with pytest.raises(UserError, match="low-rank terms need a ViT, model=resnet32 is none"):
        trial("model=resnet32", "learner.fresh_norm=false").start()
    with pytest.raises(UserError, match="rank=200 does not fit"):
        trial("learner.rank=200").start()


def test_symmetric_cross_entropy_by_hand():
    z, y = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([0])  # softmax 1/4, 3/4
    reverse = -(0.25 * math.log(1.0) + 0.75 * math.log(1e-4))
    value = losses.symmetric_cross_entropy(z, y, 0.5, 0.3)
    assert value.item() == pytest.approx(0.5 * math.log(4.0) + 0.3 * reverse, rel=1e-5)
    z = torch.tensor([[200.0, 0.0]])  # the second probability is clamped to 1e-7
    assert losses.symmetric_cross_entropy(z, y, 0.0, 1.0).item() == pytest.approx(-1e-7 * math.log(1e-4), rel=1e-4)


def test_all_groups_fall_to_the_floor_as_torchs_cosine_does():
    epochs, rates = 4, [0.01, 0.005, 0.001]
    parts = [nn.Linear(2, 2) for _ in range(6)]
    optimizer = FlooredRecipe(floor=1e-4).build(
        [{"params": list(p.parameters()), "lr": r} for p, r in zip(parts[:3], rates, strict=True)]
    )
    reference = torch.optim.SGD([{"params": list(p.parameters()), "lr": r} for p, r in zip(parts[3:], rates, strict=True)])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, epochs, eta_min=1e-4)
    for epoch in range(epochs):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))  # what fit sets
        optimizer.step()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([g["lr"] for g in reference.param_groups])
        reference.step()
        cosine.step()


def test_rates_of_the_groups(monkeypatch):
    rates = []
    real = slca_pp.fit

    def spy(runtime, name, learner, groups, *rest):
        rates.append([group["lr"] for group in groups])
        assert rest[2].floor == pytest.approx(1e-4) and rest[2].weight_decay == 5e-4
        return real(runtime, name, learner, groups, *rest)

    monkeypatch.setattr(slca_pp, "fit", spy)
    t = trial()
    learner, runtime, pipeline = t.start()
    for i in range(2):
        t.learn(learner, runtime, pipeline, i)
    assert rates == [pytest.approx([0.005, 0.001, 0.01]), pytest.approx([0.001, 0.001, 0.01])]


def test_old_heads_see_larger_features_and_alignment_is_thrown_away():
    t = trial()
    learner, runtime, pipeline = t.start()
    for i in range(2):
        t.learn(learner, runtime, pipeline, i)
    before = detached(learner.head.state_dict())
    third = t.learn(learner, runtime, pipeline, 2)
    assert learner.ages() == [2, 2, 2, 1, 0, 0]
    assert all(torch.equal(learner.head.state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(learner.aligned.blocks[0].weight, learner.head.blocks[0].weight)
    batch = third.train.batch([0, 1, 2])
    f = learner.model.features(batch)
    naive = [F.linear(f * s, b.weight, b.bias) for s, b in zip((1.04, 1.02, 1.0), learner.aligned.blocks, strict=True)]
    torch.testing.assert_close(learner.predict(batch), torch.cat(naive, dim=1))
