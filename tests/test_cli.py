"""The command line as a person types it: what it says, what it exits with, what it loads; sweeps whose jobs die."""

import ast
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import yaml

from clbench.cli.commands import Tail, summary
from clbench.cli.main import EXAMPLES
from clbench.config import families, registry
from clbench.interfaces import Capabilities
from clbench.run.subprocess_job import how_it_died, note, run_alone


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
        (
            ["rnu"],
            "no command 'rnu'; did you mean 'run'? (one of: run, plan, list, check, report, verify, predict, "
            "bench, bench tokens, new, schedule, schedule fit, tune, orders, effects, manifest, manifest corpus, submit, site)",
        ),
        (["learner=ncm"], "no command 'learner=ncm'; did you mean 'clbench run learner=ncm'? (one of: "),
        (["--versoin"], "no option '--versoin'; did you mean '--version'? (one of: "),
        (["run", "--multirn"], "no option --multirn; did you mean '--multirun'? (clbench run --help shows what there is)"),
        (["report", "--strct"], "no option --strct; did you mean '--strict'? (clbench report --help shows what there is)"),
        (["run", "learner=slac"], "no learner 'slac'; did you mean 'slca'? (one of: "),
        (["run", "-m", "learner=ncm,slac"], "no learner 'slac'; did you mean 'slca'? (one of: "),
        (["run", "learner.lr=fast"], "learner.lr must be float, got 'fast'"),
        (["plan", "learner.slwo=1"], "no key 'learner.slwo'; did you mean 'learner.slow'?"),
        (["plan", "scenario.operators=permute"], "scenario.operators is a list: write 'scenario.operators=[permute]'"),
        (
            ["plan", "scenario.operators={permute:{experiences:3}}"],
            "scenario.operators is a list: write 'scenario.operators=[{permute:{experiences:3}}]'",
        ),
        (["plan", "scenario.targt=1"], "no key 'scenario.targt'; did you mean 'scenario.data_root'?"),
        (
            ["plan", "scenario=manifest", "scenario.limit_train=3"],
            "no key 'scenario.limit_train' beside scenario=manifest",
        ),
        (["list", "learnerz"], "no group 'learnerz'; did you mean 'learners'? (one of: "),
        (["check"], "say what to check: learner=NAME or scenario=NAME"),
        (["check", "--measure", "learner=slac"], "no learner 'slac'; did you mean 'slca'? (one of: "),
        (["manifest", "write"], "say where to: clbench manifest write ... --out FILE"),
        (["manifest", "check"], "say what to check: clbench manifest check FILE, or scenario=NAME"),
        (["new", "lerner", "x"], "argument kind: invalid choice: 'lerner'"),
    ],
)
def test_mistakes_are_answered_in_one_line_before_torch_is_loaded(clbench, words, message):
    done = clbench(*words, code=2, fresh=True)
    assert done.stdout == ""
    assert done.stderr.startswith(f"clbench: {message}") and done.stderr.count("\n") == 1
    code = "import sys; from clbench.cli.main import answer; answer(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    if words[:2] != ["manifest", "write"]:
        again = subprocess.run([sys.executable, "-c", code, *words], env=clbench.env, cwd=clbench.folder, capture_output=True)
        assert again.returncode == 0, "torch was loaded"


def test_list_names_every_choice_without_torch(clbench):
    out = clbench("list").stdout
    for word in (
        "scenarios\n",
        "learners\n",
        "models\n",
        "schedules\n",
        "pets\n",
        "sweeps\n",
        "machines\n",
        "  slca ",
        "  cil_digits ",
    ):
        assert word in out
    assert "cil_digits" not in clbench("list", "learners").stdout


def test_scenarios_are_listed_by_family(clbench):
    """Every scenario once, below the heading of its family; a heading only where there is something below it."""
    first, *lines = clbench("list", "scenarios").stdout.splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("  "):
            found[list(found)[-1]].append(line.split()[0])
        else:
            found[line.strip()] = []
    assert first == "scenarios" and list(found) == list(families.FAMILIES[:-1]) and all(found.values())
    assert sorted(name for names in found.values() for name in names) == list(registry.choices("scenario"))
    assert found["your own data"] == ["cil_folder", "cil_npz", "dil_folder", "manifest"]
    assert found["few-shot"] == ["fscil_cifar100", "fscil_cub", "fscil_digits", "fscil_mini_imagenet"]
    assert {"mnist_360"} <= {*found["online and general"]} and {"permuted_mnist"} <= {*found["domain-incremental"]}
    for prefix, family in (("til_", "task-incremental"), ("ctta_", "test-time"), ("cpt_syn", "continual pre-training")):
        assert [name for name in registry.choices("scenario") if name.startswith(prefix)] == [
            name for name in found[family] if name.startswith(prefix)
        ]


def test_a_family_is_read_from_the_file(tmp_path):
    path, mine = tmp_path / "mine.yaml", "_target_: a.class_incremental\n"
    for text, family in {
        "_target_: mine.stream\n": "other",
        f"{mine}dataset: x\noperators: []  # e.g. [shots]\n": "class-incremental",
        f"{mine}operators:\n  - blur\n  # - shots\n  - single_pass\nname: x\n": "online and general",
        f"{mine}operators: [{{corrupt: {{to: copies}}}},\n  test_time]\n": "test-time",
        f"{mine}name: shots\nkwargs:\n  operators: [shots]\n": "class-incremental",
        "_target_: a.domain_incremental\ndataset: ???   # a path\n": "your own data",
    }.items():
        path.write_text("# Mine\n" + text)
        assert families.family(path) == family, text


DETAILS = """
import sys
from clbench.cli.main import answer
code = answer(["list", "learners"])
heavy = [name for name in ("torch", "hydra", "timm", "pandas") if name in sys.modules]
sys.exit(f"{heavy} loaded" if heavy else code)
"""


def test_list_learners_tells_paper_capabilities_and_bytes_without_torch(clbench):
    done = subprocess.run([sys.executable, "-c", DETAILS], env=clbench.env, cwd=clbench.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  ease "))
    assert lines[at + 1].strip() == "EASE: Expandable Subspace Ensemble (Zhou, Sun, Ye & Zhan, CVPR 2024, arXiv 2403.12030)."
    assert (
        lines[at + 2]
        .strip()
        .startswith(
            "needs_pretrained needs_new_classes needs_disjoint_classes needs_random_access; "
            "holds 3.2 kB a class + 331.3 kB an experience + "
        )
    )
    assert sum("; holds " in line for line in lines) == len(registry.choices("learner"))
    assert "(more with some options); holds" in done.stdout
    said = {line.split()[0] for line in lines if line.startswith("  ")}
    assert {field.name for field in fields(Capabilities)} <= said, "every word is explained"
    assert "needs_boundaries=False (more with some options); holds 1.3 kB a class + 0 B" in done.stdout


def test_capabilities_are_read_as_they_are_declared():
    for name, (path, *_) in registry.choices("learner").items():
        declared = registry.load_target(yaml.safe_load(path.read_text())["_target_"]).capabilities
        words = registry.details(path)[1].removesuffix("(more with some options)").split()
        said = {word.partition("=")[0]: ast.literal_eval(word.partition("=")[2] or "True") for word in words}
        assert replace(declared, trains=True) == Capabilities(**said), name  # `trains` is no need


LOOSE = '''
"""Mine (Me, HERE 2026).

More.
"""
class Mine:
    capabilities = Capabilities(needs_passes=2, stores_exemplars=True)
'''


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LOOSE, ("Mine (Me, HERE 2026).", "needs_passes=2 stores_exemplars")),
        ("class Mine: pass", ("", "")),
        ("Mine = 3", ("", "")),
        ("class :", ("", "")),
        (None, ("", "")),
    ],
)
def test_details_of_a_plug_in(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "loose_details.py").write_text(text)
    node = tmp_path / "mine.yaml"
    node.write_text(f"_target_: {tmp_path}/loose_details.py:Mine\n")
    assert registry.details(node) == expected
    assert registry.stored_text(None) == "-"


def test_bytes_held_are_measured():
    """Every learner has its row; the class means of ncm are worked by hand."""
    own = {n for n, (p, *_) in registry.choices("learner").items() if registry.origin(p) == "clbench"}
    assert set(registry.stored()) == {n for n in own if registry.asks("learner", n) == "predict"}
    assert registry.stored()["ncm"]["class"] == 8 * 160 + 8  # a sum in float64 and a count
    assert (
        registry.stored_text({"class": 640, "experience": 12800, "besides": -5})
        == "640 B a class + 12.8 kB an experience + 0 B"
    )
    assert registry.stored_text({"class": 64, "experience": -12, "besides": 5}) == "64 B a class + 0 B an experience + 5 B"


@pytest.mark.parametrize("learner", ["ncm", "slca", "ease"])
def test_bytes_held_are_as_committed(clbench, learner):
    done = clbench("check", "--measure", f"learner={learner}")
    assert json.loads(done.stdout) == {learner: registry.stored()[learner]}


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


def test_a_run_the_same_again_and_the_plan(clbench, small):
    words = ("learner=ncm", "results_dir=my results", *small)
    assert "step_macro" in clbench("run", *words).stdout
    assert "is done already" in clbench("run", *words).stdout
    assert len(clbench.records("my results")) == 1
    assert {p.name for p in clbench.folder.iterdir()} - {"cache"} == {"my results"}, "Hydra left folders behind"
    done = clbench("plan", "-m", *words, "learner=ncm,slca", "seed=0,x", "scenario.order=natural,nature", code=2)
    assert "2 jobs: 1 done, 1 new" in done.stdout and "nature" in done.stderr
    assert done.stderr.count("seed must be a whole number from 0, got 'x'") == 1


def test_a_single_run_that_fails_exits_1(clbench, small):
    done = clbench("run", "learner=finetune", "learner.lr=1e30", "scenario.budget.epochs=3", *small[:3], code=1)
    assert done.stderr.count("FloatingPointError: loss is ") == 1 and "holds the traceback" in done.stdout
    assert [r["status"] for r in clbench.records()] == ["failed"]


def test_a_sweep_is_told_line_by_line(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    note(log, {"status": "ok"})
    assert not log.exists(), "a job that ends after its sweep leaves nothing behind"
    log.touch()
    tail = Tail(log, 3)
    tail.start()
    note(log, {"status": "ok", "label": "seed=0", "seconds": 3.2, "text": "matrix\n\nstep_macro 0.9000\nrecord x"})
    note(log, {"status": "died", "label": "seed=1", "seconds": 0.6, "text": "left with exit code 7"})
    tail.stop()
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] ok          seed=0  3 s  step_macro 0.9000",
        "[2/3] died        seed=1  1 s  left with exit code 7",
    ]
    assert summary(tail.counts, 3, {"results_dir": "my results"}).splitlines() == [
        "3 jobs: 1 ok, 1 died, 1 not run",
        "clbench report --strict --results-dir 'my results' names them and exits 1",
    ]


def test_on_error_raise_ends_a_sweep_with_the_traceback(clbench, small):
    words = ("learner=finetune", "scenario.budget.epochs=3", "learner.lr=1e30", "on_error=raise", *small[:3])
    done = clbench("run", "-m", "seed=0,1", *words, code=1)
    assert "Traceback" in done.stderr and "2 jobs: 1 failed, 1 not run" in done.stdout


@pytest.mark.parametrize("words", [(), ("-m", "seed=0,1")])
def test_ctrl_c_exits_130_and_the_same_command_goes_on(clbench, small, words):
    many = ("learner=finetune", "scenario.budget.epochs=3000", "checkpoint_seconds=0.2", "num_threads=1", *small[:3], *words)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts a script's background jobs
    try:
        process = clbench.popen("run", *many, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not list(clbench.folder.glob("results/runs/*/journal/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):  # whatever it started ends with the test
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "clbench: stopped; the same command goes on where" in err
    assert "Traceback" not in err
    assert [r["status"] for r in clbench.records()] == ["running"]
    if words:
        assert "1 interrupted, 1 not run" in out
    else:
        assert "resumable" in clbench("plan", *many).stdout


def test_run_alone_says_how_a_child_ended():
    assert "forkserver" in multiprocessing.get_all_start_methods() or sys.platform == "win32"
    assert run_alone(dict, [("status", "ok"), ("text", "")]) == {"status": "ok", "text": "", "stopped": False}
    assert run_alone(os._exit, 3)["text"] == "left with exit code 3"
    assert run_alone(sys.exit, 3)["text"] == "called sys.exit(3)"
    assert run_alone(os.abort)["text"] == "killed by SIGABRT"
    assert run_alone(int, "x")["status"] == "failed"
    assert how_it_died(-9) == "killed by SIGKILL (out of memory?)"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("run learner=ncm", "GOMP_SPINCOUNT"),
        ("run -m learner=ncm,slca machine=local", "GOMP_SPINCOUNT"),
        ("run -m learner=ncm,slca machine=slurm", "GOMP_SPINCOUNT"),
        ("run -m learner=ncm,slca machine=joblib", "OMP_WAIT_POLICY"),
        ("run -m learner=ncm,slca machine=submitit_local_parallel", "OMP_WAIT_POLICY"),
        ("run -m learner=ncm,slca hydra/launcher=joblib", "OMP_WAIT_POLICY"),
        ("run -m learner=ncm,slca +hydra/launcher=mine", "OMP_WAIT_POLICY"),
        ("", "GOMP_SPINCOUNT"),
    ],
)
def test_openmp_spins_where_a_job_has_the_machine_to_itself(words, wanted):
    from clbench.cli.main import openmp_environment

    assert list(openmp_environment(words.split(), {})) == [wanted]
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "0"}):
        assert openmp_environment(words.split(), own) == {}
