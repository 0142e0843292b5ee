"""Small networks: parameters counted by hand, what norm changes, networks from outside, and the network on disk after a run."""

import copy
import json
import math
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from clbench.config.compose import build, compose
from clbench.interfaces import UserError
from clbench.models import small_networks
from clbench.models.backbone import build_backbone
from clbench.models.weights import state_sha256
from clbench.run import provenance
from clbench.run.runner import run_job

TINY = ("scenario.num_classes=4", "scenario.limit_train=6", "scenario.limit_test=3", "scenario.budget.epochs=1")
EXACT = ("num_threads=1", "arithmetic=reference", "on_error=raise")


def model_of(*overrides):
    return build(compose(list(overrides))[0]["model"])


def conv(a, b, side=3):
    return a * b * side * side


def resnet_by_hand(blocks, maps, per_map):
    """Without biases: a 3x3 stem, two 3x3 convolutions a block, a 1x1 shortcut at every change of maps; a norm behind each."""
    total, before = conv(3, maps[0]) + per_map * maps[0], maps[0]
    for number, width in zip(blocks, maps, strict=True):
        for _ in range(number):
            total += conv(before, width) + conv(width, width) + 2 * per_map * width
            total += 0 if before == width else conv(before, width, 1) + per_map * width
            before = width
    return total


BY_HAND = {
    "mlp": 784 * 100 + 100 + 100 * 100 + 100,
    "mlp_256": 784 * 256 + 256 + 256 * 256 + 256,
    "mlp_400": 784 * 400 + 400 + 400 * 400 + 400,
    "convnet": conv(3, 32) + conv(32, 32) + conv(32, 64) + conv(64, 64) + 2 * (32 + 64) + 64 * 8 * 8 * 512 + 512,
    "resnet18_slim": resnet_by_hand((2, 2, 2, 2), (20, 40, 80, 160), 0),
    "resnet18_cifar": resnet_by_hand((2, 2, 2, 2), (64, 128, 256, 512), 0),
    "resnet32": resnet_by_hand((5, 5, 5), (16, 32, 64), 0),
}
NORMED = {  # channels that stand before a norm
    "mlp": 200,
    "mlp_256": 512,
    "mlp_400": 800,
    "convnet": 192,
    "resnet18_slim": 20 + 4 * 20 + 5 * (40 + 80 + 160),
    "resnet18_cifar": 64 + 4 * 64 + 5 * (128 + 256 + 512),
    "resnet32": 16 + 10 * 16 + 11 * (32 + 64),
}
WIDTH = {
    "mlp": 100,
    "mlp_256": 256,
    "mlp_400": 400,
    "convnet": 512,
    "resnet18_slim": 160,
    "resnet18_cifar": 512,
    "resnet32": 64,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_parameters_by_hand(name):
    assert {"mlp": 88_600, "resnet18_slim": 1_090_140, "resnet18_cifar": 11_159_232}.get(name, BY_HAND[name]) == BY_HAND[name]
    for norm in ("none", "batch", "group"):
        model = model_of(f"model={name}", f"model.norm={norm}")
        expected = BY_HAND[name] + (0 if norm == "none" else 2 * NORMED[name])
        assert sum(p.numel() for p in model.parameters()) == expected, norm
        assert model.num_features == WIDTH[name] and model.profile.size == (28 if name.startswith("mlp") else 32)


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet18_slim", "resnet32"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_only_batch_norm_looks_at_other_images(name, norm):
    model = model_of(f"model={name}", f"model.norm={norm}").train()
    side = model.profile.size
    x = torch.randn(6, 3, side, side, generator=torch.Generator().manual_seed(0))
    together, alone = model.features(x), torch.cat([model.features(x[:3]), model.features(x[3:])])
    assert torch.allclose(together, alone, atol=1e-5) == (norm != "batch")
    assert bool(list(model.buffers())) == (norm == "batch"), "no statistics that a later task overwrites"
    assert together.std() > 1e-2 and torch.isfinite(together).all()
    together.square().sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("layer" in n for n in still), "only inside residual branches that start as zero"


def test_an_mlp_by_hand():
    model = model_of("model=mlp", "model.kwargs.hidden=[5,2]", "model.kwargs.img_size=2")
    weights = [layer[0] for layer in model.net.layers]
    assert [tuple(w.weight.shape) for w in weights] == [(5, 4), (2, 5)] and not any(w.bias.any() for w in weights)
    assert weights[0].weight.abs().max() <= math.sqrt(6 / 9), "Glorot: a = sqrt(6 / (4 + 5))"
    with torch.no_grad():
        weights[0].weight.zero_()
        weights[0].weight[0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        weights[0].weight[1] = torch.tensor([-1.0, 0.0, 0.0, 0.0])
        weights[1].weight.copy_(torch.tensor([[2.0, 7, 0, 0, 0], [-1.0, 0, 0, 0, 0]]))
        weights[1].bias.copy_(torch.tensor([0.5, 70.0]))
    x = torch.tensor([[1.0, 1, 0, 0], [2.0, 2, 0, 3], [3.0, 6, 0, 3]]).reshape(1, 3, 2, 2)  # means 2, 3, 0, 2
    # 2 + 2 x 3 + 4 x 2 = 16; -2 is cut; 2 x 16 + 0.5; 70 - 16
    assert model.features(x).tolist() == [[32.5, 54.0]]
    wide = model_of("model=mlp", "model.kwargs.channels=3", "model.kwargs.img_size=8")
    assert sum(p.numel() for p in wide.parameters()) == 192 * 100 + 100 + 10_100


def test_group_norm_takes_the_largest_divisor_up_to_eight():
    groups = {n: small_networks.normalisation("group", n).num_groups for n in (1, 7, 16, 20, 22, 100, 13)}
    assert groups == {1: 1, 7: 7, 16: 8, 20: 5, 22: 2, 100: 5, 13: 1}


@pytest.mark.parametrize("name", ["resnet18_slim", "resnet32"])
def test_without_norm_residual_branches_start_as_zero(name):
    net = model_of(f"model={name}", "model.norm=none").net.eval()
    x = torch.randn(2, net.layer1[0].conv1.in_channels, 8, 8)
    assert torch.equal(net.layer1(x), x.relu())


def test_a_network_of_a_seed_and_its_identity():
    same = [model_of("model=convnet", f"seed={s}").identity["state_sha256"] for s in (0, 0, 1)]
    assert same[0] == same[1] != same[2]
    plain, named, other = (compose(["model=resnet32", *w])[0] for w in ([], ["model.norm=batch"], ["model.norm=group"]))
    assert provenance.identity(plain) == provenance.identity(named) and "norm" not in provenance.identity(plain)["model"]
    assert provenance.identity(other)["model"]["norm"] == "group"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timm": "mlp", "norm": "layer"}, "model.norm must be batch, group or none, got 'layer'"),
        ({"timm": "resnet18", "norm": "none"}, "model.norm=none has no effect on timm's resnet18: it is for mlp, convnet, res"),
        ({"timm": "resnet18.a1_in1k", "norm": "group", "weights": "timm"}, "model.norm=group has no effect on the weights"),
        ({"timm": "mlp", "stem": "small"}, "stem=small is for ResNets, mlp is none"),
        ({"timm": "mlp", "kwargs": {"hiden": [3]}}, "do not fit mlp: .*hiden"),
        ({"timm": "mlp", "kwargs": {"hidden": []}}, "hidden must list numbers of units"),
        ({"timm": "mlp", "kwargs": {"hidden": [3, 0]}}, "hidden must list numbers of units"),
        ({"timm": "mlp", "kwargs": {"channels": 2}}, "channels must be 1 or 3"),
        ({"timm": "convnet", "kwargs": {"img_size": 3, "maps": [4, 4]}}, "cannot be halved 2 times"),
        ({"timm": "convnet", "kwargs": {"img_size": 0}}, "img_size must be a whole number"),
        ({"timm": "resnet18_slym"}, "near: resnet18_slim"),
        ({"timm": "resnet18_slim", "kwargs": {"depth": 3}}, "do not fit resnet18_slim"),
    ],
)
def test_wrong_networks_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        build_backbone("n", profile="small", **options)
    assert "\n" not in str(error.value)


# any timm network


@pytest.mark.parametrize(
    ("tag", "width"),
    [("mobilenetv3_small_050", 1024), ("mobilenetv4_conv_small", 1280), ("ghostnet_100", 1280), ("efficientvit_b0", 1280)],
)
def test_features_are_as_wide_as_they_come_out(tag, width):
    model = build_backbone("n", tag).eval()
    assert model.num_features == width != model.net.num_features
    assert model.features(torch.zeros(1, 3, model.profile.size, model.profile.size)).shape == (1, width)


def test_plan_and_run_know_the_width(clbench):
    few = ("scenario.num_classes=2", "scenario.limit_train=2", "scenario.limit_test=1", "scenario.budget.epochs=1")
    words = (*few, *EXACT, "learner=ncm", "model=resnet32", "model.stem=null", "model.timm=mobilenetv3_small_050")
    assert "1 new" in clbench("plan", *words).stdout
    clbench("run", *words, "results_dir=out")


def test_plan_refuses_prompts_on_a_swin(clbench, tmp_path):
    options = {"img_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    swin = build_backbone("s", "swin_tiny_patch4_window7_224", options)
    torch.save(swin.net.state_dict(), tmp_path / "swin.pth")
    kwargs = [f"+model.kwargs.{name}={value}".replace(" ", "") for name, value in options.items()]
    words = (*TINY, *EXACT, "model=vit_tiny", "model.timm=swin_tiny_patch4_window7_224", *kwargs)
    words += (f"model.weights={tmp_path / 'swin.pth'}",)
    assert "1 new" in clbench("plan", *words, "learner=finetune").stdout
    err = clbench("plan", *words, "learner=l2p", code=2).stderr
    assert err == "clbench: pet=prompt adds tokens, which only plain ViTs can take; SwinTransformer cannot\n"


# networks from outside

OWN = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width: int = 6):
            super().__init__()
            self.num_features, self.image_size = width, 8
            self.line = nn.Linear(192, width)

        def features(self, x):
            return self.line(x.flatten(1)).relu()

    class Wide(Net):
        num_features = property(lambda self: 7, lambda self, value: None)

    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)

    class Deep(Net):
        def features(self, x):
            return x

    class Broken(Net):
        def features(self, x):
            return self.line(x)

    class Nameless(nn.Module):
        num_features = 3

    class Plain:
        num_features, features = 3, None
"""


@pytest.fixture
def own(clbench):
    (clbench.folder / "own_nets.py").write_text(textwrap.dedent(OWN))
    return clbench


def test_a_network_from_outside(own):
    words = (*TINY, *EXACT, "learner=finetune", "results_dir=out")
    assert "1 new" in own("plan", *words, "model=own_nets.Net").stdout
    own("run", *words, "model=own_nets.Net", "save_model=true")
    own("run", *words, "model=own_nets.py:Net", "model.width=3", "seed=1")
    found = [json.loads(path.read_text()) for path in (own.folder / "out" / "records").glob("*.json")]
    found.sort(key=lambda entry: entry["seed"])
    assert [entry["model"]["name"] for entry in found] == ["Net", "Net"] and found[0]["learner"]["plugin"].startswith(
        "own_nets"
    )
    assert found[0]["parameters"]["total"] == 193 * 6 and found[1]["parameters"]["total"] == 193 * 3
    saved = load_file(own.folder / "out" / "runs" / found[0]["run_id"] / "model.safetensors")
    assert saved.keys() == {"line.weight", "line.bias"}
    assert "verified" in own("verify", "out").stdout
    (own.folder / "own_nets.py").write_text(textwrap.dedent(OWN) + "# changed\n")
    assert "1 new" in own("plan", *words, "model=own_nets.Net").stdout, "its code is part of the identity"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Wide", "model Wide: num_features is 7, and its features are 6 wide"),
        ("Frozen", "model Frozen has no parameter that can be trained"),
        ("Deep", "model Deep: features of 2 images must be [2, D], got [2, 3, 8, 8]"),
        ("Broken", "model Broken gives no features of images of 8 x 8 pixels: RuntimeError: "),
        (
            "Nameless",
            "model Nameless has no features: a model is a torch.nn.Module with features(x) -> [B, D] and num_features, D",
        ),
        ("Plain", "model Plain is no torch.nn.Module with a method features: a model is"),
        ("Nat", "model: own_nets.py has no 'Nat'; did you mean 'Net'?"),
        ("Net model.widht=3", "model.widht: Net has no argument 'widht'; did you mean 'width'?"),
    ],
)
def test_what_is_no_network_is_refused_by_plan(own, name, message):
    err = own("plan", *TINY, *EXACT, "learner=ncm", *f"model=own_nets.{name}".split(), code=2).stderr
    assert err.startswith(f"clbench: {message}") and err.count("\n") == 1, err


# save_model


def finished(folder, *words):
    outcome = run_job(compose([*TINY, *EXACT, f"results_dir={folder}", *words])[0])
    return outcome, json.loads(outcome.path.read_text())


@pytest.mark.parametrize("learner", ["finetune", "ncm"])
def test_the_network_is_on_disk_and_loads_again(tmp_path, learner):
    words = (f"learner={learner}", "model=resnet32")
    outcome, entry = finished(tmp_path / "a", *words, "save_model=true")
    path = tmp_path / "a" / "runs" / entry["run_id"] / "model.safetensors"
    assert outcome.text.endswith(f"\nnetwork {path}")
    _, plain = finished(tmp_path / "b", *words)
    assert plain["run_id"] == entry["run_id"] and plain["final_state_sha256"] == entry["final_state_sha256"]
    assert not (tmp_path / "b" / "runs" / entry["run_id"] / "model.safetensors").exists()
    assert "save_model" not in json.dumps(entry["config"])
    again = build(compose(["model=resnet32", f"model.weights={path}"])[0]["model"])
    assert again.pretrained and state_sha256(again.net.state_dict()) == state_sha256(load_file(path))
    assert (again.identity["state_sha256"] == entry["model"]["state_sha256"]) == (learner == "ncm")


def test_a_saved_network_is_the_learners(tmp_path, monkeypatch):
    from clbench.run import saved_model

    kept = []
    real = saved_model.save
    monkeypatch.setattr(saved_model, "save", lambda job: kept.append(copy.deepcopy(job.model)) or real(job))
    _, entry = finished(tmp_path, "learner=finetune", "model=mlp", "save_model=true")
    again = build(compose(["model=mlp", f"model.weights={tmp_path}/runs/{entry['run_id']}/model.safetensors"])[0]["model"])
    x = torch.randn(3, 3, 28, 28)
    assert torch.equal(again.eval().features(x), kept[0].eval().features(x))


def test_a_run_that_is_done_says_that_its_network_was_not_saved(tmp_path):
    words = ("learner=ncm", "model=mlp")
    finished(tmp_path, *words)
    outcome, entry = finished(tmp_path, *words, "save_model=true")
    assert outcome.status == "skipped"
    assert outcome.text.endswith("no network saved: force=true save_model=true repeats the run")
    finished(tmp_path, *words, "save_model=true", "force=true")
    outcome, _ = finished(tmp_path, *words, "save_model=true")
    assert outcome.text.endswith(f"network {tmp_path}/runs/{entry['run_id']}/model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_loads_again(tmp_path, tied):
    words = (
        "scenario=cpt_synthetic",
        "learner=constant_lr",
        "scenario.tokens=2000",
        "scenario.order=[0]",
        "scenario.eval_tokens=512",
    )
    model = ("model.depth=1", "model.width=16", "model.heads=2", f"model.tied={tied}".lower())
    config = compose([*words, *model, "num_threads=1", "arithmetic=reference", "save_model=true", f"results_dir={tmp_path}"])[0]
    outcome = run_job({**config, "on_error": "raise"})
    folder = tmp_path / "runs" / outcome.run_id / "model"
    node = compose([*words, *model, f"model.weights={folder}", "model.vocab=32", "model.context=64"])[0]["model"]
    again, saved = build(node), load_file(folder / "model.safetensors")
    assert again.pretrained and state_sha256(again.state_dict()) == state_sha256(saved)
    assert again.identity["state_sha256"] != json.loads(outcome.path.read_text())["model"]["state_sha256"], "it was trained"


def test_under_fsdp_nothing_is_saved():
    from clbench.run import saved_model

    saved_model.check(False, "fsdp"), saved_model.check(True, "ddp")
    with pytest.raises(UserError, match=r"^save_model=true needs parallel=ddp or none"):
        saved_model.check(True, "fsdp")
