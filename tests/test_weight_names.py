"""Public checkpoints of vision transformers: their names, what lies beside the network, and the same features as theirs."""

import importlib.util
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.models.backbone import build_backbone
from clbench.models.weight_names import without_prefix

D, HEADS, DEPTH, SIDE, PATCH = 24, 2, 2, 32, 8
SIZE = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": D, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2}


def small(tag="vit_tiny_patch16_224", weights="none", **more):
    return build_backbone("small", tag, {**SIZE, **more}, str(weights), profile="small", seed=7)


def tokens_of(model, images):
    with torch.no_grad():
        return model.eval().net.forward_features(images)


def images():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def drawn(shapes):
    """Tensors with values of every size that matters: a name mixed up shows."""
    rng = torch.Generator().manual_seed(3)
    return {name: 0.3 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def said(caplog, load):
    caplog.set_level(logging.INFO, logger="clbench")
    caplog.clear()
    model = load()
    return model, " ".join(record.getMessage() for record in caplog.records)


# --- naive versions, which read the names of the public files


def hugging_face(kind, registers=0, gated=False):
    """Names and shapes of Hugging Face's files of ViT ("vit") or DINOv2 ("dinov2")."""
    n = (SIDE // PATCH) ** 2
    shapes = {"embeddings.cls_token": (1, 1, D), "embeddings.position_embeddings": (1, 1 + n, D)}
    shapes |= {"embeddings.patch_embeddings.projection.weight": (D, 3, PATCH, PATCH)}
    shapes |= {"embeddings.patch_embeddings.projection.bias": (D,)}
    if registers:
        shapes |= {"embeddings.register_tokens": (1, registers, D)}
    norms = ("layernorm_before", "layernorm_after") if kind == "vit" else ("norm1", "norm2")
    wide = ("intermediate.dense", "output.dense") if kind == "vit" else ("mlp.fc1", "mlp.fc2")
    up, down = (2 * D, 2 * D)
    if gated:
        wide, up, down = ("mlp.weights_in", "mlp.weights_out"), 64, 32
    for i in range(DEPTH):
        linear = {f"attention.attention.{part}": (D, D) for part in ("query", "key", "value")}
        linear |= {"attention.output.dense": (D, D), wide[0]: (up, D), wide[1]: (D, down)}
        for name, shape in linear.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}
        for name in norms:
            shapes |= {f"encoder.layer.{i}.{name}.weight": (D,), f"encoder.layer.{i}.{name}.bias": (D,)}
        if kind == "dinov2":
            shapes |= {f"encoder.layer.{i}.layer_scale{j}.lambda1": (D,) for j in (1, 2)}
    if kind == "dinov2":
        shapes |= {"embeddings.mask_token": (1, D)}
    return shapes | {"layernorm.weight": (D,), "layernorm.bias": (D,)}


def naive(state, kind, x):
    """A forward pass written from the papers on Hugging Face's names: images [B, 3, S, S] -> tokens [B, 1 + R + N, D]."""

    def linear(name, h):
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, h):
        return F.layer_norm(h, (D,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    start = "embeddings.patch_embeddings.projection"
    h = F.conv2d(x, state[f"{start}.weight"], state[f"{start}.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    h = torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), h], 1) + state["embeddings.position_embeddings"]
    if "embeddings.register_tokens" in state:
        registers = state["embeddings.register_tokens"].expand(len(x), -1, -1)
        h = torch.cat([h[:, :1], registers, h[:, 1:]], 1)
    for i in range(DEPTH):
        at = f"encoder.layer.{i}"
        before, after = (f"{at}.layernorm_before", f"{at}.layernorm_after") if kind == "vit" else (f"{at}.norm1", f"{at}.norm2")
        inside = norm(before, h)
        q, k, v = (
            linear(f"{at}.attention.attention.{part}", inside).unflatten(2, (HEADS, D // HEADS)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = ((q @ k.transpose(2, 3)) * (D // HEADS) ** -0.5).softmax(-1) @ v
        out = linear(f"{at}.attention.output.dense", mixed.transpose(1, 2).flatten(2))
        h = h + out * state.get(f"{at}.layer_scale1.lambda1", 1)
        inside = norm(after, h)
        if kind == "vit":
            out = linear(f"{at}.output.dense", F.gelu(linear(f"{at}.intermediate.dense", inside)))
        elif f"{at}.mlp.weights_in.weight" in state:
            gate, value = linear(f"{at}.mlp.weights_in", inside).chunk(2, dim=-1)
            out = linear(f"{at}.mlp.weights_out", F.silu(gate) * value)
        else:
            out = linear(f"{at}.mlp.fc2", F.gelu(linear(f"{at}.mlp.fc1", inside)))
        h = h + out * state.get(f"{at}.layer_scale2.lambda1", 1)
    return norm("layernorm", h)


KINDS = {  # -> layout, timm's network, registers, gated MLP
    "vit": ("vit", "vit_tiny_patch16_224", {}, 0, False),
    "dinov2": ("dinov2", "vit_small_patch14_dinov2", {}, 0, False),
    "registers": ("dinov2", "vit_small_patch14_reg4_dinov2", {}, 4, False),
    "gated": ("dinov2", "vit_giant_patch14_dinov2", {"mlp_ratio": 64 / D}, 0, True),
}


@pytest.mark.parametrize("prefix", ["", "vit.", "model.backbone.dinov2."])
@pytest.mark.parametrize("name", KINDS)
def test_hugging_face_files_give_the_features_of_a_naive_pass(tmp_path, caplog, name, prefix):
    kind, tag, more, registers, gated = KINDS[name]
    state = drawn(hugging_face(kind, registers, gated))
    beside = {"classifier.weight": torch.zeros(5, D), f"{prefix}pooler.dense.weight": torch.zeros(D, D)}
    named = {f"{prefix}{key}": value for key, value in state.items()} | beside
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt", "source": "hub"})
    model, words = said(caplog, lambda: small(tag, tmp_path / "model.safetensors", **more))
    torch.testing.assert_close(tokens_of(model, images()), naive(state, kind, images()), atol=1e-5, rtol=1e-4)
    assert "names of Hugging Face's transformers" in words and (f"behind '{prefix}'" in words) == bool(prefix)
    assert ("the class token with its position" in words) == bool(registers)
    assert "classifier.weight" in words and "pooler.dense.weight" in words and "left out" in words


OWN = (  # Hugging Face's names of DINOv2 -> those of its makers' files
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in", "mlp.w12"),
    ("mlp.weights_out", "mlp.w3"),
    ("layernorm.", "norm."),
)


def own_names(state):
    out = {}
    for name, value in state.items():
        for theirs, own in OWN:
            name = name.replace(theirs, own)
        out[name] = value
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            parts = [out.pop(f"blocks.{i}.attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return out


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("name", ["dinov2", "registers", "gated"])
def test_dinov2_files_of_its_makers(tmp_path, caplog, name, chunks):
    _, tag, more, registers, gated = KINDS[name]
    state = drawn(hugging_face("dinov2", registers, gated))
    named = own_names(state)
    if chunks:  # a training state: blocks in chunks, behind the teacher, with the student and heads beside
        for block, chunk in ((0, 0), (1, 3)):
            named = {key.replace(f"blocks.{block}.", f"blocks.{chunk}.{block}."): value for key, value in named.items()}
        named = {f"backbone.{key}": value for key, value in named.items()}
        named = {"teacher": named | {"dino_head.last_layer.weight_g": torch.zeros(2)}, "student": named, "iteration": 3}
    torch.save(named, tmp_path / "w.pth")
    model, words = said(caplog, lambda: small(tag, tmp_path / "w.pth", **more))
    torch.testing.assert_close(tokens_of(model, images()), naive(state, "dinov2", images()), atol=1e-5, rtol=1e-4)
    assert "mask_token" in words and ("names of DINOv2's own files" in words) == (gated or chunks)
    assert ("read under teacher; names without 'backbone.'" in words) == chunks


# --- the same against Hugging Face's own modules


def theirs(name):
    """(module, timm's network, its options) of Hugging Face's transformers."""
    import transformers as hf

    both = {"hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH}
    vit = {**both, "intermediate_size": 2 * D, "layer_norm_eps": 1e-6}
    if name == "vit":
        return hf.ViTModel(hf.ViTConfig(**vit)), "vit_tiny_patch16_224", {}
    if name == "deit":
        return hf.DeiTModel(hf.DeiTConfig(**vit)), "deit_tiny_distilled_patch16_224", {}
    if name == "beit":
        return (
            hf.BeitModel(hf.BeitConfig(**vit, use_relative_position_bias=True)),
            "beit_base_patch16_224",
            {"init_values": 0.1},
        )
    if name == "registers":
        return (
            hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**both, mlp_ratio=2)),
            "vit_small_patch14_reg4_dinov2",
            {},
        )
    gated = {"use_swiglu_ffn": True} if name == "gated" else {}
    tag = "vit_giant_patch14_dinov2" if gated else "vit_small_patch14_dinov2"
    return hf.Dinov2Model(hf.Dinov2Config(**both, mlp_ratio=2, **gated)), tag, {"mlp_ratio": 64 / D} if gated else {}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed (the extra `text`)")
@pytest.mark.parametrize("name", ["vit", "deit", "beit", "dinov2", "registers", "gated"])
@pytest.mark.filterwarnings("ignore")
def test_the_features_of_hugging_faces_own_modules(tmp_path, name):
    net, tag, more = theirs(name)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=rng))
        want = net.eval()(images()).last_hidden_state
    net.save_pretrained(tmp_path)  # the names of files
    torch.save({"state_dict": {f"model.{key}": v for key, v in net.state_dict().items()}}, tmp_path / "modules.ckpt")
    for file in ("model.safetensors", "modules.ckpt"):
        model = small(tag, tmp_path / file, **more)
        torch.testing.assert_close(tokens_of(model, images()), want, atol=1e-5, rtol=1e-4)
        if name == "beit":  # its last norm stands behind the pooling
            pooled = model.net.forward_head(tokens_of(model, images()), pre_logits=True)
            torch.testing.assert_close(pooled, net(images()).pooler_output, atol=1e-5, rtol=1e-4)


# --- training states


@pytest.fixture
def state():
    return {name: value.clone() for name, value in small().net.state_dict().items()}


def states(net):
    """name -> (file, what the log says): how public training states of vision transformers are laid out."""

    def behind(prefix):
        return {f"{prefix}{name}": value for name, value in net.items()}

    other, row = {name: value + 1 for name, value in net.items()}, torch.zeros(2)
    mae = behind("") | {"mask_token": row, "decoder_embed.weight": row, "decoder_blocks.0.x": row}
    old = {f"module.momentum_encoder.{name}": value for name, value in other.items()}
    v3 = behind("module.base_encoder.") | old | {"module.base_encoder.head.0.weight": row, "module.predictor.0.weight": row}
    v2 = behind("module.encoder_q.") | {"module.queue": row, "module.encoder_k.fc.0.x": row}
    dino = behind("module.backbone.") | {"module.head.mlp.0.weight": row, "module.head.last_layer.weight_g": row}
    flat = {f"student.backbone.{name}": value for name, value in other.items()} | {"teacher.dino_head.x": row}
    beit = behind("") | {"lm_head.weight": row, "blocks.0.attn.relative_position_index": row}
    solo = behind("backbone.") | {"projector.0.weight": row, "momentum_backbone.x": row}
    lightning = {"state_dict": behind("model._orig_mod."), "hyper_parameters": {"lr": 0.1}}
    return {
        "mae": ({"model": mae}, "under model; decoder_blocks.0.x, decoder_embed.weight, mask_token left out"),
        "moco_v3": ({"epoch": 3, "arch": "vit_small", "state_dict": v3}, "names without 'module.base_encoder.'"),
        "moco_v2": ({"state_dict": v2}, "names without 'module.encoder_q.'"),
        "dino": ({"student": other, "teacher": dino, "epoch": 3}, "under teacher; names without 'module.backbone.'"),
        "flat": (behind("teacher.backbone.") | flat, "names without 'teacher.backbone.'"),
        "student": (behind("student.backbone.") | {"student.ibot_head.x": row}, "names without 'student.backbone.'"),
        "beit": ({"model": beit}, "blocks.0.attn.relative_position_index, lm_head.weight left out"),
        "lightning": (lightning, "under state_dict; names without 'model._orig_mod.'"),
        "solo": ({"state_dict": solo}, "momentum_backbone.x, projector.0.weight left out"),
        "timm": ({"state_dict_ema": behind("module.")}, "under state_dict_ema; names without 'module.'"),
    }


def test_training_states_as_public_code_writes_them(tmp_path, caplog, state):
    for name, (saved, words) in states(state).items():
        torch.save(saved, tmp_path / f"{name}.pth")
        model, log = said(caplog, lambda path=tmp_path / f"{name}.pth": small(weights=path))
        found = model.net.state_dict()
        assert all(torch.equal(found[key], state[key]) for key in state), name
        assert words in log and f"{len(state)} tensors" in log, (name, log)


def test_what_does_not_fit_is_said_beside_what_fits(tmp_path, state):
    named = {f"module.backbone.{name}": value for name, value in state.items() if name != "cls_token"}
    torch.save({"model": named | {"module.adapter.weight": torch.zeros(2)}}, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        small(weights=tmp_path / "w.pth")
    number = len(state)
    assert str(error.value) == (
        f"weights {tmp_path}/w.pth do not fit model small: missing cls_token; unexpected adapter.weight "
        f"({number - 1} of the model's {number} tensors are there; read under model; names without 'module.backbone.')"
    )
    with pytest.raises(UserError, match=r"attn\.query\.bias.*Hugging Face"):
        hf = drawn(hugging_face("vit"))
        del hf["encoder.layer.0.attention.attention.key.bias"], hf["encoder.layer.0.attention.attention.value.bias"]
        save_file(hf, tmp_path / "w.safetensors")
        small(weights=tmp_path / "w.safetensors")


def test_the_prefix_under_which_most_tensors_fit_is_cut():
    one = torch.zeros(1)
    few = {"teacher.a": one, "student.backbone.a": one, "student.backbone.b": one}
    assert without_prefix(few, {"a", "b"}) == ({"teacher.a": one, "a": one, "b": one}, "student.backbone.")
    both = {"student.a": one, "teacher.a": one}
    assert without_prefix(both, {"a"})[1] == "teacher.", "a teacher comes before its student, wherever it stands"
    assert without_prefix({"encoder.a": one, "b": one}, {"encoder.a", "b"})[1] == "", "names of the network's own stay"
