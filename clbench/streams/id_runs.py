"""Lists of ids and labels as text: runs, in their own order. Imports no torch."""

from __future__ import annotations

import re

import numpy as np

from clbench.interfaces import UserError

MAX_SAMPLES = 1 << 27  # a forged file must not be able to ask for more memory than this
_RUN = re.compile(r"(\d{1,12})(?:-(\d{1,12}))?")
_LABELS = re.compile(r"(\d{1,9})(?:\*(\d{1,12}))?")


def encode_ids(ids: np.ndarray) -> str:
    """Write ids [N] as ascending runs in their own order: [0, 1, 2, 7, 4] -> "0-2,7,4"."""
    ids = np.asarray(ids, dtype=np.int64)
    if len(ids) == 0:
        return ""
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    first, last = ids[np.r_[0, cuts]], ids[np.r_[cuts - 1, len(ids) - 1]]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first.tolist(), last.tolist(), strict=True))


def decode_ids(text: str, limit: int) -> np.ndarray:
    """Read what `encode_ids` wrote -> [N] int64, all below `limit`; anything else raises `UserError`."""
    runs, total = [], 0
    for part in text.split(",") if text else []:
        match = _RUN.fullmatch(part)
        if match is None:
            raise UserError(f"sample ids must look like '0-499,731', got {part[:40]!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        total += last - first + 1
        if last < first or last >= limit or total > limit:
            raise UserError(f"sample ids {part!r} do not fit a data set of {limit} samples")
        runs.append(np.arange(first, last + 1, dtype=np.int64))
    return np.concatenate(runs) if runs else np.zeros(0, np.int64)


def encode_labels(labels: np.ndarray) -> str:
    """Write labels [N] as runs: [3, 3, 7] -> "3*2,7"."""
    labels = np.asarray(labels, dtype=np.int64)
    if len(labels) == 0:
        return ""
    cuts = np.r_[0, np.flatnonzero(np.diff(labels)) + 1, len(labels)]
    runs = zip(labels[cuts[:-1]].tolist(), np.diff(cuts).tolist(), strict=True)
    return ",".join(str(label) if count == 1 else f"{label}*{count}" for label, count in runs)


def decode_labels(text: str, number: int) -> np.ndarray:
    """Read what `encode_labels` wrote -> [number] int64; anything else raises `UserError`."""
    values, counts = [], []
    for part in text.split(",") if text else []:
        match = _LABELS.fullmatch(part)
        if match is None:
            raise UserError(f"labels must look like '3*500,7', got {part[:40]!r}")
        values.append(int(match[1]))
        counts.append(int(match[2] or 1))
    if sum(counts) != number:
        raise UserError(f"there are {sum(counts)} labels for {number} samples")
    return np.repeat(np.array(values, np.int64), counts)
