"""The name of the processor. Imports no torch."""

from __future__ import annotations

import functools
import pathlib
import platform


@functools.cache
def cpu() -> str:
    """The processor's own name where the system tells it, else its architecture: arithmetic may differ between two models."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(names[0].split()) if names and names[0] else platform.processor() or platform.machine()
