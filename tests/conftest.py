"""Shared pieces of the tests: the command line as a person types it, and where real data is."""

import atexit
import json
import os
import pathlib
import select
import socket
import subprocess
import sys
import tempfile
from collections import Counter

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests run side by side; read when torch is imported
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # Each of the test processes has processors of its own: torch's threads of two processes that share them wait in turns.
    own = sorted(os.sched_getaffinity(0))[int(worker[2:]) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, own or os.sched_getaffinity(0))
SCRATCH = tempfile.TemporaryDirectory(prefix="clbench-tests-")
atexit.register(SCRATCH.cleanup)
os.environ["CLBENCH_CACHE"] = SCRATCH.name  # no test leaves features in the user's cache
ROOT = pathlib.Path(__file__).resolve().parent.parent
# Tests measure no arithmetic: they pin it, on processors with matrix units to the path that is exact there too.
CPUINFO = pathlib.Path("/proc/cpuinfo")
EXACT = "highest" if CPUINFO.exists() and "amx_bf16" in CPUINFO.read_text(errors="replace") else "medium"
os.environ["CLBENCH_ARITHMETIC"] = f"{EXACT}+explicit"
DATA = os.environ.get("CLBENCH_DATA", "")
# The contract holds for any network, so it is tried on a narrow one.
NARROW = ["model=nano_random", "model.kwargs.embed_dim=32", "model.kwargs.num_heads=2"]


def pytest_collection_modifyitems(items):
    """Tests marked `data` need the unpacked files under CLBENCH_DATA."""
    for item in items:
        for marker in item.iter_markers("data"):
            missing = [name for name in marker.args if not DATA or not (pathlib.Path(DATA) / name).exists()]
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"set CLBENCH_DATA to a folder with {', '.join(missing)}"))


class Warm:
    """The process of warm.py, started when it is first needed."""

    process = None

    def run(self, jobs: list[dict], timeout: float) -> list[int]:
        """The exit statuses of command lines that run side by side; a negative one is a signal."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "warm.py")],
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self.process.stdout.readline() == "ready\n"
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.stop()
            raise TimeoutError(f"{jobs[0]['argv']} took more than {timeout} s")
        return json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="session")
def warm():
    server = Warm()
    yield server
    server.stop()


class CommandLine:
    """`clbench WORDS` as a process of its own, from a folder of its own.

    Called, it is forked from a process with the heavy imports done; `fresh=True`, sweeps and `popen` start Python anew.
    """

    def __init__(self, folder: pathlib.Path, warm: Warm):
        self.folder, self.warm = folder, warm
        self.env = {
            **os.environ,
            "CLBENCH_CACHE": str(folder / "cache"),
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

    def __call__(self, *words: str, code: int | None = 0, timeout: float = 300, fresh: bool = False):
        if fresh or "-m" in words:
            process = self.popen(*words)
            out, err = process.communicate(timeout=timeout)
            ended = process.returncode
        else:
            with tempfile.TemporaryDirectory() as scratch:
                files = [pathlib.Path(scratch) / name for name in ("out", "err")]
                job = {"argv": words, "cwd": str(self.folder), "env": self.env, "out": str(files[0]), "err": str(files[1])}
                (ended,) = self.warm.run([job], timeout)
                out, err = (path.read_text() for path in files)
        if code is not None:
            assert ended == code, f"exit {ended}\n--- stdout\n{out}\n--- stderr\n{err}"
        return subprocess.CompletedProcess(words, ended, out, err)

    def together(self, number: int, *words: str, timeout: float = 120, **env: str):
        """One run in several processes -> (exit status, stdout, stderr) of each."""
        with socket.socket() as free, tempfile.TemporaryDirectory() as scratch:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
            shared = {
                "WORLD_SIZE": str(number),
                "LOCAL_WORLD_SIZE": str(number),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            jobs = []
            for rank in range(number):
                place = {**self.env, **env, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                files = {name: f"{scratch}/{name}{rank}" for name in ("out", "err")}
                jobs.append({"argv": words, "cwd": str(self.folder), "env": place, **files})
            free.close()
            codes = self.warm.run(jobs, timeout)
            texts = [[pathlib.Path(job[name]).read_text() for name in ("out", "err")] for job in jobs]
        return [(code, *text) for code, text in zip(codes, texts, strict=True)]

    def records(self, results: str = "results") -> list[dict]:
        """All records as `record.read` gives them, sorted by file name."""
        from clbench.records import record

        return [record.read(p) for p in sorted((self.folder / results / "records").glob("*.json"))]


@pytest.fixture
def clbench(tmp_path, warm):
    return CommandLine(tmp_path, warm)


SMALL = ("scenario.num_classes=4", "scenario.limit_train=20", "scenario.limit_test=10", "scenario.budget.epochs=1")


@pytest.fixture
def small():
    """Overrides that make the default stream a matter of a second: two experiences of two classes."""
    return SMALL


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")


def pytest_terminal_summary(terminalreporter):
    """How golden numbers were compared."""
    done = [report for name in ("passed", "failed") for report in terminalreporter.getreports(name)]
    ways = Counter(str(value) for report in done for name, value in report.user_properties if name == "golden")
    for way, number in ways.items():
        terminalreporter.write_line(f"golden numbers of {number} runs compared {way}")
