"""Runs a job of a sweep in a child process: an exception, `sys.exit`, a signal or an out-of-memory kill ends that job alone.

The process that launches (the terminal's, a joblib worker, a submitit task) starts one child for each job, hands it a plain
dictionary and waits. How a job ended is one line in the sweep's log; the terminal's process shows the lines as they come.
Where the platform can, children are forked from a server that has imported torch once and has done nothing else.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from clbench.training import torchrun

GRACE = 60.0  # seconds that a stopped child has to write its snapshot


@dataclass(frozen=True)
class SubprocessJob:
    """What Hydra's launchers call with each configuration. Pickled to workers, so it holds plain values only.

    log       the sweep's log: one JSON line for each finished job
    paths     `sys.path` of the process the sweep was started from, for learners in loose files
    progress  show the child's progress bar: only where jobs run one after another
    leave_out a learner that does not fit its stream leaves no failed record
    """

    log: str
    command: list[str]
    paths: list[str]
    varying: tuple[str, ...] = ()
    progress: bool = False
    leave_out: bool = False

    def __call__(self, config: Any) -> None:
        """Run one job to its end and note how it ended. Raises KeyboardInterrupt when the user stopped it."""
        from clbench.config.compose import label, resolve_job

        sys.path[:] = list(dict.fromkeys([*sys.path, *self.paths]))
        start = time.perf_counter()
        shown = label(self.varying)
        plain = resolve_job(config)
        torchrun.from_launcher()
        ended = run_alone(_run, plain, self.command, self.progress, self.leave_out)
        ended |= {"label": shown, "seconds": time.perf_counter() - start}
        if torchrun.rank() == 0:
            note(Path(self.log), ended)
        if ended["stopped"]:
            raise KeyboardInterrupt
        if plain.get("on_error") == "raise" and ended["status"] in ("failed", "died"):
            sys.stderr.write(ended.get("traceback") or ended["text"] + "\n")
            raise SystemExit(1)


def note(path: Path, ended: dict[str, Any]) -> None:
    """Append one line; a single write, so that lines of parallel jobs do not mix. Nothing if the sweep is over."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return
    try:
        os.write(handle, (json.dumps(ended) + "\n").encode())
    finally:
        os.close(handle)


def context() -> Any:
    """The way children are started here: forked from a clean server where the platform has that, else spawned."""
    if "forkserver" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["clbench.run.runner"])
    return found


def run_alone(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call `work(*arguments)` (an importable function -> dictionary with `status` and `text`) in a child process.

    Returns its dictionary, or status "died" with how; `stopped` says whether this process was interrupted meanwhile. A
    first Ctrl-C asks the child to stop and waits for it, a second one asks again, after `GRACE` seconds it is killed.
    """
    ctx = context()
    ours, theirs = ctx.Pipe()
    child = ctx.Process(target=_child, args=(theirs, work, arguments))
    with _plain_start_method(ctx):
        child.start()
    theirs.close()
    ended, stopped, deadline = None, False, None
    while ended is None:
        try:
            if ours.poll(0.2 if deadline else 1.0):  # another thread may be given the signal: look again
                ended = ours.recv()
            elif deadline and time.monotonic() > deadline:
                child.kill()
                deadline = None
        except KeyboardInterrupt:
            stopped, deadline = True, deadline or time.monotonic() + GRACE
            with suppress(OSError):
                ours.send("stop")
        except (EOFError, OSError):
            break
    ours.close()
    child.join(GRACE if ended else None)
    if child.exitcode is None:
        child.kill()
        child.join()
    if ended is None:
        ended = {"run_id": "", "status": "died", "text": how_it_died(child.exitcode)}
    child.close()
    return ended | {"stopped": stopped}


@contextmanager
def _plain_start_method(ctx: Any) -> Iterator[None]:
    """Joblib's workers have a default start method of their own, which a child would be told and would not know."""
    own = multiprocessing.get_start_method(allow_none=True)
    if own is None or own in multiprocessing.get_all_start_methods():
        yield
        return
    multiprocessing.set_start_method(ctx.get_start_method(), force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(own, force=True)


def how_it_died(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"left with exit code {code}"


def _child(conn: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    """The child's side: out of reach of the terminal's Ctrl-C, stopped by a message or by the parent's death."""
    with suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    finished = threading.Event()
    threading.Thread(target=_listen, args=(conn, finished), daemon=True).start()
    try:
        ended = work(*arguments)
    except KeyboardInterrupt:
        ended = {"run_id": "", "status": "interrupted", "text": "stopped"}
    except SystemExit as error:
        ended = {"run_id": "", "status": "died", "text": f"called sys.exit({error.code!r})"}
    except Exception as error:  # a job must not take the sweep with it, whatever it raises
        text = "".join(traceback.format_exception(error))
        ended = {"run_id": "", "status": "failed", "text": f"{type(error).__name__}: {error}", "traceback": text}
    finished.set()
    with suppress(OSError):
        conn.send(ended)


def _listen(conn: Connection, finished: threading.Event) -> None:
    """Turn every message into SIGINT; when the parent is gone, one SIGINT and then the end. Nothing once the work is done."""
    asked = False
    try:
        while conn.recv() and not finished.is_set():
            asked = True
            os.kill(os.getpid(), signal.SIGINT)
    except (EOFError, OSError):
        if finished.is_set():
            return
        if not asked:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(GRACE)
        os._exit(1)


def _run(config: dict[str, Any], command: list[str], progress: bool, leave_out: bool) -> dict[str, Any]:
    """The job itself, in the child."""
    from clbench.interfaces import UserError
    from clbench.run import refused
    from clbench.run.runner import DoesNotFit, run_job

    show_log(progress)
    try:
        outcome = run_job(config, command=command, progress=progress)
    except UserError as error:
        if leave_out and isinstance(error, DoesNotFit):
            return {"run_id": "", "status": "left out", "text": str(error)}
        with suppress(UserError):
            refused.write(config, error)
        return {"run_id": "", "status": "failed", "text": str(error)}
    except Exception as error:  # before there was a record: of a scenario or an operator; later ones are in the record
        if config.get("on_error") != "raise":
            with suppress(UserError):
                refused.write(config, error)
        raise
    return {"run_id": outcome.run_id, "status": outcome.status, "text": outcome.text}


class TerminalHandler(logging.StreamHandler):
    """Log lines on stderr, each on a line of its own even where a progress bar stands."""

    def emit(self, record: logging.LogRecord) -> None:
        """Clear the bar's line first."""
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
        super().emit(record)


def show_log(shown: bool) -> None:
    """Send clbench's log to the terminal, or only to the job's own file."""
    log = logging.getLogger("clbench")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = TerminalHandler(sys.stderr) if shown else logging.NullHandler()
    handler.setLevel(logging.INFO)
    log.addHandler(handler)
