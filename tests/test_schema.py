"""The JSON Schema of a record: made from one source, true of every committed record, and of one mind with `record.fault`."""

import copy
import json
import sys
from pathlib import Path

import pytest

from clbench.records import record, schema

sys.path.insert(0, str(Path(__file__).parent))
from test_verify import whole

jsonschema = pytest.importorskip("jsonschema", reason="pip install 'clbench[dev]'")
ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "clbench" / "record.schema.json"
VALIDATOR = jsonschema.Draft202012Validator(json.loads(FILE.read_text()))


def test_the_file_is_what_the_types_give():
    assert FILE.read_text() == schema.text(), "python -m clbench.records.schema > clbench/record.schema.json"
    VALIDATOR.check_schema(VALIDATOR.schema)


def test_committed_records_are_valid():
    paths = sorted((ROOT / "results" / "records").glob("*.json"))
    assert paths
    for path in paths:
        VALIDATOR.validate(json.loads(path.read_text()))


def test_a_new_record_is_valid_and_every_key_is_listed(clbench, small):
    clbench("run", "learner=icarl", *small)
    (entry,) = clbench.records()
    VALIDATOR.validate(entry)
    assert set(entry) <= set(schema.json_schema()["properties"])
    clbench("run", "learner=icarl", *small, "scenario.budget.exemplars=1", "results_dir=failed", code=None)
    for failed in clbench.records("failed"):
        VALIDATOR.validate(failed)


def test_the_command_prints_it(clbench):
    assert json.loads(clbench("verify", "--schema").stdout) == VALIDATOR.schema


BAD = [
    ("schema", 2),
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
    ("n", [10, 0]),
    ("n", "ten"),
    ("first_seen", [0, -1]),
    ("seconds", {"total": "long"}),
    ("error", "boom"),
    ("marks", "reference"),
    ("marks", [1]),
    ("stored_bytes", "1 MB"),
    ("exemplars", [1]),
    ("correct", None),
    ("correct", []),
    ("correct", [[8.5, None], [6, 9]]),
    ("correct", [["8", None], [6, 9]]),
    ("correct_masked", "none"),
    ("calibration", []),
    ("calibration", {"bins": 10, "table": [None, None]}),
    ("calibration", {"bins": 15}),
    ("calibration", {"bins": 15, "table": [{"n": 1}, None]}),
    ("task_confusion", [[[8, -2], None], None]),
    ("task_confusion", [[[8, 2.5], None], None]),
    ("task_confusion", {"a": 1}),
]
GOOD = [
    ("calibration", None),
    ("calibration", {"bins": 15, "table": [None, None]}),
    ("task_confusion", None),
    ("task_confusion", [None, None]),
    ("correct_top5", None),
    ("stored_bytes", None),
    ("marks", []),
    ("error", {"type": "X"}),
    ("future", {"anything": [1, None]}),
]


@pytest.mark.parametrize(("key", "value"), BAD + GOOD, ids=repr)
def test_fault_and_schema_agree(key, value):
    entry = whole() | {key: value}
    good = (key, value) in GOOD
    assert (record.fault(entry) is None) == good and VALIDATOR.is_valid(entry) == good


@pytest.mark.parametrize(
    "key", ["schema", "run_id", "status", "config", "n", "first_seen", "seconds", "error", "model", "seed"]
)
def test_both_miss_the_same_keys(key):
    entry = whole()
    del entry[key]
    assert record.fault(entry) == f"key {key!r} is missing" and not VALIDATOR.is_valid(entry)


@pytest.mark.parametrize("name", ["n", "nll", "brier", "bin_n", "bin_conf", "bin_correct"])
def test_every_part_of_a_calibration_row_is_looked_at(name):
    for value in (None, "x", -1, [], [0] * 14, ["0"] * 15):
        entry = copy.deepcopy(whole())
        entry["calibration"]["table"][1][name] = value
        assert record.fault(entry) is not None and not VALIDATOR.is_valid(entry), value


def test_other_statuses_need_no_counts():
    for status in ("running", "failed"):
        entry = {k: v for k, v in whole().items() if k not in ("correct", "calibration")} | {"status": status, "correct": None}
        assert record.fault(entry) is None and VALIDATOR.is_valid(entry)
