"""Answers on disk, and flips between consecutive models, against loops and worked by hand."""

import json

import numpy as np
import pytest

from clbench.config.compose import compose
from clbench.interfaces import UserError
from clbench.records import predictions, record
from clbench.records.predictions import Predictions
from clbench.records.verify_artifacts import Place, _predictions
from clbench.report import flips
from clbench.run.runner import run_job

SMALL = ["num_threads=1", "arithmetic=reference", "scenario.limit_train=12", "scenario.limit_test=20", "learner.batch_size=16"]


def finished(folder, *words):
    """A run in this process -> its outcome, its record, what its file of answers holds."""
    (job,) = compose([*SMALL, *words, f"results_dir={folder}"])
    outcome = run_job(job, command=["clbench", "run", *words])
    entry = record.read(outcome.path)
    where = predictions.path_of(folder, outcome.run_id)
    return outcome, entry, predictions.read(where) if where.exists() else None


@pytest.mark.parametrize(
    "words", [["scenario=cil_digits"], ["scenario=til_digits"], ["scenario.operators=[{evaluate:{every:2}}]"]]
)
def test_answers_give_the_counts_of_the_record(tmp_path, words):
    outcome, entry, found = finished(tmp_path, "learner=finetune", "save_predictions=true", *words)
    assert found.run_id == outcome.run_id and outcome.text.endswith(f"predictions {tmp_path}/predictions/{outcome.run_id}.npz")
    assert "save_predictions" not in json.dumps(entry["config"]) and len(found.y) == len(entry["first_seen"])
    for i, row in enumerate(entry["correct"]):
        right = [found.right(i, j) for j in range(len(row))]
        assert [None if r is None else int(r.sum()) for r in right] == row
    for (i, j), scores in found.scores.items():
        assert (np.diff(scores, axis=1) <= 0).all() and scores.dtype == np.float32
        assert all(len(set(line)) == len(line) for line in found.answers[i, j].tolist())
        if words == ["scenario=til_digits"]:
            assert set(found.answers[i, j].ravel()) <= set(found.y[j]), "a class of another task"
    if words == ["scenario=cil_digits"]:
        last = len(entry["correct"]) - 1
        among = [int((found.answers[last, j] == found.y[j][:, None]).any(1).sum()) for j in range(len(found.y))]
        assert among == entry["correct_top5"][-1]
    assert list(_predictions(entry, Place(tmp_path, None))) == []


def test_a_run_with_and_without_is_the_same_run(tmp_path):
    plain, entry, none = finished(tmp_path / "a", "learner=ncm")
    kept, other, found = finished(tmp_path / "b", "learner=ncm", "save_predictions=true")
    assert none is None and found is not None and plain.run_id == kept.run_id and entry["correct"] == other["correct"]
    assert entry["final_state_sha256"] == other["final_state_sha256"]
    again, _, none = finished(tmp_path / "a", "learner=ncm", "save_predictions=true")
    assert none is None and again.text.endswith("no predictions saved: force=true save_predictions=true repeats the run")
    assert finished(tmp_path / "a", "learner=ncm", "save_predictions=true", "force=true")[2] is not None
    assert not (tmp_path / "a" / "runs" / plain.run_id / "predictions").exists(), "parts are left over"


def test_a_run_that_goes_on_has_all_answers(tmp_path, monkeypatch):
    from clbench.learners.ncm import NearestClassMean as Ncm

    learn = Ncm.learn

    def dies(self, experience):
        if experience.index == 3:
            raise RuntimeError("here it ends")
        return learn(self, experience)

    monkeypatch.setattr(Ncm, "learn", dies)
    (job,) = compose([*SMALL, "learner=ncm", f"results_dir={tmp_path}", "save_predictions=true"])
    assert run_job(job).status == "failed"
    monkeypatch.setattr(Ncm, "learn", learn)
    _, entry, found = finished(tmp_path, "learner=ncm", "save_predictions=true")
    assert entry["resumed"] == 1 and {i for i, _ in found.answers} == set(range(5))
    straight = finished(tmp_path / "straight", "learner=ncm", "save_predictions=true")[2]
    assert all(np.array_equal(found.answers[key], straight.answers[key]) for key in straight.answers)
    assert all(np.array_equal(found.scores[key], straight.scores[key]) for key in straight.scores)


def test_a_run_that_went_without_says_so(tmp_path, monkeypatch):
    from clbench.learners.ncm import NearestClassMean as Ncm

    learn = Ncm.learn

    def dies(self, experience):
        if experience.index == 3:
            raise RuntimeError("here it ends")
        return learn(self, experience)

    monkeypatch.setattr(Ncm, "learn", dies)
    (job,) = compose([*SMALL, "learner=ncm", f"results_dir={tmp_path}"])
    run_job(job)
    monkeypatch.setattr(Ncm, "learn", learn)
    (job,) = compose([*SMALL, "learner=ncm", f"results_dir={tmp_path}", "save_predictions=true"])
    assert "did not save the answers after experience 1; force=true starts anew" in run_job(job).text


def test_verify_counts_again(tmp_path):
    outcome, entry, _ = finished(tmp_path, "learner=ncm", "save_predictions=true")
    where = predictions.path_of(tmp_path, outcome.run_id)
    arrays = predictions.load(where)
    arrays["classes_1_0"] = arrays["classes_1_0"].copy()
    arrays["classes_1_0"][:, 0] = 9
    predictions.write(where, arrays)
    (why,) = _predictions(entry, Place(tmp_path, None))
    assert "does not hold the predictions" in why
    (why,) = _predictions({**entry, "predictions_sha256": predictions.sha256(where)}, Place(tmp_path, None))
    assert why.startswith("its predictions of set 0 after experience 2 do not give the")
    where.write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="does not hold predictions"):
        predictions.read(where)


def test_texts_have_no_answers(clbench):
    said = clbench("plan", "scenario=cpt_synthetic", "learner=constant_lr", "save_predictions=true", code=2).stderr
    assert "save_predictions has no effect in scenario cpt_synthetic" in said


def made(y, *answers):
    """Predictions of one set with labels `y`, answered once a row."""
    found = {(i, 0): np.array([[a, a + 1] for a in row]) for i, row in enumerate(answers)}
    return Predictions("0" * 16, ("s",), (np.arange(len(y)),), (np.array(y),), found, {})


def test_flips_by_hand():
    """Before: right right wrong wrong right; after: right, new class 2, right, wrong, old class 0."""
    found = made([0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 2, 1, 0, 0])
    one = flips.counts(found, 1, 0, [2])
    assert one == {"n": 5, "old_right": 3, "new_right": 2, "nf": 2, "pf": 1, "nf_to_new": 1}
    rates = flips.rates(one)
    assert rates == pytest.approx(
        {"nfr": 0.4, "pfr": 0.2, "conditional_nfr": 2 / 3, "relative_nfr": 0.4 / (0.6 * 0.6), "to_new": 0.5}
    )
    never = flips.rates(flips.counts(made([0], [1], [1]), 1, 0, []))
    assert never == {"nfr": 0.0, "pfr": 0.0, "conditional_nfr": None, "relative_nfr": None, "to_new": None}


def test_flips_against_a_loop():
    rng = np.random.default_rng(3)
    for _ in range(200):
        n, k = int(rng.integers(1, 40)), int(rng.integers(2, 6))
        y, old, new = (rng.integers(0, k, n) for _ in range(3))
        one = flips.counts(made(y, old, new), 1, 0, [k - 1])
        nf = pf = to_new = 0
        for label, before, after in zip(y, old, new, strict=True):
            nf += before == label != after
            pf += before != label == after
            to_new += before == label != after == k - 1
        assert (one["nf"], one["pf"], one["nf_to_new"]) == (nf, pf, to_new)
        swapped = flips.counts(made(y, new, old), 1, 0, [])
        assert (swapped["nf"], swapped["pf"]) == (pf, nf), "the other way round"
        assert one["new_right"] - one["old_right"] == pf - nf
        assert nf <= min(one["old_right"], n - one["new_right"])


def test_unrelated_models_have_a_relative_rate_of_one():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200_000)
    old, new = (np.where(rng.random(len(y)) < p, y, 1 - y) for p in (0.7, 0.8))
    assert flips.rates(flips.counts(made(y, old, new), 1, 0, []))["relative_nfr"] == pytest.approx(1, abs=0.02)


def test_the_page(clbench, small):
    clbench("run", "learner=finetune", "save_predictions=true", *small)
    (path,) = (clbench.folder / "results" / "records").glob("*.json")
    entry = record.read(path)
    rows = json.loads(clbench("report", "flips", path.stem, "--format", "json").stdout)
    pairs, sets = (rows[part] if isinstance(rows, dict) else None for part in ("pairs", "sets"))
    assert pairs is not None and [row["experience"] for row in pairs] == list(range(2, len(entry["correct"]) + 1))
    for row in pairs:
        i = row["experience"] - 1
        mine = [one for one in sets if one["experience"] == row["experience"]]
        assert len(mine) == i and sum(one["nf"] for one in mine) == row["nf"]
        assert row["old_right"] == sum(entry["correct"][i - 1][:i]) and row["new_right"] == sum(entry["correct"][i][:i])
        assert row["new_right"] - row["old_right"] == row["pf"] - row["nf"]
    text = clbench("report", "flips", str(path)).stdout
    assert "relative_nfr" in text and "by evaluation set" not in text
    assert "no record" in clbench("report", "flips", "nobody", code=2).stderr


def test_a_record_without_answers_says_what_to_do(clbench, small):
    clbench("run", "learner=ncm", *small)
    (path,) = (clbench.folder / "results" / "records").glob("*.json")
    said = clbench("report", "flips", path.stem, code=2).stderr
    assert said.endswith("has no predictions: save_predictions=true force=true makes the run again with them\n")
