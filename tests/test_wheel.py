"""The built wheel carries configurations and weights, and runs from another folder."""

import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

import clbench

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "clbench/py.typed",
        "clbench/models/nano.safetensors",
        "clbench/models/nano.json",
        "clbench/models/facts.safetensors",
        "clbench/models/base_text.safetensors",
    ):
        assert name in names
    assert "clbench/conf/run.yaml" in names
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"clbench/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    assert not any(name.startswith(("tests/", "results/")) for name in names)
    assert wheel.stat().st_size < 5_000_000


def test_the_source_archive_builds_the_same_wheel(wheel, tmp_path):
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run([*words, "--sdist", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert folder.name == f"clbench-{clbench.__version__}" and source.stat().st_size < 6_000_000
    done = subprocess.run([*words, "--wheel", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (again,) = tmp_path.glob("*.whl")
    a, b = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert again.name == wheel.name and sorted(a.namelist()) == sorted(b.namelist())
    assert all(a.read(name) == b.read(name) for name in a.namelist())


def test_runs_from_another_folder(wheel, tmp_path):
    """A fresh environment that sees the installed dependencies and this wheel, but not the checkout."""
    fresh = tmp_path / "a folder" / "env"
    subprocess.run([sys.executable, "-m", "venv", str(fresh)], check=True)
    python = fresh / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    here = subprocess.run([str(python), "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True)
    own = pathlib.Path(next(p for p in sys.path if p.endswith("site-packages")))
    pathlib.Path(here.stdout.strip(), "dependencies.pth").write_text(str(own) + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    work = tmp_path / "elsewhere"
    work.mkdir()
    words = [str(fresh / "bin" / "clbench"), "run", "learner=ncm", "scenario.num_classes=4", "scenario.limit_test=10"]
    where = subprocess.run(
        [str(python), "-c", "import clbench; print(clbench.__file__)"], capture_output=True, text=True, cwd=work, env=env
    )
    assert str(fresh) in where.stdout, where.stdout + where.stderr
    done = subprocess.run(words, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((work / "results" / "records").glob("*.json"))
