"""Rows on disk and tables in memory say the same; rows of other evaluators are kept, checked, repeated and shown."""

import copy
import csv
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.cli import main
from clbench.evaluation import metrics, row_metrics
from clbench.records import migrations, record, rerun, tables
from clbench.records.rows import COUNTS, rows_of
from clbench.records.verify import verify
from clbench.report import report
from clbench.report.page import html
from clbench.report.table import leaderboard

sys.path.insert(0, str(Path(__file__).parent))
from test_report import made
from test_verify import again, machine, whole

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = sorted((ROOT / "results").glob("**/records/*.json"))


def per_unit(form):
    """Looks at losses have means in tables: their sums / n."""
    rows = []
    for row in form["rows"]:
        if row["step"] is not None and row["evaluator"] == "token_loss":
            sums = row["sums"]
            row = row | {"sums": {k: [v / n for v, n in zip(column, sums["n"], strict=True)] for k, column in sums.items()}}
        rows.append(row)
    return form | {"rows": rows}


@pytest.mark.parametrize("part", range(8))
def test_every_committed_record_keeps_its_tables_and_its_numbers(part):
    """Migrated from schema 1 and back: every key as it lies in the file and every number to the last bit; schema 2 as it is."""
    assert len(COMMITTED) > 600
    for path in COMMITTED[part::8]:
        lies = json.loads(path.read_text())
        if lies["schema"] == record.SCHEMA:
            back = rows_of(tables.tables(lies))
            assert per_unit(back) == per_unit({key: value for key, value in lies.items() if key != "checksum"})
            continue
        form = migrations.migrate(lies, record.SCHEMA)
        assert record.fault(form) is None and "correct" not in form and "sum_loss" not in form
        view = tables.tables(json.loads(json.dumps(form)))
        assert view.pop("rows") == [] and len(view.pop("sets")) == len(lies["n"])
        assert json.dumps(view, sort_keys=True) == json.dumps(lies | {"schema": record.SCHEMA}, sort_keys=True)
        assert "legacy" not in view["marks"]
        assert repr(metrics.summary(view)) == repr(metrics.summary(lies))


def test_a_record_of_schema_1_and_one_of_schema_2_read_alike(tmp_path):
    (tmp_path / "1.json").write_text(json.dumps(whole()))
    two = record.write(whole(), tmp_path)
    old, new = record.read(tmp_path / "1.json"), record.read(two)
    assert json.loads(two.read_text())["schema"] == 2 and old == {k: v for k, v in new.items() if k != "checksum"}
    assert {k: v for k, v in old.items() if k not in ("sets", "rows", "heads")} == whole() | {"schema": 2}
    assert old["heads"] == {} and old["rows"] == [] and [one["name"] for one in old["sets"]] == ["a", "b"]


def test_rows_by_hand():
    form = rows_of(whole())
    assert form["sets"] == [{"name": k, "n": 10, "first_seen": i, "classes": [i], "class_n": [10]} for i, k in enumerate("ab")]
    assert "eval_names" not in form["scenario"] and "n" not in form and "correct" not in form
    last = form["rows"][1]
    assert (last["experience"], last["step"], last["evaluator"]) == (1, None, "accuracy")
    assert last["sums"]["correct"] == [6, 9] and last["sums"]["task_confusion"] == [[7, 3], [0, 10]]
    assert last["total"]["n"] == 20 and last["sums"].keys() == {*COUNTS, "task_confusion"}


def losses(**changes):
    """Two experiences, two sets of four and five tokens, looks with means of one sequence each."""
    entry = made() | {"n": [4, 5], "tokens": [4, 5], "floor": [0.5, None], "bytes_per_token": [None, None]}
    entry = {k: v for k, v in entry.items() if k not in ("correct", *COUNTS, "class_n", "eval_classes")}
    curves = {"tokens": [0, 8, 8, 16], "lr": [0.1, 0.2, 0.1, 0.2], "experience": [0, 0, 1, 1], "step": [0, 1, 0, 1]}
    curves |= {"role": ["trunk"] * 4, "boundaries": [0, 8]}
    curves |= {"loss": {"a": [3.0, 2.5, 2.5, 2.0], "b": [3.0, 3.0, 2.75, 1.0]}, "accuracy": {"a": [0.1] * 4, "b": [0.2] * 4}}
    entry |= {"correct": None, "sum_loss": [[4.0, 9.0], [6.0, 5.0]], "sum_loss_start": [8.0, 10.0]}
    return entry | {"sum_loss_trunk": [None, [7.0, 6.0]], "curves": curves} | changes


def test_rows_of_losses_by_hand():
    rows = rows_of(losses())["rows"]
    places = [(row["experience"], row["step"], row.get("role")) for row in rows]
    start, ends = (-1, None, None), [(0, None, None), (1, None, "trunk"), (1, None, None)]
    looks = [(k, step, "trunk") for k in range(2) for step in range(2)]
    assert places == [start, *looks[:2], ends[0], *looks[2:], *ends[1:]]
    look = {"experience": 0, "step": 1, "evaluator": "token_loss", "lr": 0.2, "trained": 8, "role": "trunk"}
    assert rows[2] == look | {"sums": {"n": [1, 1], "loss": [2.5, 3.0], "correct": [0.1, 0.2]}}
    assert rows[-1]["sums"] == {"loss": [6.0, 5.0]} and rows[-2]["sums"] == {"loss": [7.0, 6.0]}
    images = losses() | {"scenario": losses()["scenario"] | {"unit": "images"}}
    assert {row["evaluator"] for row in rows_of(images)["rows"]} == {"reconstruction"}


def test_looks_with_sums_are_means_in_curves():
    form = rows_of(losses())
    for row in form["rows"]:
        if row["step"] is not None:
            row["sums"] = {"n": [4, 2], "loss": [v * m for v, m in zip(row["sums"]["loss"], (4, 2), strict=True)]}
    curves = tables.tables(form)["curves"]
    assert curves["loss"] == losses()["curves"]["loss"] and "accuracy" not in curves


def test_what_is_missing_stays_missing():
    bare = {k: v for k, v in whole().items() if k not in ("calibration", "task_confusion", "correct_top5", "class_correct")}
    view = tables.tables(rows_of(bare))
    assert not {"calibration", "task_confusion", "correct_top5", "class_correct", "stability", "curves", "sum_loss"} & set(view)
    running = tables.tables(rows_of(made(status="running", correct=None, correct_masked=None)))
    assert running["correct"] is None and "heads" not in running and "sum_loss" not in running
    assert "sum_loss_start" not in tables.tables(rows_of({k: v for k, v in losses().items() if k != "sum_loss_start"}))


def cells(width, steps, values):
    return st.lists(st.lists(st.none() | values, min_size=width, max_size=width), min_size=steps, max_size=steps)


@st.composite
def views(draw):
    """Records of random shape with any of the optional tables."""
    width, steps = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count, number = st.integers(0, 10), st.floats(-1e6, 1e6)
    row = st.lists(count, min_size=width, max_size=width)
    view = {"scenario": {"eval_names": [f"s{j}" for j in range(width)]}, "n": [10] * width, "first_seen": [0] * width}
    view["correct"] = draw(cells(width, steps, count))
    view["heads"] = {name: draw(cells(width, steps, count)) for name in draw(st.sets(st.sampled_from(["a", "b/c", ""])))}
    optional = {
        "class_correct": cells(width, steps, st.lists(count, max_size=3)),
        "correct_top5": cells(width, steps, count),
        "floor": st.lists(st.none() | number, min_size=width, max_size=width),
        "stability": st.lists(st.tuples(st.integers(0, steps - 1), row), min_size=1, max_size=4).map(
            lambda looks: {
                "trace": [
                    {"experience": k, "step": i, "correct": c, "n": [10] * width} for i, (k, c) in enumerate(sorted(looks))
                ]
            }
        ),
        "probe": st.tuples(row, cells(width, steps, count), cells(width, steps, count)).map(
            lambda p: {"n": [10] * width, "own_start": p[0], "own": p[1], "seen": p[2]}
        ),
    }
    return view | {key: draw(made_of) for key, made_of in optional.items() if draw(st.booleans())}


@settings(max_examples=60, deadline=None)
@given(views())
def test_tables_and_rows_are_one_thing(view):
    before = copy.deepcopy(view)
    form = json.loads(json.dumps(rows_of(view)))
    back = tables.tables(form)
    assert view == before, "writing changes nothing"
    assert {k: v for k, v in back.items() if k not in ("sets", "rows")} == view and back["rows"] == []
    assert json.loads(json.dumps(rows_of(back))) == form, "a view that was read is written alike"
    slim = tables.tables(form, details=False)
    assert slim == {k: v for k, v in back.items() if k not in tables.DETAILS}


# --- rows of other evaluators -----------------------------------------------------------------------------------------


def edits(experience=1, step=None, evaluator="edits", **sums):
    return {"experience": experience, "step": step, "evaluator": evaluator, "sums": sums}


def test_rows_that_no_table_shows_are_kept(tmp_path):
    rows = [
        edits(-1, evaluator="accuracy", correct=[1, 2]),
        edits(0, done=[3.5, None], n=[10, None]),
        edits(1, 4, done=[1, 2], lists=[[1, 2], None]),
        edits(1, 4, evaluator="accuracy", correct_masked=[3, 4]),
        edits(1, done=[3.5, 4]) | {"total": {"bins": [1, 2]}, "by": "a plug-in"},
    ]
    trace = {"trace": [{"experience": 1, "step": 4, "correct": [3, 4], "n": [10, 10]}]}
    path = record.write(whole(rows=rows, stability=trace), tmp_path)
    back = record.read(path)
    assert sorted(back["rows"], key=rows.index) == rows and back["stability"] == trace and back["correct"] == whole()["correct"]
    assert record.load(record.write(back, tmp_path)) == record.load(path)


def test_rows_of_one_place_are_one_row(tmp_path):
    rows = [{"experience": 1, "evaluator": "edits", "sums": {"a": [1, 2]}}, edits(1, b=[3, 4])]
    assert record.read(record.write(whole(rows=rows), tmp_path))["rows"] == [edits(1, a=[1, 2], b=[3, 4])]
    assert "step" not in rows[0] and rows[0]["sums"] == {"a": [1, 2]}


def test_a_row_adds_to_a_table_and_wins(tmp_path):
    more = {"correct": [7, 9], "top10": [10, 10], "heads/x": [1, 2]}
    rows = [edits(1, evaluator="accuracy", **more) | {"note": "by hand"}]
    rows.append(edits(0, evaluator="accuracy", correct=[8, None], **{"heads/x": [3, None]}))
    back = record.read(record.write(whole(rows=rows), tmp_path))
    assert back["correct"] == [[8, None], [7, 9]] and back["heads"] == {"x": [[3, None], [1, 2]]}
    assert back["correct_masked"] == whole()["correct_masked"] and back["calibration"] == whole()["calibration"]
    assert back["rows"] == [edits(1, evaluator="accuracy", top10=[10, 10]) | {"note": "by hand"}]


def test_numbers_of_other_evaluators_by_hand():
    """Set b is not seen after experience 0; after 1: (3.5 / 10 + 4 / 8) / 2, of the sets' own sizes (2 / 10 + 1 / 10) / 2."""
    rows = [
        edits(0, early=[1, 1]),
        edits(1, done=[3.5, 4], n=[10, 8]),
        edits(1, evaluator="b", x=[2, 1], y=[None, 5], z=[[1], [2]]),
    ]
    found = row_metrics.summary(whole(rows=rows))
    assert found == {"edits/done": pytest.approx(0.425), "b/x": pytest.approx(0.15), "b/y": 0.5}
    assert repr(metrics.summary(whole(rows=rows))) == repr(metrics.summary(whole()) | found)
    late = whole(rows=rows, first_seen=[0, 2])
    assert row_metrics.summary(late)["edits/done"] == 0.35
    assert row_metrics.summary(whole()) == {} and row_metrics.summary(whole(rows=[edits(1, 3, done=[1, 2])])) == {}
    assert metrics.summary(made(correct=None, rows=[edits(0, done=[5, None])])) == {"edits/done": 0.5}


def test_columns_of_other_evaluators(tmp_path, capsys):
    record.write(made(0, "other"), tmp_path / "records")
    report(tmp_path)
    before = (tmp_path / "leaderboard.csv").read_text()
    plain = html.write(tmp_path, tmp_path / "plain.html").read_text()
    assert "edits/done" not in plain and "edits" not in before
    for seed, done in enumerate((3, 5)):
        record.write(made(seed, rows=[edits(1, done=[done, 4])]), tmp_path / "records")
    text, code = report(tmp_path, strict=True)
    after = (tmp_path / "leaderboard.csv").read_text()
    assert code == 0 and "edits/done" in text and "0.4000±.0707" in text
    rows = {row["learner"]: row for row in csv.DictReader(io.StringIO(after))}
    assert list(rows["ncm"])[-2:] == ["edits/done_mean", "edits/done_std"] and rows["other"]["edits/done_mean"] == ""
    assert (rows["ncm"]["edits/done_mean"], rows["ncm"]["edits/done_std"]) == ("0.4000", "0.0707")
    assert before.splitlines()[0] + ",edits/done_mean,edits/done_std" == after.splitlines()[0]
    frame = leaderboard(record.read_all(tmp_path / "records")[0])
    assert frame.set_index("learner")["edits/done_mean"]["ncm"] == pytest.approx(0.4)
    page = html.write(tmp_path).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert 0.4 in data["columns"]["edits/done_mean"] and "evaluation sets seen" in data["about"]["edits/done_mean"]
    assert "Other evaluators" in page
    for form in ("md", "latex", "html", "json", "csv"):
        assert main.answer(["report", "--results-dir", str(tmp_path), "--format", form]) == 0
        assert "edits/done" in capsys.readouterr().out.replace("\\", ""), form


def test_rows_are_verified(tmp_path):
    good = [edits(0, n=[10, None], correct_edits=[10, None]), edits(1, 5, done=[99, 0.5])]
    text, code = verify(record.write(whole(rows=good), tmp_path / "records"))
    assert code == 0, text
    for row, words in (
        (edits(2, done=[1, 2]), "edits of experience 2: there are 2 experiences"),
        (edits(1, done=[1, 2], n=[11, 10]), "edits of experience 1: n is [11, 10], the sets have [10, 10] samples"),
        (edits(1, correct=[4, 5], n=[3, 5]), "edits of experience 1: correct is [4, 5], of [3, 5] samples"),
        (edits(1, correct_all=[4, 11]), "correct_all is [4, 11], of [10, 10] samples"),
        (edits(1, done=[1]), "rows[2].sums.done must have 2 values, one for each evaluation set"),
    ):
        text, code = verify(record.write(whole(rows=[row]), tmp_path / "records"))
        assert code == 1 and words in text, text


def test_looks_are_verified(tmp_path):
    trace = {"trace": [{"experience": 1, "step": 2, "correct": [11, None], "n": [10, 10]}]}
    text, code = verify(record.write(whole(stability=trace), tmp_path / "records"))
    assert code == 1 and "accuracy of experience 1: correct is [11, None], of [10, 10] samples" in text


def test_rows_of_a_repeat():
    """Counts within the tolerance of counts, other sums within a share of themselves, nothing at all on the same machine."""
    mine = whole(rows=[edits(0, done=[8, None], far=[2.0, 3.5]), edits(5, done=[1, 1])]) | machine()

    def compare(entry, **sums):
        return rerun.compare("x", entry, again(rows=[edits(0, **({"done": [8, None], "far": [2.0, 3.5]} | sums))]))

    assert compare(mine).verdict == "verified" and "all 15 counts and sums are equal" in compare(mine).notes[0]
    assert compare(mine, far=[2.0 + 1e-12, 3.5]).verdict == "verified"
    for sums in ({"done": [7, None]}, {"far": [2.0, 3.6]}, {"far": [2.0, None]}):
        assert compare(mine, **sums).verdict == "failed", sums
        there = compare(mine | machine(cpu="B"), **sums)
        assert there.verdict == ("failed" if None in sums.get("far", ()) else "verified"), sums
    assert compare(mine | machine(cpu="B"), far=[2.0, 3.8]).verdict == "failed"
    assert compare(mine | machine(cpu="B"), done=[0, None]).verdict == "failed"
    lost = rerun.compare("x", mine, again())
    assert lost.verdict == "failed" and lost.reasons == ("a repeat has no done of edits for experience 0",)


def test_rows_of_a_repeat_of_losses():
    mine = losses(rows=[edits(0, done=[4, None])]) | machine()
    for found, wanted in ((4, "verified"), (3, "failed")):
        verdict = rerun.compare("x", mine, losses(rows=[edits(0, done=[found, None])]) | machine())
        assert verdict.verdict == wanted
    assert "a repeat has no done of edits" in rerun.compare("x", mine, losses() | machine()).reasons[0]
    bare = {key: value for key, value in losses().items() if key != "curves"} | machine()
    assert "all 8 losses are equal" in rerun.compare("x", losses() | machine(), bare).notes[0]  # curves are not compared
    near = bare | {"sum_loss": [[4.0, 9.0], [6.1, 5.0]]}
    there = rerun.compare("x", losses() | machine(cpu="B"), near)
    text = "1 of 8 losses differ, token_loss[1].loss[0] most: the record says 1.5 nats per token, the repeat 1.525"
    assert text in there.notes[0]
    assert "all within the tolerance (0.05)" in there.notes[0]
    far = rerun.compare("x", losses() | machine(cpu="B"), bare | {"sum_loss": [[4.0, 9.0], [7.0, 5.0]]})
    assert far.verdict == "failed" and far.reasons[1] == "1 beyond the tolerance (0.05)"


def test_one_summary_of_every_evaluator():
    counts, sums = whole(rows=[edits(1, done=[5, 4])]), losses()
    both = counts | {key: sums[key] for key in ("sum_loss", "sum_loss_start", "tokens", "floor", "bytes_per_token")}
    found = metrics.summary(both)
    assert found.keys() == {*metrics.summary(counts), *metrics.summary(both | {"correct": None})}
    assert (found["edits/done"], found["final_loss"]) == (0.45, 1.25)
    assert found["last_macro"] == metrics.summary(counts)["last_macro"]
    assert found.keys() - {"edits/done"} <= metrics.ABOUT.keys()
    assert set(metrics.summary(sums)) <= metrics.ABOUT.keys() and "last_macro" not in metrics.summary(sums)


def test_an_evaluator_alone_is_a_result(tmp_path):
    entry = whole(rows=[edits(0, done=[5, None]), edits(1, done=[5, 4])])
    for key in ("correct", "calibration", "task_confusion", *COUNTS):
        entry.pop(key, None)
    text, code = verify(record.write(entry, tmp_path / "records"))
    assert code == 0 and "of other evaluators only the sizes are checked" in text
    assert "all 3 counts are equal" in rerun.compare("x", entry | machine(), entry | machine()).notes[0]
    assert rerun.compare("x", entry | machine(), entry | machine() | {"rows": []}).verdict == "failed"
    assert "edits/done" in report(tmp_path, strict=True)[0] and math.isclose(row_metrics.summary(entry)["edits/done"], 0.45)
    html.write(tmp_path)
