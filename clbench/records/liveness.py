"""Whether the process of a run is still there, told without a lock: by what its record says of it, and by a heartbeat.

While a run lasts its record holds {"host", "pid", "started"}, and the file `alive` in the run's folder is touched every
`BEAT` seconds. On the same host the process is looked up; elsewhere the heartbeat's age decides. Where neither can be known,
the run counts as running. Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import platform
import sys
import threading
import time
from contextlib import suppress
from typing import Any

BEAT = 20.0  # seconds from one heartbeat to the next
STILL = 3600.0  # seconds without one after which a process that cannot be looked up is gone


@functools.cache
def host() -> str:
    """A hash that is the same for all processes that see each other's pids: this machine since it was started."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def this_process() -> dict[str, Any]:
    """How a record names the process that makes it; `started` tells it from a later one with its pid."""
    return {"host": host(), "pid": os.getpid(), "started": _started(os.getpid())}


def may_live(process: Any, folder: pathlib.Path) -> bool:
    """Whether a run may be at work: `process` is what its record says of it, `folder` the run's own. Takes no lock.

    A run removes its heartbeat when it leaves, so a folder without one is a run that has ended. Records of earlier versions
    name no process: there the heartbeat alone counts.
    """
    try:
        age = time.time() - (folder / "alive").stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        age = None
    except OSError:
        return True
    if not isinstance(process, dict):
        return age is not None and age < STILL
    if age is None and os.path.isdir(folder):
        return False
    pid = process.get("pid")
    if process.get("host") == host() and type(pid) is int and 0 < pid < 1 << 31:
        found = _is_there(pid, process.get("started"))
        if found is not None:
            return found
    return age is None or age < STILL


def _is_there(pid: int, started: Any) -> bool | None:
    """Whether this host has the process; None where the system does not tell."""
    if sys.platform == "win32":  # there os.kill ends it
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    now = _started(pid)
    return now != "" and (started is None or now is None or now == started)


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; "" for one that has ended and is not collected yet. Linux only."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


class Heartbeat:
    """Touches `folder`/alive from another thread while the `with` block lasts, then removes it."""

    def __init__(self, folder: pathlib.Path):
        self.path, self._over = folder / "alive", threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._over.wait(BEAT):
            self._beat()

    def _beat(self) -> None:
        with suppress(OSError):
            self.path.touch()
