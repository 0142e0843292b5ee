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

from clbench import record
from clbench.interfaces import UserError
from clbench.report import report, verify

sys.path.insert(0, str(Path(__file__).parent))
from test_report import made


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


@pytest.mark.parametrize("value", [None, math.nan, 10**400, "\ud800", [], [None], "DELETE"], ids=repr)
def test_no_record_however_malformed_stops_a_report(tmp_path, value, monkeypatch):
    """One value replaced at a time, everywhere: read or refused in one line, never an exception."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    entry = made()
    path = record.write(entry, tmp_path / "records")
    for place in places(entry):
        bad = changed(entry, place, value)
        bad["checksum"] = record.checksum(bad)
        path.write_text(json.dumps(bad))
        for text, _ in (report(tmp_path, strict=True), verify(tmp_path)):
            assert text.isprintable() or set(c for c in text if not c.isprintable()) <= {"\n"}


@pytest.mark.parametrize("key", ["n", "first_seen", "correct", "correct_masked", "class_correct", "class_n", "eval_classes"])
def test_counts_that_were_changed_and_sealed_again_are_refused(tmp_path, key):
    entry = made()
    for place in places({key: entry[key]}):
        for value in (-1, 3, 10.0, None, True, "DELETE"):
            bad = changed(entry, place, value)
            if json.dumps(bad) != json.dumps(entry):
                assert verify(record.write(bad, tmp_path / "records"))[1] == 1, (place, value)


def test_identity_is_the_content_and_not_the_order_of_keys():
    one = record.run_id({"a": 1, "b": {"c": 2.5}}, "m", "w", None)
    assert one == record.run_id({"b": {"c": 2.5}, "a": 1}, "m", "w", None) and len(one) == 16 and int(one, 16) >= 0
    others = [({"a": 2}, "m", "w", None), ({"a": 1, "b": {"c": 2.5}}, "x", "w", None)]
    others += [({"a": 1, "b": {"c": 2.5}}, "m", "w", "p 1"), ({"a": 1, "b": {"c": 2.5}}, "m", "x", None)]
    assert len({one, *(record.run_id(*other) for other in others)}) == 5


def test_unknown_keys_and_nan_survive(tmp_path):
    entry = made(future={"key": [1, None, "ü🙂"]}, experiences=[{"loss": math.nan}])
    back = record.read(record.write(entry, tmp_path))
    assert back["future"] == entry["future"] and math.isnan(back["experiences"][0]["loss"])
    assert back["checksum"] == record.checksum(back)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "done"}, "status 'done' is none of"),
        ({"run_id": "../../evil"}, "not 16 hex digits"),
        ({"schema": 99}, "newer than this clbench knows"),
        ({"seed": True}, "key 'seed' has the wrong type bool"),
        ({"n": [10, 0]}, "positive whole numbers"),
        ({"first_seen": [0, 5]}, "first_seen names experience 5"),
        ({"correct": [[8], [6]]}, "a column for each of the 2 evaluation sets"),
        ({"correct": None}, "key 'correct' must be a table"),
        ({"correct_top5": [[10, None]]}, "differ in length"),
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
