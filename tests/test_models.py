"""Backbones and heads: what is loaded is what was asked for, nothing draws from the global generators, states round-trip."""

import copy
import hashlib
import json
import pathlib

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.models import weights as files
from clbench.models.backbone import build_backbone, state_sha256
from clbench.models.heads import CosineHead, LinearHead, PrototypeHead
from clbench.streams.eval_sets import open_eval
from clbench.streams.generators import class_incremental
from clbench.streams.images.data import ImageBatch, ImageData, open_experience
from clbench.streams.images.pixels import Pipeline
from clbench.streams.scenario import ArrayImages

NANO = {"img_size": 32, "patch_size": 8, "embed_dim": 160, "depth": 4, "num_heads": 4}
TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
PACKAGE = pathlib.Path(files.__file__).parent


def nano(**more):
    return build_backbone("nano", "vit_tiny_patch16_224", NANO, "package:nano.safetensors", profile="small", **more)


def tiny(**more):
    return build_backbone("tiny", "vit_tiny_patch16_224", TINY, profile="small", **more)


SIX = ArrayImages(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))


def plain_data(model):
    """Six images of one source, whoever asks; ids 50 to 55."""
    return ImageData(SIX, np.arange(6), np.arange(6) + 50, np.arange(6), Pipeline(model.profile, "cpu"), None, "six")


def test_nano_is_the_file_of_its_card():
    model = nano().eval()
    card = json.loads((PACKAGE / "nano.json").read_text())
    assert model.identity["file_sha256"] == card["sha256"]
    assert sum(p.numel() for p in model.parameters()) == card["num_parameters"] <= 1_500_000
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **NANO).eval()
    net.load_state_dict({k: v.float() for k, v in load_file(PACKAGE / "nano.safetensors").items()})
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.features(x), net.forward_features(x)[:, 0]), "the class token after the last norm"
    assert model.pretrained and model.num_features == 160 and model.profile.size == 32
    assert model.identity["state_sha256"] == state_sha256(net.state_dict())


def test_random_weights_come_from_the_seed_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    models = [tiny(seed=s) for s in (0, 0, 1)]
    models += [build_backbone("r", "resnet32", stem="small", profile="small", seed=s) for s in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    hashes = [m.identity["state_sha256"] for m in models]
    assert hashes[0] == hashes[1] != hashes[2] and hashes[3] == hashes[4] != hashes[5]
    assert not any(m.pretrained or m.identity["file_sha256"] for m in models)


def test_resnet32_is_the_network_for_32_pixels():
    model = build_backbone("r", "resnet32", stem="small", profile="small").eval()
    assert sum(p.numel() for p in model.parameters()) == 466_256  # 464,154 of He et al. with 10 classes, shortcuts by 1x1
    assert sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 31
    shapes = []
    for stage in (model.net.layer1, model.net.layer2, model.net.layer3):
        stage.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape[1:])))
    assert model.features(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)] and model.profile.size == 32
    small = build_backbone("r18", "resnet18", stem="small", profile="small")
    assert small.features(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    with pytest.raises(UserError, match="has no final LayerNorm"):
        model.fresh_norm()


def test_fresh_norm_is_slcas():
    model = nano().eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model.net.norm = torch.nn.LayerNorm(160, eps=1e-6)
    with torch.no_grad():
        model.net.norm.weight.fill_(3.0)
    model.fresh_norm()
    assert model.net.norm.eps == 1e-5 and torch.allclose(model.features(x).mean(1), torch.zeros(2), atol=1e-5)
    assert all(p.requires_grad for p in model.net.norm.parameters())
    model.freeze()
    model.fresh_norm()
    assert not any(p.requires_grad for p in model.parameters())


def test_frozen_features_are_computed_once():
    model = nano()
    data = plain_data(model)
    list(map(model.features, data.test_batches(4)))
    assert model.passes == {"train": 6, "eval": 0, "stored": 0} and not len(model.memory), "not frozen: nothing is remembered"
    model.freeze()
    model.train()
    assert not model.training
    first = torch.cat([model.features(b) for b in data.test_batches(4)])
    again = torch.cat([model.features(b) for b in data.test_batches(3)])
    assert torch.equal(first, again) and model.passes == {"train": 6, "eval": 6, "stored": 0}
    batch = data.batch([2])
    model.features(batch)
    assert batch._x is None, "no pixel is read for what is remembered"
    model.features(data.batch([0, 1], key=3))
    model.features(ImageBatch.of(batch.x, ids=batch.ids))
    assert model.passes["eval"] == 9, "augmented and foreign images are never remembered"
    model.remember(False)
    model.features(batch)
    assert model.passes["eval"] == 10


def test_large_batches_pass_in_pieces(monkeypatch):
    """Without gradients only: there nothing looks at two samples at once. Pieces are nearly equal, so no image goes alone."""
    model = tiny().eval()
    x, sizes = torch.randn(33, 3, 32, 32), []
    whole = model.features(x)
    monkeypatch.setattr("clbench.models.backbone.CACHED_PIXELS", 16 * 32 * 32)
    monkeypatch.setattr(
        model.net, "forward_features", lambda x, real=model.net.forward_features: sizes.append(len(x)) or real(x)
    )
    assert torch.equal(model.features(x), whole) and sizes == [33], "gradients may be wanted"
    with torch.no_grad():
        torch.testing.assert_close(model.features(x), whole)
        assert sizes[1:] == [11, 11, 11] and model.features(x[:0]).shape == (0, 24)
        model.train()
        model.features(x)
    assert sizes[-1] == 33 and sum(model.passes.values()) == 4 * 33


def test_what_is_remembered_is_forgotten_when_weights_may_move():
    model = nano()
    data = plain_data(model)
    for change in (
        model.unfreeze,
        model.fresh_norm,
        lambda: model.load_state_dict(model.state_dict()),
        lambda: model.net.norm.requires_grad_(True),
    ):
        model.freeze()
        model.features(data.batch([0]))
        before = model.passes["eval"] + model.passes["train"]
        change()
        model.features(data.batch([0]))
        assert model.passes["eval"] + model.passes["train"] == before + 1


def test_memo_is_bounded(monkeypatch):
    monkeypatch.setattr("clbench.models.feature_memory.MEMO_BYTES", 4 * 160 * 4)
    model = nano()
    model.freeze()
    data = plain_data(model)
    for _ in range(2):
        list(map(model.features, data.test_batches(3)))
    assert len(model.memory) == 3 and model.passes["eval"] == 9


def test_deep_copies_are_apart_but_counted():
    model = nano()
    model.freeze()
    data = plain_data(model)
    model.features(data.batch([0, 1]))
    twin = copy.deepcopy(model)
    assert not len(twin.memory) and twin.frozen and twin.profile == model.profile
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert state_sha256(model.state_dict()) != state_sha256(twin.state_dict())
    twin.features(data.batch([0]))
    assert model.passes == twin.passes == {"train": 0, "eval": 3, "stored": 0} and len(model.memory) == 2


def test_weights_from_files(tmp_path, monkeypatch):
    model = tiny(seed=3)
    state = model.net.state_dict()
    full = {**state, "head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    save_file(full, tmp_path / "a.safetensors")
    save_file({k: v.half() for k, v in full.items()}, tmp_path / "half.safetensors")
    torch.save({"state_dict": full, "epoch": 3}, tmp_path / "a.pth")
    digest = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    for found in (
        tiny(weights=str(tmp_path / "a.safetensors"), sha256=digest),
        tiny(weights="a.safetensors", data_root=str(tmp_path)),
        tiny(weights="a.pth", data_root=str(tmp_path)),
    ):
        assert found.identity["state_sha256"] == model.identity["state_sha256"] and found.pretrained
        assert str(tmp_path) not in json.dumps(found.identity), "an identity names no folder"
    half = tiny(weights="half.safetensors", data_root=str(tmp_path))
    assert {v.dtype for v in half.net.state_dict().values()} == {torch.float32}
    monkeypatch.setenv("CLBENCH_DATA", str(tmp_path))
    assert tiny(weights="a.safetensors").identity["file_sha256"] == digest


def test_google_npz_files(tmp_path):
    net, rng = tiny(seed=5).net, np.random.default_rng(0)
    s = {k: rng.normal(size=tuple(v.shape)).astype(np.float32) for k, v in net.state_dict().items()}
    block, d, heads = "Transformer/encoderblock_0/", 24, 2
    w = {
        "cls": s["cls_token"],
        "embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": s["pos_embed"],
        "Transformer/encoder_norm/scale": s["norm.weight"],
        "Transformer/encoder_norm/bias": s["norm.bias"],
    }
    for theirs, ours in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
        w |= {f"{block}{theirs}/scale": s[f"blocks.0.{ours}.weight"], f"{block}{theirs}/bias": s[f"blocks.0.{ours}.bias"]}
    attention = f"{block}MultiHeadDotProductAttention_1/"
    for i, n in enumerate(("query", "key", "value")):
        part = slice(i * d, (i + 1) * d)
        w[f"{attention}{n}/kernel"] = s["blocks.0.attn.qkv.weight"][part].T.reshape(d, heads, d // heads)
        w[f"{attention}{n}/bias"] = s["blocks.0.attn.qkv.bias"][part].reshape(heads, d // heads)
    w[f"{attention}out/kernel"] = s["blocks.0.attn.proj.weight"].T.reshape(heads, d // heads, d)
    w[f"{attention}out/bias"] = s["blocks.0.attn.proj.bias"]
    for i in range(2):
        w[f"{block}MlpBlock_3/Dense_{i}/kernel"] = s[f"blocks.0.mlp.fc{i + 1}.weight"].T
        w[f"{block}MlpBlock_3/Dense_{i}/bias"] = s[f"blocks.0.mlp.fc{i + 1}.bias"]
    np.savez(tmp_path / "v.npz", **w)
    model = tiny(weights="v.npz", data_root=str(tmp_path))
    for key, value in model.net.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), s[key], err_msg=key)
    del w["cls"]
    np.savez(tmp_path / "v.npz", **w)
    with pytest.raises(UserError, match=r"do not fit model tiny: .*cls"):
        tiny(weights="v.npz", data_root=str(tmp_path))


def test_positions_follow_the_image_size_as_timm_has_it(tmp_path):
    import timm

    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    large = build_backbone("large", "vit_tiny_patch16_224", {"img_size": 64, **kwargs})
    save_file(large.net.state_dict(), tmp_path / "large.safetensors")
    for size in (32, (32, 64)):
        small = build_backbone(
            "small", "vit_tiny_patch16_224", {"img_size": size, **kwargs}, "large.safetensors", data_root=str(tmp_path)
        )
        reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=size, **kwargs)
        state = timm.models.vision_transformer.checkpoint_filter_fn(dict(large.net.state_dict()), reference)
        torch.testing.assert_close(small.net.pos_embed.data, state["pos_embed"])
    wrong = {**large.net.state_dict(), "pos_embed": torch.zeros(1, 60, 24)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"pos_embed is \(1, 60, 24\), the model wants \(1, 17, 24\)"):
        build_backbone(
            "small", "vit_tiny_patch16_224", {"img_size": 32, **kwargs}, "wrong.safetensors", data_root=str(tmp_path)
        )


def bad_files(folder):
    state = tiny().net.state_dict()
    save_file({k: v for k, v in state.items() if k != "cls_token"}, folder / "missing.safetensors")
    save_file({**state, "adapter.w": torch.zeros(2)}, folder / "extra.safetensors")
    save_file({**state, "cls_token": torch.zeros(1, 1, 9)}, folder / "shape.safetensors")
    save_file({**state, "cls_token": torch.full((1, 1, 24), torch.nan)}, folder / "nan.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"\x00" * 20)
    torch.save({"state_dict": {"cls_token": 3}}, folder / "odd.pth")
    torch.save(pathlib.PurePosixPath("x"), folder / "code.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "missing.safetensors"}, "do not fit model tiny: missing cls_token"),
        ({"weights": "extra.safetensors"}, "do not fit model tiny: unexpected adapter.w"),
        ({"weights": "shape.safetensors"}, r"cls_token is \(1, 1, 9\), the model wants \(1, 1, 24\)"),
        ({"weights": "nan.safetensors"}, "cls_token holds NaN"),
        ({"weights": "damaged.safetensors"}, "cannot be read"),
        ({"weights": "code.pth"}, "hold the Python object pathlib.PurePosixPath, and such files are never unpickled"),
        ({"weights": "odd.pth"}, "not a mapping of names to tensors"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors not found: .*timm's vit_tiny_patch16_224.*download=true"),
        ({"weights": "extra.safetensors", "sha256": "0" * 64}, "have SHA-256 [0-9a-f]{64}, expected 0000"),
        ({"weights": "none", "sha256": "0" * 64}, "has no effect"),
        ({"weights": "package:other.safetensors"}, "clbench ships .*package:nano.safetensors"),
        (
            {"weights": "timm", "timm": "vit_tiny_patch16_224"},
            "names 2 sets of weights: give the full tag, one of .*augreg_in21k",
        ),
        ({"timm": "vit_tiny_patch16_224.augreg_in2k"}, "did you mean 'vit_tiny_patch16_224.augreg_in21k'"),
        ({"timm": "vit_tiny_patch16_242"}, "near: vit_tiny_patch16_224"),
        ({"stem": "small"}, "for ResNets"),
        ({"stem": "small", "weights": "timm"}, "stem=small would replace"),
        ({"kwargs": {"widht": 3}}, "model.kwargs .* do not fit timm's"),
        ({"profile": "smal"}, "did you mean 'small'"),
    ],
)
def test_bad_models_are_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.delenv("CLBENCH_DATA", raising=False)
    bad_files(tmp_path)
    given = {"timm": "vit_tiny_patch16_224", "kwargs": TINY, "profile": "small", "data_root": str(tmp_path), **options}
    with pytest.raises(UserError, match=message) as error:
        build_backbone("tiny", **given)
    assert "\n" not in str(error.value)


def test_timm_weights_come_from_its_cache_or_say_what_to_do(tmp_path, monkeypatch):
    tag = "vit_tiny_patch16_224.augreg_in21k"
    monkeypatch.setattr(files, "cached", lambda tag: None)
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("nothing may be asked for without download=true"))
    with pytest.raises(UserError, match=f"{tag} are not in the local cache: download=true fetches them, or model.weights=FILE"):
        build_backbone("v", tag, weights="timm")
    monkeypatch.undo()
    save_file(tiny(seed=9).net.state_dict(), tmp_path / "c.safetensors")
    monkeypatch.setattr(files, "cached", lambda tag: tmp_path / "c.safetensors")
    model = build_backbone("v", tag, TINY, weights="timm", profile="timm")
    assert state_sha256(model.net.state_dict()) == tiny(seed=9).identity["state_sha256"] == model.identity["state_sha256"]
    assert model.identity["file_sha256"] == hashlib.sha256((tmp_path / "c.safetensors").read_bytes()).hexdigest()
    with pytest.raises(UserError, match="expected 0000"):
        build_backbone("v", tag, TINY, weights="timm", sha256="0" * 64)

    def offline(*a, **k):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(files, "cached", lambda tag: None)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"could not be loaded .*no route to host$"):
        build_backbone("v", tag, weights="timm", download=True)


@pytest.mark.data("vit_tiny_patch16_224.safetensors")
def test_real_vit_is_timms():
    model = build_backbone("v", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", weights="vit_tiny_patch16_224.safetensors").eval()
    assert (model.num_features, model.profile.size, model.profile.resize) == (192, 224, 248)
    assert model.profile.mean == (0.5, 0.5, 0.5) and model.profile.test_kernel == "bicubic"
    assert torch.isfinite(model.features(torch.zeros(1, 3, 224, 224))).all()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", [LinearHead, CosineHead])
def test_growing_heads(kind):
    before = torch.get_rng_state()
    head, twin = kind(16), kind(16)
    head.grow(3, rng())
    old = head.blocks[0].weight
    held, copied = old, old.detach().clone()
    head.grow(1, rng(1))
    assert head.blocks[0].weight is held and torch.equal(held, copied) and head.num_classes == 4
    x = torch.randn(5, 16, generator=rng(2))
    assert head(x).shape == (5, 4)
    state = head.state_dict()
    twin.load_state_dict(state)
    assert torch.equal(twin(x), head(x)) and [p.shape for p in twin.parameters()] == [p.shape for p in head.parameters()]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in head.parameters()]
    kept = twin.blocks[0].weight
    shorter = kind(16)
    shorter.grow(3, rng(7))
    twin.load_state_dict(shorter.state_dict())
    assert twin.blocks[0].weight is kept and twin.num_classes == 3 and torch.equal(twin(x), shorter(x))
    assert torch.equal(before, torch.get_rng_state()), "a head drew from the global generator"


def test_linear_head_starts_as_vits_do():
    head = LinearHead(400)
    head.grow(200, rng())
    weight = head.blocks[0].weight
    assert abs(weight.std().item() - 0.02) < 5e-4 and abs(weight.mean().item()) < 5e-4
    assert not head.blocks[0].bias.any()


def test_linear_head_starts_as_a_peers_do():
    """kaiming_uniform of a linear layer: U(-b, b) with b = sqrt(3 / 300) = 0.1, so a standard deviation of 1 / sqrt(300)."""
    head = LinearHead(300, init="kaiming_uniform")
    head.grow(200, rng()), head.grow(1, rng(1))
    weight = head.blocks[0].weight.detach()
    assert 0.0999 < weight.abs().max() <= 0.1 and abs(weight.std().item() - 300**-0.5) < 5e-4 and abs(weight.mean()) < 5e-4
    torch.testing.assert_close(weight, 0.1 * (2 * torch.rand(200, 300, generator=rng()) - 1), atol=1e-6, rtol=0)
    assert not head.blocks[0].bias.any() and head.blocks[1].weight.abs().max() > 0.09, "the bound is of D, not of the count"
    joined = head.joined()
    assert joined.init == "kaiming_uniform" and torch.equal(joined.blocks[0].weight[200:], head.blocks[1].weight)
    with pytest.raises(UserError, match="'kaiming' of a linear head: choose normal or kaiming_uniform"):
        LinearHead(300, init="kaiming")


def test_cosine_head_by_hand():
    head = CosineHead(8)
    head.grow(2, rng())
    head.grow(2, rng(1))
    assert all(block.weight.abs().max() <= 8**-0.5 for block in head.blocks)
    prototypes = torch.randn(3, 8, generator=rng(3))
    kept = head.blocks[0].weight[0].clone()
    head.assign(1, prototypes)
    x = torch.randn(4, 8, generator=rng(4))
    with torch.no_grad():
        head.sigma.fill_(2.5)
    rows = torch.cat([kept[None], prototypes])
    torch.testing.assert_close(head(x), 2.5 * F.cosine_similarity(x[:, None], rows[None], dim=2))
    with pytest.raises(UserError, match=r"classes 2\.\.4, the head has 4"):
        head.assign(2, prototypes)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_prototypes_do_not_depend_on_the_order(metric):
    f, y = torch.randn(60, 12, generator=rng()), torch.arange(60) % 4
    whole, parts = PrototypeHead(12, metric), PrototypeHead(12, metric)
    whole.update(f, y, 5)
    for rows in torch.randperm(60, generator=rng(1)).split(7):
        parts.update(f[rows], y[rows], int(y[rows].max()) + 1)
    parts.update(f[:0], y[:0], 5)
    torch.testing.assert_close(whole.means_KD, parts.means_KD, atol=1e-14, rtol=1e-12)
    assert torch.equal(whole.counts_K, parts.counts_K)
    means = torch.stack([f[y == c].double().mean(0) for c in range(4)])
    x = torch.randn(9, 12, generator=rng(2))
    naive = (
        -torch.cdist(x.double(), means).square()
        if metric == "euclidean"
        else F.cosine_similarity(x[:, None].double(), means, dim=2)
    )
    scores = whole(x)
    torch.testing.assert_close(scores[:, :4], naive.float())
    assert scores.shape == (9, 5) and torch.isfinite(scores).all() and (scores[:, 4] < scores[:, :4].amin(1)).all()
    other = PrototypeHead(12, metric)
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other(x), scores)
    sums, kept = other.sums_KD, whole.sums_KD.clone()
    other.update(f, y, 5)
    assert torch.equal(whole.sums_KD, kept), "a loaded state is a copy"
    other.load_state_dict(parts.state_dict())
    assert other.sums_KD is sums and torch.equal(sums, parts.sums_KD), "filled in place"


def test_unknown_metric():
    with pytest.raises(UserError, match="choose euclidean or cosine"):
        PrototypeHead(3, "manhattan")


def test_digits_by_nearest_mean_of_nano_features():
    """The aim for `ncm` on the default stream; the order of classes and the batch size have no part in it."""
    model = nano()
    model.freeze()
    scenario = class_incremental(name="d", dataset="digits", increment=2, budget={"epochs": 1})
    pipeline = Pipeline(model.profile, "cpu", "none")
    head, right, total = PrototypeHead(160), 0, 0
    with torch.no_grad():
        for i in range(5):
            e = open_experience(scenario, i, pipeline)
            for batch in e.train.test_batches(128):
                head.update(model.features(batch), batch.y, e.num_seen)
        for j in range(5):
            for batch, y in open_eval(scenario, j, pipeline).batches(64):
                right, total = right + int((head(model.features(batch)).argmax(1) == y).sum()), total + len(y)
    assert right / total >= 0.80 and model.passes == {"train": 0, "eval": 1797, "stored": 0}
