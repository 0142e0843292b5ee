"""Reports of folders that hold losses, alone and beside accuracies: tables, comparisons, explanations, figures."""

import csv
import io
import json

import numpy as np
import pytest
from conftest import ROOT
from test_cpt_run import run
from test_report import made as accuracy_record

from clbench.evaluation import loss_metrics
from clbench.interfaces import UserError
from clbench.records import record
from clbench.records.verify import verify
from clbench.report import compare, explain, numbers, overview, report, table
from clbench.report.columns import LOSS
from clbench.report.figures import data
from clbench.report.runs import Filter, scan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two learners with two replay shares and two seeds each, joint training, and a run of accuracies."""
    place = tmp_path_factory.mktemp("both")
    for seed in (0, 1):
        for name in ("rewarm_replay", "infinite"):
            for share in (0, 0.25):
                run(place, f"learner={name}", f"learner.replay.share={share}", f"seed={seed}")
        run(place, "learner=joint_union", f"seed={seed}")
    record.write(accuracy_record(), place / "records")
    return place


def test_both_kinds_have_their_tables(folder):
    text, code = report(folder, strict=True)
    assert code == 0 and "final_loss" in text and "last_macro" in text
    assert (folder / "leaderboard.csv").exists() and (folder / "leaderboard_loss.csv").exists()
    first, second = ((folder / name).read_text() for name in ("leaderboard.csv", "leaderboard_loss.csv"))
    assert "cpt_synthetic" not in first and "cpt_synthetic" in second and len(second.splitlines()) == 6
    board = table.rows_of(scan(folder).runs, LOSS)
    assert board[-1]["vs_best"] is not None or board[-1]["marks"] == "reference"
    assert {row["vs_best"] for row in board if row["marks"]} == {None}
    final = [row["final_loss_mean"] for row in board]
    assert final == sorted(final)
    best = next(row for row in board if row["vs_best"] == "best")
    assert best["final_loss_low"] <= best["final_loss_mean"] <= best["final_loss_high"]


def test_ratios_of_pairs_survive_a_filter(folder):
    """Without replay and joint training are not shown, but known."""
    (row,) = table.rows_of(scan(folder, Filter(learner=["infinite"], where=["learner.replay.share=0.25"])).runs, LOSS)
    every = {(r["learner"], r["replay"]): r for r in table.rows_of(scan(folder).runs, LOSS)}
    without, union = every["infinite", 0]["final_loss_mean"], every["joint_union", 0.0]["final_loss_mean"]
    assert row["recovery_ratio_mean"] == every["infinite", 0.25]["recovery_ratio_mean"]
    assert row["recovery_ratio_mean"] == pytest.approx((without - row["final_loss_mean"]) / (without - union), abs=0.05)


def test_views_in_other_formats(folder, clbench):
    def shown(*words, code=0):
        return clbench("report", "--results-dir", str(folder), *words, code=code)

    assert "tables of their own: choose with --scenario" in shown("--format", "csv", code=2).stderr
    table = list(csv.DictReader(io.StringIO(shown("--scenario", "cpt_*", "--format", "csv").stdout)))
    assert len(table) == 5 and list(table[0]) == list(LOSS.columns)
    parts = json.loads(shown("--format", "json").stdout)
    assert set(parts) == {"leaderboard", "losses"} and len(parts["losses"]) == 5
    text = shown("--format", "md").stdout
    assert "| final_loss |" in text and "| last_macro |" in text
    few = shown("--scenario", "cpt_*", "--columns", "learner,final_loss_mean,gap_tokens_mean").stdout
    assert "final_loss_mean" in few and "last_macro" not in few
    wrong = shown("--scenario", "cpt_*", "--columns", "final_los_mean", code=2).stderr
    assert "did you mean 'final_loss_mean'" in wrong


def test_comparisons_take_the_number_of_the_kind(folder):
    tables = compare.compare("rewarm_replay", "infinite", str(folder), Filter(where=["learner.replay.share=0.25"]))
    (full,) = tables[1].rows
    sides = [[r.values["final_loss"] for r in scan(folder, Filter(learner=[n], where=["learner.replay.share=0.25"])).runs]
             for n in ("rewarm_replay", "infinite")]  # fmt: skip
    assert full["metric"] == "final_loss" and full["pairs"] == 2
    assert full["difference"] == pytest.approx(np.mean(sides[1]) - np.mean(sides[0]))
    better = full["p_b_better"]
    assert better == np.mean([[b < a for a in sides[0]] for b in sides[1]])  # a lower loss is better
    assert not numbers.lower("recovery_ratio") and numbers.lower("gap_depth") and not numbers.lower("last_macro")
    with pytest.raises(UserError, match="did you mean 'forgetting_after'"):
        numbers.check_metric("forgeting_after")
    with pytest.raises(UserError, match="no metric 'final_loss'"):
        numbers.check_metric("final_loss", losses=False)
    tables = overview.tables(scan(folder).runs)
    assert tables[0].title.startswith("last_macro, final_loss") and len(tables[0].rows) == 6
    assert [t.part for t in overview.tables([r for r in scan(folder).runs if r.loss is not None])] == ["rows", "pairs"]


def test_a_record_is_explained(folder):
    (one,) = scan(folder, Filter(learner=["infinite"], where=["learner.replay.share=0.25", "seed=1"])).runs
    parts = {table.part: table for table in explain.of_record(one.run_id, folder)}
    assert set(parts) == {"matrix", "numbers", "gaps", "ledger", "loss columns"}
    assert [row["after"] for row in parts["matrix"].rows] == ["before", "0 trunk", "0", "1 trunk", "1", "2 trunk", "2", "floor"]
    told = {row["name"]: row["value"] for row in parts["numbers"].rows}
    assert told["final_loss"] == one.values["final_loss"] and set(told) == set(loss_metrics.ABOUT)
    assert len(parts["gaps"].rows) == 3
    depths = [row["depth"] for row in parts["gaps"].rows]
    assert np.mean(depths) == pytest.approx(one.values["gap_depth"])


def test_figures(folder, tmp_path):
    pytest.importorskip("vl_convert")
    from clbench.report.figures import plots

    paths = plots.write(folder, tmp_path, ("losses", "loss_matrix", "replay", "gaps", "trade"), "svg")
    kinds = [path.name.partition("-")[0] for path in paths]
    assert kinds.count("losses") == 5 and {"loss_matrix", "replay", "gaps", "trade"} <= set(kinds)
    text = next(p for p in paths if p.name.startswith("losses")).read_text()
    assert "tokens trained on" in text and "learning rate" in text and "language_2" in text
    again = {path.name: path.read_bytes() for path in paths}
    plots.write(folder, tmp_path, ("losses",), "svg")
    assert all((tmp_path / name).read_bytes() == data for name, data in again.items())
    plots.write(folder, tmp_path, ("matrix",), "svg", Filter(scenario=["cil"]))
    with pytest.raises(UserError, match="nothing to draw for replay: no record has two shares of replay"):
        plots.write(folder, tmp_path, ("replay",), "svg", Filter(learner=["joint_union"]))


def test_rows_of_a_stream_are_told_apart(folder):
    (field,) = [field for field in data.read(folder) if field.board is LOSS]
    labels = {line.label for line in field.lines}
    assert labels == {"joint_union", "infinite 0 %", "infinite 25 %", "rewarm_replay 0 %", "rewarm_replay 25 %"}
    assert [line.label for line in field.lines if line.reference] == ["joint_union"]
    line = field.lines[0]
    assert data.mean_matrix(line).shape == (4, 3) and len(line.courses()) == 2
    assert data.mean_matrix(line)[-1].mean() == pytest.approx(line.row["final_loss_mean"])


def test_the_panel_has_an_interval_for_every_number(folder):
    report(folder)
    table = list(csv.DictReader((folder / "losses" / "cpt_synthetic.csv").read_text().splitlines()))
    assert [(row["learner"], float(row["replay"])) for row in table] == [
        ("infinite", 0.0),
        ("infinite", 0.25),
        ("joint_union", 0.0),
        ("rewarm_replay", 0.0),
        ("rewarm_replay", 0.25),
    ]
    for row, name in ((table[1], "infinite"), (table[4], "rewarm_replay")):
        runs = scan(folder, Filter(learner=[name], where=["learner.replay.share=0.25"])).runs
        for metric in ("final_loss", "forgetting_after", "newest_loss"):
            low, mean, high = (float(row[f"{metric}_{part}"]) for part in ("low", "mean", "high"))
            values = [run.values[metric] for run in runs]
            assert mean == pytest.approx(np.mean(values), abs=1e-4) and low == pytest.approx(min(values), abs=1e-4)
            assert high == pytest.approx(max(values), abs=1e-4)  # of two seeds, the interval is both
    (folder / "losses" / "gone.csv").write_text((folder / "losses" / "cpt_synthetic.csv").read_text())
    (folder / "losses" / "mine.csv").write_text("a,b")
    report(folder)
    assert sorted(path.name for path in (folder / "losses").glob("*.csv")) == ["cpt_synthetic.csv", "mine.csv"]


def test_all_of_it_is_verified(folder):
    text, _ = verify(folder)
    assert "10 verified" in text, text


def test_a_record_is_repeated(folder, clbench, tmp_path):
    (one,) = scan(folder, Filter(learner=["infinite"], where=["learner.replay.share=0.25", "seed=1"])).runs
    path = folder / "records" / f"{one.run_id}.json"
    done = clbench("verify", "--rerun", str(path))
    assert "repeated 2 experiences: all 15 losses are equal" in done.stdout, done.stdout + done.stderr
    entry = record.read(path)
    entry["sum_loss"][1][0] *= 1.01
    (tmp_path / "manifests").symlink_to(folder / "manifests")
    record.write(entry, tmp_path / "records")
    done = clbench("verify", "--rerun", str(tmp_path / "records" / path.name), code=1)
    assert "1 of 15 losses differ, token_loss[1].loss[0] most" in done.stdout and "on the same processor" in done.stdout


def test_columns_are_explained():
    words = (ROOT / "results" / "README.md").read_text()
    for name, text in LOSS.about.items():
        assert f"| `{name}` | {text} |" in words, name
    for name in loss_metrics.ABOUT:
        assert f"{name}_mean" in LOSS.columns
