"""What is handed in besides accuracies: losses, edits, answers of every sample; each flag on a record that deserves it."""

import argparse
import json
import math
import shutil

import numpy as np
import pytest
from conftest import ROOT
from test_editing import RUN
from test_travel import NOW

from clbench.cli import submit_command
from clbench.config import compose
from clbench.interfaces import UserError
from clbench.records import predictions, record
from clbench.records.verify import verdicts
from clbench.report.columns import EDITS, LOSS
from clbench.report.runs import Filter
from clbench.report.travel import answers_table, archive, flags, lines, submission
from clbench.run.runner import run_job

IID = "constant_lr"  # on cpt_iid: five seeds


def losses(folder, change=None, learner=IID, seeds=5):
    """A results folder of committed records on cpt_iid; `change(record)` makes others of them, sealed anew."""
    (folder / "records").mkdir(parents=True)
    (folder / "manifests").mkdir()
    for path in sorted((ROOT / "results" / "records").glob("*.json")):
        text = path.read_text()
        found = json.loads(text) if '"cpt_iid"' in text else None
        if (
            found is None
            or (found["scenario"]["name"], found["learner"]["name"]) != ("cpt_iid", learner)
            or found["seed"] >= seeds
        ):
            continue
        if change is not None:
            change(found)
            found["checksum"] = record.checksum(found)
        (folder / "records" / path.name).write_text(json.dumps(found))
        shutil.copy(ROOT / "results" / "manifests" / f"{found['scenario']['manifest_sha256']}.json", folder / "manifests")
    return folder


def gathered(folder, known=None):
    return submission.gather(folder, Filter(), verdicts(folder), (), known, NOW)


def test_losses_stand_beside_known_losses(tmp_path):
    mine, known = losses(tmp_path / "mine"), losses(tmp_path / "known", learner="infinite")
    made = gathered(mine, known)
    (group,) = made.groups
    assert lines.board_of(group) is LOSS and made.flags[0] == []
    text = submission.text(made, ROOT / "conf")
    mean = f"{group.row['final_loss_mean']:.4f} ± {group.row['final_loss_std']:.4f}"
    assert f"| constant_lr | decoder_tiny | {group.row['variant']} | 5 | {mean} |" in text.replace(r"\_", "_")
    assert "| known |" in text and "Losses in nats per token" in text and "per cent" not in text
    command = text.rpartition("```bash")[2]
    assert "clbench run -m learner=constant_lr " in command and " scenario=cpt_iid " in command and "seed=0,1,2,3,4" in command
    held = submission.files(made, mine, ROOT / "conf")
    (badge,) = [data.decode() for name, data in held.items() if name.startswith("badges/")]
    assert f"constant_lr final_loss {group.row['final_loss_mean']:.3f} ± " in badge
    (row,) = json.loads(held["submission.json"])["rows"]
    assert row["final_loss"] == group.row["final_loss_mean"] and len(row["records"]) == 5
    assert "final_loss" in submission.summary(made)


def test_implausible_losses_are_flagged(tmp_path):
    def fast(found):
        found["seconds"]["total"] = 1e-3 if found["seed"] == 1 else found["seconds"]["total"]

    folder = losses(tmp_path / "odd", fast, seeds=2)
    (odd,) = gathered(folder).flags.values()
    assert any(line.startswith("1.") and "which no such machine computes (seed 1)" in line for line in odd)
    entry = record.read(next((folder / "records").glob("*.json"))) | {"seconds": {}}
    assert list(flags.of_numbers(entry)) == []
    low = [0.85 * math.log(32) * n for n in entry["tokens"]]
    assert list(flags.of_numbers(entry | {"sum_loss_start": low})) == [
        "random weights begin at 2.946 nats per token; a uniform guess has 3.466"
    ]
    assert list(flags.of_numbers(entry | {"sum_loss_start": low, "model": {"source": "file"}})) == [], "they were trained"
    row = {"seeds": "0 1 2 3 4", "failed": 0, "dead": 0, "marks": "", "scenario": "s", "manifest": "m", "model": "n"}
    row |= {"learner": "mine", "final_loss_mean": 2.0, "final_loss_std": 0.01, "regret_mean": -0.002, "tokens_trunk_new": 1020}
    union = row | {"learner": "joint_union", "marks": "reference", "final_loss_mean": 2.05, "tokens_trunk_new": 1000}
    assert list(flags.of_row(row, "", [union], {}, LOSS)) == [
        "the mean loss is 0.0020 below the exact loss of the true source",
        "trained on 1020 tokens or images; the known rows of this stream on at most 1000",
        "final_loss 2.0000 is below joint_union, which trains on all data, with 2.0500",
    ]
    near = row | {"final_loss_mean": 2.04, "regret_mean": None, "tokens_trunk_new": 1000}
    assert list(flags.of_row(near, "", [union], {}, LOSS)) == [], "within two standard deviations"
    assert list(flags.of_row(near, "", [union | {"model": "other"}], {}, LOSS)) == []


def test_committed_losses_are_not_odd():
    """No flag on losses fires on any committed record: they are about what cannot be."""
    shown = 0
    for entry in record.entries(ROOT / "results" / "records", [], details=False):
        if entry["scenario"].get("kind") == "continual_pretraining":
            assert list(flags.of_numbers(entry)) == [] and math.isfinite(entry["ledger"]["flops"])
            shown += 1
    assert shown > 100


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited")
    (job,) = compose.compose([*RUN, "learner=edit_finetune", f"results_dir={folder}"])
    assert run_job(job).status == "ok"
    return folder


def test_edits_are_handed_in_and_flagged(edited, tmp_path):
    made = gathered(edited)
    (group,) = made.groups
    assert lines.board_of(group) is EDITS
    held = submission.files(made, edited, ROOT / "conf")
    (row,) = json.loads(held["submission.json"])["rows"]
    assert row["edit_score"] == group.row["edit_score_mean"] and "edit_score" in held["PULL_REQUEST.md"].decode().replace(
        "\\", ""
    )
    assert not any("edits were right before" in line or "better" in line for line in made.flags[0])
    (path,) = (edited / "records").glob("*.json")
    entry = record.read(path)
    places = [j for j, kind in enumerate(entry["probe"]) if kind == "edits"]
    (sums,) = [r["sums"] for r in entry["rows"] if (r["evaluator"], r["experience"]) == ("edit_success", -1)]
    total = sum(sums["n"][j] for j in places)
    for j in places:
        sums["correct"][j] = sums["n"][j]
    assert list(flags.of_numbers(entry)) == [f"{total} of {total} edits were right before the first edit"]
    odd = dict(group.row) | {"seeds": "0 1 2 3 4", "exemplars": 0}
    odd |= {"reliability_mean": 0.5, "generalisation_mean": 0.6, "retention_mean": 1.2, "old_loss_rise_mean": -0.2}
    assert list(flags.of_row(odd, "", [], {}, EDITS)) == [
        "paraphrases are answered better (0.600) than the edits themselves (0.500)",
        "1.200 times as many edits are right at the end as were right when they were made",
        "old text is predicted 0.200 nats per token better after the edits, and none of it is kept",
    ]
    assert len(list(flags.of_row(odd | {"exemplars": 9}, "", [], {}, EDITS))) == 2, "who keeps old text may learn from it"


# --- answers of every sample


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answered")
    for seed, kept in ((0, True), (1, True), (2, False)):
        words = ["learner=ncm", "scenario.num_classes=4", "scenario.limit_train=10", "scenario.limit_test=15", f"seed={seed}"]
        (job,) = compose.compose([*words, f"save_predictions={str(kept).lower()}", f"results_dir={folder}"])
        assert run_job(job).status == "ok"
    return folder


def test_answers_in_one_file_are_those_of_the_records(answered, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pandas as pd

    records, rows = answers_table.write(answered, tmp_path / "out" / "answers.parquet")
    table = pd.read_parquet(tmp_path / "out" / "answers.parquet")
    assert records == 2 and rows == len(table) and list(table.columns) == list(answers_table.COLUMNS)
    for entry in record.entries(answered / "records", []):
        mine = table[table.run_id == entry["run_id"]]
        assert (len(mine) > 0) == (entry["seed"] != 2)
        if len(mine) == 0:
            continue
        counts = mine.groupby(["after", "set"], observed=True).right.agg(["sum", "count"])
        for i, row in enumerate(entry["correct"]):
            for j, count in enumerate(row):
                assert ((i, j) in counts.index) == (count is not None)
                assert count is None or tuple(counts.loc[(i, j)]) == (count, entry["n"][j])
        assert (mine.right == (mine.label == mine.answer)).all() and set(mine.seed) == {entry["seed"]}
        assert (mine.source_class == np.array(entry["scenario"]["class_order"])[mine.label]).all()
        assert (mine.answers.str[0] == mine.answer).all() and (mine.scores.str[0] == mine.score).all()
        found = predictions.read(predictions.path_of(answered, entry["run_id"]))
        one = mine[(mine.after == 1) & (mine.set == 0)]
        assert (one["sample"].to_numpy() == found.ids[0]).all() and set(one.set_name) == {found.sets[0]}
    schema = parquet.read_schema(tmp_path / "out" / "answers.parquet")
    assert schema.metadata[b"clbench"] == answers_table.FORM.encode()
    assert all(schema.field(name).metadata[b"about"] for name in schema.names)
    records, _ = answers_table.write(answered, tmp_path / "one.parquet", Filter(where=["seed=1"]))
    assert records == 1
    with pytest.raises(UserError, match="has predictions"):
        answers_table.write(answered, tmp_path / "none.parquet", Filter(where=["seed=2"]))


def test_answers_that_are_not_the_records_are_refused(answered, tmp_path):
    pytest.importorskip("pyarrow")
    folder = shutil.copytree(answered, tmp_path / "copy")
    path = next((folder / "predictions").glob("*.npz"))
    arrays = predictions.load(path)
    arrays["classes_1_0"] = (arrays["classes_1_0"] + 1) % 4
    predictions.write(path, arrays)
    with pytest.raises(UserError, match=rf"does not hold the predictions that the record {path.stem} names"):
        answers_table.write(folder, tmp_path / "a.parquet")
    file = folder / "records" / f"{path.stem}.json"
    found = json.loads(file.read_text()) | {"predictions_sha256": predictions.sha256(path)}
    found["checksum"] = record.checksum(found)
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match="set 0 after evaluation 1 does not give the"):
        answers_table.write(folder, tmp_path / "a.parquet")
    assert not list(tmp_path.glob("*.parquet")) and not list(tmp_path.glob(".*.tmp"))


def submit(*words):
    """The command, in this process -> exit code."""
    parser = argparse.ArgumentParser()
    submit_command.add_arguments(parser)
    return submit_command.run(parser.parse_args([str(word) for word in words]))


def test_an_archive_brings_answers_where_they_are_asked_for(answered, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # beside no other results
    folder = shutil.copytree(answered, tmp_path / "mine")
    assert submit(folder, "--predictions", "--out", tmp_path / "sent.zip") == 0
    assert "1 manifests, 2 predictions, 3 records" in capsys.readouterr().out
    held = archive.unpack(tmp_path / "sent.zip")
    names = {f"predictions/{path.name}" for path in (answered / "predictions").glob("*.npz")}
    assert {name for name in held if name.startswith("predictions/")} == names and len(names) == 2
    assert all(held[name] == (answered / name).read_bytes() for name in names)
    made = gathered(folder)
    assert not names & submission.files(made, folder, ROOT / "conf").keys(), "they are large: asked for, or left out"
    archive.pack({n: d + b"x" * (n in names) for n, d in held.items() if n != archive.SUMS}, tmp_path / "bad.zip")
    assert submit("--check", tmp_path / "sent.zip") == 0 and submit("--check", tmp_path / "bad.zip") == 1
    assert capsys.readouterr().out.count("does not hold the predictions that the record names") == 2
    shutil.rmtree(folder / "predictions")
    with pytest.raises(UserError, match="save_predictions=true keeps them"):
        submission.files(made, folder, ROOT / "conf", answers=True)
