"""Trackers: nothing unless chosen, offline, the run outlives them, and a resumed run goes on with its steps."""

import json
import math
import os
import signal
import subprocess
import sys
import types

import pytest
from conftest import ROOT
from test_resume import kill_when, reached

from clbench.interfaces import UserError
from clbench.run import provenance, tracking

ENTRY = {
    "run_id": "0123456789abcdef",
    "seed": 0,
    "config": {"seed": 0, "learner": {"lr": 0.1, "schedule": None, "sizes": [1, 2]}, "scenario": {}},
    "scenario": {"name": "cil", "manifest_sha256": "m"},
    "learner": {"name": "ncm"},
    "model": {"name": "nano"},
}
FAKE_WANDB = '''
"""Writes down what it is asked for."""
import json, os, types
CALLS = os.environ.get("FAKE_CALLS")
def note(*words):
    with open(CALLS, "a") as file:
        file.write(json.dumps(words) + "\\n")
class Run:
    def log(self, values, step):
        if os.environ.get("FAKE_FAILS"):
            raise OSError("no space left\\non this device")
        note("log", step, values)
    def finish(self):
        note("finish")
def Settings(**options):
    return options
def init(**options):
    note("init", options)
    return Run()
'''


@pytest.fixture
def fake(monkeypatch):
    """A `wandb` in memory that remembers calls."""
    module = types.ModuleType("wandb")
    module.calls = []

    class Run:
        def log(self, values, step):
            module.calls.append(("log", step, values))

        def finish(self):
            module.calls.append(("finish",))

    module.Settings = lambda **options: options
    module.init = lambda **options: module.calls.append(("init", options)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_none_does_nothing_and_knows_nobody(tmp_path):
    tracker = tracking.open_tracker("none", tmp_path, {})
    tracker.log(0, {"macro": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    code = "import clbench.run.runner, sys; sys.exit(any(m in sys.modules for m in ('tensorboard', 'wandb', 'mlflow')))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_wandb_is_offline_unless_the_user_says_otherwise(tmp_path, fake, monkeypatch):
    tracker = tracking.open_tracker("wandb", tmp_path / "run", ENTRY)
    tracker.log(0, {"macro": 0.5, "forgetting": math.nan, "accuracy/ü,=cmd\n": 1})
    tracker.log(1, {"macro": 0.25})
    tracker.close()
    tracker.close()
    tracker.log(2, {"macro": 0.0})
    (_, options), *rest = fake.calls
    assert options["mode"] == "offline" and options["dir"] == str(tmp_path / "run") and options["id"] == ENTRY["run_id"]
    assert options["config"] == {
        "run_id": ENTRY["run_id"],
        "manifest": "m",
        "seed": 0,
        "learner.lr": 0.1,
        "learner.schedule": "null",
        "learner.sizes": "[1, 2]",
        "scenario": "{}",
    }
    assert rest == [("log", 0, {"macro": 0.5, "accuracy/ü__cmd_": 1.0}), ("log", 1, {"macro": 0.25}), ("finish",)]
    monkeypatch.setenv("WANDB_MODE", "online")
    tracking.open_tracker("wandb", tmp_path / "run", ENTRY, first=3).close()
    assert fake.calls[-2][1]["mode"] == "online" and fake.calls[-2][1]["resume"] == "allow"


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_fails_warns_once(tmp_path, fake, where, caplog, monkeypatch):
    def fail(*words, **options):
        raise RuntimeError("the server\nis gone")

    if where == "open":
        monkeypatch.setattr(fake, "init", fail)
    else:
        run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
        setattr(run, {"log": "log", "close": "finish"}[where], fail)
        monkeypatch.setattr(fake, "init", lambda **options: run)
    caplog.set_level("WARNING", logger="clbench")
    monkeypatch.setattr(tracking.log, "propagate", True)
    tracker = tracking.open_tracker("wandb", tmp_path, ENTRY)
    for step in range(3):
        tracker.log(step, {"macro": 1.0})
    tracker.close()
    assert [r.getMessage() for r in caplog.records] == ["track=wandb failed and is left out: RuntimeError: the server"]


def test_what_is_not_there(tmp_path, monkeypatch, clbench, small):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"track=wandb needs a package that is not installed: pip install 'clbench\[track\]'"):
        tracking.open_tracker("wandb", tmp_path, ENTRY)
    with pytest.raises(UserError, match="track must be one of none"):
        tracking.check("comet")
    err = clbench("run", *small, "learner=ncm", "track=comet", code=2).stderr
    assert "track must be none, tensorboard, wandb or mlflow" in err
    (clbench.folder / "wandb.py").write_text("raise ImportError('not this one')")
    err = clbench("run", *small, "learner=ncm", "track=wandb", code=2).stderr
    assert "clbench[track]" in err and "Traceback" not in err and not (clbench.folder / "results" / "runs").exists()


def calls(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_and_its_identity(clbench, small):
    """The numbers of each experience reach the tracker; the run is the one without it; a full disk there costs nothing here."""
    (clbench.folder / "wandb.py").write_text(FAKE_WANDB)
    clbench.env["FAKE_CALLS"] = str(clbench.folder / "calls")
    clbench("run", *small, "learner=finetune", "track=wandb", "results_dir=tracked")
    clbench.env["FAKE_FAILS"] = "1"
    failing = clbench("run", *small, "learner=finetune", "track=wandb", "results_dir=failing")
    clbench("run", *small, "learner=finetune", "results_dir=plain")
    tracked, failed, plain = (clbench.records(name)[0] for name in ("tracked", "failing", "plain"))
    for key in ("run_id", "config", "correct", "final_state_sha256", "calibration", "task_confusion"):
        assert tracked[key] == plain[key] == failed[key], key
    assert failing.stderr.count("track=wandb failed and is left out: OSError: no space left") == 1
    made = calls(clbench.folder / "calls")
    assert [words[0] for words in made] == ["init", "log", "log", "finish", "init", "finish"]
    first, last = made[1][2], made[2][2]
    assert first["macro"] == tracked["correct"][0][0] / tracked["n"][0] and "forgetting" not in first
    assert last["accuracy/exp1"] == tracked["correct"][1][1] / tracked["n"][1]
    assert last["forgetting"] == (tracked["correct"][0][0] - tracked["correct"][1][0]) / tracked["n"][0]
    assert last["learn/train_loss"] == tracked["experiences"][1]["train_loss"] and last["seconds"] > first["seconds"]


def test_a_killed_run_goes_on_with_its_steps(clbench):
    words = ("run", "learner=finetune", "scenario.num_classes=6", "scenario.limit_train=40", "scenario.limit_test=10")
    words = (*words, "scenario.budget.epochs=3", "checkpoint_seconds=0", "num_threads=1", "track=wandb")
    (clbench.folder / "wandb.py").write_text(FAKE_WANDB)
    clbench.env["FAKE_CALLS"] = str(clbench.folder / "calls")
    process, _, _ = kill_when(clbench, words, "results", reached("experience.pt"))
    assert process.returncode == -signal.SIGKILL
    clbench(*words)
    made = calls(clbench.folder / "calls")
    second = [i for i, words in enumerate(made) if words[0] == "init"][1]
    goes_on = made[second][1]
    assert goes_on["resume"] == "allow" and goes_on["id"] == clbench.records()[0]["run_id"]
    steps = [words[1] for words in made[second:] if words[0] == "log"]
    assert steps == list(range(steps[0], 3)) and made[-1] == ["finish"]
    assert {words[1] for words in made if words[0] == "log"} == {0, 1, 2}
    clbench(*words[:-1], "results_dir=straight")
    for key in ("calibration", "task_confusion", "correct", "final_state_sha256"):
        assert clbench.records()[0][key] == clbench.records("straight")[0][key], key


def test_jobs_of_a_sweep_leave_nothing_to_each_other(tmp_path, fake):
    for seed in range(3):
        tracker = tracking.open_tracker("wandb", tmp_path / str(seed), ENTRY | {"run_id": f"{seed:016x}"})
        tracker.log(0, {"macro": seed})
        tracker.close()
    assert [words[0] for words in fake.calls] == ["init", "log", "finish"] * 3
    assert [words[1]["id"] for words in fake.calls[::3]] == [f"{seed:016x}" for seed in range(3)]


def test_mlflow_without_a_global_run(tmp_path, monkeypatch):
    """A fake client: the store lies in the run's folder, parameters go in parts, a resumed run is found again."""
    stores = {}

    class Client:
        def __init__(self, tracking_uri):
            self.kept = stores.setdefault(tracking_uri, {"runs": [], "logged": []})

        def get_experiment_by_name(self, name):
            return types.SimpleNamespace(experiment_id="1") if self.kept["runs"] else None

        def create_experiment(self, name, artifact_location):
            assert name == "clbench" and artifact_location.startswith("file://")
            return "1"

        def search_runs(self, experiments, filter_string, max_results):
            run_id = filter_string.split("'")[1]
            return [run for run in self.kept["runs"] if run.tags["clbench.run_id"] == run_id]

        def create_run(self, experiment, tags, run_name):
            self.kept["runs"].append(
                types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1", status="FINISHED"), tags=tags)
            )
            return self.kept["runs"][-1]

        def log_batch(self, run_id, metrics=(), params=()):
            assert run_id == "r1" and len(params) <= 100
            self.kept["logged"] += [*params, *metrics]

        def set_terminated(self, run_id, status="FINISHED"):
            self.kept["logged"].append(status)

    def pair(*values):
        return values

    for name in ("mlflow", "mlflow.entities", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mlflow.tracking"].MlflowClient = Client
    sys.modules["mlflow.entities"].Metric = sys.modules["mlflow.entities"].Param = pair
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in tracking.QUIET:
        monkeypatch.setenv(name, "as the user wants")
    many = ENTRY | {"config": {f"k{i}": i for i in range(250)}}
    for first in (None, 1):
        tracker = tracking.open_tracker("mlflow", tmp_path / "run", many, first)
        tracker.log(first or 0, {"macro": 0.5 + (first or 0)})
        tracker.close()
    ((uri, kept),) = stores.items()
    assert uri == f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}" and len(kept["runs"]) == 1
    values = [(word[0], word[1], word[3]) for word in kept["logged"] if isinstance(word, tuple) and len(word) == 4]
    assert values == [("macro", 0.5, 0), ("macro", 1.5, 1)]
    assert [word for word in kept["logged"] if isinstance(word, str)] == ["FINISHED", "RUNNING", "FINISHED"]
    assert sum(isinstance(word, tuple) and len(word) == 2 for word in kept["logged"]) == 252


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_real_event_files(tmp_path):
    """TensorBoard reads back what was written, and drops what a killed run wrote beyond the step it goes on with."""
    pytest.importorskip("tensorboard", reason="pip install 'clbench[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, values in ((None, (0.1, 0.2, 0.9)), (2, (0.3, 0.4))):
        tracker = tracking.open_tracker("tensorboard", tmp_path, ENTRY, first)
        assert tracker.write is not None
        for step, value in enumerate(values, first or 0):
            tracker.log(step, {"macro": value, "accuracy/exp 0": value})
        tracker.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"macro", "accuracy/exp_0"}
    assert [(e.step, round(e.value, 6)) for e in found.Scalars("macro")] == [(0, 0.1), (1, 0.2), (2, 0.3), (3, 0.4)]


def test_it_is_no_part_of_the_identity():
    assert "track" in provenance.MACHINE
