"""Pre-training on the page: what is written, and what Chromium makes of it (skipped where there is none)."""

import csv
import io

import pytest
from test_cpt_run import run
from test_html import browser, drawn, open_page, saved, written  # noqa: F401
from test_report import made as accuracy_record

from clbench.records import record
from clbench.report import table
from clbench.report.columns import LOSS
from clbench.report.page import contents, html
from clbench.report.runs import scan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("losses")
    for seed in (0, 1):
        run(place, "learner=infinite", f"seed={seed}")
    run(place, "learner.replay.share=0")
    run(place, "learner=joint_union")
    bare = record.read(next((place / "records").glob("*.json")))
    config = bare["config"] | {"seed": 7}
    sha, weights = bare["scenario"]["manifest_sha256"], bare["model"]["state_sha256"]
    run_id = record.run_id(config, sha, weights, None)
    error = {"type": "E", "message": "<b>"}
    record.write(bare | {"seed": 7, "config": config, "run_id": run_id, "status": "failed", "error": error}, place / "records")
    return place


def test_the_data_are_those_of_the_leaderboard(folder):
    _, data = written(folder)
    board = table.rows_of(scan(folder).runs, LOSS)
    assert data["lines"] == [] and data["counts"] == {"failed": 1, "ok": 4} and len(data["lost"]) == 1
    rows = data["losses"]["rows"]
    assert [row["learner"] for row in rows] == [row["learner"] for row in board if row["n_seeds"]]
    for row, mine in zip(rows, board, strict=True):
        assert row["numbers"]["final_loss"][0] == pytest.approx(mine["final_loss_mean"], rel=1e-4)
        assert row["command"].startswith("clbench run") and f"learner={row['learner']}" in row["command"]
    (stream,) = data["losses"]["streams"]
    assert stream["sets"] == ["language_0", "language_1", "language_2"] and len(stream["floors"]) == 3
    infinite = next(d for d, row in zip(data["losses"]["details"], rows, strict=True) if row["learner"] == "infinite")
    assert infinite["all"] and len(infinite["loss_matrix"][0]["loss"]) == 4
    looks, edges, floors = infinite["losses"]
    assert len(looks["tokens"]) == 2 and len(looks["tokens"][0]) == len(looks["lr"][0]) == len(looks["loss"][0])
    assert len(looks["loss"][0][0]) == len(floors) == 3 and edges == [1920, 3840]
    gaps = infinite["gaps"]
    assert gaps[3] == {"start": 1} and len(gaps[0]["rise"]) == 2 and gaps[0]["rise"][0][0] == 0


def test_details_give_way_to_the_size(folder, monkeypatch):
    monkeypatch.setattr(contents, "LARGEST_LOSSES", 2000)
    _, data = written(folder)
    assert sum(len(str(d)) for d in data["losses"]["details"]) < 4000
    monkeypatch.setattr(contents, "LARGEST_LOSSES", 0)
    _, data = written(folder)
    assert data["losses"]["details"] == [None] * 3


TITLES = "[...document.querySelectorAll('#row figure h3')].map((h) => h.textContent)"


def test_a_row_is_drawn(folder, open_page):  # noqa: F811
    tab = open_page(html.write(folder))
    assert tab("document.getElementById('pre').hidden") is False and tab("document.getElementById('board').hidden") is True
    keys = tab("[...document.querySelectorAll('#pre tbody tr')].map((r) => [r.dataset.key, r.querySelector('a').textContent])")
    assert sorted(name for _, name in keys) == ["infinite", "joint_union", "rewarm_replay"]
    assert "loss on the newest set" in drawn(tab, "#pre")[0]
    for key, name in keys:
        tab(f"location.hash = '#loss={key}'")
        texts = drawn(tab, "#row")
        wanted = ["Loss over tokens, learning rate", "Loss before and after each experience", "Stability gap"]
        assert tab(TITLES) == wanted and len(texts) == 3 and "learning rate" in texts[0] and "language_2" in texts[0]
        assert name in tab("document.querySelector('#row h1').textContent")
    table = list(csv.reader(io.StringIO(saved(tab, "#row figure .save button:nth-child(2)")[1])))
    assert table[0] == ["seed", "set", "tokens", "experience", "lr", "loss"] and len(table) == 1 + 3 * 3 * 6


def test_sorting_and_both_kinds(folder, tmp_path, open_page):  # noqa: F811
    for path in (folder / "records").glob("*.json"):
        (tmp_path / "records").mkdir(exist_ok=True)
        (tmp_path / "records" / path.name).write_bytes(path.read_bytes())
    record.write(accuracy_record(), tmp_path / "records")
    tab = open_page(html.write(tmp_path))
    assert tab("document.getElementById('board').hidden") is False and tab("document.getElementById('pre').hidden") is False
    names = "[...document.querySelectorAll('#pre tbody th a')].map((a) => a.textContent)"
    head = "[...document.querySelectorAll('#pre thead button')].find((b) => b.textContent === '{}').click()"
    tab(head.format("Learner"))
    assert tab(names) == ["infinite", "joint_union", "rewarm_replay"]
    tab(head.format("Learner"))
    assert tab(names) == ["rewarm_replay", "joint_union", "infinite"]
