"""The decoder: against transformers on the same weights, gradients, causality, weights from folders."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clbench.config import compose
from clbench.interfaces import UserError
from clbench.models import checkpoint
from clbench.models.decoder import Decoder, Shape, build_decoder

SMALL = {"name": "small", "vocab": 29, "width": 32, "depth": 2, "heads": 4, "context": 16}


@pytest.fixture
def tokens():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 29, (3, 16)))


def reference(folder: Path, **options):
    """A random model of transformers, saved; weights large enough that every part matters."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: text)")
    transformers.utils.logging.disable_progress_bar()
    plain = {"vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    made = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**plain, max_position_embeddings=16, **options))
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    made.save_pretrained(folder)
    return made.eval()


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"use_parallel_residual": False, "rotary_pct": 1.0}, {"parallel": False, "rotary": 1.0}),
        ({"hidden_act": "relu", "rotary_pct": 0.5}, {"activation": "relu", "rotary": 0.5}),
        ({"hidden_act": "gelu_new"}, {"activation": "gelu_new"}),
        ({"layer_norm_eps": 0.1, "rotary_emb_base": 100, "rotary_pct": 1.0}, {"eps": 0.1, "rotary_base": 100.0, "rotary": 1.0}),
        ({"tie_word_embeddings": True}, {"tied": True}),
    ],
)
def test_logits_equal_those_of_transformers(tmp_path, tokens, theirs, ours, attention):
    other = reference(tmp_path, **theirs)
    model = build_decoder(**SMALL, **ours, attention=attention, weights=str(tmp_path))
    with torch.no_grad():
        want, got = other(tokens).logits, model(tokens)
        loss = other(tokens, labels=tokens).loss
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert model.loss(tokens).mean().item() == pytest.approx(float(loss), rel=1e-5)
    assert model.pretrained and model.identity["source"] == tmp_path.name
    assert sum(p.numel() for p in other.parameters()) == model.identity["parameters"]
    for name in ours.keys() - {"tied"}:  # the options do something: with another one the logits move
        moved = build_decoder(**{**SMALL, **ours, name: Shape.__dataclass_fields__[name].default}, attention=attention)
        moved.load_state_dict(model.state_dict())
        assert (moved(tokens) - want).abs().max().item() > 5e-5, name


def write_checkpoint(folder: Path, shards: int = 1, **changes):
    """A checkpoint as Pythia's are on the hub: half precision, buffers inside, names with a prefix."""
    model = build_decoder(**SMALL, seed=3)
    state = {f"gpt_neox.{k}" if k != "embed_out.weight" else k: v.half() for k, v in model.state_dict().items()}
    for i in range(2):
        state[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        state[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
        state[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(1)
    state |= changes
    state = {k: v for k, v in state.items() if v is not None}
    folder.mkdir(exist_ok=True)
    plain = {"model_type": "gpt_neox", "vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain |= {"intermediate_size": 128, "max_position_embeddings": 16, "rotary_pct": 0.25, "rotary_emb_base": 10000}
    (folder / "config.json").write_text(json.dumps(plain))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
    else:
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        where = {k: names[i % shards] for i, k in enumerate(sorted(state))}
        for name in names:
            save_file({k: state[k] for k in state if where[k] == name}, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return model


@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoints_of_one_file_and_of_several(tmp_path, tokens, shards):
    made = write_checkpoint(tmp_path / "point", shards)
    model = build_decoder(**SMALL, weights="point", data_root=str(tmp_path), seed=8)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, made.state_dict()[name].half().float(), rtol=0, atol=0)
    assert len(model.identity["file_sha256"]) == 64 and model.identity["source"] == "point"
    shorter = build_decoder(**{**SMALL, "context": 8}, weights=str(tmp_path / "point"))
    torch.testing.assert_close(shorter(tokens[:, :8]), model(tokens)[:, :8], atol=1e-5, rtol=1e-5)


def damage(folder: Path, what: str) -> None:
    path, file = folder / "config.json", folder / "model.safetensors"
    body = json.loads(path.read_text())
    if what == "no config":
        path.unlink()
    elif what == "bad config":
        path.write_text("{")
    elif what == "list config":
        path.write_text("[]")
    elif what == "other type":
        path.write_text(json.dumps(body | {"model_type": "llama"}))
    elif what == "scaled":
        path.write_text(json.dumps(body | {"rope_scaling": {"type": "linear", "factor": 2}}))
    elif what == "two differences":
        path.write_text(json.dumps(body | {"hidden_size": 64, "hidden_act": "relu"}))
    elif what == "short context":
        path.write_text(json.dumps(body | {"max_position_embeddings": 8}))
    elif what == "no weights":
        file.rename(folder / "pytorch_model.bin")
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "text":
        file.write_text("hello")
    else:
        state = load_file(file)
        if what == "missing tensor":
            del state["gpt_neox.final_layer_norm.weight"]
        elif what == "extra tensor":
            state["gpt_neox.layers.7.mlp.dense_h_to_4h.bias"] = torch.ones(3)
        elif what == "other shape":
            state["embed_out.weight"] = torch.ones(30, 32)
        elif what == "nan":
            state["embed_out.weight"][0, 0] = math.nan
        save_file(state, file)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "cannot read .*config.json: No such file"),
        ("bad config", r"config.json is not JSON"),
        ("list config", "not a JSON object"),
        ("other type", "holds a model of type 'llama', not gpt_neox"),
        ("scaled", "scaled rotary positions"),
        ("two differences", r"width is 64, model.width is 32; activation is relu, model.activation is gelu"),
        ("short context", "context is 8, model.context is 16"),
        ("no weights", "lacks model.safetensors; pytorch_model.bin is a pickle"),
        ("cut", "model.safetensors cannot be read"),
        ("text", "model.safetensors cannot be read"),
        ("missing tensor", "lacks final_layer_norm.weight$"),
        ("extra tensor", "holds gpt_neox.layers.7"),
        ("other shape", r"embed_out.weight is \(30, 32\), the model wants \(29, 32\)"),
        ("nan", "embed_out.weight holds NaN"),
    ],
)
def test_damaged_checkpoints(tmp_path, what, message):
    write_checkpoint(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(UserError, match=message) as error:
        build_decoder(**SMALL, weights=str(tmp_path))
    assert "\n" not in str(error.value)


def test_damaged_shards(tmp_path):
    write_checkpoint(tmp_path, 2)
    index = tmp_path / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002.safetensors"):
        build_decoder(**SMALL, weights=str(tmp_path))
    for wrong in ({"weight_map": {}}, {"weight_map": {"a": "../b.safetensors"}}, {"weight_map": [1]}, {}):
        index.write_text(json.dumps(body | wrong if wrong else wrong))
        with pytest.raises(UserError, match="names no files"):
            checkpoint.parts(tmp_path)


def test_folders_that_are_none(tmp_path, monkeypatch):
    monkeypatch.delenv("CLBENCH_DATA", raising=False)
    with pytest.raises(UserError, match=r"CLBENCH_DATA is not set.*EleutherAI"):
        build_decoder(**SMALL, weights="pythia-70m")
    with pytest.raises(UserError, match=r"no folder pythia-70m or .*pythia-70m: "):
        build_decoder(**SMALL, weights="pythia-70m", data_root=str(tmp_path))
    (tmp_path / "a.bin").touch()
    with pytest.raises(UserError, match="is a file: a folder"):
        build_decoder(**SMALL, weights=str(tmp_path / "a.bin"))


def test_explicit_attention_equals_the_kernel_and_has_its_gradients(tokens):
    pairs = [build_decoder(**SMALL, attention=kind) for kind in ("explicit", "sdpa")]
    losses = [model.loss(tokens) for model in pairs]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.mean().backward()
    for a, b in zip(*(model.parameters() for model in pairs), strict=True):
        assert a.grad is not None and float(a.grad.abs().sum()) > 0
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_loss_is_the_negative_log_probability_of_the_next_token(tokens):
    model = build_decoder(**SMALL)
    logits = model(tokens[:, :-1]).double()
    want = -torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]
    loss = model.loss(tokens)
    assert loss.shape == (3, 15) and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.loss(tokens).dtype == torch.float32
    torch.testing.assert_close(model(tokens[:, :1]), model(tokens)[:, :1], atol=1e-5, rtol=1e-5)


def test_no_token_sees_a_later_one(tokens):
    for parallel in (True, False):
        model = build_decoder(**SMALL, parallel=parallel)
        changed = tokens.clone()
        changed[:, 9] = (changed[:, 9] + 1) % 29
        before, after = model(tokens), model(changed)
        torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
        assert (before[:, 9:] - after[:, 9:]).abs().amax((0, 2)).min() > 1e-5


def test_random_weights_follow_the_scheme_and_the_seed():
    shape = {**SMALL, "vocab": 300, "width": 128, "depth": 3}
    one, again, other = (build_decoder(**shape, seed=seed) for seed in (0, 0, 1))
    assert one.identity["state_sha256"] == again.identity["state_sha256"] != other.identity["state_sha256"]
    small, last = math.sqrt(2 / (5 * 128)), 2 / 3 / math.sqrt(128)
    for name, value in one.named_parameters():
        if value.ndim == 2:
            want = last if name.endswith(("attention.dense.weight", "4h_to_h.weight")) else small
            assert float(value.detach().std()) == pytest.approx(want, rel=0.03), name
            assert abs(float(value.detach().mean())) < 5 * want / math.sqrt(value.numel())
        else:
            assert (value == float("norm.weight" in name)).all(), name
    flat = torch.cat([p.detach().flatten() for n, p in one.named_parameters() if n.startswith("embed")]) / small
    assert float((flat**4).mean()) == pytest.approx(3 - 1.2 / 8, abs=0.1)  # a sum of eight uniform numbers
    assert one.loss(torch.arange(300).view(20, 15)).mean().item() == pytest.approx(math.log(300), abs=0.5)


def test_pinned_weights():
    """Integer arithmetic: the same on every machine."""
    state = build_decoder(**SMALL).state_dict()
    assert [round(float(v), 6) for v in state["embed_in.weight"][0, :4]] == PINNED


PINNED = [0.157795, 0.026328, 0.014335, -0.143796]


@pytest.mark.parametrize(
    ("name", "parameters", "flops"),
    [("pythia_70m", 70_426_624, 3.43e8), ("pythia_160m", 162_322_944, 9.68e8), ("pythia_410m", 405_334_016, 2.73e9)],
)
def test_sizes_and_operations_of_pythia(name, parameters, flops):
    node = compose.compose([f"model={name}", "scenario=cpt_synthetic"])[0]["model"]
    numbers = {k: node[k] for k in ("vocab", "width", "depth", "heads", "context")}
    with torch.device("meta"):
        model = Decoder(Shape(**numbers, hidden=4 * node["width"]))
    assert sum(p.numel() for p in model.parameters()) == parameters  # the model cards' total
    assert model.flops_per_token(2048) == pytest.approx(flops, rel=0.002)


@pytest.mark.parametrize("name", ["decoder_tiny", "decoder_1m", "decoder_3m"])
def test_small_models_from_their_files(name):
    node = dict(compose.compose([f"model={name}", "scenario=cpt_synthetic"])[0]["model"])
    model = compose.build(node | {"vocab": 256, "context": 32})
    expected = {"decoder_tiny": 0.2e6, "decoder_1m": 1e6, "decoder_3m": 3e6}[name]
    assert model.identity["parameters"] == pytest.approx(expected, rel=0.2)
    assert model.identity["context"] == 32 and model.identity["name"] == name and not model.pretrained
    with pytest.raises(UserError, match=r"model\.vocab is null"):
        compose.build(node | {"vocab": None, "context": 32})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "model.width=32 is not a multiple of model.heads=5"),
        ({"depth": 0}, "model.depth must be a whole number from 1"),
        ({"rotary": 1.5}, "share of each head"),
        ({"rotary": 0.4}, "turns 3 of 8 numbers of a head: it must be an even number"),
        ({"activation": "gelo"}, "model.activation must be one of gelu"),
        ({"attention": "flash"}, "model.attention must be auto, explicit or sdpa"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        build_decoder(**{**SMALL, **options})


def test_a_text_longer_than_the_context(tokens):
    model = build_decoder(**{**SMALL, "context": 8})
    with pytest.raises(UserError, match="16 tokens is longer than the context of 8"):
        model(tokens)
    assert model.loss(tokens[:, :9]).shape == (3, 8)
