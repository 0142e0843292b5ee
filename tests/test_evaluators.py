"""Evaluators from outside: an installed package or a dotted path; their counts everywhere; what is refused."""

import csv
import json
import os
import textwrap

import pytest
import torch

from clbench.evaluation.evaluators import Answered, asked_for, load, row_of
from clbench.interfaces import UserError
from clbench.records import record

CODE = """
    import json
    import os

    from clbench import EvaluationSet, Evaluator


    class Top3:
        name = "top3"

        def __call__(self, learner, data: EvaluationSet):
            n = right = 0
            for z, y in data.answers(learner):
                best = z.topk(min(3, z.shape[1]), dim=1).indices
                right, n = right + int((best == y[:, None]).any(1).sum()), n + len(y)
            return {"n": n, "right": right}


    class Written:
        '''Counts nothing; leaves the scores of every set in a file.'''

        name = "written"

        def __call__(self, learner, data):
            z, y = zip(*((z.tolist(), y.tolist()) for z, y in data.answers(learner)))
            scores, labels = sum(z, []), sum(y, [])
            line = {"set": data.name, "classes": list(data.classes), "seen": data.num_seen, "task": data.task}
            if "SCORES" in os.environ:
                with open(os.environ["SCORES"], "a") as file:
                    file.write(json.dumps(line | {"scores": scores, "labels": labels}) + "\\n")
            return {"n": len(labels)}


    class Bad:
        name = "bad"

        def __call__(self, learner, data):
            n = sum(len(y) for _, y in data.answers(learner))
            return BAD[os.environ["BAD"]](n)


    BAD = {
        "no n": lambda n: {"right": 1},
        "n of 0": lambda n: {"n": 0},
        "float n": lambda n: {"n": float(n)},
        "no mapping": lambda n: n,
        "NaN": lambda n: {"n": n, "right": float("nan")},
        "infinite": lambda n: {"n": n, "right": float("inf")},
        "text": lambda n: {"n": n, "right": "3"},
        "bool": lambda n: {"n": n, "right": True},
        "too many": lambda n: {"n": n + 1},
        "nameless": lambda n: {"n": n, 3: 1},
    }


    class Clash(Top3):
        name = "accuracy"


    class Slash(Top3):
        name = "a/b"


    class Nameless:
        def __call__(self, learner, data):
            return {"n": 1}


    nothing = 3
"""
TINY = ("scenario.num_classes=6", "scenario.limit_train=6", "scenario.limit_test=4", "scenario.budget.epochs=1")
EXACT = ("num_threads=1", "arithmetic=reference")


def asked(*names):
    return f"scenario.operators=[{{evaluators: {{names: [{', '.join(names)}]}}}}]"


@pytest.fixture
def outside(clbench, tmp_path):
    """An installed package with evaluators under the names top3 and written; others are not registered."""
    site = tmp_path / "site"
    (site / "toppkg").mkdir(parents=True)
    (site / "toppkg" / "__init__.py").write_text(textwrap.dedent(CODE))
    info = site / "toppkg-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toppkg\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[clbench.evaluators]\ntop3 = toppkg:Top3\nwritten = toppkg:Written\n")
    (info / "RECORD").write_text("toppkg/__init__.py,,\n")
    clbench.env["PYTHONPATH"] += f"{os.pathsep}{site}"
    clbench.env["SCORES"] = str(tmp_path / "scores")
    return clbench


def naive_top3(clbench):
    """[(set, right)] by sorting the scores that were written, in the order of evaluation."""
    found = []
    for line in map(json.loads, (clbench.folder / "scores").read_text().splitlines()):
        right = 0
        for row, label in zip(line["scores"], line["labels"], strict=True):
            assert len(row) == line["seen"]
            right += sum(value > row[label] for value in row) < 3  # no two scores are equal
        found.append((line["set"], right))
    return found


def rows_of(entry, name):
    return [row for row in entry["rows"] if row["evaluator"] == name]


def stored(clbench, results="results"):
    (path,) = (clbench.folder / results / "records").glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["top3", "toppkg.Top3"])
def test_counts_by_entry_point_and_by_path(outside, name):
    outside(
        "run",
        "learner=finetune",
        "learner.batch_size=4",
        "learner.lr=1e-5",
        "learner.backbone_lr=1e-6",
        *TINY,
        *EXACT,
        asked(name, "written"),
    )
    entry, names = stored(outside), ["exp0", "exp1", "exp2"]
    made = rows_of(entry, "top3")
    expected = naive_top3(outside)
    assert [row["experience"] for row in made] == [0, 1, 2]
    counted = [(names[j], c) for row in made for j, c in enumerate(row["sums"]["right"]) if c is not None]
    assert counted == expected and len({right for _, right in expected}) > 1
    assert [row["sums"]["n"] for row in made] == [[8, None, None], [8, 8, None], [8, 8, 8]]
    assert all(row["step"] is None for row in made)
    share = sum(right for _, right in expected[-3:]) / 24
    out = outside("report").stdout
    with (outside.folder / "results" / "leaderboard.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["top3/right_mean"]) == pytest.approx(share, abs=5e-5)
    assert "top3/right" in out and f"{share:.4f}" in out
    outside("report", "html")
    page = (outside.folder / "results" / "report.html").read_text()
    assert "top3/right" in page
    assert "1 verified" in outside("verify").stdout
    again = outside("verify", "--rerun", "1").stdout
    assert "1 repeated: 1 verified" in again


def test_an_evaluator_of_other_code_makes_another_run(outside, tmp_path):
    """What it counts depends on its code: the record of the run before is no answer."""
    words = ("run", "learner=ncm", *TINY, *EXACT, asked("top3"))
    outside(*words)
    assert "is done already" in outside(*words).stdout
    with (tmp_path / "site" / "toppkg" / "__init__.py").open("a") as file:
        file.write("# another version\n")
    outside(*words)
    first, second = outside.records()
    assert first["run_id"] != second["run_id"] and first["config"] == second["config"]
    assert first["evaluators"]["top3"].startswith("toppkg 1.2 ") and first["evaluators"] != second["evaluators"]
    assert "2 records: 2 verified" in outside("verify", "results").stdout


def test_a_wrong_count_is_noticed_by_a_repeat(outside):
    outside("run", "learner=ncm", *TINY, *EXACT, asked("top3"))
    (path,) = (outside.folder / "results" / "records").glob("*.json")
    entry = json.loads(path.read_text())
    sums = rows_of(entry, "top3")[1]["sums"]["right"]
    sums[0] += 1 if sums[0] < 8 else -1
    path.write_text(json.dumps(entry | {"checksum": record.checksum(entry)}))
    assert "top3[1].right[0]" in outside("verify", "--rerun", "1", code=1).stdout


def test_resumed_runs_have_each_row_once(outside, tmp_path):
    """Killed by an evaluator in the middle of the second evaluation; the same command has the same rows."""
    (outside.folder / "deadly.py").write_text(
        textwrap.dedent("""
        import os

        class Deadly:
            name = "deadly"
            def __call__(self, learner, data):
                n = sum(len(y) for _, y in data.answers(learner))
                if "DEADLY" in os.environ and data.num_seen == 4 and data.name == "exp1":
                    os._exit(9)
                return {"n": n, "all": n}
        """)
    )
    words = ("run", "learner=finetune", "learner.batch_size=4", *TINY, *EXACT, asked("top3", "deadly.Deadly"))
    outside(*words, "results_dir=straight")
    outside.env["DEADLY"] = "1"
    outside(*words, "results_dir=killed", code=9)
    del outside.env["DEADLY"]
    outside(*words, "results_dir=killed")
    straight, killed = stored(outside, "straight"), stored(outside, "killed")
    assert killed["rows"] == straight["rows"] and killed["final_state_sha256"] == straight["final_state_sha256"]
    assert killed["resumed"] == 1 and len(rows_of(killed, "deadly")) == 3


def test_in_a_sweep_of_joblib(outside):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    out = outside("run", "-m", "machine=joblib", "learner=ncm", "seed=1,2", *TINY, *EXACT, asked("top3")).stdout
    assert "2 jobs: 2 ok" in out
    assert all(len(rows_of(entry, "top3")) == 3 for entry in outside.records())


def test_looks_ask_evaluators_too(outside):
    operators = "scenario.operators=[{looks: {number: 1}}, {evaluators: {names: [top3]}}]"
    outside("run", "learner=finetune", "learner.batch_size=4", *TINY, *EXACT, operators)
    made = rows_of(stored(outside), "top3")
    assert [(row["experience"], row["step"]) for row in made] == [(i, step) for i in range(3) for step in (2, None)]
    assert all(row["trained"] == 8 for row in made if row["step"] is not None)


def test_heads_and_tasks(outside):
    """The first head is the answer; a set that discloses its task says so, and scores are over all classes seen."""
    outside("run", "scenario=til_digits", "learner=lae", "learner.batch_size=4", *TINY, *EXACT, asked("top3", "written"))
    entry = stored(outside)
    lines = [json.loads(line) for line in (outside.folder / "scores").read_text().splitlines()]
    sets = len(entry["sets"])
    assert len(lines) == sets * (sets + 1) // 2 and all(line["task"] is not None for line in lines)
    counted = [c for row in rows_of(entry, "top3") for c in row["sums"]["right"] if c is not None]
    assert counted == [right for _, right in naive_top3(outside)]
    ends = rows_of(entry, "accuracy")
    masked = [c for row in ends for c in row["sums"]["correct_masked"] if c is not None]
    naive = []
    for line in lines:
        hits = (max(line["classes"], key=lambda c: row[c]) == y for row, y in zip(line["scores"], line["labels"], strict=True))
        naive.append(sum(hits))
    assert naive == masked


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("no n", "must return a mapping of numbers with 'n'"),
        ("n of 0", "must return a mapping of numbers with 'n'"),
        ("float n", "must return a mapping of numbers with 'n'"),
        ("no mapping", "must return a mapping of numbers with 'n'"),
        ("NaN", "right must be a finite number, got nan"),
        ("infinite", "right must be a finite number, got inf"),
        ("text", "right must be a finite number, got '3'"),
        ("bool", "right must be a finite number, got True"),
        ("too many", "n is 3, set s has 2 samples"),
        ("nameless", "a sum must have a name, got 3"),
    ],
)
def test_bad_sums(bad, message, monkeypatch):
    space = {}
    exec(textwrap.dedent(CODE), space)
    monkeypatch.setenv("BAD", bad)
    data = Answered("s", (0, 1), 2, None, [(torch.eye(2), torch.tensor([0, 1]))])
    with pytest.raises(UserError) as refused:
        row_of(space["Bad"](), None, [None, data])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_bad_sums_end_a_run_in_one_line(outside):
    outside.env["BAD"] = "NaN"
    done = outside("run", "learner=ncm", *TINY, asked("toppkg.Bad"), code=None)
    assert done.returncode and "evaluator bad: right must be a finite number, got nan" in done.stderr
    assert "Traceback" not in done.stderr and stored(outside)["status"] == "failed"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("top4",), "no evaluator 'top4' is installed; did you mean 'top3'?"),
        (("zzz",), "no evaluator 'zzz' is installed (write module.Class, or register it under clbench.evaluators)"),
        (("toppkg.Top4",), "evaluator toppkg.Top4 cannot be imported"),
        (("no_such_pkg.Top3",), "evaluator no_such_pkg.Top3 cannot be imported: No module named 'no_such_pkg'"),
        (("toppkg.Clash",), "evaluator toppkg.Clash must be callable and have a `name` of its own"),
        (("toppkg.Slash",), "evaluator toppkg.Slash must be callable and have a `name` of its own"),
        (("toppkg.Nameless",), "evaluator toppkg.Nameless must be callable and have a `name` of its own"),
        (("toppkg.nothing",), "evaluator toppkg.nothing must be callable and have a `name` of its own"),
        (("top3", "toppkg.Top3"), "two evaluators have one name: top3, top3"),
        ((), "evaluators.names is missing: a list of names"),
    ],
)
def test_refused_before_anything_is_trained(outside, names, message):
    done = outside("run", "learner=ncm", *TINY, asked(*names), code=2)
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not list((outside.folder / "results").glob("records/*"))


# what somebody hands over

TRAP = """
    import pathlib

    pathlib.Path("sprung").touch()


    class Top3:
        name = "trap"

        def __call__(self, learner, data):
            return {"n": 1}


    def identity(stream):
        return stream
"""


@pytest.fixture
def handed(outside):
    """A manifest and a record of a run with an evaluator in a loose file, which now leaves a mark when it is imported."""
    (outside.folder / "loose.py").write_text(textwrap.dedent(CODE))
    outside("run", "learner=ncm", *TINY, *EXACT, asked("loose.Top3"))
    assert "1 verified" in outside("verify").stdout
    (outside.folder / "loose.py").write_text(textwrap.dedent(TRAP))
    return outside


def test_a_manifest_imports_nothing_that_is_not_registered(handed):
    (manifest,) = (handed.folder / "results" / "manifests").glob("*.json")
    words = ("run", "scenario=manifest", f"scenario.path={manifest}", "learner=ncm", "results_dir=other")
    err = handed(*words, code=2).stderr
    assert "no evaluator 'loose.Top3' is installed" in err and err.count("\n") == 1
    assert not (handed.folder / "sprung").exists()


def test_a_record_imports_nothing_that_is_not_registered(handed):
    out = handed("verify", "--rerun", "1").stdout
    assert "self-reported" in out and "evaluator loose.Top3 is of no installed package: it is not run" in out
    (path,) = (handed.folder / "results" / "records").glob("*.json")
    err = handed("verify", "--rerun", str(path), code=2).stderr
    assert "cannot be repeated here: evaluator loose.Top3 is of no installed package" in err
    entry = json.loads(path.read_text())
    entry["config"]["scenario"]["operators"] = ["loose.identity"]
    sha, weights = entry["scenario"]["manifest_sha256"], entry["model"]["state_sha256"]
    entry["run_id"] = record.run_id(entry["config"], sha, weights, None, entry["numbers_version"], entry["evaluators"])
    path.unlink()
    path = path.with_name(f"{entry['run_id']}.json")
    path.write_text(json.dumps(entry | {"checksum": record.checksum(entry)}))
    out = handed("verify", "--rerun", "1").stdout
    assert "operator loose.identity is of no installed package: it is not run" in out
    assert not (handed.folder / "sprung").exists()


def test_only_the_operator_evaluators_allows_a_path():
    scenario = {"path": "os.path", "operators": ["single_pass", {"permute": {"names": ["os.getcwd"]}}]}
    assert list(asked_for(scenario)) == []
    for name in ("os.path", "os.getcwd"):
        with pytest.raises(UserError, match="no evaluator"):
            load([name], scenario)
    assert list(asked_for({"operators": [{"evaluators": {"names": ["a.B", "c"]}}]})) == ["a.B", "c"]


def test_sets_that_were_not_asked_are_null():
    class Count:
        name = "count"

        def __call__(self, learner, data):
            n = sum(len(y) for _, y in data.answers(learner))
            return {"n": n} | ({"odd": 1} if data.name == "b" else {})

    parts = [(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(1, 3), torch.zeros(1))]
    sets = [Answered("a", (0,), 3, None, parts), None, Answered("b", (1,), 3, None, parts[:1])]
    assert row_of(Count(), None, sets) == {"evaluator": "count", "sums": {"n": [3, None, 2], "odd": [None, None, 1]}}
    assert row_of(Count(), None, [None]) == {"evaluator": "count", "sums": {}}
