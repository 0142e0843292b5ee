"""The last block for the class token alone: the same features and gradients, less work, and only where nothing else is read."""

import copy

import pytest
import timm
import torch
from conftest import SMALL
from test_pet import CPU, FACTORIES, images, nano, runtime, shake, small
from torch import nn

from clbench.models import backbone, class_token, low_rank
from clbench.models import pet_modules as kinds
from clbench.models.pet import stack
from clbench.records.rerun import machine

WHOLE_BLOCK = ("vpt_deep", "vpt_shallow")  # their hooks take tokens out behind the block


def both(model, work):
    """What `work` gives with the whole last block, and with the class token's part of it."""
    out = []
    for model.class_token_tail in (False, True):
        out.append(work())
    return out


def tokens_of_last_mlp(model, x):
    """How many tokens the last MLP sees in a pass."""
    seen = []

    def look(module, args):
        seen.append(args[0].shape[1])

    look.per_token = True
    handle = model.net.blocks[-1].mlp.register_forward_pre_hook(look)
    with torch.no_grad():
        model.features(x)
    handle.remove()
    return seen


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["bare", *FACTORIES])
def test_the_same_features_and_gradients(name, fused):
    model, x = nano(), images()
    for block in model.net.blocks:
        block.attn.fused_attn = fused
    pet = FACTORIES[name](model, runtime()) if name != "bare" else None
    if pet is not None:
        shake(pet)
    trained = list(model.parameters() if pet is None else pet.parameters())

    def work():
        out = model.features(x)
        return out.detach(), torch.autograd.grad(out.sin().sum(), trained, allow_unused=True)

    (whole, slopes), (tail, tail_slopes) = both(model, work)
    torch.testing.assert_close(tail, whole, atol=1e-5, rtol=1e-5)
    for a, b in zip(tail_slopes, slopes, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert tokens_of_last_mlp(model, x) == ([20] if name in WHOLE_BLOCK else [1]), "16 patches, a class token, 3 more"


def test_dropout_draws_the_same():
    """Of a module that trains: the class token loses the same values whether the others are computed or not."""
    model, x, clock = nano(), images(), runtime()
    pet = kinds.adapter(model, clock, bottleneck=8, dropout=0.5, scale=1.0)
    shake(pet)
    pet.train()

    def work():
        clock.used_visits += 1  # another step
        torch.manual_seed(0)
        twin, own = copy.deepcopy((model, pet))
        clock.used_visits = 0
        return twin.features(x).detach(), own

    (whole, one), (tail, _) = both(model, work)
    torch.testing.assert_close(tail, whole, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model.features(x), whole, atol=1e-3), "nothing was dropped"
    assert one.tokens is None and pet.tokens is None


def test_mixed_states_and_the_low_rank_terms_of_slca_pp():
    model, x = nano(), images(7)
    pet = FACTORIES["adapter"](model, runtime())
    states = []
    for seed in range(2):
        shake(pet, seed)
        states.append(pet.state())
    rows = torch.tensor([1, 0, 1, 1, 0, 0, 1])

    def mixed():
        with torch.no_grad(), pet.use(stack(states), rows):
            return model.features(x)

    whole, tail = both(model, mixed)
    torch.testing.assert_close(tail, whole, atol=1e-5, rtol=1e-5)
    other = nano()
    terms = low_rank.LowRank(other, 2)
    with torch.no_grad():
        for value in terms.terms.values():
            value.add_(0.1)
    whole, tail = both(other, lambda: other.features(x).detach())
    torch.testing.assert_close(tail, whole, atol=1e-5, rtol=1e-5)
    assert tokens_of_last_mlp(other, x) == [1]


def test_where_more_is_read_the_block_is_run_whole():
    def vit(**options):
        return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=2, **options)

    assert class_token.fits(vit().eval()) and class_token.fits(vit().train())
    assert class_token.fits(vit(reg_tokens=2, no_embed_class=True))
    assert class_token.fits(vit(proj_drop_rate=0.1).eval()) and not class_token.fits(vit(proj_drop_rate=0.1).train())
    assert not class_token.fits(vit(global_pool="avg")) and not class_token.fits(vit(class_token=False, global_pool="avg"))
    assert not class_token.fits(small("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1)).net)
    assert not class_token.fits(small("resnet18").net)
    net = vit()
    net.set_grad_checkpointing()
    assert not class_token.fits(net)
    for place in (lambda n: n.blocks, lambda n: n.blocks[-1], lambda n: n.blocks[-1].attn.proj, lambda n: n.blocks[-1].mlp.act):
        net = vit()
        place(net).register_forward_hook(lambda module, args, out: None)
        assert not class_token.fits(net), "somebody looks at all tokens"
    net = vit()
    net.blocks[0].register_forward_hook(lambda module, args, out: None)
    net.norm.register_forward_hook(lambda module, args, out: None)
    assert class_token.fits(net), "blocks before the last are run whole"

    class Other(type(net)):
        def forward_features(self, x, **more):
            return super().forward_features(x, **more) * 2

    net = vit()
    net.__class__ = Other
    assert not class_token.fits(net)


@pytest.mark.parametrize(
    "options", [{"qk_norm": True}, {"qkv_bias": False}, {"init_values": 0.1}, {"reg_tokens": 2}, {"pre_norm": True}]
)
def test_variants_of_the_block(options):
    model = backbone.Backbone(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=2, **options).eval(),
        nano().profile, {}, False,
    )  # fmt: skip
    x = images(3)
    whole, tail = both(model, lambda: model.features(x).detach())
    torch.testing.assert_close(tail, whole, atol=1e-5, rtol=1e-5)
    assert tokens_of_last_mlp(model, x) == [1]


def test_another_attention_is_run_as_it_is():
    """A layer that somebody replaced: what it computes stays, only what follows is shortened."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = nano(), images(3)
    old = model.net.blocks[-1].attn.qkv
    new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.net.blocks[-1].attn.qkv = new
    whole, tail = both(model, lambda: model.features(x).detach())
    torch.testing.assert_close(tail, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bare", *FACTORIES])
def test_a_large_batch_goes_in_pieces_with_the_state_of_every_sample(name, monkeypatch):
    model, x = nano().eval(), images(7)
    pet = FACTORIES[name](model, runtime()) if name != "bare" else None
    states = []
    for seed in range(2 if pet is not None else 0):
        shake(pet, seed)
        states.append(pet.state())

    def features():
        with torch.no_grad():
            if pet is None:
                return model.features(x)
            with pet.use(stack(states), torch.tensor([1, 0, 1, 1, 0, 0, 1])):
                return model.features(x)

    before = features()
    assert model.passes["eval"] == 7
    monkeypatch.setattr(backbone, "CACHED_PIXELS", 2 * 32 * 32)
    sizes, forward = [], model.net.forward_features
    monkeypatch.setattr(model.net, "forward_features", lambda part: (sizes.append(len(part)), forward(part))[1])
    torch.testing.assert_close(features(), before, atol=1e-5, rtol=1e-5)
    assert sizes == [2, 2, 2, 1] and model.passes["eval"] == 14


def test_a_run_with_it_answers_as_one_without(clbench):
    for learner in ("finetune", "mos", "coda_prompt"):
        found = []
        for path in ("medium+explicit", "medium+explicit+tail"):
            words = (f"learner={learner}", *SMALL, "num_threads=1", "device=cpu", f"arithmetic={path}", "force=true")
            clbench("run", *words, "feature_store=off")
            found.append(next(r for r in clbench.records() if r["learner"]["name"] == learner))
        off, on = found
        assert (off["machine"]["flags"]["class_token_tail"], on["machine"]["flags"]["class_token_tail"]) == (False, True)
        assert off["passes"] == on["passes"] and off["n"] == on["n"]
        pairs = [(a, b) for x, y in zip(off["correct"], on["correct"], strict=True) for a, b in zip(x, y, strict=True)]
        assert all((a is None) == (b is None) and (a is None or abs(a - b) <= 2) for a, b in pairs)


def test_a_record_from_before_the_flag_is_of_the_same_machine():
    flags = {"num_threads": 1, "matmul": "medium", "fused_attention": False, "deterministic": True}
    old = {"machine": {"device": "cpu", "cpu": "x", "flags": flags}, "versions": {}}
    new = {"machine": {"device": "cpu", "cpu": "x", "flags": flags | {"class_token_tail": False}}, "versions": {}}
    assert list(machine(old, new)) == []
    new["machine"]["flags"]["class_token_tail"] = True
    assert list(machine(old, new)) == ["class_token_tail False then, True now"]
    assert CPU.type == "cpu"
