"""Signs of life: real processes that live and die, other hosts, folders that were moved. Nobody takes a run's lock to look."""

import json
import os
import signal
import subprocess
import sys
import time

import filelock
import pytest
from test_report import made

from clbench.records import liveness, record
from clbench.report import report

LONG = (
    "run",
    "learner=finetune",
    "model=nano_random",
    "scenario.budget.epochs=1000",
    "learner.batch_size=8",
    "num_threads=1",
)


@pytest.fixture
def no_locks(monkeypatch):
    """Whoever takes a lock fails."""

    def refuse(self, *args, **options):
        raise AssertionError("a lock is taken")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)


def running(process, **changes):
    return made(status="running", correct=None, process=liveness.this_process() | process, **changes)


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_a_real_process(tmp_path, no_locks, sleeper):
    started = liveness._started(sleeper.pid)
    entry = running({"pid": sleeper.pid, "started": started})
    assert not record.is_dead(entry, tmp_path)  # a record that was copied without its run's folder, too
    folder = tmp_path / "runs" / entry["run_id"]
    folder.mkdir(parents=True)
    with liveness.Heartbeat(folder):
        assert not record.is_dead(entry, tmp_path)
        assert record.is_dead(running({"pid": sleeper.pid, "started": "1"}), tmp_path) == (started is not None)
        sleeper.kill()
        deadline = time.monotonic() + 20
        while not record.is_dead(entry, tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert record.is_dead(entry, tmp_path), "not collected yet, and gone"
        sleeper.wait()
        assert record.is_dead(entry, tmp_path)
    assert not list(folder.iterdir())


def test_a_run_that_left_is_dead_though_its_process_goes_on(tmp_path):
    entry = running({})
    folder = tmp_path / "runs" / entry["run_id"]
    assert not record.is_dead(entry, tmp_path)
    folder.mkdir(parents=True)
    assert record.is_dead(entry, tmp_path)
    with liveness.Heartbeat(folder):
        assert not record.is_dead(entry, tmp_path)
    assert record.is_dead(entry, tmp_path)


def test_another_host(tmp_path, no_locks):
    """Its processes cannot be looked up: the heartbeat counts, and where there is none it is running."""
    entry = running({"host": "f" * 16, "pid": 1 << 22})
    assert not record.is_dead(entry, tmp_path)
    alive = tmp_path / "runs" / entry["run_id"] / "alive"
    alive.parent.mkdir(parents=True)
    alive.touch()
    assert not record.is_dead(entry, tmp_path)
    then = time.time() - liveness.STILL / 2
    os.utime(alive, (then, then))
    assert not record.is_dead(entry, tmp_path)
    then = time.time() - 2 * liveness.STILL
    os.utime(alive, (then, then))
    assert record.is_dead(entry, tmp_path)


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(liveness, "BEAT", 0.01)
    with liveness.Heartbeat(tmp_path):
        os.utime(tmp_path / "alive", (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / "alive").stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "alive").stat().st_mtime > 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_read_says_nothing(tmp_path, monkeypatch):
    entry = running({"host": "f" * 16})

    def refuse(self, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "stat", refuse)
    assert not record.is_dead(entry, tmp_path)


@pytest.mark.parametrize("process", [7, [], {}, {"pid": "x"}, {"pid": -1}, {"pid": True}, {"pid": 1 << 70}, {"host": 3}])
def test_foreign_words_about_a_process_harm_nothing(tmp_path, process):
    entry = made(status="running", correct=None, process=process)
    assert record.is_dead(entry, tmp_path) == (not isinstance(process, dict))
    if isinstance(process, dict):
        assert not record.is_dead(running(process), tmp_path) or process.get("pid") == 1 << 22


def test_a_live_run_is_running_and_a_killed_one_is_dead(clbench, no_locks):
    process = clbench.popen(*LONG)
    results = clbench.folder / "results"
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        if [entry for entry in clbench.records() if entry["status"] == "running"]:
            break
        time.sleep(0.1)
    (entry,) = clbench.records()
    assert entry["process"]["pid"] == entry["pid"] == process.pid
    for _ in range(3):
        assert not record.is_dead(record.read(results / "records" / f"{entry['run_id']}.json"), results)
        text, code = report(results, strict=True)
        assert code == 0 and "dead" not in text
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    text, code = report(results, strict=True)
    assert code == 1 and "its process is gone; the same command goes on where it was" in text
    assert json.loads((results / "records" / f"{entry['run_id']}.json").read_text())["status"] == "running"
