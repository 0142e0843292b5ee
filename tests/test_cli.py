"""The command line as a person types it: what it says, what it exits with, what it loads; sweeps whose jobs die."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from clbench.cli import EXAMPLES
from clbench.isolate import how_it_died, run_alone


def test_alone_it_explains_itself(clbench):
    done = clbench()
    assert done.stderr == "" and "start here:  clbench run" in done.stdout
    for name, (_, examples) in EXAMPLES.items():
        assert f"\n  {name}" in done.stdout and examples[0] in done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_of_each_command_has_examples(clbench, name):
    done = clbench(name, "--help")
    assert done.stderr == "" and all(example in done.stdout for example in EXAMPLES[name][1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "no command 'rnu'; did you mean 'run'? (one of: run, plan, list, check, report, verify, new, manifest)"),
        (["learner=ncm"], "no command 'learner=ncm'; did you mean 'clbench run learner=ncm'? (one of: "),
        (["--versoin"], "no option '--versoin'; did you mean '--version'? (one of: "),
        (["run", "--multirn"], "no option --multirn; did you mean '--multirun'? (clbench run --help shows what there is)"),
        (["report", "--strct"], "no option --strct; did you mean '--strict'? (clbench report --help shows what there is)"),
        (["run", "learner=slac"], "no learner 'slac'; did you mean 'slca'? (one of: "),
        (["run", "-m", "learner=ncm,slac"], "no learner 'slac'; did you mean 'slca'? (one of: "),
        (["run", "learner.lr=fast"], "learner.lr must be float, got 'fast'"),
        (["plan", "learner.slwo=1"], "no key 'learner.slwo'; did you mean 'learner.slow'?"),
        (["list", "learnerz"], "no group 'learnerz'; did you mean 'learners'? (one of: "),
        (["check"], "say what to check: learner=NAME or scenario=NAME"),
        (["manifest", "write"], "say where to: clbench manifest write ... --out FILE"),
        (["manifest", "check"], "say which file: clbench manifest check FILE"),
        (["new", "lerner", "x"], "argument kind: invalid choice: 'lerner'"),
    ],
)
def test_mistakes_are_answered_in_one_line_before_torch_is_loaded(clbench, words, message):
    done = clbench(*words, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith(f"clbench: {message}") and done.stderr.count("\n") == 1
    code = "import sys; from clbench.cli import answer; answer(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    if words[:2] != ["manifest", "write"]:
        again = subprocess.run([sys.executable, "-c", code, *words], env=clbench.env, cwd=clbench.folder, capture_output=True)
        assert again.returncode == 0, "torch was loaded"


def test_list_names_every_choice_without_torch(clbench):
    out = clbench("list").stdout
    for word in ("scenarios\n", "learners\n", "models\n", "schedules\n", "sweeps\n", "machines\n", "  slca ", "  cil_digits "):
        assert word in out
    assert "cil_digits" not in clbench("list", "learners").stdout


def test_results_folder_that_cannot_be_written(clbench, small):
    (clbench.folder / "results").write_text("a file in the way")
    done = clbench("run", *small, code=2)
    assert done.stderr.startswith("clbench: ") and "results" in done.stderr and done.stderr.count("\n") == 1


def test_manifest_write_check_show(clbench, small):
    words = ("scenario=cil_digits", *small)
    clbench("manifest", "write", *words, "--out", "a stream.json")
    shown = clbench("manifest", "show", *words).stdout
    sha256 = shown.splitlines()[0].split()[-1]
    assert clbench("manifest", "check", "a stream.json").stdout == f"a stream.json: ok, sha256 {sha256}\n"
    clbench("manifest", "write", *words, "--out", "a stream.json")
    err = clbench("manifest", "write", *words, "scenario.limit_train=19", "--out", "a stream.json", code=2).stderr
    assert "holds another stream" in err
    text = (clbench.folder / "a stream.json").read_text()
    (clbench.folder / "a stream.json").write_text(text.replace("class_incremental", "task_incremental"))
    assert clbench("manifest", "check", "a stream.json", code=2).stderr.count("\n") == 1


def test_a_single_run_and_the_same_again(clbench, small):
    words = ("run", "learner=ncm", "results_dir=my results", *small)
    assert "step_macro" in clbench(*words).stdout
    assert "is done already" in clbench(*words).stdout
    assert len(clbench.records("my results")) == 1
    assert {p.name for p in clbench.folder.iterdir()} == {"my results"}, "Hydra left folders behind"


def test_a_single_run_that_fails_exits_1(clbench, small):
    done = clbench("run", "learner=finetune", "learner.lr=1e30", "learner.backbone_lr=1e30", *small, code=1)
    assert "FloatingPointError" in done.stderr
    assert [r["status"] for r in clbench.records()] == ["failed"]


def test_plan_shows_all_jobs_and_all_errors(clbench, small):
    out = clbench("plan", "-m", "learner=ncm,finetune", *small).stdout
    assert "2 jobs: 2 new" in out
    clbench("run", "learner=ncm", *small)
    assert "2 jobs: 1 done, 1 new" in clbench("plan", "-m", "learner=ncm,finetune", *small).stdout
    done = clbench("plan", "-m", "learner=ncm,slca", "scenario=dil_pacs,til_digits", "seed=0,x", code=2)
    assert "seed must be a whole number from 0, got 'x'" in done.stderr


DEADLY = """
    import os, signal, sys

    from clbench.learners.ncm import NearestClassMean


    class Deadly(NearestClassMean):
        def __init__(self, model, runtime, *, how: str = "live"):
            super().__init__(model, runtime)
            self.how = how

        def learn(self, experience):
            if experience.index == 1:
                if self.how == "raise":
                    raise RuntimeError("as asked")
                if self.how == "exit":
                    sys.exit(3)
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.how == "vanish":
                    os._exit(7)
            return super().learn(experience)
"""


def sweep_of_deaths(clbench, small, *words):
    (clbench.folder / "deadly.py").write_text(textwrap.dedent(DEADLY))
    how = "learner.how=raise,exit,kill,vanish,live"
    return clbench("run", "-m", "learner._target_=deadly.Deadly", how, *words, *small)


def check_deaths(clbench, out):
    assert "5 jobs: 1 ok, " in out and "clbench report --strict" in out
    for text in ("learner.how=raise", "as asked", "killed by SIGKILL", "left with exit code 7"):
        assert text in out
    by_how = {r["config"]["learner"]["how"]: r["status"] for r in clbench.records()}
    assert by_how["live"] == "ok" and by_how["raise"] == "failed" and by_how["kill"] == by_how["vanish"] == "running"


def test_a_job_that_dies_takes_nothing_with_it(clbench, small):
    check_deaths(clbench, sweep_of_deaths(clbench, small).stdout)
    assert not list(clbench.folder.glob("results/runs/.sweep-*"))
    assert clbench("report", "--strict", code=None).returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["joblib", "submitit_local"])
def test_nor_under_other_launchers(clbench, small, machine):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    check_deaths(clbench, sweep_of_deaths(clbench, small, f"machine={machine}").stdout)


def test_alone_and_in_a_sweep_the_same_record(clbench, small):
    clbench("run", "-m", "learner=finetune", "seed=0,1", "results_dir=a", "num_threads=1", *small)
    clbench("run", "learner=finetune", "seed=1", "results_dir=b", "num_threads=1", *small)
    (alone,) = clbench.records("b")
    (same,) = [r for r in clbench.records("a") if r["run_id"] == alone["run_id"]]
    assert same["correct"] == alone["correct"] and same["final_state_sha256"] == alone["final_state_sha256"]


@pytest.mark.parametrize("words", [(), ("-m", "seed=0,1")])
def test_ctrl_c_exits_130_and_the_same_command_goes_on(clbench, small, words):
    many = ("learner=finetune", "scenario.budget.epochs=200", "checkpoint_seconds=0.2", "num_threads=1", *small[:3], *words)
    process = clbench.popen("run", *many, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(clbench.folder.glob("results/runs/*/journal/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on where" in err
    assert "Traceback" not in err
    few = [word for word in many if "epochs" not in word]
    assert [r["status"] for r in clbench.records()] == ["running"]
    assert clbench("plan", *[w for w in few], "scenario.budget.epochs=200").stdout.count("resumable") >= 1


def test_run_alone_says_how_a_child_ended():
    assert "forkserver" in multiprocessing.get_all_start_methods() or sys.platform == "win32"
    assert run_alone(dict, [("status", "ok"), ("text", "")]) == {"status": "ok", "text": "", "stopped": False}
    assert run_alone(os._exit, 3)["text"] == "left with exit code 3"
    assert run_alone(sys.exit, 3)["text"] == "called sys.exit(3)"
    assert run_alone(os.abort)["text"] == "killed by SIGABRT"
    assert run_alone(int, "x")["status"] == "failed"
    assert how_it_died(-9) == "killed by SIGKILL (out of memory?)"
