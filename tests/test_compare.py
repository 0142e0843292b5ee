"""`clbench report compare`, `statistics` and `explain`: by hand, on the command line, and with mistakes in them."""

import copy
import csv
import io
import json
import pathlib

import numpy as np
import pytest
from scipy import stats
from test_report import made

from clbench.cli import main
from clbench.evaluation import accuracy_metrics, metrics, peer_metrics
from clbench.interfaces import UserError
from clbench.records import record
from clbench.records.variant import variant
from clbench.report import explain, overview
from clbench.report.compare import compare
from clbench.report.formats import render
from clbench.report.runs import Filter, summarize


def run(seed=0, learner="ncm", last=(6, 9), order=0, lr=None, **changes):
    """A record on class order `order`, with the settings that make its identity."""
    entry = copy.deepcopy(made(seed, learner, correct=((8, None), last)))
    entry["config"]["scenario"] = {"name": "cil", "order": "random", "order_seed": order}
    if lr is not None:
        entry["config"]["learner"]["lr"] = lr
    entry["scenario"]["manifest_sha256"] = f"{order}" * 64
    entry |= changes
    sha, version = entry["scenario"]["manifest_sha256"], entry["numbers_version"]
    entry["run_id"] = record.digest([version, entry["config"], sha, entry["scenario"]["name"], entry["model"]["name"]])[:16]
    return entry


def save(folder, *entries):
    for entry in entries:
        record.write(entry, folder / "records")
    return str(folder)


LASTS = {"a": [(5, 6), (6, 6), (5, 7)], "b": [(8, 9), (8, 8), (9, 9)]}


@pytest.fixture
def both(tmp_path):
    """Two learners, three seeds: b is better by 0.30, 0.20, 0.30."""
    return save(tmp_path / "r", *(run(s, name, last) for name, lasts in LASTS.items() for s, last in enumerate(lasts)))


def full(*words, **options):
    return compare(*words, **options)[1].rows


def test_two_learners_by_hand(both):
    (row,) = full("a", "b", both, Filter())
    assert (row["pairs"], row["orders"]) == (3, 1) and row["difference"] == pytest.approx(0.8 / 3)
    assert row["mean_a"] == pytest.approx(3.5 / 6) and row["mean_b"] == pytest.approx(5.1 / 6)
    assert row["p"] == row["p_holm"] == pytest.approx(stats.ttest_rel([0.85, 0.8, 0.9], [0.55, 0.6, 0.6]).pvalue)
    assert row["p_sign_flip"] == 0.25 and row["p_b_better"] == 1 and row["verdict"] == "b better"
    assert row["low"] == pytest.approx(0.2) and row["high"] == pytest.approx(0.3)
    assert row["seconds_ratio"] == 1 and row["bytes_ratio"] == 1
    (back,) = full("b", "a", both, Filter())
    assert back["difference"] == pytest.approx(-row["difference"]) and back["verdict"] == "b better"
    (flip,) = full("a", "b", both, Filter(), test="sign-flip")
    assert flip["p"] == 0.25 and flip["verdict"] == "not distinguishable"
    assert "cannot go below p = 0.25" in render(compare("a", "b", both, Filter(), test="sign-flip"), "text", "rows")


def test_lower_is_better_where_it_is(both):
    (row,) = full("a", "b", both, Filter(), metric="forgetting")
    assert row["difference"] < 0 and row["verdict"] == "b better" and row["p_b_better"] > 0.9


def test_too_little_to_say_is_said(tmp_path):
    where = save(tmp_path / "r", run(0, "a"), run(0, "b", (8, 9)), run(1, "b", (8, 9)))
    (row,) = full("a", "b", where, Filter())
    assert row["pairs"] == 1 and row["verdict"] == "not distinguishable: 1 shared seed" and row["p"] is None
    where = save(tmp_path / "s", *(run(s, name, last) for name in "ab" for s, last in enumerate([(6, 9), (5, 9)])))
    assert full("a", "b", where, Filter())[0]["verdict"] == "identical"
    where = save(tmp_path / "t", run(0, "a"), run(1, "b"))
    with pytest.raises(UserError, match=r"no seed is shared \(A has 0, B has 1\)"):
        compare("a", "b", where, Filter())


def test_old_against_new(tmp_path):
    """Another numbers version and another rate: matched, and both are named."""
    lasts = [(6, 9), (6, 8), (5, 9)]
    old = save(tmp_path / "old", *(run(s, "a", last, numbers_version=0) for s, last in enumerate(lasts)), run(0, "gone"))
    new = [run(s, "a", (last[0] + 1, last[1])) for s, last in enumerate(lasts)]
    where = save(tmp_path / "new", *new, run(0, "fresh"))
    rows, whole = compare(old, where, "results", Filter())
    (row,) = whole.rows
    assert row["pairs"] == 3 and row["difference"] == pytest.approx(0.05) and "numbers_version 0 → 1" in row["differs"]
    assert row["verdict"] == "no test: the same difference on every seed"
    assert any("only in A: cil gone" in note for note in rows.notes) and any("only in B: cil fresh" in n for n in rows.notes)
    where = save(tmp_path / "other", *(run(s, "a", lr=0.5) for s in range(3)))
    (row,) = full(old, where, "results", Filter())
    assert "learner.lr - → 0.5" in row["differs"]
    save(tmp_path / "other", *(run(s, "a", lr=0.7) for s in range(3)))
    with pytest.raises(UserError, match="1 settings in A and 2 in B have no partner"):
        compare(old, where, "results", Filter())
    (row,) = full(where, str(save(tmp_path / "third", *(run(s, "a", (9, 9), lr=0.7) for s in range(3)))), "r", Filter())
    assert row["differs"] == "" and row["pairs"] == 3


def test_orders_are_strata(tmp_path):
    entries = [run(s, name, (6 + (name == "b"), 9 - k), order=k) for name in "ab" for k in range(3) for s in range(2)]
    where = save(tmp_path / "r", *entries)
    (row,) = full("a", "b", where, Filter())
    assert (row["pairs"], row["orders"]) == (6, 3) and row["difference"] == pytest.approx(0.05)
    rows, pairs, profiles = overview.tables([summarize(e) for e in entries], "last_macro")
    a = next(r for r in rows.rows if r["learner"] == "a")
    assert (a["orders"], a["runs"], a["variants"]) == (3, 6, 3) and a["noise_std"] == 0
    assert a["order_std"] == pytest.approx(0.05) and a["order_share"] == 1 and a["low"] == a["high"] == pytest.approx(0.7)
    assert [p["pairs"] for p in pairs.rows] == [6] and {p["learner"] for p in profiles.rows} == {"a", "b"}
    assert next(p for p in profiles.rows if p["learner"] == "a")[">0.7"] == pytest.approx(1 / 3)


def test_settings_of_one_learner_by_variant(tmp_path):
    entries = [run(s, "a", last, lr=lr) for lr, lasts in ((0.1, LASTS["a"]), (0.2, LASTS["b"])) for s, last in enumerate(lasts)]
    where = save(tmp_path / "r", *entries)
    one, two = (variant(e) for e in (entries[0], entries[-1]))
    (row,) = full(f"a@{one}", f"a@{two[:5]}", where, Filter())
    assert row["verdict"] == f"a@{two[:5]} better" and row["differs"] == "learner.lr 0.1 → 0.2"
    with pytest.raises(UserError, match="no variant 'zz' of a"):
        compare("a@zz", f"a@{two}", where, Filter())


def test_holm_runs_over_the_rows(tmp_path):
    entries = [
        run(s, n, last, model={"name": m, "state_sha256": "w" * 64})
        for m in "mn"
        for n in "ab"
        for s, last in enumerate(LASTS[n])
    ]
    rows = full("a", "b", save(tmp_path / "r", *entries), Filter())
    assert len(rows) == 2 and all(r["p_holm"] == pytest.approx(2 * r["p"]) for r in rows)


def test_statistics_of_learners(both):
    runs = [summarize(e) for e in record.read_all(pathlib.Path(both) / "records")[0]]
    rows, pairs, _ = overview.tables(runs, "last_macro")
    assert [r["split"] for r in rows.rows] == ["one class order: its share cannot be told from training noise"] * 2
    (pair,) = pairs.rows
    assert pair["p_a_better"] == 0 and pair["verdict"] == "b better" and pair["difference"] == pytest.approx(-0.8 / 3)


MISTAKES = [
    (("slca", "b"), "no learner or results folder 'slca'"),
    (("aa", "b"), "did you mean 'a'"),
    (("a", "a"), "both 'a'"),
    (("a", "b", "--metric", "last_marco"), "did you mean 'last_macro'"),
    (("a", "b", "--metric", "last_ece"), "no last_ece on both sides"),
    (("a", "b", "--scenario", "cli"), "did you mean 'cil'"),
    (("a", "results"), "results is a results folder, a is not"),
    (("results", "results"), "same folder"),
    (("a",), "required: B"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_mistakes(tmp_path, monkeypatch, capsys, words, said):
    save(tmp_path / "results", *(run(s, name, last) for name in "ab" for s, last in enumerate(LASTS[name])))
    monkeypatch.chdir(tmp_path)
    assert main.answer(["report", "compare", *words]) == 2
    out, err = capsys.readouterr()
    assert said in err and not out


def test_pages_on_the_command_line(clbench):
    save(clbench.folder / "results", *(run(s, name, last) for name in "ab" for s, last in enumerate(LASTS[name])))
    text = clbench("report", "compare", "a", "b").stdout
    assert "b better" in text and "paired t-test" in text and "fewer than 5 pairs" in text
    lines = list(csv.DictReader(io.StringIO(clbench("report", "compare", "a", "b", "--format", "csv").stdout)))
    assert lines[0]["verdict"] == "b better" and float(lines[0]["difference"]) == pytest.approx(0.2667)
    assert clbench("report", "--results-dir", "results", "compare", "a", "b", "--out", "x.md").stdout == "written x.md\n"
    assert "| cil | nano |" in (clbench.folder / "x.md").read_text()
    found = json.loads(clbench("report", "statistics", "--format", "json").stdout)
    assert set(found) == {"rows", "pairs", "profiles"} and found["pairs"][0]["verdict"] == "b better"
    assert not (clbench.folder / "results" / "leaderboard.csv").exists()
    assert "clbench report compare slca mos" in clbench("report", "compare", "--help").stdout


def test_every_page_has_help(capsys):
    for page in ("explain", "compare", "statistics", "html", "plot"):
        with pytest.raises(SystemExit):
            main.answer(["report", page, "--help"])
        assert f"examples:\n  clbench report {page}" in capsys.readouterr().out
    assert main.answer(["report", "explian"]) == 2 and "did you mean 'explain'" in capsys.readouterr().err


def test_explain_prints_the_worked_example(clbench):
    text = clbench("report", "explain").stdout
    for library, number in (("CODA-Prompt", "0.44"), ("LibContinual", "8.33"), ("Renate", "11.67"), ("Mammoth", "16.67")):
        assert any(library in line and " forgetting " in line and f" {number} " in line for line in text.splitlines()), library
    assert "forgetting_diagonal" in text and "10.67" in text and "5.67" in text
    assert "| `" not in text and "last_macro_iqm" in clbench("report", "explain", "--part", "columns").stdout


def test_explain_a_record(clbench):
    entry = run(0, "a")
    save(clbench.folder / "results", entry)
    by_id = clbench("report", "explain", entry["run_id"][:6]).stdout
    assert f"record {entry['run_id']}" in by_id and "20.00" in by_id
    path = f"results/records/{entry['run_id']}.json"
    assert clbench("report", "explain", path).stdout == by_id
    assert "no file" in clbench("report", "explain", "zzzz", code=2).stderr


def test_the_registry_is_the_code():
    """Every public function of averages is listed, every key of a peer has a name and a formula, and `summary` has them all."""
    import inspect

    averages = {
        name
        for name, f in inspect.getmembers(accuracy_metrics, inspect.isfunction)
        if f.__module__ == accuracy_metrics.__name__ and list(inspect.signature(f).parameters)[:1] == ["a"]
    }
    averages = {name for name in averages if not name.startswith("_")}
    assert averages == {*metrics.FORMULAS, "macro", "micro", "own"}
    assert all(entry.text and entry.also for entry in metrics.FORMULAS.values())
    peers = {
        n
        for n, f in inspect.getmembers(peer_metrics, inspect.isfunction)
        if list(inspect.signature(f).parameters)[:2] == ["a", "n"]
    }
    assert {name for name in peers if not name.startswith("_")} == set(peer_metrics.PEERS)
    a, n = np.array(explain.EXAMPLE, float), explain.SIZES
    for name, peer in peer_metrics.PEERS.items():
        assert set(peer.function(a, n)) == set(peer.values), name
    values = metrics.summary({"correct": [[5, None], [4, 9]], "n": [10, 10], "first_seen": [0, 1]})
    assert set(values) == set(metrics.FORMULAS) - {"fwt_init", "intransigence"}


def test_twins_are_found_by_trying():
    assert explain.twin("continuum", "forgetting") == "forgetting" and explain.twin("pilot", "average") == "~ step_micro"
    assert explain.twin("mammoth", "bwt") == "bwt" and explain.twin("libcontinual", "forgetting") == "none"
    assert explain.twin("avalanche", "forgetting") == "forgetting_diagonal" and explain.twin("renate", "fwt") == "fwt_init"


def test_explain_where_sets_and_experiences_differ():
    entry = {"correct": [[8, 6, None], [7, 6, 9]], "n": [10, 10, 10], "first_seen": [0, 0, 1]}
    case = explain.Case("t", peer_metrics.percent(entry["correct"], entry["n"]), entry["n"], entry["first_seen"], None, entry)
    peers = explain.tables(case)[2]
    assert all(row["value"] is None for row in peers.rows) and any("no values" in note for note in peers.notes)
