"""Methods from outside: an installed package with an entry point, a loose file, and what `clbench new` writes."""

import pathlib
import textwrap

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


@pytest.mark.parametrize(
    ("kind", "target"), [("learner", "my_thing.learner.MyThing"), ("scenario", "my_thing.scenario.my_thing")]
)
def test_new_writes_what_runs_at_once(clbench, small, kind, target):
    out = clbench("new", kind, "my_thing", "--to", "my code").stdout
    project = clbench.folder / "my code" / "my_thing"
    assert "cd 'my code/my_thing'" in out and f"clbench run {kind}._target_={target}" in out
    assert len((project / "my_thing" / f"{kind}.py").read_text().splitlines()) <= 40
    assert 'my_thing = "my_thing"' in (project / "pyproject.toml").read_text()
    clbench.folder = project
    if kind == "learner":
        assert "step_macro" in clbench("run", f"learner._target_={target}", *small).stdout
    else:
        shown = clbench("manifest", "show", f"scenario._target_={target}", "scenario.increment=5").stdout
        assert shown.startswith("class_incremental, digits, sha256 ") and shown.count("evaluate exp") == 2


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
