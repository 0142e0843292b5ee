"""Rows of evaluators that clbench has no tables for: what can be said of them without knowing what they measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def check(entry: Mapping[str, Any]) -> Iterator[str]:
    """Rows that no table shows, and looks inside experiences: of experiences that there are, on samples that there are."""
    steps, sizes = entry["scenario"].get("num_experiences"), entry["n"]
    looks = [{"evaluator": "accuracy", "experience": look["experience"], "sums": look} for look in _trace(entry)]
    for row in [*entry.get("rows", ()), *looks]:
        where, sums = f"{row['evaluator']} of experience {row['experience']}", row["sums"]
        if steps is not None and row["experience"] >= steps:
            yield f"{where}: there are {steps} experiences"
        n = sums.get("n", sizes)
        if any(size is not None and not 0 <= size <= whole for size, whole in zip(n, sizes, strict=True)):
            yield f"{where}: n is {n}, the sets have {sizes} samples"
        for name, column in sums.items():
            counts = zip(column, n, strict=True) if name.startswith("correct") else ()
            if any(type(count) is int and (size is None or not 0 <= count <= size) for count, size in counts):
                yield f"{where}: {name} is {column}, of {n} samples"


def _trace(entry: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Evaluations inside experiences, where they have the form of looks."""
    stability = entry.get("stability")
    trace = stability.get("trace") if isinstance(stability, Mapping) and len(stability) == 1 else None
    return trace if isinstance(trace, list) and all(isinstance(look, Mapping) and "step" in look for look in trace) else ()
