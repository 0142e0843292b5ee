"""`clbench plan` says what a run would do, and leaves process, caches and folders as they are."""

import os
import random

import numpy as np
import pytest
import torch
from timm.layers.config import set_fused_attn, use_fused_attn

from clbench.config import compose
from clbench.run import image_stream
from clbench.run.plan import plan_job
from clbench.training import kernel_timing

JOBS = {
    "images": ("learner=slca", "scenario.num_classes=4", "scenario.limit_train=8"),
    "features": ("learner=ncm", "scenario.num_classes=4", "feature_store=on"),
    "texts": (
        "scenario=cpt_synthetic",
        "scenario.symbols=8",
        "scenario.states=8",
        "scenario.tokens=768",
        "scenario.context=8",
        "scenario.batch=8",
        "scenario.eval_tokens=320",
        "model.width=16",
        "model.depth=1",
        "model.heads=2",
    ),
}


def files(folder):
    return {
        os.path.join(place, name): os.stat(os.path.join(place, name)).st_mtime_ns
        for place, folders, names in os.walk(folder)
        for name in [*folders, *names]
    }


def flags():
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        use_fused_attn(),
        torch.random.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),  # noqa: NPY002
        random.getstate(),
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user who has measured nothing yet."""
    for name in ("CLBENCH_CACHE", "CLBENCH_ARITHMETIC", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def odd_flags():
    """Settings that no run would choose, put back afterwards."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), use_fused_attn()
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("high")
    set_fused_attn(False)
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(before[0])
    torch.set_float32_matmul_precision(before[1])
    set_fused_attn(before[2])
    torch.use_deterministic_algorithms(was[0], warn_only=was[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.parametrize("kind", JOBS)
def test_a_plan_changes_nothing(home, odd_flags, monkeypatch, kind):
    def refuse(*args):
        raise AssertionError("a plan measures the machine's arithmetic")

    monkeypatch.setattr(kernel_timing, "measure", refuse)
    (job,) = compose.compose([*JOBS[kind], "num_threads=1", "device=cpu", "seed=5"])
    there, before = files(home), flags()
    row = plan_job(job)
    assert row.state == "new" and row.seconds is not None and row.seconds > 0 and row.bytes
    assert flags() == before and files(home) == there


def test_flags_come_back_after_an_error(home, odd_flags):
    from clbench.interfaces import UserError

    (job,) = compose.compose([*JOBS["texts"], "scenario.budget.processed=100", "num_threads=1", "device=cpu"])
    before = flags()
    with pytest.raises(UserError, match="the budget allows 100"):
        plan_job(job)
    assert flags() == before


def test_what_was_measured_is_used(home):
    from clbench.training import arithmetic

    device = torch.device("cpu")
    assert arithmetic.chosen("auto", device, 1, "fp32", measure=False)["matmul"] == "highest"
    path = kernel_timing._file(kernel_timing.machine_key(device, 1, "fp32"))
    path.parent.mkdir(parents=True)
    path.write_text('{"choice": "medium+explicit+tail"}')
    found = arithmetic.chosen("auto", device, 1, "fp32", measure=False)
    assert (found["matmul"], found["fused_attention"], found["class_token_tail"]) == ("medium", False, True)


def test_the_command_line(clbench):
    del clbench.env["CLBENCH_ARITHMETIC"], clbench.env["CLBENCH_CACHE"]
    clbench.env["HOME"] = str(clbench.folder)
    there = files(clbench.folder)
    done = clbench("plan", *JOBS["images"], "num_threads=1", "device=cpu")
    assert "1 jobs: 1 new" in done.stdout and files(clbench.folder) == there


def test_steps_and_views_at_test_time_are_in_the_estimate(home, monkeypatch):
    """By hand: 1 s an image forward, 3 s forward and backward; 20 test images in two sets, with steps, or a step on 4 views."""
    monkeypatch.setattr(image_stream, "_pace", lambda job: (1.0, 3.0))
    few = ["scenario.limit_train=5", "scenario.limit_test=2", "num_threads=1", "device=cpu", "seed=5", "model=convnet"]

    def seconds(*words):
        (job,) = compose.compose([*few, "scenario=ctta_digits", "scenario.operators=[{test_time:{clean:after}}]", *words])
        return plan_job(job).seconds - image_stream.BESIDES

    learned = 50 * 5 * 3 + 50  # five epochs, and one pass
    assert seconds("learner=bn_adapt") == pytest.approx(learned + 40)
    assert seconds("learner=tent", "learner.steps=2") == pytest.approx(learned + 40 * (1 + 2 * 3))
    assert seconds("learner=cotta", "learner.augmentations=4") == pytest.approx(learned + 40 * (1 + 3 + 4))
