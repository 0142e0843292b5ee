"""Killed at any moment, the same command goes on, and ends with the same counts and the same weights to the last bit."""

import json
import random
import signal
import time

import pytest

RUN = (
    "run",
    "scenario.num_classes=6",
    "scenario.limit_train=40",
    "scenario.limit_test=10",
    "scenario.budget.epochs=3",
    "learner.batch_size=16",
    "checkpoint_seconds=0",
    "num_threads=1",
    "feature_store=off",
)


def finished(clbench, results):
    (record,) = clbench.records(results)
    assert record["status"] == "ok", record
    return record


def numbers(record):
    keys = ("run_id", "correct", "correct_masked", "class_correct", "final_state_sha256", "visits", "steps", "experiences")
    return {key: record[key] for key in (*keys, "passes", "calibration", "task_confusion")}


def kill_when(clbench, words, results, when, number=signal.SIGKILL):
    """Start the run and send a signal as soon as `when(journal folder)` holds of one in the results folder."""
    process = clbench.popen(*words, f"results_dir={results}")
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(when(folder) for folder in (clbench.folder / results / "runs").glob("*/journal")):
            process.send_signal(number)
            break
        time.sleep(0.01)
    return process, *process.communicate(timeout=60)


def reached(name):
    return lambda journal: (journal / name).exists()


@pytest.mark.parametrize("learner", ["slca", "replay"])
def test_killed_twice_and_equal_to_the_last_bit(clbench, learner):
    words = (*RUN, f"learner={learner}")
    clbench(*words, "results_dir=straight")
    straight = finished(clbench, "straight")
    # in the middle of the first fit; then later: in the alignment of a two-phase learn, or in another experience
    later = {"slca": "fit-1.pt", "replay": "experience.pt"}[learner]
    for moment in ("fit-0.pt", later):
        process, _, _ = kill_when(clbench, words, "killed", reached(moment))
        assert process.returncode == -signal.SIGKILL
        assert clbench.records("killed")[0]["status"] == "running"
    text = clbench("report", "--results-dir", "killed", "--strict", code=1).stdout
    assert "dead" in text
    clbench(*words, "results_dir=killed")
    killed = finished(clbench, "killed")
    assert numbers(killed) == numbers(straight)
    assert killed["resumed"] >= 1
    assert not list((clbench.folder / "killed" / "runs").glob("*/journal/*.pt")), "snapshots are left behind"


@pytest.mark.slow
def test_killed_at_random_moments(clbench):
    words = (*RUN, "learner=slca")
    clbench(*words, "results_dir=straight")
    rng = random.Random(7)
    for _ in range(6):
        process = clbench.popen(*words, "results_dir=killed")
        time.sleep(rng.uniform(3.0, 6.0))
        process.kill()
        process.communicate(timeout=60)
    clbench(*words, "results_dir=killed")
    assert numbers(finished(clbench, "killed")) == numbers(finished(clbench, "straight"))


def test_interrupt_says_how_to_go_on(clbench):
    words = (*RUN, "learner=slca")
    process, out, err = kill_when(clbench, words, "results", reached("fit-0.pt"), signal.SIGINT)
    assert process.returncode == 130, out + err
    assert "same command" in out + err and "Traceback" not in out + err
    clbench(*words)
    clbench(*words, "results_dir=straight")
    assert numbers(finished(clbench, "results")) == numbers(finished(clbench, "straight"))


def test_the_same_run_is_a_skip_and_force_repeats(clbench, small):
    words = ("run", "learner=ncm", *small)
    clbench(*words)
    (path,) = (clbench.folder / "results" / "records").glob("*.json")
    before = path.read_text()
    assert "done already" in clbench(*words).stdout and path.read_text() == before
    clbench(*words, "force=true")
    again = json.loads(path.read_text())
    assert again["rows"] == json.loads(before)["rows"] and again["created"] >= json.loads(before)["created"]
    path.write_text("{")
    for command in ("run", "plan"):
        refused = clbench(command, *words[1:], code=None)
        assert (
            refused.returncode
            and f"{path} is not a record" in refused.stderr
            and "force=true makes the run anew" in refused.stderr
        )
    assert "new" in clbench("plan", *words[1:], "force=true").stdout
    clbench(*words, "force=true")
    assert json.loads(path.read_text())["rows"] == again["rows"]


def test_machine_options_do_not_change_the_identity(clbench, small):
    clbench("run", "learner=ncm", *small)
    assert "done already" in clbench("run", "learner=ncm", *small, "num_threads=1", "device=cpu", "eval_batch_size=7").stdout
