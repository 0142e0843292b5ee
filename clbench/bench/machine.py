"""Description of the machine, and peak memory and time of a piece of work. No host name, no user, no path."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pathlib
import platform
import resource
import sys
import time
from typing import Any

import torch

from clbench.run import provenance
from clbench.training import hardware


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Processor, cores, memory, GPU, versions; `load` is what else was running at the start, in processes."""
    found: dict[str, Any] = {
        "cpu": hardware.cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(_memory_total() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": provenance.versions(),
        "git": provenance.git_state()["revision"],
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _memory_total() -> int:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


class Peak:
    """Highest memory between `with` and its end: of the GPU, else resident memory of this process.

    `bytes` is None where the system cannot start counting anew (it can on Linux).
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            give_back()
        self._from_zero = self.device.type == "cuda" or _restart()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.bytes = int(torch.cuda.max_memory_allocated(self.device))
        elif self._from_zero:
            self.bytes = high_water()


def give_back() -> None:
    """Return free memory to the system, where the C library can."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def _restart() -> bool:
    """Have Linux count this process's peak anew."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return high_water() is not None


def high_water() -> int | None:
    """Peak of resident memory since the count began, in bytes."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


class Clock:
    """Seconds of the wall and of the processor. Where the second fall short of the first times the threads, others ran too."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _processor_seconds()

    def read(self) -> dict[str, float]:
        """{"wall": s, "cpu": s} since the start."""
        return {"wall": time.perf_counter() - self._wall, "cpu": _processor_seconds() - self._cpu}


def _processor_seconds() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime
