"""From words to checked configurations: composition, sweeps, one-line errors, the signature check, building objects."""

import pathlib
import sys
import textwrap

import pytest

from clbench.config import compose
from clbench.config.registry import GROUPS, asks, check, choices, conf_dir, description
from clbench.config.signatures import problems, signature
from clbench.interfaces import Place, UserError


def wrong(*words, multirun=False):
    """The message that words are answered with."""
    with pytest.raises(UserError) as caught:
        for job in compose.compose(words, multirun):
            check(job)
    return str(caught.value)


def test_defaults_compose_and_pass():
    (job,) = compose.compose()
    check(job)
    assert job["names"] == {"scenario": "cil_digits", "learner": "slca", "model": "nano"}
    assert job["seed"] == 0 and job["device"] == "auto" and job["precision"] == "fp32" and job["num_threads"] == "auto"
    assert "hydra" not in job and "schedule" not in job


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learner=slac"], "no learner 'slac'; did you mean 'slca'? (one of: "),
        (["scenario=cil_digit"], "no scenario 'cil_digit'; did you mean 'cil_digits'? (one of: "),
        (["machine=lokal"], "no machine 'lokal'; did you mean 'local'? (one of: "),
        (["lerner=slca"], "no key 'lerner'; did you mean 'learner'?"),
        (["learner.slwo=1"], "no key 'learner.slwo'; did you mean 'learner.slow'?"),
        (["scenario.budget.epoch=1"], "no key 'scenario.budget.epoch'; did you mean 'scenario.budget.epochs'?"),
        (["sed=3"], "no key 'sed'; did you mean 'seed'?"),
        (["seed"], "'seed': write NAME=VALUE"),
        (["=3"], "'=3': write NAME=VALUE"),
        (["learner=3"], "no learner '3' (one of: "),
        (
            ["model=vit_tiny", "model.kwargs={img_size: 16}"],
            "'model.kwargs' takes no new parts at once: write +model.kwargs.NAME=VALUE for each",
        ),
        (["schedule=null"], "schedule=null has no effect: leave it out"),
        (["seed=0,1"], "seed=0,1 asks for several runs: add -m"),
        (["seed=abc"], "seed must be a whole number from 0, got 'abc'"),
        (["seed=-1"], "seed must be a whole number from 0, got -1"),
        (["device=gpu"], "device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        (["precision=fp16"], "precision must be fp32 or bf16, got 'fp16'"),
        (["num_threads=0"], "num_threads must be auto or a whole number from 1, got 0"),
        (["on_error=ignore"], "on_error must be record or raise, got 'ignore'"),
        (["learner.lr=fast"], "learner.lr must be float, got 'fast'"),
        (["learner.epochs=1.5"], "learner.epochs must be int or null, got 1.5"),
        (["learner.mean_rescale=1"], "learner.mean_rescale must be bool, got 1"),
        (
            ["learner=ncm", "learner.metric=cosin"],
            "learner.metric must be cosine or euclidean, got 'cosin'; did you mean 'cosine'?",
        ),
        (
            ["learner=ncm", "+learner.metrik=cosine"],
            "learner.metrik: NearestClassMean has no argument 'metrik'; did you mean 'metric'?",
        ),
        (["+learner.model=3"], "learner.model is given by clbench and cannot be set"),
        (["learner=ncm", "schedule=cosine"], "schedule=cosine has no effect: learner ncm has no schedule"),
        (["schedule=cosine", "schedule.warmup=yes_please"], "learner.schedule.warmup must be float, got 'yes_please'"),
        (["scenario=cil_npz"], "scenario.dataset needs a value: add scenario.dataset=..."),
        (["learner._target_=nowhere.Mine"], "learner: no module nowhere (from _target_=nowhere.Mine)"),
        (["learner._target_=clbench.learners.slca.Slcaa"], "learner: slca.py has no 'Slcaa'; did you mean 'Slca'?"),
        (["learner._target_=no/such.py:Mine"], "learner: no file no/such.py"),
    ],
)
def test_errors_are_one_line_with_the_nearest_name(words, message):
    text = wrong(*words)
    assert text.startswith(message) and "\n" not in text


def test_all_problems_of_a_configuration_together():
    assert wrong("device=gpu", "learner.lr=fast").splitlines() == [
        "device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'",
        "learner.lr must be float, got 'fast'",
    ]


def test_schedule_takes_the_place_of_the_learners_own():
    (job,) = compose.compose(["schedule=cosine", "schedule.warmup=0.1"])
    (own,) = compose.compose(["learner=finetune"])
    assert job["learner"]["schedule"] == {
        "_target_": "clbench.training.schedules.cosine",
        "_partial_": True,
        "warmup": 0.1,
        "end": 0.0,
    }
    assert own["learner"]["schedule"]["_target_"].endswith("constant")


def test_sweeps_are_expanded():
    jobs = compose.compose(["learner=ncm,slca", "seed=range(0,3)"], multirun=True)
    assert [(j["names"]["learner"], j["seed"]) for j in jobs] == [(n, s) for n in ("ncm", "slca") for s in range(3)]
    every = compose.compose(["learner=glob(*)"], multirun=True)
    assert {j["names"]["learner"] for j in every} == {n for n in choices("learner") if asks("learner", n) == "predict"}
    every = compose.compose(["learner=glob(*)", "scenario=cpt_synthetic"], multirun=True)
    assert {j["names"]["learner"] for j in every} == {n for n in choices("learner") if asks("learner", n) == "loss"}
    every = compose.compose(["learner=glob(*)", "scenario=edit_facts"], multirun=True)
    assert {j["names"]["learner"] for j in every} == {n for n in choices("learner") if asks("learner", n) == "logits"}
    assert len(compose.compose(["learner.lr=0.1,0.2", "learner.schedule.gamma=choice(0.1,0.5)"], multirun=True)) == 4


def test_a_sweep_in_a_file_needs_no_flag():
    found = compose.read(["sweep=default_table", "seed=0"])
    assert found.multirun and found.varying == ("learner",) and len(found.jobs) == 5
    assert len(compose.read(["sweep=default_table"]).jobs) == 15


def test_an_error_in_any_job_of_a_sweep():
    assert wrong("learner=ncm,slac", multirun=True).startswith("no learner 'slac'; did you mean 'slca'?")
    assert wrong("seed=0,x", multirun=True) == "seed must be a whole number from 0, got 'x'"


@pytest.mark.parametrize("machine", ["joblib", "submitit_local", "slurm", "ray"])
def test_machines_choose_launchers_and_nothing_of_the_job(machine):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    found = compose.read([f"machine={machine}"])
    (local,) = compose.compose()
    assert "BasicLauncher" not in found.launcher
    assert {k: v for k, v in found.jobs[0].items() if k != "num_threads"} == {
        k: v for k, v in local.items() if k != "num_threads"
    }


@pytest.mark.parametrize("folder", ["a folder", "a(b)/c d", "x=y/z", "über/é", "a,b/c"])
def test_paths_need_no_quotes(folder):
    (job,) = (
        compose.compose([f"results_dir=/tmp/{folder}"], multirun=False)
        if "," not in folder
        else compose.compose([f"results_dir='/tmp/{folder}'"])
    )
    assert job["results_dir"] == f"/tmp/{folder}"


@pytest.mark.parametrize("group", [g for g in GROUPS if g not in ("sweep", "machine")])
def test_every_file_of_a_group_is_described_and_fits_its_target(group):
    for name, (path, *_) in choices(group).items():
        assert len(description(path)) > 10, f"{path} opens without a line that says what it is"
        words = [f"{group}={name}", *(["learner=finetune"] if group in ("schedule", "pet") else [])]
        text = path.read_text()
        words += [
            f"{group}.{line.split(':')[0]}=x" for line in text.splitlines() if line.split("#")[0].rstrip().endswith("???")
        ]
        for job in compose.compose(words):
            check(job)


def test_sweep_files_say_what_they_show():
    for path, *_ in choices("sweep").values():
        text = path.read_text()
        assert "# Shows:" in text and "# Command:" in text
        part = ["shard=1/100"] if "\nsuite:" in text else []
        for job in compose.compose([f"sweep={path.stem}", *part]):
            check(job)


LOOSE = """
    from dataclasses import dataclass
    from typing import Literal, Optional

    from clbench.training.schedules import cosine as again

    Mode = Literal["slow", "fast"]

    class Mine:
        def __init__(self, model, runtime, lr: float = 0.1, mode: Mode = "slow", sizes: list[int] | None = None, *, n: int = 3):
            self.given = (model, runtime, lr, mode, sizes, n)

    class Child(Mine):
        pass

    @dataclass
    class Plain:
        width: int
        name: Optional[str] = None

    def anything(**options):
        return options
"""


@pytest.fixture
def loose(tmp_path, monkeypatch):
    (tmp_path / "loose_part.py").write_text(textwrap.dedent(LOOSE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("loose_part", None)


@pytest.mark.parametrize("target", ["loose_part.Mine", "loose_part.py:Mine", "{tmp}/loose_part.py:Mine", "loose_part.py:Child"])
def test_a_learner_in_a_loose_file(loose, target):
    target = target.format(tmp=loose)
    (job,) = compose.compose([f"learner._target_={target}", "learner.lr=3", "learner.mode=fast"])
    check(job)
    assert job["learner"] == {"_target_": target, "lr": 3, "mode": "fast"} and "learner" not in job["names"]
    assert compose.build(job["learner"], model="m", runtime="r").given == ("m", "r", 3, "fast", None, 3)
    assert compose.load_target(target).__name__ in ("Mine", "Child")
    assert wrong(f"learner._target_={target}", "learner.mode=fats").endswith("got 'fats'; did you mean 'fast'?")
    assert wrong(f"learner._target_={target}", "learner.ll=1").endswith("no argument 'll'; did you mean 'lr'?")
    assert "_file" not in str(compose.compose(["learner=glob(*)"], multirun=True))


def test_options_of_what_a_sweep_chooses():
    """`scenario.shift` is an option of the sweep's scenario, which the default scenario does not have."""
    found = compose.read(["sweep=cpt_synthetic_rates", "scenario.shift=0.3", "seed=0"])
    assert len(found.jobs) == 4 and all(job["scenario"]["shift"] == 0.3 for job in found.jobs)
    assert found.varying == ("learner.lr", "learner.schedule.warmup")
    found = compose.read(["sweep=cpt_text", "scenario.corpora=[a, b]", "scenario.name='a, b'", "learner.replay.share=0.5"])
    assert len(found.jobs) == 12 and {job["scenario"]["name"] for job in found.jobs} == {"a, b"}
    assert found.jobs[0]["scenario"]["corpora"] == ["a", "b"] and found.jobs[0]["learner"]["replay"]["share"] == 0.5
    assert wrong("sweep=cpt_synthetic_rates", "scenario.shft=0.3") == "no key 'scenario.shft'; did you mean 'scenario.shift'?"


def test_loose_targets_can_be_swept(loose):
    jobs = compose.compose(["learner._target_=loose_part.Mine,loose_part.Child", "learner.n=1,2"], multirun=True)
    assert [j["learner"]["n"] for j in jobs] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"_target_": "loose_part.Plain", "width": 3}, []),
        ({"_target_": "loose_part.Plain", "width": True}, ["x.width must be int, got True"]),
        ({"_target_": "loose_part.Plain"}, ["x.width is missing: Plain needs it"]),
        ({"_target_": "loose_part.Plain", "width": 3, "name": None}, []),
        ({"_target_": "loose_part.anything", "whatever": 1}, []),
        ({"_target_": "loose_part.again", "_partial_": True, "warmup": 0}, []),
        (
            {"_target_": "loose_part.again", "_partial_": True, "warmups": 0},
            ["x.warmups: cosine has no argument 'warmups'; did you mean 'warmup'?"],
        ),
        ({"_target_": "loose_part.Mine", "sizes": 3}, ["x.sizes must be list or null, got 3"]),
        ({"_target_": 3}, ["x._target_ must be a name, got 3"]),
    ],
)
def test_signatures_are_read_from_the_source(loose, node, expected):
    assert problems(node, "x", ("model", "runtime")) == expected
    assert "loose_part" not in sys.modules


def test_a_syntax_error_in_a_loose_file_names_the_line(loose):
    (loose / "broken.py").write_text("x = 1\nclass :\n")
    with pytest.raises(UserError, match=r"broken\.py, line 2: invalid syntax"):
        signature("broken.Mine")


def test_build_makes_nested_parts_and_partials():
    schedule = compose.build({"_target_": "clbench.training.schedules.multistep", "_partial_": True, "milestones": [0.5]})
    assert [schedule(Place(0, step, 4, step)) for step in range(4)] == [1.0, 1.0, 0.1, 0.1]


def test_conf_dir_is_beside_the_package():
    assert conf_dir() == pathlib.Path(__file__).resolve().parent.parent / "conf"
