"""Parameter-efficient tuning: placement, shapes, starts and sizes against naive versions of each paper's formula."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from clbench.config.compose import build, compose
from clbench.interfaces import UserError
from clbench.models import pet_modules as kinds
from clbench.models.backbone import build_backbone
from clbench.models.pet import average, blend, distance, stack
from clbench.training.runtime import Runtime

CPU = torch.device("cpu")
FACTORIES = {
    "adapter": lambda m, r: kinds.adapter(m, r, bottleneck=4),
    "adapter_attention": lambda m, r: kinds.adapter(m, r, bottleneck=4, place="attention", learn_scale=True, scale=1.0),
    "lora": lambda m, r: kinds.lora(m, r, rank=3, targets=("k", "v"), learn_scale=True),
    "lora_all": lambda m, r: kinds.lora(m, r, rank=3, targets=("qkv", "proj", "fc1", "fc2"), scale=0.8),
    "prefix": lambda m, r: kinds.prefix(m, r, length=3, blocks=[0, 2], low=-1, high=1),
    "prefix_lae": lambda m, r: kinds.prefix(m, r, length=3, blocks=[0, 2], low=-1, high=1, learn_scale=True, compensate=True),
    "prompt": lambda m, r: kinds.prompt(m, r, length=3),
    "vpt_deep": lambda m, r: kinds.vpt(m, r, length=3, low=-1, high=1),
    "vpt_shallow": lambda m, r: kinds.vpt(m, r, length=3, deep=False, low=-1, high=1),
    "ssf": lambda m, r: kinds.ssf(m, r, std=0.1),
    "mam": lambda m, r: kinds.mam(m, r, length=3, bottleneck=4, low=-1, high=1),
}


def nano():
    (config,) = compose(["model=nano"])
    return build(config["model"])


def small(name, **kwargs):
    return build_backbone("small", name, kwargs)


def runtime(seed=0):
    return Runtime(seed, CPU)


def images(n=6, side=32, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def shake(pet, seed=1, size=0.3):
    """Random values everywhere, so that nothing is the identity by its start; no dropout."""
    pet.eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in pet.values.values():
            value.add_(size * torch.randn(value.shape, generator=rng))


@pytest.mark.parametrize("name", FACTORIES)
def test_start_off_state_and_keys(name):
    model, x = nano(), images()
    bare, keys = model.features(x).detach(), list(model.state_dict())
    pet = FACTORIES[name](model, runtime())
    assert list(model.state_dict()) == keys, "the network's own names changed"
    identity = name.startswith(("adapter", "lora"))
    assert torch.allclose(model.features(x), bare, atol=1e-5) == identity
    shake(pet)
    own = model.features(x)
    assert not torch.allclose(own, bare, atol=1e-2)
    with pet.off():
        torch.testing.assert_close(model.features(x), bare)
    state = pet.state()
    shake(pet, 2)
    assert not torch.allclose(model.features(x), own, atol=1e-3)
    with pet.use(state):
        torch.testing.assert_close(model.features(x), own)
    pet.insert(state)
    torch.testing.assert_close(model.features(x), own)
    model.features(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pet.values.values())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", FACTORIES)
def test_mixed_states_in_one_pass(name):
    model, x = nano(), images(7)
    pet = FACTORIES[name](model, runtime())
    states = []
    for seed in range(3):
        shake(pet, seed)
        states.append(pet.state())
    rows = torch.tensor([2, 0, 1, 1, 2, 0, 0])
    with torch.no_grad(), pet.use(stack(states), rows):
        mixed = model.features(x)
    for i, row in enumerate(rows.tolist()):
        with torch.no_grad(), pet.use(states[row]):
            torch.testing.assert_close(model.features(x[i : i + 1])[0], mixed[i], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FACTORIES)
def test_deep_copy_is_independent(name):
    model, x = nano(), images(2)
    pet = FACTORIES[name](model, runtime())
    shake(pet)
    before = model.features(x).detach()
    twin, twin_pet = copy.deepcopy((model, pet))
    shake(twin_pet, 5)
    torch.testing.assert_close(model.features(x), before)
    assert not torch.allclose(twin.features(x), before, atol=1e-3)
    shake(pet, 5)
    torch.testing.assert_close(model.features(x), twin.features(x))


@pytest.mark.parametrize("name", ["lora", "lora_all", "ssf"])
def test_merge_and_back(name):
    model, x = nano(), images()
    pet = FACTORIES[name](model, runtime())
    shake(pet, size=0.05)
    weights = {k: v.double().clone() for k, v in model.state_dict().items()}
    model.double(), pet.double()
    x = x.double()
    own = model.features(x).detach()
    pet.merge()
    with pytest.raises(UserError, match="already merged"):
        pet.merge()
    torch.testing.assert_close(model.features(x), own, atol=1e-6, rtol=1e-6)
    with pet.off():
        assert torch.allclose(model.features(x), own, atol=1e-6), "merged, the network is the tuned one without its pet"
    pet.unmerge()
    torch.testing.assert_close(model.features(x), own, atol=1e-6, rtol=1e-6)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[key], atol=1e-6, rtol=1e-6)


def test_what_is_no_affine_map_is_not_merged():
    for name in ("adapter", "prefix", "prompt", "vpt_deep", "mam"):
        with pytest.raises(UserError, match="cannot be merged"):
            FACTORIES[name](nano(), runtime()).merge()


def test_published_sizes():
    """Numbers of trained values for ViT-B/16, from the methods' specifications."""
    five = [0, 1, 2, 3, 4]
    expected = {
        304_320: lambda m, r: kinds.adapter(m, r, bottleneck=16),
        1_189_632: lambda m, r: kinds.adapter(m, r, bottleneck=64),
        42_270: lambda m, r: kinds.adapter(m, r, bottleneck=5, place="attention", learn_scale=True, blocks=five),
        76_810: lambda m, r: kinds.lora(m, r, rank=5, targets=("k", "v"), learn_scale=True, blocks=five),
        76_811: lambda m, r: kinds.prefix(m, r, length=10, learn_scale=True, blocks=five),
        107_520: lambda m, r: kinds.prefix(m, r, length=[5, 5, 20, 20, 20], blocks=five),
        516_096: lambda m, r: kinds.lora(m, r, rank=4, targets=("qkv", "fc1", "fc2")),
    }
    for count, make in expected.items():
        model = small("vit_base_patch16_224", img_size=32)
        assert make(model, runtime()).num_values() == (count if count != 76_811 else 76_810)


def test_adapter_against_the_formula():
    model, x = nano(), images()
    pet = kinds.adapter(model, runtime(), bottleneck=4, scale=0.1)
    shake(pet)
    net = model.net

    def block(i, t):
        b, v = net.blocks[i], {k.split("/")[1]: p for k, p in pet.values.items() if k.startswith(f"{i}/")}
        with pet.off():
            h = t + b.attn(b.norm1(t))
            mlp = b.mlp(b.norm2(h))
        return h + mlp + 0.1 * (torch.relu(h @ v["down"].T + v["down_bias"]) @ v["up"].T + v["up_bias"])

    with torch.no_grad():
        t = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))
        for i in range(len(net.blocks)):
            t = block(i, t)
        torch.testing.assert_close(model.features(x), net.norm(t)[:, 0])


def test_lae_adapter_is_parallel_to_the_attention():
    model, x = nano(), images()
    pet = kinds.adapter(
        model, runtime(), bottleneck=3, place="attention", activation="gelu", scale=1.0, learn_scale=True, blocks=[1]
    )
    shake(pet)
    b, v = model.net.blocks[1], {k.split("/")[1]: p for k, p in pet.values.items()}
    t = torch.randn(2, 5, 160)
    with pet.off():
        n = b.norm1(t)
        h = t + b.attn(n) + v["scale"] * (F.gelu(n @ v["down"].T + v["down_bias"]) @ v["up"].T + v["up_bias"])
        want = h + b.mlp(b.norm2(h))
    torch.testing.assert_close(b(t), want)
    assert model.features(x).shape == (6, 160)


@pytest.mark.parametrize("compensate", [False, True])
def test_prefix_against_naive_attention(compensate):
    model = nano()
    pet = kinds.prefix(model, runtime(), length=3, blocks=[2], low=-1, high=1, learn_scale=True, compensate=compensate)
    shake(pet)
    a, t = model.net.blocks[2].attn, torch.randn(2, 7, 160)
    v = {k.split("/")[1]: p for k, p in pet.values.items()}
    q, k, val = a.qkv(t).chunk(3, dim=-1)
    out = torch.zeros(2, 7, 160)
    for s in range(2):
        for head in range(4):
            c = slice(40 * head, 40 * head + 40)
            keys = torch.cat([v["k"][:, c] * v["scale_k"], k[s][:, c]])
            values = torch.cat([v["v"][:, c] * v["scale_v"], val[s][:, c]])
            w = (q[s][:, c] @ keys.T / math.sqrt(40)).softmax(-1)
            if compensate:
                mass = w[:, :3].sum(1, keepdim=True)
                w = torch.cat([w[:, :3] / mass, w[:, 3:]], 1)
                torch.testing.assert_close(w[:, :3].sum(1), torch.ones(7))
                torch.testing.assert_close(w[:, 3:].sum(1), 1 - mass[:, 0])
            out[s][:, c] = w @ values
    torch.testing.assert_close(a(t), a.proj(out), atol=1e-5, rtol=1e-4)


def test_mam_is_a_prefix_and_an_adapter():
    """Two modules with the same values on one network are the same function; without either part it differs."""
    one, two, x = nano(), nano(), images(4)
    pet = kinds.mam(one, runtime(), length=3, bottleneck=4)
    shake(pet)
    parts = [kinds.adapter(two, runtime(), bottleneck=4, scale=4.0), kinds.prefix(two, runtime(), length=3)]
    assert set(pet.values) == set(parts[0].values) | set(parts[1].values)
    for part in parts:
        part.insert({name: pet.values[name].detach() for name in part.values})
    torch.testing.assert_close(one.features(x), two.features(x), atol=1e-5, rtol=1e-5)
    for part in parts:
        with part.off():
            assert not torch.allclose(one.features(x), two.features(x), atol=1e-3)
    wide = small("vit_base_patch16_224", img_size=32, depth=1)
    assert kinds.mam(wide, runtime()).num_values() == 1_189_632 // 12 + 2 * 10 * 768


def test_prompt_and_vpt_tokens():
    x = images(2)
    model = nano()
    kinds.prompt(model, runtime(), length=3)
    assert model.tokens(x).shape == (2, 17 + 3, 160)
    for deep in (True, False):
        model = nano()
        pet = kinds.vpt(model, runtime(), length=3, deep=deep)
        assert model.tokens(x).shape == (2, 17, 160) and len(pet.values) == (4 if deep else 1)
        assert all((p == 0).all() for p in pet.values.values())
    model = nano()
    pet = kinds.prompt(model, runtime(), length=2)
    got = {}
    model.net.blocks[0].register_forward_pre_hook(lambda module, args: got.setdefault("x", args[0]))
    model.features(x)
    torch.testing.assert_close(got["x"][:, 1:3], (pet.values["tokens"] + model.net.pos_embed[:, :1]).expand(2, -1, -1))


def test_dropout_belongs_to_seed_step_and_place():
    def trained(seed, steps):
        model, clock = nano(), runtime(seed)
        pet = kinds.adapter(model, clock, bottleneck=16, dropout=0.5)
        shake(pet, size=2.0)
        pet.train()
        clock.used_visits = steps
        return model.features(images(2)), pet, model

    first, pet, model = trained(0, 3)
    torch.testing.assert_close(first, trained(0, 3)[0])
    assert not torch.allclose(first, trained(0, 4)[0]) and not torch.allclose(first, trained(1, 3)[0])
    assert not torch.allclose(model.features(images(2)), first), "a second pass of a step draws anew"
    pet.eval()
    torch.testing.assert_close(model.features(images(2)), model.features(images(2)))
    rate = (pet.train().dropout(torch.ones(100_000), 0.1, "x") == 0).float().mean()
    assert 0.09 < rate < 0.11


def test_a_range_of_blocks_ends_with_the_network():
    assert {k[0] for k in kinds.adapter(nano(), runtime(), blocks="2:5").values} == {"2", "3"}
    assert {k[0] for k in kinds.adapter(nano(), runtime(), blocks="0:5").values} == set("0123")


def test_state_arithmetic():
    a, b = {"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([3.0, 7.0])}
    assert average([a, b])["w"].tolist() == [2.0, 5.0]
    assert blend(a, b, 0.25)["w"].tolist() == [1.5, 4.0]
    assert distance(a, b) == pytest.approx((math.sqrt(20), math.sqrt(58)))


def test_swin_and_convnext_where_it_makes_sense():
    swin = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "patch_size": 2}
    x = images(3)
    for name in ("adapter", "adapter_attention", "lora", "lora_all", "ssf"):
        model = small("swin_tiny_patch4_window7_224", **swin)
        bare = model.features(x).detach()
        pet = FACTORIES[name](model, runtime())
        shake(pet)
        own = model.features(x)
        assert own.shape == bare.shape and not torch.allclose(own, bare, atol=1e-3)
        one = pet.state()
        shake(pet, 4)
        with torch.no_grad(), pet.use(stack([one, pet.state()]), torch.tensor([0, 1, 0])):
            torch.testing.assert_close(model.features(x)[[0, 2]], own[[0, 2]], atol=2e-5, rtol=1e-4)
    for name in ("prefix", "prompt", "vpt_deep"):
        with pytest.raises(UserError, match=name.split("_")[0]):
            FACTORIES[name](small("swin_tiny_patch4_window7_224", **swin), runtime())
    convnext = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "ls_init_value": 1.0}
    for name in ("lora_ffn", "ssf"):
        model = small("convnext_tiny", **convnext)
        make = FACTORIES.get(name, lambda m, r: kinds.lora(m, r, rank=2, targets=("fc1", "fc2")))
        bare = model.features(x).detach()
        shake(make(model, runtime()))
        assert not torch.allclose(model.features(x), bare, atol=1e-4)
    for name in ("adapter", "lora", "prefix", "prompt", "vpt_deep"):
        with pytest.raises(UserError):
            FACTORIES[name](small("convnext_tiny", **convnext), runtime())
    for name in FACTORIES:
        with pytest.raises(UserError):
            FACTORIES[name](small("resnet18"), runtime())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m, r: kinds.adapter(m, r, bottleneck=0), "bottleneck must be at least 1"),
        (lambda m, r: kinds.adapter(m, r, blocks=[4]), "0 to 3"),
        (lambda m, r: kinds.adapter(m, r, blocks=[1, 1]), "distinct"),
        (lambda m, r: kinds.adapter(m, r, blocks="2-3"), "nor a range"),
        (lambda m, r: kinds.adapter(m, r, blocks="4:9"), "0 to 3"),
        (lambda m, r: kinds.lora(m, r, targets=["w"]), "unknown LoRA targets"),
        (lambda m, r: kinds.prefix(m, r, length=[1, 2]), "2 lengths for 4 blocks"),
        (lambda m, r: kinds.vpt(m, r, deep=False, blocks=[1]), "no effect"),
    ],
)
def test_wrong_options(make, words):
    with pytest.raises(UserError, match=words):
        make(nano(), runtime())


def test_features_are_remembered_only_without_a_pet():
    from clbench.streams.eval_sets import open_eval
    from clbench.streams.images.pixels import Pipeline
    from clbench.testing.contract import small_stream

    model = nano()
    pet = kinds.adapter(model, runtime(), bottleneck=2)
    shake(pet)
    data = open_eval(small_stream(), 0, Pipeline(model.profile, CPU, "none")).data
    with torch.no_grad():
        tuned = model.features(data.batch(range(4)))
        with pet.off():
            bare = model.features(data.batch(range(4)))
            before = dict(model.passes)
            assert torch.equal(model.features(data.batch(range(4))), bare) and model.passes == before
        torch.testing.assert_close(model.features(data.batch(range(4))), tuned)
        with pet.use(tag="frozen"):
            torch.testing.assert_close(model.features(data.batch(range(4))), tuned)
            before = dict(model.passes)
            torch.testing.assert_close(model.features(data.batch(range(4))), tuned)
            assert model.passes == before
            with pet.use(stack([pet.state()] * 2), torch.tensor([0, 1, 1, 0]), tag="bank"):
                model.features(data.batch(range(4)))
                assert model.passes["eval"] == before["eval"] + 4
        state = pet.state()
        shake(pet, 3)
        other = pet.state()
        pet.insert(state)
        pet.insert(other)
        with pet.use(tag="frozen"):
            assert not torch.allclose(model.features(data.batch(range(4))), tuned, atol=1e-3), "insert forgets"
    assert not torch.allclose(tuned, bare, atol=1e-2)


def test_an_unusual_block_is_refused():
    with pytest.raises(UserError, match="built otherwise"):
        kinds.adapter(small("vit_small_patch16_18x2_224", img_size=32, depth=1, embed_dim=32, num_heads=2), runtime())
