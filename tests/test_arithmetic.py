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
    for bad in ("fastest", "", None, 3, "medium", "tail", "medium+explicit+"):
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
    assert kernel_timing.PATHS[json.loads(saved.read_text())["choice"]] == wanted


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
