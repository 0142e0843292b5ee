"""The JSON Schema of a record: made from the class, true of every committed record, and of one mind with `record.fault`."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clbench.records import form, migrations, record, rows

sys.path.insert(0, str(Path(__file__).parent))
from test_verify import whole

jsonschema = pytest.importorskip("jsonschema", reason="pip install 'clbench[dev]'")
ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "clbench" / "records" / "record.schema.json"
VALIDATOR = jsonschema.Draft202012Validator(json.loads(FILE.read_text()))


def lying(**changes):
    """A whole record as it lies on disk."""
    return rows.rows_of(whole(**changes)) | {"schema": record.SCHEMA}


def test_the_file_is_what_the_class_gives():
    assert FILE.read_text() == form.text(), "python -m clbench.records.form > clbench/records/record.schema.json"
    VALIDATOR.check_schema(VALIDATOR.schema)


def test_committed_records_are_valid():
    paths = sorted((ROOT / "results" / "records").glob("*.json"))
    assert paths
    for path in paths[::4]:
        VALIDATOR.validate(migrations.migrate(json.loads(path.read_text()), record.SCHEMA))


def test_a_new_record_is_valid_and_every_key_is_listed(clbench, small):
    clbench("run", "learner=icarl", *small)
    clbench("run", "learner=icarl", *small, "scenario.budget.exemplars=1", "results_dir=failed", code=None)
    for folder in ("results", "failed"):
        (path,) = (clbench.folder / folder / "records").glob("*.json")
        entry = json.loads(path.read_text())
        VALIDATOR.validate(entry)
        assert set(entry) <= set(form.json_schema()["properties"]) and entry["schema"] == 2


def test_the_command_prints_it(clbench):
    assert json.loads(clbench("verify", "--schema").stdout) == VALIDATOR.schema


def test_commands_that_read_no_record_do_not_import_pydantic():
    code = "import sys, clbench.records.record; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


ROW = {"experience": 1, "step": None, "evaluator": "edits", "sums": {"done": [1.5, None]}}
BAD = [
    ("schema", 3),
    ("run_id", "../../evil"),
    ("run_id", 5),
    ("status", "done"),
    ("status", None),
    ("numbers_version", "1"),
    ("config", []),
    ("scenario", {}),
    ("scenario", {"name": 3}),
    ("learner", None),
    ("model", {"name": None}),
    ("seed", True),
    ("seed", 1.5),
    ("seed", 1 << 60),
    ("sets", []),
    ("sets", None),
    ("sets", [{"n": 10, "first_seen": 0}, {"n": 0, "first_seen": 1}]),
    ("sets", [{"n": 10, "first_seen": 0}, {"n": 10, "first_seen": -1}]),
    ("sets", [{"n": 10, "first_seen": 0}, {"n": 10}]),
    ("sets", [{"n": 10, "first_seen": 0}, {"n": 10, "first_seen": 1, "name": 5}]),
    ("sets", [{"n": 10, "first_seen": 0}, {"n": 10, "first_seen": 1, "classes": ["a"]}]),
    ("seconds", {"total": "long"}),
    ("error", "boom"),
    ("marks", "reference"),
    ("marks", [1]),
    ("stored_bytes", "1 MB"),
    ("exemplars", [1]),
    ("visits", {"new": -1}),
    ("experiences", [{"loss": "low"}]),
    ("rows", None),
    ("rows", []),
    ("rows", [5]),
    ("rows", [ROW | {"experience": -2}]),
    ("rows", [ROW | {"step": -1}]),
    ("rows", [ROW | {"evaluator": ""}]),
    ("rows", [ROW | {"evaluator": ["accuracy"]}]),
    ("rows", [ROW | {"sums": None}]),
    ("rows", [ROW | {"sums": {"done": [1, "2"]}}]),
    ("rows", [ROW | {"sums": {"done": [[1], [2.5]]}}]),
    ("rows", [ROW | {"evaluator": "accuracy"}]),
    ("rows", [ROW | {"evaluator": "token_loss"}]),
    ("rows", [ROW | {"experience": -1}]),
]
GOOD = [
    ("stored_bytes", None),
    ("marks", []),
    ("error", {"type": "X"}),
    ("future", {"anything": [1, None]}),
    ("rows", [ROW]),
    ("rows", [ROW | {"sums": {"lists": [[1, 2], None], "n": [3, 4]}, "total": {"bins": [1, 2.5], "n": 7}, "more": "x"}]),
    ("rows", [ROW | {"evaluator": "token_loss", "experience": 0, "sums": {"loss": [3, 2.5]}}]),
]


@pytest.mark.parametrize(("key", "value"), BAD + GOOD, ids=repr)
def test_fault_and_schema_agree(key, value):
    entry = lying() | {key: value}
    good = (key, value) in GOOD
    assert (record.fault(entry) is None) == good and VALIDATOR.is_valid(entry) == good


@pytest.mark.parametrize("key", ["run_id", "status", "config", "sets", "rows", "seconds", "error", "model", "seed"])
def test_both_miss_the_same_keys(key):
    entry = lying()
    del entry[key]
    assert record.fault(entry) == f"key {key!r} is missing" and not VALIDATOR.is_valid(entry)


@pytest.mark.parametrize("name", ["correct", "correct_masked", "correct_top5", "class_correct", "task_confusion", "heads/a"])
def test_every_sum_of_accuracy_is_looked_at(name):
    for value in (None, "x", [8.5, None], [["8"], None], [True, None], [[2.5], None]):
        if name == "heads/a" and value == [8.5, None]:
            continue  # a number, which a sum of any other name may be
        entry = lying()
        entry["rows"][0]["sums"][name] = value
        assert record.fault(entry) is not None and not VALIDATOR.is_valid(entry), value


@pytest.mark.parametrize("name", ["n", "nll", "brier", "bin_n", "bin_conf", "bin_correct"])
def test_every_part_of_a_calibration_row_is_looked_at(name):
    for value in (None, "x", -1, [], [0] * 14, ["0"] * 15):
        entry = copy.deepcopy(lying())
        entry["rows"][1]["total"][name] = value
        assert record.fault(entry) is not None and not VALIDATOR.is_valid(entry), value


def test_other_statuses_need_no_rows():
    for status in ("running", "failed"):
        entry = lying() | {"status": status, "rows": []}
        assert record.fault(entry) is None and VALIDATOR.is_valid(entry)


def sums(entry, k, **changes):
    entry["rows"][k]["sums"] |= changes
    return entry


RELATIONS = {
    "rows[0].sums.correct must have 2 values": lambda e: sums(e, 0, correct=[8]),
    "the rows of accuracy after experience 0 and 1 have other sums": lambda e: sums(e, 1, **{"heads/a": [1, 2]}),
    "the rows of accuracy after an experience are of experiences [1], not": lambda e: e | {"rows": e["rows"][1:]},
    "two rows of accuracy after experience 0": lambda e: e | {"rows": [*e["rows"], e["rows"][0]]},
    "the rows of accuracy after an experience are of experiences [1, 0], not": lambda e: e | {"rows": e["rows"][::-1]},
    "task_confusion after experience 0 must have 2 counts": lambda e: sums(e, 0, task_confusion=[[10], None]),
    "rows[0].sums.n differs from the sizes of the sets": lambda e: sums(e, 0, n=[9, None]),
    "rows[2].sums.loss is missing": lambda e: e | {"rows": [*e["rows"], ROW | {"evaluator": "token_loss"}]},
    "rows[2].trained is missing": lambda e: (
        e | {"rows": [*e["rows"], ROW | {"evaluator": "reconstruction", "step": 3, "sums": {"loss": [1.0, 2.0]}}]}
    ),
    "rows of token_loss and of reconstruction in one record": lambda e: (
        e
        | {
            "rows": [
                *e["rows"],
                *(ROW | {"experience": 0, "evaluator": v, "sums": {"loss": [1, 2]}} for v in ("token_loss", "reconstruction")),
            ]
        }
    ),
}


@pytest.mark.parametrize("words", RELATIONS)
def test_what_a_type_cannot_say(words):
    assert record.fault(RELATIONS[words](lying())).startswith(words)
