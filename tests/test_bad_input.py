"""Bad input gives one clear line, exit code 2 (or a failed record), no traceback, and leaves earlier results alone."""

import json
import os
import shutil

import numpy as np
import pytest

RUN = ("run", "learner=ncm")


def arrays(**changes):
    rng = np.random.default_rng(0)
    made = {}
    for split, n in (("train", 24), ("test", 12)):
        made |= {f"{split}_x": rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), f"{split}_y": np.arange(n) % 4}
    return made | changes


def floats(value):
    x = np.full((24, 8, 8, 3), 0.5, np.float32)
    x[3, 1, 2, 0] = value
    return x


def one_line(done, *words):
    text = done.stderr.strip()
    assert "Traceback" not in text and len(text.splitlines()) == 1, text
    for word in words:
        assert word in text, text


CASES = {
    "shape": (arrays(train_x=np.zeros((24, 8), np.uint8)), ["train_x"]),
    "lengths": (arrays(train_y=np.zeros(5, int)), ["train_y"]),
    "missing class": (arrays(train_y=np.array([0, 1, 3] * 8), test_y=np.array([0, 1, 3] * 4)), ["2"]),
    "class only in test": (arrays(train_y=np.arange(24) % 3), ["3"]),
    "NaN": (arrays(train_x=floats(np.nan)), ["train_x", "3"]),
    "range": (arrays(train_x=floats(7.0)), ["train_x"]),
    "negative label": (arrays(train_y=np.arange(24) % 4 - 1), ["train_y"]),
    "no test": ({k: v for k, v in arrays().items() if k != "test_y"}, ["test_y"]),
    "empty class": (arrays(test_y=np.arange(12) % 3), ["3"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_arrays(clbench, case):
    content, words = CASES[case]
    np.savez(clbench.folder / "my.npz", **content)
    done = clbench(*RUN, "scenario=cil_npz", "scenario.dataset=my.npz", "scenario.increment=2", code=2)
    one_line(done, *words)
    assert clbench.records() == []


@pytest.mark.parametrize("how", ["truncated", "text", "missing"])
def test_bad_files(clbench, how):
    path = clbench.folder / "my.npz"
    np.savez(path, **arrays())
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif how == "text":
        path.write_text("train_x, train_y")
    else:
        path.unlink()
    one_line(clbench(*RUN, "scenario=cil_npz", "scenario.dataset=my.npz", "scenario.increment=2", code=2), "my.npz")


OPTIONS = [
    (["scenario.budget.epochs=-1"], ["budget.epochs", "-1"]),
    (["scenario.budget.exemplars=-5"], ["budget.exemplars"]),
    (["scenario.sha256=" + "0" * 64], ["0000", "SHA-256"]),
    (["model.sha256=" + "0" * 64], ["SHA-256"]),
    (["scenario.limit_train=-3"], ["limit_train"]),
    (["scenario.num_classes=99"], ["num_classes", "10"]),
    (["scenario.dataset=imagenet_r"], ["imagenet_r@coda"]),
    (["scenario=cil_cifar100", "data_root=nowhere"], ["cifar100"]),
    (["model=vit_tiny", "data_root=nowhere"], ["vit_tiny_patch16_224.safetensors"]),
    (["device=cuda:7"], ["cuda:7"]),
    (["learner=slac"], ["did you mean 'slca'"]),
    (["learner.metrc=cosine"], ["learner.metric"]),
    (["learner.metric=cosinus"], ["metric"]),
    (["learner.batch_size=many"], ["batch_size"]),
    (["seed=-1"], ["seed"]),
    (["schedule=cosine"], ["no effect"]),
]


@pytest.mark.parametrize(("words", "expected"), OPTIONS, ids=lambda v: v[0][:40])
def test_bad_options(clbench, words, expected):
    if words[0] == "device=cuda:7" and shutil.which("nvidia-smi"):
        pytest.skip("a GPU is here")
    done = clbench("run", *([] if "learner" in words[0] and "=" in words[0][:8] else ["learner=ncm"]), *words, code=2)
    one_line(done, *expected)
    assert clbench.records() == []


def test_mistyped_option_loads_no_torch(clbench):
    clbench.env["PYTHONPROFILEIMPORTTIME"] = "1"
    done = clbench("run", "leaner=ncm", code=2)
    assert "did you mean 'learner'" in done.stderr
    assert " torch\n" not in done.stderr and " timm\n" not in done.stderr


def test_unwritable_results_folder(clbench, small):
    (clbench.folder / "file").write_text("not a folder")
    one_line(clbench(*RUN, *small, "results_dir=file/results", code=2), "file/results")


def test_earlier_results_survive(clbench, small):
    clbench(*RUN, *small)
    (path,) = (clbench.folder / "results" / "records").glob("*.json")
    before = path.read_bytes()
    np.savez(clbench.folder / "my.npz", **CASES["NaN"][0])
    clbench(*RUN, "scenario=cil_npz", "scenario.dataset=my.npz", code=2)
    assert path.read_bytes() == before and clbench("verify").returncode == 0


def test_full_disk(clbench, small):
    """A file system of 200 kB: the run fails with one line, the record of an earlier run stays whole."""
    mount = clbench.folder / "tiny"
    mount.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=200k tmpfs '{mount}' 2>/dev/null") != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        clbench(*RUN, *small, "results_dir=tiny/results", "checkpoint_seconds=null")
        (path,) = (mount / "results" / "records").glob("*.json")
        before = json.loads(path.read_text())
        done = clbench("run", "learner=finetune", *small, "results_dir=tiny/results", "checkpoint_seconds=0", code=None)
        assert done.returncode in (1, 2) and "No space left" in done.stderr + done.stdout and "Traceback" not in done.stderr
        assert json.loads(path.read_text()) == before
    finally:
        os.system(f"umount '{mount}'")


def test_a_learner_that_answers_wrongly(clbench, small):
    (clbench.folder / "wrong.py").write_text(
        "import torch\nfrom clbench.learners.ncm import NearestClassMean\n"
        "class Wrong(NearestClassMean):\n"
        "    def __init__(self, model, runtime, *, how: str = 'shape'):\n"
        "        super().__init__(model, runtime)\n        self.how = how\n"
        "    def predict(self, batch):\n"
        "        z = super().predict(batch)\n"
        "        return z[:, :1] if self.how == 'shape' else z * float('nan')\n"
    )
    for how, word in (("shape", "must return"), ("hole", "NaN or infinite")):
        done = clbench("run", "learner._target_=wrong.Wrong", f"learner.how={how}", *small, code=1)
        assert word in done.stderr
    assert [r["status"] for r in clbench.records()] == ["failed", "failed"]
