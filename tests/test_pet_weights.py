"""Kinds of `pet=` that change the weight of a linear layer: each against its formula written naively, size, merge and back."""

import copy

import numpy as np
import pytest
import torch
from test_pet import images, nano, runtime, shake, small

from clbench.interfaces import UserError
from clbench.models import pet_weights as kinds
from clbench.models.pet import stack
from clbench.models.pet_adalora import adalora
from clbench.models.pet_corda import corda

TARGETS = ("q", "v", "proj", "fc1", "fc2")  # square, wide, tall, and thirds of a layer
FACTORIES = {
    "dora": lambda m, r: kinds.dora(m, r, rank=3, targets=TARGETS, scale=0.7),
    "vera": lambda m, r: kinds.vera(m, r, rank=24, targets=TARGETS),
    "randlora": lambda m, r: kinds.randlora(m, r, rank=48, targets=TARGETS, scale=0.7),  # 160 is no multiple of it
    "allora": lambda m, r: kinds.allora(m, r, rank=3, targets=TARGETS, eta=2.0),
    "loldu": lambda m, r: kinds.loldu(m, r, rank=32, targets=TARGETS, scale=0.7),
    "corda": lambda m, r: calibrated(corda(m, r, rank=3, targets=TARGETS)),
    "adalora": lambda m, r: adalora(m, r, rank=3, target=2, targets=TARGETS, scale=0.7),
    "hydra": lambda m, r: kinds.hydra(m, r, rank=3, targets=TARGETS, scale=0.7, sequential_scale=0.4),
    "miss": lambda m, r: kinds.miss(m, r, rank=7, targets=TARGETS),
    "bone": lambda m, r: kinds.bone(m, r, rank=8, targets=TARGETS),
    "mora": lambda m, r: kinds.mora(m, r, rank=3, targets=TARGETS),
    "mora_sum": lambda m, r: kinds.mora(m, r, rank=3, targets=TARGETS, form="sum"),
}


def calibrated(pet):
    """With terms as calibration makes them: some that the network then leaves out of its frozen part."""
    generator = torch.Generator().manual_seed(7)
    state = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in pet.values.items()}
    pet.insert(state)
    for name, value in state.items():
        getattr(pet, f"{name}_start").copy_(value)
    return pet


def arrays(pet, site):
    """The values of a site, in float64."""
    return {k.removeprefix(f"{site}/"): v.detach().double().numpy() for k, v in pet.values.items() if k.startswith(f"{site}/")}


def naive_dora(w, v, pet, site):
    moved = w + 0.7 * v["b"] @ v["a"]
    return np.stack([m / np.linalg.norm(row) * row for m, row in zip(v["m"], moved, strict=True)])


def naive_vera(w, v, pet, site):
    a, b = pet.frozen_a.numpy(), pet.frozen_b.numpy()
    delta = np.zeros_like(w)
    for k in range(24):
        delta += v["d"][k] * np.outer(v["b"] * b[: len(w), k], a[k, : w.shape[1]])
    return w + delta


def naive_randlora(w, v, pet, site):
    a, b, low = pet.frozen_a.numpy(), pet.frozen_b.numpy(), min(w.shape)
    delta = np.zeros((max(w.shape), low))
    for j in range(4):
        delta += b[: len(delta), j] @ np.diag(v["l"][j]) @ a[:, :low] @ np.diag(v["g"][j])
    return w + 0.7 * (delta if len(w) >= w.shape[1] else delta.T)


def naive_allora(w, v, pet, site):
    return w + v["b"] @ v["a"]


def naive_loldu(w, v, pet, site):
    left, upper, start = (getattr(pet, f"{site}/{part}").numpy() for part in ("left", "upper", "start"))
    moved = w.copy()
    for k in range(32):
        moved += (v["s"] * v["z"][k] - start[k]) * np.outer(left[:, k], upper[k])
    return moved


def naive_corda(w, v, pet, site):
    start = {part: getattr(pet, f"{site}/{part}_start").numpy() for part in "ab"}
    return w - start["b"] @ start["a"] + v["b"] @ v["a"]


def naive_adalora(w, v, pet, site):
    return w + 0.7 * v["b"] @ np.diag(v["e"]) @ v["a"]


def naive_hydra(w, v, pet, site):
    sequential = np.eye(len(w)) + 0.4 * v["sequential_up"] @ v["sequential_down"]
    return sequential @ w + 0.7 * v["parallel_up"] @ v["parallel_down"]


def naive_miss(w, v, pet, site):
    return w + np.stack([v["b"][:, j % 7] for j in range(w.shape[1])], axis=1)


def naive_bone(w, v, pet, site):
    out = w.copy()
    for p in range(len(w) // 8):
        for q in range(w.shape[1] // 8):
            block = np.s_[8 * p : 8 * p + 8, 8 * q : 8 * q + 8]
            out[block] += w[block] @ v["b"][p] + v["b"][p]
    return out


def naive_mora_sum(w, v, pet, site):
    side, (out, into) = len(v["m"]), w.shape
    assert side == round(((out + into) * 3) ** 0.5)
    squeeze = np.zeros((side, into))
    for j in range(-(-into // side) * side):
        squeeze[j % side, j % into] += 1
    return w + (v["m"] @ squeeze)[[k % side for k in range(out)]]


def naive_mora(w, v, pet, site):
    side, (out, into) = len(v["m"]), w.shape
    rows = []
    for c in range(-(-into // side)):
        cut, turn = np.zeros((side, into)), np.zeros((side, side))
        for k in range(side):
            cut[k, (c * side + k) % into] = 1
        for k in range(side // 2):
            angle, other = c / 10_000 ** (2 * k / side), k + side // 2
            turn[k, k] = turn[other, other] = np.cos(angle)
            turn[k, other], turn[other, k] = -np.sin(angle), np.sin(angle)
        rows += list(v["m"] @ turn @ cut)
    return w + np.stack([rows[k % len(rows)] for k in range(out)])


NAIVE = {"dora": naive_dora, "vera": naive_vera, "randlora": naive_randlora, "allora": naive_allora, "loldu": naive_loldu}
NAIVE |= {"corda": naive_corda, "adalora": naive_adalora, "hydra": naive_hydra, "miss": naive_miss, "bone": naive_bone}
NAIVE |= {"mora": naive_mora, "mora_sum": naive_mora_sum}


def places(model, pet):
    """(name, layer, rows) of each target, by the names of the values."""
    for site in dict.fromkeys(name.rsplit("/", 1)[0] for name in pet.values):
        i, target = site.split("/")
        block = model.net.blocks[int(i)]
        layer = {"fc1": block.mlp.fc1, "fc2": block.mlp.fc2, "proj": block.attn.proj}.get(target, block.attn.qkv)
        third = {"q": 0, "k": 1, "v": 2}.get(target)
        yield site, layer, slice(None) if third is None else slice(third * 160, third * 160 + 160)


@pytest.mark.parametrize("name", FACTORIES)
def test_start_off_state_and_keys(name):
    model, x = nano(), images()
    bare, keys = model.features(x).detach(), list(model.state_dict())
    pet = FACTORIES[name](model, runtime())
    assert list(model.state_dict()) == keys, "the network's own names changed"
    assert torch.equal(model.features(x), bare), "the start is the identity, to the last bit"
    start = pet.state()
    assert list(start) == list(pet.values) and {f"values.{k}" for k in start} <= pet.state_dict().keys()
    assert pet.guide is not None or list(pet.state_dict()) == [f"values.{k}" for k in start]
    shake(pet)
    own = model.features(x)
    assert not torch.allclose(own, bare, atol=1e-2)
    with pet.off():
        assert torch.equal(model.features(x), bare)
    with pet.use(start):
        assert torch.equal(model.features(x), bare)
    own.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pet.values.values())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", FACTORIES)
def test_mixed_states_copies_and_seeds(name):
    model, x = nano(), images(4)
    pet = FACTORIES[name](model, runtime())
    states = []
    for seed in range(2):
        shake(pet, seed, 0.1)
        states.append(pet.state())
    rows = torch.tensor([1, 0, 0, 1])
    with torch.no_grad(), pet.use(stack(states), rows):
        mixed = model.features(x)
    for i, row in enumerate(rows.tolist()):
        with torch.no_grad(), pet.use(states[row]):
            torch.testing.assert_close(model.features(x[i : i + 1])[0], mixed[i], atol=5e-5, rtol=1e-4)
    before = model.features(x).detach()
    twin, twin_pet = copy.deepcopy((model, pet))
    shake(twin_pet, 5)
    assert torch.equal(model.features(x), before) and not torch.allclose(twin.features(x), before, atol=1e-3)
    twin_pet.merge()
    assert torch.equal(model.features(x), before), "the copy merges into its own weights"
    again = nano()
    FACTORIES[name](again, runtime()).insert(states[1])
    assert torch.equal(again.features(x), before), "what is frozen follows from the seed and the weights"


@pytest.mark.parametrize("name", FACTORIES)
def test_merge_is_the_formula_and_unmerge_is_exact(name):
    model, x = nano(), images(3)
    model.double()
    pet = FACTORIES[name](model, runtime())
    pet.double()
    shake(pet, size=0.05)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    naive = {}
    for site, layer, rows in places(model, pet):
        naive[site] = NAIVE[name](layer.weight[rows].detach().numpy(), arrays(pet, site), pet, site)
    own = model.features(x.double()).detach()
    pet.merge()
    for site, layer, rows in places(model, pet):
        np.testing.assert_allclose(layer.weight[rows].detach().numpy(), naive[site], rtol=0, atol=1e-9, err_msg=site)
    torch.testing.assert_close(model.features(x.double()), own, rtol=0, atol=1e-9)
    pet.unmerge()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model.features(x.double()), own, rtol=0, atol=1e-9)


def test_merge_and_back_in_float32():
    """The weight is put back, not subtracted from: no bit is lost."""
    model = nano()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for make in FACTORIES.values():
        pet = make(model, runtime())
        shake(pet, size=0.2)
        pet.merge()
        assert not torch.equal(model.net.blocks[0].mlp.fc2.weight, weights["net.blocks.0.mlp.fc2.weight"])
        pet.unmerge()
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_sizes():
    """Trained values of one matrix of ViT-B (768 x 768, or 3072 x 768), from the methods' tables."""
    i = o = 768
    expected = [
        (lambda m, r: kinds.dora(m, r, rank=5, targets=["k"], blocks=[0]), 5 * (i + o) + o),
        (lambda m, r: kinds.vera(m, r, targets=["k"]), 256 + o),
        (lambda m, r: kinds.randlora(m, r, targets=["k"], blocks=[0]), 24 * (32 + 768)),
        (lambda m, r: kinds.randlora(m, r, rank=100, targets=["fc1"], blocks=[0]), 8 * (100 + 768)),
        (lambda m, r: kinds.allora(m, r, rank=5, targets=["k"], blocks=[0]), 5 * (i + o)),
        (lambda m, r: kinds.loldu(m, r, rank=64, targets=["k"], blocks=[0]), 64 + 1),
        (lambda m, r: corda(m, r, rank=5, targets=["k"], blocks=[0]), 5 * (i + o)),
        (lambda m, r: adalora(m, r, targets=["k"], blocks=[0]), 12 * (i + o + 1)),
        (lambda m, r: kinds.hydra(m, r), 2 * (3072 + o) + 2 * 2 * o),
        (lambda m, r: kinds.miss(m, r, rank=10, targets=["k"]), 10 * o),
        (lambda m, r: kinds.bone(m, r, rank=16, targets=["k"]), 16 * o),
        (lambda m, r: kinds.mora(m, r, rank=5, targets=["k"]), 88**2),
        (lambda m, r: kinds.mora(m, r, rank=8, targets=["k"], form="sum"), 111**2),
    ]
    for make, count in expected:
        model = small("vit_base_patch16_224", img_size=32, depth=1)
        assert make(model, runtime()).num_values() == count


def test_swin_and_convnext():
    swin = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "patch_size": 2}
    x = images(3)
    for name, make in FACTORIES.items():
        model = small("swin_tiny_patch4_window7_224", **swin)
        bare = model.features(x).detach()
        pet = kinds.loldu(model, runtime(), rank=8, targets=TARGETS) if name == "loldu" else make(model, runtime())
        shake(pet, size=0.1)
        own = model.features(x).detach()
        assert own.shape == bare.shape and not torch.allclose(own, bare, atol=1e-3), name
        one = pet.state()
        shake(pet, 4)
        with torch.no_grad(), pet.use(stack([one, pet.state()]), torch.tensor([0, 1, 0])):
            torch.testing.assert_close(model.features(x)[[0, 2]], own[[0, 2]], atol=5e-5, rtol=1e-4)
        with pytest.raises(UserError, match=f"pet={name.removesuffix('_sum')}"):
            make(small("resnet18"), runtime())
    with pytest.raises(UserError, match="pet=dora: ConvNeXtBlock has no linear layer"):
        kinds.dora(small("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)), runtime(), targets=["k"])


def test_the_norm_of_dora_is_a_constant_of_the_backward_pass():
    model = nano()
    pet = kinds.dora(model, runtime(), rank=2, targets=["proj"], blocks=[1])
    shake(pet)
    layer, t = model.net.blocks[1].attn.proj, torch.randn(5, 160)
    layer(t).square().sum().backward()
    a, b, m = (pet.values[f"1/proj/{part}"].detach().clone().requires_grad_() for part in "abm")
    moved = layer.weight + b @ a
    out = t @ (m / moved.detach().norm(dim=1))[:, None].mul(moved).T + layer.bias
    out.square().sum().backward()
    for part, want in zip("abm", (a, b, m), strict=True):
        torch.testing.assert_close(pet.values[f"1/proj/{part}"].grad, want.grad, atol=1e-3, rtol=1e-4)


def test_allora_scales_the_gradient_of_each_row():
    """What A, B get is that of rows multiplied by 1 / sqrt(|(B A)_k| + 1 / eta^2); what x gets is not."""
    model = nano().double()
    pet = kinds.allora(model, runtime(), rank=2, targets=["proj"], blocks=[1], eta=2.0).double()
    shake(pet)
    layer, x = model.net.blocks[1].attn.proj, torch.randn(5, 160, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    w, bias = layer.weight.detach(), layer.bias.detach()
    a, b = (pet.values[f"1/proj/{part}"].detach() for part in "ab")
    g = 2 * (x.detach() @ (w + b @ a).T + bias)  # of the output
    rows = torch.stack([(g[:, k : k + 1] * x.detach()).sum(0) / ((b @ a)[k].norm() + 0.25).sqrt() for k in range(160)])
    torch.testing.assert_close(pet.values["1/proj/b"].grad, rows @ a.T)
    torch.testing.assert_close(pet.values["1/proj/a"].grad, b.T @ rows)
    torch.testing.assert_close(x.grad, g @ (w + b @ a))


def test_loldu_is_a_triangular_decomposition():
    """Of all ranks the weight itself, for square, wide and tall; z is the diagonal."""
    model = nano()
    pet = kinds.loldu(model, runtime(), rank=160, targets=["q", "fc1", "fc2"], blocks=[2])
    for site, layer, rows in places(model, pet):
        left, upper, start = (getattr(pet, f"{site}/{part}") for part in ("left", "upper", "start"))
        torch.testing.assert_close(left * start @ upper, layer.weight[rows].detach(), atol=1e-5, rtol=1e-4)
        assert torch.equal(upper, upper.triu()) and torch.equal(upper.diagonal(), torch.ones(160))
        order = (left != 0).sum(1)  # each row of L has ones more entries than the one above it, up to 160
        assert sorted(order.clamp_max(160).tolist())[:160] == list(range(1, 161)) and left.abs().max() <= 1
        assert torch.equal(pet.values[f"{site}/z"].detach(), start) and pet.values[f"{site}/s"].item() == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m, r: kinds.dora(m, r, rank=0), "pet=dora: rank must be at least 1"),
        (lambda m, r: kinds.dora(m, r, targets=["w"]), "unknown targets .'w'. of pet=dora: choose from q, k, v"),
        (lambda m, r: kinds.dora(m, r, targets=["qkv", "k"]), "name a layer twice"),
        (lambda m, r: kinds.dora(m, r, blocks=[4]), "0 to 3"),
        (lambda m, r: kinds.allora(m, r, eta=0.0), "pet=allora: eta must be above 0, got 0"),
        (lambda m, r: kinds.loldu(m, r, rank=161), "rank=161 is above a side of 0/k of 160 x 160"),
        (lambda m, r: kinds.bone(m, r, rank=48), "rank=48 does not divide 0/k of 160 x 160"),
        (lambda m, r: kinds.mora(m, r, form="type6"), "unknown form='type6' of pet=mora: choose rotate or sum"),
    ],
)
def test_wrong_options(make, words):
    with pytest.raises(UserError, match=words):
        make(nano(), runtime())
