"""Sweeps: every launcher, jobs that raise, exit or are killed, and nothing that leaks from one job to the next."""

import importlib.util
import textwrap

import pytest

BAD = """
import os, signal, sys
import torch
from clbench.learners.ncm import NearestClassMean

class Bad(NearestClassMean):
    def __init__(self, model, runtime, *, how: str = "fine"):
        super().__init__(model, runtime)
        self.how = how

    def learn(self, experience):
        if self.how == "raise":
            raise RuntimeError("on purpose, with a, comma")
        if self.how == "exit":
            sys.exit(3)
        if self.how == "vanish":
            os._exit(5)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "leak":
            torch.set_num_threads(1)
            torch.manual_seed(99)
            torch.use_deterministic_algorithms(False)
            torch.set_default_dtype(torch.float32)
        return super().learn(experience)
"""
LAUNCHERS = {"basic": "machine=local", "joblib": "machine=joblib", "submitit": "machine=submitit_local"}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_bad_job_loses_only_itself(clbench, small, launcher):
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher")
    (clbench.folder / "bad.py").write_text(textwrap.dedent(BAD))
    words = ("run", "-m", LAUNCHERS[launcher], "learner._target_=bad.Bad", *small)
    done = clbench(*words, "learner.how=raise,exit,vanish,kill,fine,leak")
    statuses = sorted(r["status"] for r in clbench.records())
    assert statuses.count("ok") == 2, done.stdout + done.stderr
    assert len(statuses) == 6 and set(statuses) <= {"ok", "failed", "running"}
    raised = [r for r in clbench.records() if r["status"] == "failed" and "on purpose" in r["error"]["message"]]
    assert len(raised) == 1 and "RuntimeError" in raised[0]["error"]["traceback"]
    report = clbench("report", "--strict", code=1).stdout
    assert "failed" in report
    assert clbench("report").returncode == 0


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_job_alone_and_in_a_sweep_are_equal(clbench, small, launcher):
    if launcher != "basic":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    clbench("run", "-m", LAUNCHERS[launcher], "learner=finetune,slca", "seed=0,1", *small, "results_dir=sweep")
    clbench("run", "learner=slca", "seed=1", *small, "results_dir=alone")
    (alone,) = clbench.records("alone")
    together = {r["run_id"]: r for r in clbench.records("sweep")}
    assert len(together) == 4
    for key in ("correct", "class_correct", "final_state_sha256", "visits"):
        assert together[alone["run_id"]][key] == alone[key], key


def test_two_jobs_in_the_same_second(clbench, small):
    both = [clbench.popen("run", "learner=ncm", f"seed={seed}", *small) for seed in (0, 1)]
    same = clbench.popen("run", "learner=ncm", "seed=0", *small)
    for process in (*both, same):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    assert [r["status"] for r in clbench.records()] == ["ok", "ok"]


def test_a_finished_sweep_is_skipped(clbench, small):
    words = ("run", "-m", "learner=ncm", "learner.metric=euclidean,cosine", *small)
    clbench(*words)
    again = clbench(*words)
    assert again.stdout.count("done already") == 2 or "2 skipped" in again.stdout


def test_a_job_that_is_refused_is_seen(clbench, small):
    """slca needs new classes, which a domain-incremental stream does not bring: the other job goes on."""
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 24), ("test", 8)):
        arrays |= {f"{split}_x": rng.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8), f"{split}_y": np.arange(n) % 2}
        arrays[f"domain_{split}"] = np.arange(n) // 2 % 2
    np.savez(clbench.folder / "two.npz", **arrays)
    words = ("run", "-m", "scenario=dil_pacs", "scenario.dataset=two.npz", "scenario.domains=null", "learner=slca,ncm")
    done = clbench(*words)
    assert "1 ok, 1 failed" in done.stdout, done.stdout + done.stderr
    report = clbench("report", "--strict", code=1).stdout
    assert "needs_new_classes" in report
    planned = clbench("plan", *words[1:], code=2)
    assert "learner slca does not fit scenario" in planned.stderr


def test_a_pattern_leaves_out_what_does_not_fit(clbench, small):
    """hat needs the task, bn_adapt a BatchNorm: `glob` leaves them out and says why, no record fails; named, they fail."""
    words = ("-m", "learner=glob([bn_adapt,hat,ncm])", *small)
    planned = clbench("plan", *words).stdout
    whys = [
        "learner bn_adapt: model nano has no BatchNorm, nothing would change",
        "learner hat does not fit scenario cil_digits: needs_task_id, and the scenario does not disclose tasks",
    ]
    assert planned.endswith("".join(f"left out: {why}\n" for why in whys)) and "1 jobs: 1 new" in planned
    done = clbench("run", *words)
    assert done.stdout.endswith("3 jobs: 1 ok, 2 left out\n") and all(why in done.stdout for why in whys)
    assert len(list((clbench.folder / "results" / "records").glob("*.json"))) == 1
    clbench("report", "--strict")
    named = clbench("run", "-m", "learner=hat,ncm", *small).stdout
    assert "1 skipped, 1 failed" in named and "report --strict" in named


def test_a_pattern_leaves_out_learners_alone(clbench, small):
    """A wrong option of the stream is an error of every job, not a reason to leave learners out."""
    words = ("-m", "learner=glob([hat,ncm])", *small, "scenario.operators=[{shots:{base:50}}]")
    planned = clbench("plan", *words, code=2)
    assert "left out" not in planned.stdout and "shots" in planned.stderr
    assert "2 failed" in clbench("run", *words).stdout


def test_ray_runs_jobs_as_tasks_and_a_bad_one_loses_only_itself(clbench, small):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'clbench[ray]'")
    (clbench.folder / "bad.py").write_text(textwrap.dedent(BAD))
    words = (
        "run",
        "-m",
        "machine=ray",
        "hydra.launcher.num_cpus=2",
        "hydra.launcher.num_gpus=1",
        "hydra.launcher.gpus_per_job=0.5",
    )
    done = clbench(*words, "learner._target_=bad.Bad", *small, "learner.how=raise,kill,fine")
    assert sorted(r["status"] for r in clbench.records()) == ["failed", "ok", "running"], done.stdout + done.stderr
    assert "3 jobs: 1 ok, 1 failed, 1 died" in done.stdout


def test_ray_that_is_missing_is_said(clbench, small):
    if importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed")
    done = clbench("run", "-m", "machine=ray", "learner=ncm", "seed=0,1", *small, code=None)
    assert done.returncode != 0 and "pip install 'clbench[ray]'" in done.stderr + done.stdout


def test_memory_does_not_grow_with_jobs():
    """Ten thousand jobs are a list of overrides; their configurations are made one after another."""
    import tracemalloc

    from clbench.config import compose

    found = compose.read(["learner=ncm", "seed=range(10000)"], True)
    assert len(found.jobs) == 10_000 and [job["seed"] for job in found.jobs[9998:]] == [9998, 9999]
    assert [job["model"]["seed"] for job in found.jobs[:2]] == [0, 1]
    tracemalloc.start()
    for job in found.jobs[:64]:
        assert job["learner"]["_target_"].endswith("NearestClassMean")
    base = tracemalloc.get_traced_memory()[0]
    for _ in found.jobs[:640]:
        pass
    grown = tracemalloc.get_traced_memory()[0] - base
    tracemalloc.stop()
    assert grown < 1_000_000, grown
