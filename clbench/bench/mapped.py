"""Resident memory while sequences are read from all over a corpus much larger than it."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.tokens import sequences


def resident() -> int:
    """Resident bytes of this process now, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
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
