"""Parameter-efficient tuning of decoders: positions, masks, rows of heads and merging, against a decoder written in loops."""

import copy
import functools
import math

import pytest
import torch
from test_cpt_train import experiences, learn, learner, run_with_kills
from test_decoder import write_checkpoint
from test_pet import shake
from token_models import Bigram

from clbench.config.compose import compose
from clbench.interfaces import UserError
from clbench.learners.pretrain import Pretrain
from clbench.models import pet_modules as kinds
from clbench.models import pet_weights
from clbench.models.decoder import build_decoder
from clbench.models.pet import stack
from clbench.records import record
from clbench.run.runner import prepare, run_job
from clbench.training.runtime import Runtime
from clbench.training.state import fingerprint

SMALL = {"name": "small", "vocab": 29, "width": 32, "depth": 2, "heads": 4, "context": 20, "rotary": 0.5}
CPU = torch.device("cpu")
ALL = ("q", "v", "proj", "fc1", "fc2")
LINEAR = {
    "lora": lambda m, r: kinds.lora(m, r, rank=3, targets=ALL, scale=0.8),
    "lora_qkv": lambda m, r: kinds.lora(m, r, rank=3, targets=("qkv", "k"), learn_scale=True),
    "ssf": lambda m, r: kinds.ssf(m, r, std=0.1),
    "dora": lambda m, r: pet_weights.dora(m, r, rank=3, targets=ALL),
    "vera": lambda m, r: pet_weights.vera(m, r, rank=8, targets=ALL),
    "randlora": lambda m, r: pet_weights.randlora(m, r, rank=20, targets=ALL),
    "allora": lambda m, r: pet_weights.allora(m, r, rank=3, targets=ALL),
    "loldu": lambda m, r: pet_weights.loldu(m, r, rank=16, targets=ALL),
    "hydra": lambda m, r: pet_weights.hydra(m, r, rank=3, targets=ALL),
    "miss": lambda m, r: pet_weights.miss(m, r, rank=7, targets=ALL),
    "bone": lambda m, r: pet_weights.bone(m, r, rank=8, targets=ALL),
    "mora": lambda m, r: pet_weights.mora(m, r, rank=3, targets=ALL),
}
BENT = {
    "adapter": lambda m, r: kinds.adapter(m, r, bottleneck=4),
    "adapter_attention": lambda m, r: kinds.adapter(m, r, bottleneck=4, place="attention", learn_scale=True),
    "prefix": lambda m, r: kinds.prefix(m, r, length=3, low=-1, high=1, learn_scale=True),
    "prompt": lambda m, r: kinds.prompt(m, r, length=4),
    "mam": lambda m, r: kinds.mam(m, r, length=3, bottleneck=4),
}


def decoder(**options):
    return build_decoder(**{**SMALL, **options}, seed=1)


def attached(name, model):
    pet = ({**LINEAR, **BENT})[name](model, Runtime(0, CPU))
    shake(pet, size=0.1 if name in ("bone", "mora", "miss") else 0.3)
    return pet


def tokens(rows=3, length=12):
    return torch.randint(0, 29, (rows, length), generator=torch.Generator().manual_seed(5))


def norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def turned(vector, position, model):
    """A head's vector [d], its first half as pairs that lie a quarter of it apart, turned."""
    out, n = vector.clone(), model.shape.turned
    for i in range(n // 2):
        angle = torch.tensor(position * model.shape.rotary_base ** (-2 * i / n))
        a, b = vector[i], vector[i + n // 2]
        out[i], out[i + n // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def naive(model, x, keys=None, values=None, bottleneck=None):
    """Logits of embeddings x [N, D] of one text, in loops; keys and values [blocks][n, D] stand before its own."""
    heads, depth = model.shape.heads, model.shape.width // model.shape.heads
    for number, block in enumerate(model.layers):
        seen, entered = norm(x, block.input_layernorm), x
        qkv = seen @ block.attention["query_key_value"].weight.T + block.attention["query_key_value"].bias
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for h in range(heads):
                at = slice(h * 3 * depth, (h + 1) * 3 * depth)
                own = slice(h * depth, (h + 1) * depth)
                q = turned(qkv[t, at][:depth], t, model)
                ks = [] if keys is None else [k[own] for k in keys[number]]
                vs = [] if values is None else [v[own] for v in values[number]]
                ks += [turned(qkv[s, at][depth : 2 * depth], s, model) for s in range(t + 1)]
                vs += [qkv[s, at][2 * depth :] for s in range(t + 1)]
                weights = torch.softmax(torch.stack([q @ k / math.sqrt(depth) for k in ks]), 0)
                out[t, own] = sum(w * v for w, v in zip(weights, vs, strict=True))
        attended = out @ block.attention["dense"].weight.T + block.attention["dense"].bias
        middle = entered if model.shape.parallel else entered + attended
        hidden = norm(middle, block.post_attention_layernorm) @ block.mlp["dense_h_to_4h"].weight.T
        fed = torch.nn.functional.gelu(hidden + block.mlp["dense_h_to_4h"].bias) @ block.mlp["dense_4h_to_h"].weight.T
        x = entered + attended + fed + block.mlp["dense_4h_to_h"].bias
        if bottleneck is not None:
            x = x + bottleneck(number, middle, seen)
    return norm(x, model.final_layer_norm) @ model.embed_out.weight.T


@pytest.mark.parametrize("options", [{}, {"parallel": False, "attention": "sdpa"}], ids=["explicit", "sdpa"])
@torch.no_grad()
def test_prefix_prompt_and_adapters_against_loops(options):
    text = tokens(2, 7)

    def check(make, naive_logits):
        model = decoder(**options)
        bare = model(text)
        pet = make(model)
        found = model(text)
        assert not torch.allclose(found, bare, atol=1e-3)
        for row, one in zip(found, text, strict=True):
            torch.testing.assert_close(row, naive_logits(model, pet, one), atol=2e-5, rtol=1e-4)
        with pet.off():
            torch.testing.assert_close(model(text), bare)

    def prefix(model, pet, one):
        parts = [[pet.values[f"{i}/{n}"] * pet.values[f"{i}/scale_{n}"] for i in range(2)] for n in "kv"]
        return naive(model, model.embed_in.weight[one], *parts)

    def prompt(model, pet, one):
        return naive(model, torch.cat([pet.values["tokens"], model.embed_in.weight[one]]))[4:]

    def adapter(place):
        def logits(model, pet, one):
            def bottleneck(i, middle, seen):
                v = {name.split("/")[1]: value for name, value in pet.values.items() if name.startswith(f"{i}/")}
                hidden = torch.relu((middle if place == "mlp" else seen) @ v["down"].T + v["down_bias"])
                return v.get("scale", 0.1) * (hidden @ v["up"].T + v["up_bias"])

            return naive(model, model.embed_in.weight[one], bottleneck=bottleneck)

        return logits

    check(functools.partial(attached, "prefix"), prefix)
    check(functools.partial(attached, "prompt"), prompt)
    check(functools.partial(attached, "adapter"), adapter("mlp"))
    if model_is_parallel(options):  # else what the MLP sees has the attention's adapter in it
        check(functools.partial(attached, "adapter_attention"), adapter("attention"))


def model_is_parallel(options):
    return options.get("parallel", True)


@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_merged_and_unmerged_logits_are_equal(name, tmp_path):
    """On a checkpoint in Pythia's layout; the merged weights alone, in a fresh decoder, do it too."""
    write_checkpoint(tmp_path / "point")
    plain = {**SMALL, "context": 16, "rotary": 0.25}
    model = build_decoder(**plain, weights=str(tmp_path / "point"))
    text, keys = tokens(), list(model.state_dict())
    bare, before = model(text), {k: v.clone() for k, v in model.state_dict().items()}
    pet = attached(name, model)
    own = model(text)
    assert not torch.allclose(own, bare, atol=1e-3) and list(model.state_dict()) == keys
    pet.merge()
    torch.testing.assert_close(model(text), own, atol=5e-5, rtol=1e-4)
    fresh = build_decoder(**plain)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(text), model(text), rtol=0, atol=0)
    pet.unmerge()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(model(text), own, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_q_and_v_are_rows_of_every_head():
    """Outputs of a layer are (head, {q, k, v}, 8): k stays what it was, to the last bit."""
    model, text = decoder(), tokens()
    layer, x = model.layers[0].attention["query_key_value"], model.embed_in(text)
    bare = layer(x)
    pet = kinds.lora(model, Runtime(0, CPU), rank=3, targets=("q", "v"), scale=0.5)
    shake(pet)
    moved = layer(x)
    for h in range(4):
        for part, name in enumerate("qkv"):
            at, own = slice(h * 24 + part * 8, h * 24 + part * 8 + 8), slice(h * 8, h * 8 + 8)
            if name == "k":
                assert torch.equal(moved[..., at], bare[..., at])
                continue
            delta = 0.5 * (pet.values[f"0/{name}/b"] @ pet.values[f"0/{name}/a"])[own]
            torch.testing.assert_close(moved[..., at] - bare[..., at], x @ delta.T, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [*LINEAR, *BENT])
def test_gradients_mixed_states_and_causality(name):
    model, text = decoder(), tokens()
    pet = attached(name, model)
    pet.train()
    model.loss(text).mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pet.values.values())
    pet.eval()
    states = [pet.state()]
    shake(pet, 2, 0.1)
    states.append(pet.state())
    with torch.no_grad():
        each = []
        for state in states:
            with pet.use(state):
                each.append(model(text))
        with pet.use(stack(states), torch.tensor([1, 0, 1])):
            mixed = model(text)
        torch.testing.assert_close(mixed, torch.stack([each[1][0], each[0][1], each[1][2]]), atol=2e-5, rtol=1e-4)
        other = text.clone()
        other[:, 6:] = (other[:, 6:] + 1) % 29
        torch.testing.assert_close(model(other)[:, :6], model(text)[:, :6])
        twin, copied = copy.deepcopy((model, pet))
        shake(copied, 3)
        assert not torch.allclose(twin(text), model(text), atol=1e-3)
        torch.testing.assert_close(model(text), each[1])


def test_what_does_not_fit_a_decoder():
    runtime = Runtime(0, CPU)
    for make, words in (
        (lambda m: kinds.vpt(m, runtime), "pet=vpt adds tokens, which only plain ViTs can take; Decoder cannot"),
        (lambda m: kinds.prefix(m, runtime, compensate=True), "compensate is for networks of images"),
        (lambda m: kinds.prefix(m, runtime) and kinds.prefix(m, runtime), "block 0 has a prefix already"),
        (lambda m: kinds.lora(m, runtime, blocks=[2]), r"not distinct numbers of the 2 blocks"),
        (lambda m: kinds.prompt(m, runtime, length=9) and m(tokens()), "a text of 21 tokens is longer than the context of 20"),
    ):
        with pytest.raises(UserError, match=words):
            make(decoder())
    with pytest.raises(UserError, match="a Bigram is neither"):
        kinds.lora(Bigram(8, 8, 6, seed=3), runtime)


TINY = ("scenario=cpt_synthetic", "scenario.symbols=8", "scenario.states=8", "scenario.tokens=768", "scenario.context=16",
        "scenario.batch=8", "scenario.eval_tokens=160", "scenario.probe_sequences=2", "scenario.probe_evenly=2",
        "scenario.order=[0,1]", "model.width=16", "model.depth=1", "model.heads=2", "num_threads=1", "device=cpu")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pet=prompt",), "puts 5 vectors before texts of 16 tokens: model.context=21 or more is needed, it is 16"),
        (("pet=vpt",), "pet=vpt adds tokens"),
        (("pet=adalora",), "pet=adalora is chosen by data or steps of its training"),
        (("pet=lora", "learner.trainable=half"), "learner.trainable=half is for the whole network"),
        (("pet=lora", "+model.mup=8"), "pet=lora needs model.mup=null"),
        (("pet=lora", "compile=true"), "pet=lora needs compile=false"),
        (("pet=adapter", "micro_batch=4"), "pet=adapter with dropout needs micro_batch=null"),
    ],
)
def test_what_cannot_run_is_refused_at_plan_time(tmp_path, words, message):
    (config,) = compose([*TINY, *words, f"results_dir={tmp_path}"])
    with pytest.raises(UserError, match=message):
        prepare(config)


def test_a_run_trains_the_module_alone_and_counts_it(tmp_path):
    entries = {}
    for name in ("none", "lora"):
        (config,) = compose([*TINY, f"pet={name}", f"results_dir={tmp_path}", "on_error=raise"])
        entries[name] = record.read(run_job(config).path)
    whole, lora = entries["none"], entries["lora"]
    assert lora["parameters"] == {"trained": 2 * 5 * (16 + 16), "total": whole["parameters"]["total"]}
    matrices = 4 * 16 * 16 + 2 * 16 * 64 + 16 * 8
    per_token = [entry["ledger"]["flops"] / 2 / 768 for entry in (whole, lora)]
    assert per_token[0] - per_token[1] == pytest.approx(2 * matrices - 6 * 320)
    assert lora["run_id"] != whole["run_id"] and lora["sum_loss_start"] == whole["sum_loss_start"] != lora["sum_loss"][0]


PLANS = {
    "lora": {"pet": functools.partial(kinds.lora, rank=2), "boundary": "reset"},
    "adapter": {"pet": functools.partial(kinds.adapter, bottleneck=4, dropout=0.5), "branch": 0.25, "boundary": "restore",
                "schedule": lambda place: min(1.0, 4 * (place.steps - place.step) / place.steps)},
    "prompt": {"pet": functools.partial(kinds.prompt, length=2), "start": "scratch", "boundary": "reset"},
}  # fmt: skip


def pretrain(model, runtime, **options):
    """`Pretrain` of a decoder in place of the model that it is given."""
    return Pretrain(
        build_decoder(name="d", vocab=8, width=8, depth=1, heads=2, context=8, rotary=0.5, seed=3), runtime, **options
    )


@pytest.mark.parametrize("plan", PLANS)
def test_killed_and_equal_to_the_last_bit(tmp_path, plan):
    """The frozen weights are what they were, the killed run ends where the other does, dropout included."""
    straight = learn(learner(pretrain, **PLANS[plan]), experiences(2))
    assert fingerprint(straight.model.state_dict()) == fingerprint(learner(pretrain).model.state_dict())
    assert set(straight.state_dict()) == {"pet", "optimizer", "average", "trunk", "places"}
    again = run_with_kills(tmp_path, pretrain, PLANS[plan], (5, 11, 16, 22))
    assert fingerprint(again.state_dict()) == fingerprint(straight.state_dict())
    assert again.runtime.ledger == straight.runtime.ledger
