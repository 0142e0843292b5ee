"""Shared pieces of the tests: the command line as a person types it, and where real data is."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = os.environ.get("CLBENCH_DATA", "")


def pytest_collection_modifyitems(items):
    """Tests marked `data` need the unpacked files under CLBENCH_DATA."""
    for item in items:
        for marker in item.iter_markers("data"):
            missing = [name for name in marker.args if not DATA or not (pathlib.Path(DATA) / name).exists()]
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"set CLBENCH_DATA to a folder with {', '.join(missing)}"))


class CommandLine:
    """`clbench WORDS` as a process of its own, from a folder of its own."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }

    def popen(self, *words: str, **options):
        return subprocess.Popen(
            [sys.executable, "-m", "clbench", *words],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def __call__(self, *words: str, code: int | None = 0, timeout: float = 300):
        process = self.popen(*words)
        out, err = process.communicate(timeout=timeout)
        if code is not None:
            assert process.returncode == code, f"exit {process.returncode}\n--- stdout\n{out}\n--- stderr\n{err}"
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def records(self, results: str = "results") -> list[dict]:
        """All records, sorted by file name."""
        return [json.loads(p.read_text()) for p in sorted((self.folder / results / "records").glob("*.json"))]


@pytest.fixture
def clbench(tmp_path):
    return CommandLine(tmp_path)


SMALL = ("scenario.num_classes=4", "scenario.limit_train=20", "scenario.limit_test=10", "scenario.budget.epochs=1")


@pytest.fixture
def small():
    """Overrides that make the default stream a matter of a second: two experiences of two classes."""
    return SMALL


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")
