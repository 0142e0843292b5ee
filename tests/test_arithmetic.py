"""Which arithmetic a run takes: measured once a machine, gated by accuracy, named in the record, kept by a resumed run."""

import json

import pytest
import torch
from conftest import SMALL

from clbench.interfaces import UserError
from clbench.training import arithmetic, kernel_timing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache folder of its own, and flags as they were."""
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CLBENCH_ARITHMETIC")
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(kernel_timing, "channels_last_wins", lambda *_: False)
    kernel_timing.choice.cache_clear()
    yield
    kernel_timing.choice.cache_clear()
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_choice_is_accurate_and_not_slow(precision):
    found = kernel_timing.measure(CPU, precision)
    assert found["errors"][found["choice"]] <= 2 * found["errors"]["highest+fused"]
    assert found["seconds"][found["choice"]] <= min(found["seconds"].values()) / (1 - kernel_timing.MARGIN)
    exact = 1e-5 if precision == "fp32" else 5e-2
    assert 0 < found["errors"]["highest+fused"] < exact, "the float64 truth is another function"
    assert set(found["seconds"]) <= set(found["errors"]) <= set(kernel_timing.PATHS)


def test_measured_once_and_read_after_that(monkeypatch):
    first = kernel_timing.choice(CPU, 1, "fp32")
    (path,) = kernel_timing.folder().glob("*.json")
    saved = json.loads(path.read_text())
    assert saved["choice"] == first and saved["machine"]["torch"] == torch.__version__
    kernel_timing.choice.cache_clear()
    monkeypatch.setattr(kernel_timing, "measure", lambda *_: pytest.fail("measured again"))
    assert kernel_timing.choice(CPU, 1, "fp32") == first
    path.write_text(json.dumps(saved | {"choice": "highest+fused"}))
    kernel_timing.choice.cache_clear()
    assert kernel_timing.choice(CPU, 1, "fp32") == "highest+fused", "the file is not read"


@pytest.mark.parametrize("content", ["", "[]", '{"choice": "fastest"}', '{"choice": 3}'])
def test_a_damaged_file_is_measured_anew(monkeypatch, content):
    monkeypatch.setattr(kernel_timing, "measure", lambda *_: {"choice": "highest+explicit"})
    kernel_timing.choice(CPU, 1, "fp32")
    (path,) = kernel_timing.folder().glob("*.json")
    path.write_text(content)
    kernel_timing.choice.cache_clear()
    assert kernel_timing.choice(CPU, 1, "fp32") == "highest+explicit"
    assert json.loads(path.read_text())["choice"] == "highest+explicit"


def test_other_threads_and_precisions_have_their_own(monkeypatch):
    monkeypatch.setattr(kernel_timing, "measure", lambda *_: {"choice": "highest+explicit"})
    for threads, precision in ((1, "fp32"), (2, "fp32"), (1, "bf16")):
        kernel_timing.choice(CPU, threads, precision)
    assert len(list(kernel_timing.folder().glob("*.json"))) == 3


def test_the_gate_refuses_and_the_margin_holds(monkeypatch):
    errors = dict.fromkeys(kernel_timing.PATHS, 9.0)  # refused, but for these
    errors |= {"highest+fused": 1.0, "highest+explicit+tail": 1.0, "medium+fused": 2.1, "medium+explicit+tail": 2.0}
    times = {"highest+fused": 4.0, "highest+explicit+tail": 0.97, "medium+fused": 0.1, "medium+explicit+tail": 1.0}
    monkeypatch.setattr(kernel_timing.KernelTimer, "error", lambda self, name: errors[name])
    monkeypatch.setattr(kernel_timing.KernelTimer, "seconds", lambda self, name: times[name])
    wanted = "medium+explicit+tail"
    assert kernel_timing.measure(CPU, "fp32")["choice"] == wanted, "a twentieth is not enough to leave the expected"
    times["highest+explicit+tail"] = 0.9
    assert kernel_timing.measure(CPU, "fp32")["choice"] == "highest+explicit+tail"
    errors["medium+explicit+tail"] = 2.1
    found = kernel_timing.measure(CPU, "fp32")
    assert found["choice"] == "highest+explicit+tail" and set(found["seconds"]) == {"highest+fused", "highest+explicit+tail"}


def test_measuring_leaves_flags_and_generators_alone():
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    kernel_timing.measure(CPU, "fp32")
    assert torch.get_float32_matmul_precision() == "high" and torch.equal(torch.get_rng_state(), state)


def test_the_probe_is_timms_block():
    from timm.models.vision_transformer import Block

    probe, x = kernel_timing.KernelTimer(CPU, "fp32"), torch.randn(2, 5, kernel_timing.WIDTH)
    blocks = []
    for w in probe.weights:
        block = Block(kernel_timing.WIDTH, kernel_timing.HEADS, qkv_bias=True).eval()
        for layer, name in ((block.attn.qkv, "qkv"), (block.attn.proj, "proj"), (block.mlp.fc1, "up"), (block.mlp.fc2, "down")):
            layer.weight.data, layer.bias.data = w[name], torch.zeros_like(layer.bias)
        block.norm1.eps = block.norm2.eps = 1e-5
        blocks.append(block)
    wanted = blocks[1](blocks[0](x))
    for path in kernel_timing.PATHS.values():
        part = wanted[:, :1] if path.tail else wanted
        torch.testing.assert_close(probe._forward(x, probe.weights, path), part, atol=1e-4, rtol=1e-4)


def test_words_of_the_option(monkeypatch):
    reference = arithmetic.chosen("reference", CPU, 1, "fp32")
    assert reference == {"matmul": "highest", "fused_attention": True, "class_token_tail": False, "arithmetic": "reference"}
    given = arithmetic.chosen("medium+explicit", CPU, 1, "fp32")
    assert given == {"matmul": "medium", "fused_attention": False, "class_token_tail": False, "arithmetic": "given"}
    assert arithmetic.chosen("highest+fused+tail", CPU, 1, "fp32")["class_token_tail"] is True
    monkeypatch.setenv("CLBENCH_ARITHMETIC", "highest+explicit")
    assert arithmetic.chosen("auto", CPU, 1, "fp32")["matmul"] == "highest"
    for bad in ("fastest", "", None, 3, "medium", "tail", "medium+explicit+", "channels_last", "reference+channels_last"):
        with pytest.raises(UserError, match="arithmetic must be one of auto, reference, highest"):
            arithmetic.chosen(bad, CPU, 1, "fp32")


def test_a_built_network_takes_the_path_of_a_resumed_run():
    from clbench.config.compose import build, compose

    model = build(compose(["model=nano"])[0]["model"])
    for fused in (True, False):
        arithmetic.pin(model, {"fused_attention": fused, "class_token_tail": not fused})
        assert {m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")} == {fused}
        assert model.class_token_tail is not fused
    arithmetic.pin(model, {"fused_attention": True})
    assert model.class_token_tail is False, "a record from before that flag ran the whole block"


def test_the_record_names_it_and_the_identity_does_not(clbench):
    clbench("run", "learner=ncm", *SMALL, "arithmetic=reference")
    flags = clbench.records()[0]["machine"]["flags"]
    assert flags["matmul"] == "highest" and flags["fused_attention"] and flags["arithmetic"] == "reference"
    assert "done already" in clbench("run", "learner=ncm", *SMALL, "arithmetic=highest+explicit").stdout
    assert "arithmetic must be auto, reference, or" in clbench("run", "learner=ncm", *SMALL, "arithmetic=quick", code=2).stderr
    clbench.env.pop("CLBENCH_ARITHMETIC", None)
    clbench("run", "learner=ncm", *SMALL, "seed=1")
    flags = next(r for r in clbench.records() if r["seed"] == 1)["machine"]["flags"]
    (saved,) = (clbench.folder / "cache" / "arithmetic").glob("*.json")
    assert flags["arithmetic"] == "measured"
    wanted = (flags["matmul"], flags["fused_attention"], flags["class_token_tail"])
    assert kernel_timing.PATHS[json.loads(saved.read_text())["choice"].removesuffix(kernel_timing.CHANNELS_LAST)] == wanted


# channels last

WINS = kernel_timing.channels_last_wins


def test_channels_last_is_gated_by_accuracy_and_margin(monkeypatch):
    """Seconds by hand: three rounds of (contiguous, channels last) on a clock that each piece of work moves on."""
    now, cost, error = [0.0], {False: 1.0, True: 0.9}, {False: 1e-3, True: 1e-3}

    def work(x, weights, act):
        last = x.is_contiguous(memory_format=torch.channels_last) and x.dtype != torch.float64
        if len(x) == 4:
            return [torch.ones(1, dtype=torch.float64) + (0 if x.dtype == torch.float64 else error[last])]
        now[0] += cost[last]
        return []

    monkeypatch.setattr(kernel_timing, "convolved", work)
    monkeypatch.setattr(kernel_timing.time, "perf_counter", lambda: now[0])
    assert WINS(CPU, "fp32")
    cost[True] = 1.05
    assert WINS(CPU, "fp32"), "a twentieth is not enough to leave the expected"
    cost[True] = 1.2
    assert not WINS(CPU, "fp32")
    cost[True], error[True] = 0.5, 2.1e-3
    assert not WINS(CPU, "fp32"), "fast and wrong"


def test_the_blocks_of_the_probe_are_a_networks():
    """Against autograd of the same function with an epsilon of 1e-5, in both layouts."""
    rng = torch.Generator().manual_seed(0)
    x, weights = (
        torch.randn(3, 4, 5, 5, generator=rng).double(),
        [torch.randn(4, 4, 3, 3, generator=rng).double() for _ in range(4)],
    )

    def normed(v):
        return (v - v.mean((0, 2, 3), keepdim=True)) / (v.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    own = [w.clone().requires_grad_(True) for w in weights]
    h = (x + normed(torch.conv2d(normed(torch.conv2d(x, own[0], padding=1)).relu(), own[1], padding=1))).relu()
    h = (h + normed(torch.conv2d(normed(torch.conv2d(h, own[2], padding=1)).relu(), own[3], padding=1))).relu()
    wanted = torch.autograd.grad(h.mean((2, 3)).square().mean(), own)
    for form in (torch.contiguous_format, torch.channels_last):
        laid = [w.contiguous(memory_format=form) for w in weights]
        found = kernel_timing.convolved(x.contiguous(memory_format=form), laid, torch.relu)
        torch.testing.assert_close(found[0], h.mean((2, 3)).detach())
        torch.testing.assert_close(found[1:5], list(wanted))
    WINS(CPU, "bf16")


def test_a_choice_with_channels_last_is_kept_and_read(monkeypatch):
    monkeypatch.setattr(kernel_timing, "measure", lambda *_: {"choice": "highest+explicit"})
    monkeypatch.setattr(kernel_timing, "channels_last_wins", lambda *_: True)
    assert kernel_timing.choice(CPU, 1, "fp32") == "highest+explicit+channels_last"
    kernel_timing.choice.cache_clear()
    monkeypatch.setattr(kernel_timing, "measure", lambda *_: pytest.fail("measured again"))
    flags = arithmetic.chosen("auto", CPU, 1, "fp32")
    assert flags["channels_last"] is True and flags["matmul"] == "highest" and not flags["fused_attention"]
    assert "channels_last" not in arithmetic.chosen("reference", CPU, 1, "fp32")


def test_channels_last_lays_out_networks_of_convolutions_alone():
    from clbench.config.compose import build, compose
    from clbench.models.weights import state_sha256

    model, vit = (build(compose([f"model={name}"])[0]["model"]) for name in ("resnet32", "nano"))
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model.eval().features(x)
    for one in (model, vit):
        arithmetic.pin(one, {"fused_attention": True, "channels_last": True})
    assert model.channels_last and not vit.channels_last
    weight = model.net.layer2[1].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    seen = []
    model.net.layer2.register_forward_hook(lambda module, given, out: seen.append(out))
    torch.testing.assert_close(model.features(x), before, atol=1e-5, rtol=1e-4)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert state_sha256(model.state_dict()) == state_sha256(build(compose(["model=resnet32"])[0]["model"]).state_dict())
    arithmetic.pin(model, {"fused_attention": True})
    assert not model.channels_last and weight.is_contiguous() and torch.equal(model.features(x), before)


@pytest.mark.parametrize("learner", ["finetune", "ewc learner.trainable=all learner.batch_size=4"])
def test_a_run_with_channels_last(clbench, learner):
    """The state is that of the other layout but for rounding; it resumes, and verifies."""
    words = (*SMALL, *f"learner={learner}".split(), "model=convnet", "model.kwargs.maps=[4,4]", "model.kwargs.hidden=8")
    clbench("run", *words, "arithmetic=highest+fused+channels_last", "num_threads=1", "results_dir=last")
    clbench("run", *words, "arithmetic=highest+fused", "num_threads=1", "results_dir=first")
    (last,), (first,) = (
        [json.loads(path.read_text()) for path in (clbench.folder / name / "records").glob("*.json")]
        for name in ("last", "first")
    )
    assert last["run_id"] == first["run_id"] and last["machine"]["flags"]["channels_last"] is True
    assert "channels_last" not in first["machine"]["flags"]
    pairs = zip(last["experiences"], first["experiences"], strict=True)
    assert all(abs(a["train_loss"] - b["train_loss"]) < 1e-2 for a, b in pairs)


def test_memory_is_kept_where_the_c_library_can():
    import platform

    assert arithmetic.keep_memory() == (platform.libc_ver()[0] == "glibc")


def test_a_resumed_run_keeps_the_flags_it_began_with(tmp_path):
    """Stopped after the first experience under one arithmetic, resumed by a command that asks for another."""
    from clbench.config.compose import compose
    from clbench.run import loop, runner

    options = ["learner=ncm", *SMALL, f"results_dir={tmp_path}/results", "num_threads=1", "device=cpu", "feature_store=off"]
    real, calls = loop.Loop.evaluate, []

    def stop_once(self, index):
        calls.append(self.job.flags["matmul"])
        if len(calls) == 2:
            raise walk_interrupted()
        real(self, index)

    from clbench.training.runtime import Interrupted as walk_interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "evaluate", stop_once)
        outcome = runner.run_job(compose([*options, "arithmetic=highest+fused+tail"])[0])
        assert outcome.status == "interrupted"
        outcome = runner.run_job(compose([*options, "arithmetic=medium+explicit"])[0])
    entry = json.loads(outcome.path.read_text())
    assert entry["status"] == "ok" and entry["resumed"] == 1 and set(calls) == {"highest"}
    flags = entry["machine"]["flags"]
    assert (flags["matmul"], flags["fused_attention"], flags["class_token_tail"]) == ("highest", True, True), (
        "the record's words"
    )
