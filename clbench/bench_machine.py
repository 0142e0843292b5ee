"""What a bench says besides its numbers: the machine without its name, memory that stays flat, tables."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clbench.interfaces import UserError
from clbench.streams import sequences

PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}  # dense bf16 operations per second
TARGETS = {"pythia_410m": 145_000, "decoder_124m": 460_000}  # tokens per second on one H200: 40 % of its peak


def target(args: argparse.Namespace) -> int | None:
    """The tokens per second that were set for this model on one H200."""
    on_gpu = args.device.startswith("cuda") and "H200" in torch.cuda.get_device_name(args.device)
    return TARGETS.get(args.model) if on_gpu else None


def share_of_peak(flops_per_second: float, args: argparse.Namespace) -> float | None:
    """Operations per second over the device's dense bf16 peak; None where that is not known."""
    if not args.device.startswith("cuda") or args.precision != "bf16":
        return None
    name = torch.cuda.get_device_name(args.device)
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    return None if peak is None else round(flops_per_second / peak, 3)


def resident() -> int:
    """Resident bytes of this process now, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Read sequences from all over a corpus that lies on disk (a file with holes, which takes no room)."""
    if not Path("/proc/self/statm").exists():
        raise UserError("resident memory is read from /proc, which this system has not")
    count = int(args.corpus_gb * 1e9) // 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.tokens"
        with path.open("wb") as file:
            file.truncate(2 * count)
        tokens = np.memmap(path, "<u2", "r")
        whole, rng = sequences.count(len(tokens), args.context), np.random.default_rng(0)
        before, most, read = resident(), 0, 0
        start = time.perf_counter()
        while read < args.read_gb * 1e9:
            read += 2 * sequences.windows(tokens, rng.integers(0, whole, args.batch), args.context).size
            most = max(most, resident() - before)
        seconds = time.perf_counter() - start
        del tokens
    return [
        {
            "row": f"{args.corpus_gb:g} GB corpus, {read / 1e9:.2f} GB read",
            "tokens_per_second": round(read / 2 / seconds),
            "grown_mb": round(most / 1e6, 1),
        }
    ]


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What this ran on; no names of machines."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None
    found = {"cpu": cpu, "cores": usable, "threads": torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__}
    return found | {"python": platform.python_version(), "matmul": torch.get_float32_matmul_precision()}


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Rows of plain values in columns; what no row has is left out."""
    names = [name for name in rows[0] if name != "rounds" and any(row.get(name) is not None for row in rows)]
    cells = [names, *([("" if row[name] is None else str(row[name])) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return "\n".join(
        [title, *("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells), ""]
    )
