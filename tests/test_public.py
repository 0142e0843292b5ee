"""What is public: the names of `clbench`, loaded lazily; where modules of the first edition went; identities that stay."""

import ast
import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

import clbench as package
from clbench.cli import scaffold
from clbench.config import moved
from clbench.config.compose import build
from clbench.records import record

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ast.parse((ROOT / "clbench" / "__init__.py").read_text())


def typed_names():
    """Name -> module of the imports that type checkers see."""
    block = next(n for n in SOURCE.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    assert all(isinstance(node, ast.ImportFrom) for node in block.body)
    return {alias.name: node.module for node in block.body for alias in node.names}


@pytest.mark.parametrize("name", package.__all__)
def test_every_name_is_what_its_home_defines(name):
    value = getattr(package, name)
    home = f"clbench.{package._HOME[name]}"
    if isinstance(value, type(sys)):
        assert value is importlib.import_module(f"{home}.{name}")
    else:
        assert value is getattr(importlib.import_module(home), name)
        assert value.__module__.startswith(home), f"{name} is defined in {value.__module__}, not in {home}"


def test_type_checkers_see_the_same_names():
    typed = typed_names()
    assert sorted(typed) == sorted(package.__all__) == sorted(package._HOME)
    assert {name: module.removeprefix("clbench.") for name, module in typed.items()} == package._HOME
    assert list(package.__all__) == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))


def test_import_is_light():
    code = """
import sys, time
start = time.process_time()
import clbench
took = time.process_time() - start
heavy = {"torch", "numpy", "pandas", "hydra", "timm"} & set(sys.modules)
own = sorted(m for m in sys.modules if m.startswith("clbench."))
print(took, sorted(heavy), own)
sys.exit(bool(heavy) or took > 0.3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match=r"clbench has no public name 'Bakbone'; did you mean 'Backbone'\?"):
        _ = package.Bakbone  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"clbench has no public name 'qqq' \(it has Backbone, .*shuffled\)"):
        _ = package.qqq  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        exec("from clbench import no_such_name")


def exists(module):
    path = ROOT / "clbench" / pathlib.Path(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize(("old", "new"), (moved.MOVED | moved.JOINED).items())
def test_moved_modules_say_where(old, new):
    assert exists(new)
    if exists(old):  # a package of that name is here now: it answers for itself
        return
    with pytest.raises(ModuleNotFoundError, match=f"^clbench.{old} is now clbench.{new}; plug-ins import from clbench itself$"):
        importlib.import_module(f"clbench.{old}")
    assert moved.current(f"clbench.{old}.Thing") == f"clbench.{new}.Thing"


@pytest.mark.parametrize("old", sorted(moved.MOVED))
def test_names_go_there_and_back(old):
    target = f"clbench.{old}.thing"
    back = moved.first_edition(moved.current(target))
    assert moved.current(back) == moved.current(target) and back.removesuffix(".thing").removeprefix("clbench.") in moved.MOVED
    joined = ("schema", "faults", "report.rerun", "report.rerun_losses")  # two that became one; no target names what they hold
    assert back == target or old in joined
    assert moved.first_edition(target.replace("clbench.", "other.")) == target.replace("clbench.", "other.")


def test_a_module_that_never_was_fails_as_ever():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'clbench\.nothing'"):
        importlib.import_module("clbench.nothing")
    assert importlib.util.find_spec("clbench.run") is not None


def nodes(value):
    """Every mapping with a `_target_` in a configuration."""
    if isinstance(value, dict):
        found = [value] if "_target_" in value else []
        return found + [node for inner in value.values() for node in nodes(inner)]
    return [node for inner in value for node in nodes(inner)] if isinstance(value, list) else []


def test_targets_of_old_records_still_build():
    made = build({"_target_": "clbench.streams.texts.synthetic", "_partial_": True})
    from clbench.streams.tokens.texts import synthetic

    assert getattr(made, "func", made) is synthetic
    average = build({"_target_": "clbench.training.averages.Average", "_partial_": True})
    from clbench.training.pretraining.weight_averaging import Average

    assert getattr(average, "func", average) is Average


def test_every_target_of_the_committed_records_exists_and_their_ids_are_recomputed():
    targets, names = {}, set()
    for path in sorted((ROOT / "results").rglob("records/*.json")):
        found = json.loads(path.read_text())
        identity = [found["config"], found["scenario"].get("manifest_sha256") or "", found["model"].get("state_sha256") or ""]
        plugin, version = (found.get("learner") or {}).get("plugin"), found["numbers_version"]
        assert record.run_id(*identity, plugin, version) == found["run_id"] == path.stem, path
        for node in nodes(found["config"]):
            targets.setdefault(moved.current(node["_target_"]), path)
            names.add(node["_target_"])
    assert len(targets) > 20, "no records were read"
    for target, path in targets.items():
        module, _, name = target.rpartition(".")
        assert hasattr(importlib.import_module(module), name), f"{path}: {target}"
    assert any(moved.current(name) != name for name in names), "no record of the first edition is among them"


def imported(code):
    """Modules of clbench that a piece of Python imports, and the names that it takes from each."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "clbench":
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "clbench":
                    found.setdefault(alias.name, set())
    return found


IN_README = ("from clbench import check_learner, compose",)  # the form that is allowed


@pytest.mark.parametrize("kind", ["learner", "scenario"])
def test_what_new_writes_imports_from_clbench_alone(kind, tmp_path):
    scaffold.write(kind, "my_thing", tmp_path)
    found = imported((tmp_path / "my_thing" / "my_thing" / f"{kind}.py").read_text())
    assert found.keys() == {"clbench"} and found["clbench"] <= set(package.__all__)


def test_the_readme_imports_from_clbench_alone():
    """Lines of Python in any block, and in words: modules behind the public names are not shown to anybody."""
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"(?:from clbench[\w.]* import [\w, ]+|import clbench[\w.]*)", text)
    for line in (*lines, *IN_README):
        names = imported(line)
        assert names.keys() == {"clbench"} and names["clbench"] <= set(package.__all__), line
