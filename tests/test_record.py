"""Records on disk: what is refused, what survives a full disk, whether a run is alive."""

import copy
import errno
import json
import math
import os
import sys
import threading
from pathlib import Path

import pytest

from clbench.interfaces import UserError
from clbench.records import record
from clbench.records.verify import verify
from clbench.report import report

sys.path.insert(0, str(Path(__file__).parent))
from test_report import made
from test_verify import whole


def places(value, path=()):
    """Every place inside nested JSON, as a path of keys."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(entry, path, value):
    entry = copy.deepcopy(entry)
    inner = entry
    for key in path[:-1]:
        inner = inner[key]
    if value == "DELETE":
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return entry


OF_1 = [(1, value) for value in (None, [], "DELETE")]
OF_2 = [(2, value) for value in (None, math.nan, 10**400, "\ud800", -1, [], [None], {}, True, "DELETE")]


@pytest.mark.parametrize(("schema", "value"), OF_1 + OF_2, ids=repr)
def test_no_record_however_malformed_stops_a_report(tmp_path, schema, value, monkeypatch):
    """One value replaced at a time, everywhere: read or refused in one line, never an exception."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    entry = made(rows=[{"experience": 1, "step": None, "evaluator": "edits", "sums": {"done": [1.5, 2], "n": [9, 10]}}])
    path = record.write(entry, tmp_path / "records")
    if schema == 2:
        entry = json.loads(path.read_text())
    for place in places(entry):
        bad = changed(entry, place, value)
        bad["checksum"] = record.checksum(bad)
        path.write_text(json.dumps(bad))
        for text, _ in (report(tmp_path, strict=True), verify(tmp_path)):
            assert text.isprintable() or set(c for c in text if not c.isprintable()) <= {"\n"}


@pytest.mark.parametrize("value", [None, math.nan, "\ud800", -1, []], ids=repr)
def test_malformed_details_stop_no_report(tmp_path, value, monkeypatch):
    """The same for calibration and confusion in files of schema 1; what is refused, `fault` or `verify` refuse."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    entry = whole()
    path = record.write(entry, tmp_path / "records")
    for place in places({key: entry[key] for key in ("calibration", "task_confusion")}):
        if place[:2] == ("calibration", "table") and place[-1] in range(1, 15):
            continue
        bad = changed(entry, place, value)
        bad["checksum"] = record.checksum(bad)
        path.write_text(json.dumps(bad))
        assert isinstance(report(tmp_path)[0], str) and isinstance(verify(tmp_path)[0], str)
        if value in (-1, []) and place not in (("task_confusion", 0),) and not str(place[-1]).startswith(("nll", "brier")):
            assert verify(tmp_path)[1] == 1, (place, value)


@pytest.mark.parametrize("key", ["n", "first_seen", "correct", "correct_masked", "class_correct", "class_n", "eval_classes"])
def test_counts_that_were_changed_and_sealed_again_are_refused(tmp_path, key):
    entry = made()
    for place in places({key: entry[key]}):
        for value in (-1, 3, 10.0, None, True, "DELETE"):
            bad = changed(entry, place, value)
            if json.dumps(bad) != json.dumps(entry):
                assert verify(record.write(bad, tmp_path / "records"))[1] == 1, (place, value)


@pytest.mark.parametrize("key", ["sets", "rows"])
def test_sums_that_were_changed_on_disk_and_sealed_again_are_refused(tmp_path, key):
    path = record.write(made(), tmp_path / "records")
    entry = record.load(path)
    for place in places({key: entry[key]}):
        for value in (-1, 3, 10.0, None, True, "DELETE"):
            bad = changed(entry, place, value)
            if json.dumps(bad) == json.dumps(entry) or (place[-1] == "name" and value in (None, "DELETE")):
                continue
            path.write_text(json.dumps(bad | {"checksum": record.checksum(bad)}))
            assert verify(tmp_path)[1] == 1, (place, value)


def test_identity_is_the_content_and_not_the_order_of_keys():
    one = record.run_id({"a": 1, "b": {"c": 2.5}}, "m", "w", None)
    assert one == record.run_id({"b": {"c": 2.5}, "a": 1}, "m", "w", None) and len(one) == 16 and int(one, 16) >= 0
    others = [({"a": 2}, "m", "w", None), ({"a": 1, "b": {"c": 2.5}}, "x", "w", None)]
    others += [({"a": 1, "b": {"c": 2.5}}, "m", "w", "p 1"), ({"a": 1, "b": {"c": 2.5}}, "m", "x", None)]
    assert len({one, *(record.run_id(*other) for other in others)}) == 5


def test_unknown_keys_and_nan_survive(tmp_path):
    entry = made(future={"key": [1, None, "ü🙂"]}, experiences=[{"loss": math.nan}])
    path = record.write(entry, tmp_path)
    back, lies = record.read(path), record.load(path)
    assert back["future"] == entry["future"] and math.isnan(back["experiences"][0]["loss"])
    assert lies["schema"] == record.SCHEMA and back["checksum"] == lies["checksum"] == record.checksum(lies)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "done"}, "status 'done' is none of 'running', 'ok' or 'failed'"),
        ({"run_id": "../../evil"}, "not 16 hex digits"),
        ({"schema": 99}, "newer than this clbench knows"),
        ({"seed": True}, "key 'seed' must be a whole number, got True"),
        ({"n": [10, 0]}, "sets[1].n must be at least 1, got 0"),
        ({"n": [10]}, "keys 'n' and 'first_seen' must be lists of one length"),
        ({"first_seen": [0, 5]}, "first_seen names experience 5, the rows of accuracy end with experience 1"),
        (
            {"correct": [[8], [6]]},
            "key 'correct' must be a table of counts with a row for each experience and a column for each",
        ),
        ({"correct": [[8, None], [6, 9.5]]}, "rows[1].sums.correct[1] must be a whole number, got 9.5"),
        ({"correct": None}, "key 'correct_masked' must be a table"),
        ({"correct": None, "correct_masked": None, "correct_top5": None}, "status ok, but no evaluator has a row"),
        ({"correct_top5": [[10, None]]}, "key 'correct_top5' must be a table of counts with a row for each experience"),
        ({"heads": {"top5": [[8, None], ["x", 9]]}}, "rows[1].sums.heads/top5 must be a list of numbers"),
        ({"error": "boom"}, "key 'error' must be an object, got 'boom'"),
        ({"model": {}}, "model.name is missing"),
        ({"experiences": "no"}, "key 'experiences' must be a list, got 'no'"),
        ({"seconds": {"total": "long"}}, "key 'seconds' must hold numbers"),
        ({"stored_bytes": "1 MB"}, "key 'stored_bytes' must be a number, got '1 MB'"),
        ({"marks": "reference"}, "key 'marks' must be a list"),
    ],
)
def test_each_fault_is_one_line_that_names_file_and_key(tmp_path, changes, words):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(made(**changes)))
    with pytest.raises(UserError) as caught:
        record.read(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100000, b"null", b"1" * 5000])
def test_files_that_are_no_records(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    (tmp_path / "folder.json").mkdir()
    records, problems = record.read_all(tmp_path)
    assert records == [] and len(problems) == 2 and not any("\n" in line for line in problems)


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_full_disk_leaves_no_rest(tmp_path, monkeypatch, when):
    path = record.write(made(), tmp_path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, when, full)
    with pytest.raises(UserError, match="No space left on device"):
        record.write(made(marks=["reference"]), tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_stop_while_writing_leaves_no_rest(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        record.write(made(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for work in (record.ensure_writable, lambda folder: record.write(made(), folder)):
        with pytest.raises(UserError, match="cannot write"):
            work(tmp_path / "file" / "records")
    record.ensure_writable(tmp_path / "new" / "records")
    assert list((tmp_path / "new" / "records").iterdir()) == []


def test_writers_in_one_process_do_not_collide(tmp_path):
    entries = [made(marks=["x" * size]) for size in range(20)]
    threads = [threading.Thread(target=record.write, args=(entry, tmp_path)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (path,) = tmp_path.iterdir()
    assert record.read(path)["run_id"] == entries[0]["run_id"]


def test_looking_at_a_lock_does_not_remove_it(tmp_path):
    entry = made(status="running", correct=None)
    assert record.is_dead(entry, tmp_path)
    lock = tmp_path / "runs" / entry["run_id"] / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert record.is_dead(entry, tmp_path) and lock.exists()
    assert not record.is_dead(made(), tmp_path)


def test_a_folder_of_rubbish_loses_nothing(tmp_path):
    """Foreign, half-written, looping, unreadable: each is one line with its name, and the records beside them are all there."""
    folder = tmp_path / "records"
    good = [record.write(made(seed), folder) for seed in range(3)]
    (folder / "loop.json").symlink_to(folder / "loop.json")
    (folder / "gone.json").symlink_to(folder / "nowhere")
    (folder / "folder.json").mkdir()
    (folder / "foreign.json").write_text('{"name": "package", "version": "1.0", "schema": "x"}')
    (folder / "list.json").write_text("[1, 2, 3]")
    (folder / "bytes.json").write_bytes(b'{"run_id": "\xff\xfe"}')
    (folder / "half.json").write_bytes(good[0].read_bytes()[:700])
    (folder / "copy.json").write_bytes(good[0].read_bytes())
    (folder / f".{good[0].name}.99.abcd.tmp").write_text("{")
    (folder / "._hidden.json").write_bytes(b"\x00\x05\x16\x07")
    (folder / "=cmd|' C calc'!A0.json").write_text("{}")
    found, problems = record.read_all(folder)
    assert [e["seed"] for e in found] == [e["seed"] for e in map(record.read, sorted(good))] and len(problems) == 9
    for name in ("loop", "gone", "folder", "foreign", "list", "bytes", "half", "copy", "=cmd"):
        assert sum(f"/{name}" in line for line in problems) == 1, name
    text, code = report(tmp_path, strict=True)
    assert code == 1 and "3 ok" in text
    text, code = verify(tmp_path)
    assert code == 1 and "12 records" in text and text.count("\n") < 20


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "records").mkdir()
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UserError, match=r"cannot read .*records: Permission denied"):
        record.read_all(tmp_path / "records")


def test_records_are_chosen_and_slimmed_while_they_are_read(tmp_path):
    for seed in range(4):
        record.write(made(seed), tmp_path)
    found, _ = record.read_all(tmp_path, keep=lambda e: e["seed"] > 1, details=False)
    assert {e["seed"] for e in found} == {2, 3} and all("class_correct" not in e and "correct" in e for e in found)
    problems: list[str] = []
    assert len(list(record.entries(tmp_path, problems))) == 4 and problems == []
    assert list(record.entries(tmp_path / "nowhere", problems)) == []


def test_thousands_are_a_matter_of_seconds(tmp_path):
    import time

    entry = made()
    text = record.write(entry, tmp_path).read_text()
    for i in range(3000):
        (tmp_path / f"{i:016x}.json").write_text(text.replace(entry["run_id"], f"{i:016x}"))
    start = time.perf_counter()
    found, problems = record.read_all(tmp_path)
    assert len(found) == 3001 and not problems and time.perf_counter() - start < 10


def test_two_reports_at_once(tmp_path):
    for seed in range(5):
        record.write(made(seed), tmp_path / "records")
    report(tmp_path)
    whole = (tmp_path / "leaderboard.csv").read_bytes()
    codes, seen = [], set()

    def work():
        for _ in range(10):
            codes.append(report(tmp_path, strict=True)[1])
            seen.add((tmp_path / "leaderboard.csv").read_bytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 40 and seen == {whole} and not list(tmp_path.glob(".*.tmp"))


def test_a_record_is_readable_line_by_line(tmp_path):
    lines = record.write(made(), tmp_path).read_text().splitlines()
    sums = '{"correct": [8, null], "correct_masked": [10, null], "correct_top5": [10, null], "class_correct": [[8], null]}'
    assert f'  {{"experience": 0, "step": null, "evaluator": "accuracy", "sums": {sums}}},' in lines
    assert '  {"name": "a", "n": 10, "first_seen": 0, "classes": [0], "class_n": [10]},' in lines
    assert '  "class_order": [0, 1],' in lines
