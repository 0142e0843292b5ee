"""Methods from outside: an installed package with an entry point, a loose file, and what `clbench new` writes."""

import pathlib
import shlex
import textwrap
import tomllib

import pytest

LEARNER = """
    # deliberately heavy: naming it must not import it
    import torch

    from clbench.learners.ncm import NearestClassMean


    class Outside(NearestClassMean):
        def __init__(self, model, runtime, *, metric: str = "cosine", strength: int = 1):
            super().__init__(model, runtime, metric=metric)
"""


def install(folder: pathlib.Path, package: str, *, group: str = "learner", name: str = "outside", code: str = LEARNER):
    """What pip leaves behind for a package with one entry point: the package and its dist-info."""
    site = folder / "site packages"
    (site / package / "conf" / group).mkdir(parents=True)
    (site / package / "__init__.py").write_text("import torch\n")
    (site / package / "method.py").write_text(textwrap.dedent(code))
    yaml = f"# A method from elsewhere\n_target_: {package}.method.Outside\nmetric: cosine\n"
    (site / package / "conf" / group / f"{name}.yaml").write_text(yaml)
    info = site / f"{package}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[clbench.plugins]\n{package} = {package}\n")
    (info / "RECORD").write_text(f"{package}/__init__.py,,\n{package}/method.py,,\n")
    return site


@pytest.fixture
def outside(clbench, tmp_path):
    site = install(tmp_path, "outside_pkg")
    clbench.env["PYTHONPATH"] += f":{site}"
    return clbench


def test_listed_suggested_and_composed_without_import(outside):
    assert "outside            A method from elsewhere  [outside_pkg]" in outside("list", "learners").stdout
    err = outside("run", "learner=outsid", code=2).stderr
    assert err.startswith("clbench: no learner 'outsid'; did you mean 'outside'? (one of: ") and "slca" in err
    shown = outside("run", "--cfg", "job", "learner=outside", "learner.strength=2").stdout
    assert "_target_: outside_pkg.method.Outside" in shown and "strength: 2" in shown
    err = outside("run", "learner=outside", "learner.strength=high", code=2).stderr
    assert err == "clbench: learner.strength must be int, got 'high'\n"


@pytest.mark.parametrize("machine", ["local", "joblib"])
def test_runs_in_a_sweep(outside, small, machine):
    if machine == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    out = outside("run", "-m", f"machine={machine}", "learner=outside", "seed=1,2", *small).stdout
    assert "2 jobs: 2 ok" in out
    assert {r["learner"]["name"] for r in outside.records()} == {"outside"} and len(outside.records()) == 2
    assert all(r["learner"]["plugin"].startswith("outside_pkg 1.2") for r in outside.records())


def test_a_package_without_conf_is_left_out_with_a_warning(outside, tmp_path):
    info = tmp_path / "site packages" / "ghost-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ghost\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[clbench.plugins]\nghost = ghost\n")
    done = outside("list", "learners")
    assert "outside" in done.stdout and done.stderr == "plug-in ghost: package ghost has no conf folder; it is left out\n"


def test_a_name_that_is_taken_is_refused_when_chosen(clbench, tmp_path):
    clbench.env["PYTHONPATH"] += f":{install(tmp_path, 'taken_pkg', name='ncm')}"
    err = clbench("run", "learner=ncm", code=2).stderr
    assert err.startswith("clbench: learner 'ncm' is defined twice: ")


def test_a_loose_file_in_this_folder(clbench, small):
    (clbench.folder / "loose.py").write_text(textwrap.dedent(LEARNER))
    clbench("run", "learner._target_=loose.Outside", "learner.strength=2", *small)
    out = clbench("run", "-m", "learner._target_=loose.py:Outside", "learner.strength=3,4", *small).stdout
    assert "2 jobs: 2 ok" in out
    assert {r["learner"]["name"] for r in clbench.records()} == {"Outside"} and len(clbench.records()) == 3


@pytest.mark.parametrize("kind", ["learner", "scenario", "operator", "evaluator"])
def test_new_writes_what_runs_at_once(clbench, small, kind):
    out = clbench("new", kind, "my_thing", "--to", "my code").stdout
    project = clbench.folder / "my code" / "my_thing"
    assert "cd 'my code/my_thing'" in out
    (at_once,) = (shlex.split(line) for line in out.splitlines() if line.startswith("  clbench run") and "my_thing." in line)
    code = (project / "my_thing" / f"{kind}.py").read_text()
    assert len(code.splitlines()) <= 40 and all("clbench." not in line for line in code.splitlines() if "import" in line)
    group = "plugins" if kind in ("learner", "scenario") else f"{kind}s"
    assert f'[project.entry-points."clbench.{group}"]\nmy_thing = "my_thing' in (project / "pyproject.toml").read_text()
    clbench.folder = project
    assert "step_macro" in clbench(*at_once[1:], *(small if kind != "scenario" else ("learner=ncm",))).stdout
    (entry,) = clbench.records()
    if kind == "scenario":
        assert entry["scenario"]["kind"] == "class_incremental" and len(entry["scenario"]["experiences"]) == 5
    if kind == "evaluator":
        assert [row["evaluator"] for row in entry["rows"]] == ["my_thing"] * len(entry["correct"])


def installed(clbench, kind: str, name: str) -> str:
    """What `clbench new` writes, as pip would install it -> the folder to be found on the path."""
    clbench("new", kind, name)
    project = clbench.folder / name
    config = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    info = project / f"{name}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {config['version']}\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in entries.items())
        for group, entries in config["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}/{kind}.py,,\n")
    return str(project)


def test_four_parts_of_packages_outside_pass_check_and_run_under_joblib(clbench):
    """A learner, a scenario, an operator and an evaluator, none of clbench, in one run."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    folders = [installed(clbench, kind, f"my_{kind}") for kind in ("learner", "scenario", "operator", "evaluator")]
    clbench.env["PYTHONPATH"] += "".join(f":{folder}" for folder in folders)
    operators = "scenario.operators=[{my_operator:{every:3}},{evaluators:{names:[my_evaluator]}}]"
    chosen = ("learner=my_learner", "scenario=my_scenario", "scenario.epochs=1", "scenario.increment=5", operators)
    out = clbench("check", *chosen).stdout
    assert "FAILED" not in out and out.count("ok    ") > 15
    shown = clbench("manifest", "show", *chosen).stdout
    assert '{"my_operator": {"every": 3}}' in shown
    out = clbench("run", "-m", "machine=joblib", "seed=0,1", *chosen).stdout
    assert "2 jobs: 2 ok" in out
    for entry in clbench.records():
        assert [row["evaluator"] for row in entry["rows"]] == ["my_evaluator"] * 2
        assert entry["config"]["scenario"]["operators"][0] == {"my_operator": {"every": 3}}
        assert entry["learner"]["plugin"].startswith("my_learner 0.1.0")
        assert entry["scenario"]["experiences"][0]["num_train"] < 300, "a third of five classes"
    table = (clbench.folder / "results" / "leaderboard.csv").read_text().splitlines()[0] if clbench("report").stdout else ""
    assert "my_evaluator/hits_mean" in table
    assert "2 records: 2 verified" in clbench("verify", "results").stdout


def test_new_refuses(clbench):
    clbench("new", "learner", "mine")
    assert clbench("new", "learner", "mine", code=2).stderr == "clbench: mine exists already; nothing was written\n"
    for name, message in [
        ("My-Method", "'My-Method' is no Python name in lower case; did you mean 'my_method'?"),
        ("class", "'class' is no Python name in lower case"),
        ("slca", "there is a learner 'slca' already; choose another name"),
        ("torch", "there is a Python package 'torch' already; choose another name"),
    ]:
        assert clbench("new", "learner", name, code=2).stderr == f"clbench: {message}\n"
    assert sorted(p.name for p in clbench.folder.iterdir()) == ["mine"]
