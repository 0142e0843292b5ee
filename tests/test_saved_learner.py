"""Learners on disk: the state there and back, the same answers as in the run, new images."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import clbench
from clbench.config.compose import build, compose
from clbench.interfaces import UserError
from clbench.records import record
from clbench.run import saved_learner
from clbench.run.runner import run_job
from clbench.run.saved_model import write_whole
from clbench.training.state import fingerprint

SMALL = [
    *("num_threads=1", "arithmetic=reference", "scenario.limit_train=8", "scenario.limit_test=10", "scenario.num_classes=4"),
    *("scenario.budget.epochs=1", "save_model=true"),
]


def finished(folder, *words):
    (job,) = compose([*SMALL, *words, f"results_dir={folder}"])
    outcome = run_job(job, command=["clbench", "run", *words])
    assert outcome.status == "ok", outcome.text
    return outcome, record.read(outcome.path), job


def test_a_state_comes_back_to_the_last_bit(tmp_path):
    """Nested dicts, lists, tuples, keys that are numbers or pairs, shared and strided tensors, every type, empty ones."""
    shared = torch.randn(3, 4)
    state = {
        "a": [shared, shared.T, shared[1:]],
        3: (1, 2.5, None, True, "text", float("inf")),
        ("pair", 0): {"x": np.arange(6).reshape(2, 3), "empty": torch.empty(0, 5)},
        "types": [torch.tensor([1, 2], dtype=t) for t in (torch.uint8, torch.bool, torch.int64, torch.bfloat16, torch.float64)],
        "nothing": {},
    }
    tree, tensors = saved_learner.flat(state)
    write_whole(tensors, tmp_path / "s.safetensors", {"form": "1", "tree": json.dumps(tree)})
    again = saved_learner.read(tmp_path / "s.safetensors")
    assert fingerprint(again) == fingerprint(state) and list(again) == list(state)
    assert isinstance(again[3], tuple) and isinstance(again["a"], list)
    assert np.array_equal(again["pair", 0]["x"], np.arange(6).reshape(2, 3))
    with pytest.raises(UserError, match=r"holds a set at a\.b"):
        saved_learner.flat({"a": {"b": {1, 2}}})


@pytest.mark.parametrize(
    "words",
    [
        ("learner=ncm",),
        ("learner=replay", "learner.memory=12"),
        ("learner=mos", "learner.epochs=1"),
        ("learner=hypernetwork", "scenario=til_digits", "model=mlp", "model.kwargs.img_size=8"),
        ("learner=finetune", "scenario=til_digits", "model=mlp", "model.kwargs.img_size=8", "learner.head=per_task"),
    ],
    ids=lambda words: words[0],
)
def test_it_answers_as_in_the_run(tmp_path, words):
    outcome, entry, job = finished(tmp_path, *words)
    assert outcome.text.splitlines()[-2] == f"learner {tmp_path}/runs/{outcome.run_id}/learner.safetensors"
    found = clbench.load(outcome.path, device="cpu")
    assert found.record == entry and found.classes == ["0", "1", "2", "3"]
    scenario = build(job["scenario"])
    manifest, right = scenario.manifest, []
    for j, one in enumerate(manifest.evals):
        task = manifest.experiences[j].name if manifest.discloses_task else None
        images = pixels(scenario, one)
        z = found.predict(images, task)
        assert z.shape == (len(images), 4)
        if task is not None:
            assert torch.isneginf(z).sum(1).eq(2).all()
        y = torch.tensor([manifest.renumber[int(c)] for c in scenario.labels(one)])
        right.append(int((z.argmax(1) == y).sum()))
    assert right == entry["correct"][-1]


def pixels(scenario, entry):
    """Stored test images of an evaluation set as arrays [H, W, 3]."""
    stored = scenario.dataset.images.array
    return [np.ascontiguousarray(np.broadcast_to(stored[i], (*stored.shape[1:3], 3))) for i in entry.ids]


def test_new_images_as_csv(tmp_path, clbench):
    outcome, _, _ = finished(tmp_path / "out", "learner=ncm")
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in ("b.png", "a.jpg", "below/c.png"):
        Image.fromarray(draw.integers(0, 255, (20, 31, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    lines = list(csv.DictReader(io.StringIO(clbench("predict", str(outcome.path), str(folder), "--top", "9").stdout)))
    assert [line["file"] for line in lines] == ["a.jpg", "b.png", "below/c.png"]
    z = saved_learner.load(outcome.path, device="cpu").predict([folder / line["file"] for line in lines])
    assert list(lines[0]) == ["file", *(f"{what}{k}" for k in ("", "_2", "_3", "_4") for what in ("prediction", "confidence"))]
    for line, scores in zip(lines, z, strict=True):
        assert line["prediction"] == str(int(scores.argmax())) and line["prediction_4"] == str(int(scores.argmin()))
        assert abs(float(line["confidence"]) - float(scores.softmax(0).max())) < 1e-4
    one = clbench("predict", str(outcome.path), str(folder / "b.png"), "--out", str(tmp_path / "one.csv"))
    assert one.stdout == "" and (tmp_path / "one.csv").read_text().splitlines()[1].startswith("b.png,")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    for words, why in (
        ([str(folder)], "cannot decode image"),
        ([str(tmp_path / "none")], "does not exist"),
        ([str(folder), "--task", "exp0"], "discloses no tasks"),
        ([str(folder), "--top", "0"], "--top must be at least 1"),
        ([str(folder), "--out", str(tmp_path / "no" / "a.csv")], "is no folder"),
    ):
        done = clbench("predict", str(outcome.path), *words, code=2)
        assert done.stderr.count("\n") == 1 and why in done.stderr and done.stdout == ""


def test_what_is_not_the_runs_learner_is_refused(tmp_path):
    outcome, _, _ = finished(tmp_path, "learner=ncm")
    file = tmp_path / "runs" / outcome.run_id / "learner.safetensors"
    state = saved_learner.read(file)
    found = saved_learner.load(outcome.path, device="cpu")
    with pytest.raises(UserError, match=r"uint8 \[H, W, 3\], got float64"):
        found.predict([np.zeros((4, 4, 3))])
    assert found.predict([]).shape == (0, 4)
    tree, tensors = saved_learner.flat(state)
    tensors = {name: t + 1 if t.is_floating_point() else t for name, t in tensors.items()}
    write_whole(tensors, file, {"form": "1", "tree": json.dumps(tree)})
    with pytest.raises(UserError, match="its fingerprint is another"):
        saved_learner.load(outcome.path)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read"):
        saved_learner.load(outcome.path)
    file.unlink()
    with pytest.raises(UserError, match="run it with save_model=true"):
        saved_learner.load(outcome.path)
    with pytest.raises(UserError):
        saved_learner.load(tmp_path / "records" / "none.json")


def test_tasks_are_named(tmp_path):
    outcome, _, _ = finished(tmp_path, "learner=gpm", "scenario=til_digits", "model=mlp", "model.kwargs.img_size=8")
    found = saved_learner.load(outcome.path, device="cpu")
    assert found.tasks == {"exp0": [0, 1], "exp1": [2, 3]}
    for task in (None, "exp7"):
        with pytest.raises(UserError, match=r"must be one of exp0, exp1"):
            found.predict([np.zeros((8, 8, 3), np.uint8)], task)
