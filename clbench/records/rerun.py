"""A record against a repeat of its first experiences: equal to the last sum, or by how much not. Pure comparison.

On one machine with the versions, threads and flags of the record every sum must be equal, of every evaluator. Elsewhere the
arithmetic may round otherwise, and training carries that on; there a sum may differ by what `TOLERANCE` says, and so does the
verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clbench.records.loss_facts import measure_of
from clbench.records.rows import LOSSES, PLACE, rows_of
from clbench.records.verify import Verdict

Entry = Mapping[str, Any]
_VERSIONS = ("clbench", "python", "torch", "torchvision", "timm", "numpy", "pillow")
_FLAGS = ("num_threads", "matmul", "fused_attention", "class_token_tail", "channels_last", "deterministic")
_SINCE = {"class_token_tail": False, "channels_last": False}  # what records that are older than a flag ran under

SAME = 1e-9  # relative: sums of floats, in the same order
NEAR, NEAR_LOSS = 0.05, 0.05  # by what training on another machine may move a sum, relative, and a mean loss
TOLERANCE = {
    "counts": "3 standard errors, at least 2 samples",
    "losses": f"{NEAR_LOSS}",
    "sums": f"{NEAR:.0%} of the sum",
}


@dataclass(frozen=True)
class Cell:
    """One number of both; `kind` is a key of `TOLERANCE`, `allowed` what another machine may move it by, None no number."""

    kind: str
    where: str
    said: float | None
    found: float | None
    allowed: float
    unit: str = ""

    @property
    def size(self) -> float:
        """By how much they differ."""
        if self.said is None or self.found is None:
            return math.inf
        size = abs(self.said - self.found)
        return 0.0 if isinstance(self.said, float) and size <= SAME * abs(self.said) else size

    @property
    def share(self) -> float:
        """`size` of what is allowed."""
        return self.size / self.allowed if self.allowed else math.inf

    def text(self) -> str:
        """Where it is and what both say."""
        said, found = ("nothing" if v is None else f"{v:.10g}" for v in (self.said, self.found))
        return f"{self.where} most: the record says {said}{self.unit}, the repeat {found}"


def tolerance(n: int, count: int) -> tuple[float, float]:
    """Standard error of a count of n samples (share by Laplace's rule), and what it may differ by: 3 of them, at least 2."""
    p = (count + 1) / (n + 2)
    error = math.sqrt(n * p * (1 - p))
    return error, max(2.0, 3 * error)


def compare(name: str, entry: Entry, again: Entry) -> Verdict:
    """The verdict on a record by the rows that `again`, a repeat of its first experiences, has."""
    have = {_place(row): row["sums"] for row in _rows(again)}
    steps = 1 + max((experience for experience, *_ in have), default=-1)
    rows = [row for row in _rows(entry) if row["experience"] < steps]
    for row in rows:
        if lost := row["sums"].keys() - have.get(_place(row), {}).keys() - {"n"}:
            why = f"a repeat has no {min(lost)} of {row['evaluator']} for experience {row['experience']}"
            return Verdict(name, "failed", (why,))
    pairs = [(row, have.get(_place(row), {})) for row in rows]
    sizes = [(row["sums"].get("n"), sums.get("n")) for row, sums in pairs]
    if entry["n"] != again["n"] or not rows or any(a != b for a, b in sizes if a and b):
        return Verdict(name, "failed", ("a repeat evaluates other sets",))
    return _verdict(name, steps, [cell for pair in pairs for cell in cells(entry, *pair)], list(machine(entry, again)))


def _verdict(name: str, steps: int, made: Sequence[Cell], others: list[str]) -> Verdict:
    """`others` is what differs between the machines: where nothing does, nothing may differ."""
    kinds, found = " and ".join(dict.fromkeys(cell.kind for cell in made)), [cell for cell in made if cell.size]
    listed = f"the machine differs: {', '.join(others)}"
    if not found:
        note = f"repeated {steps} experiences: all {len(made)} {kinds} are equal"
        return Verdict(name, "verified", (), (note + (f", although {listed}" if others else ""),))
    most = max(found, key=lambda cell: cell.share)
    text = f"repeated {steps} experiences: {len(found)} of {len(made)} {kinds} differ, {most.text()}"
    if not others:
        return Verdict(name, "failed", (f"{text}, on the same processor with the same versions and flags",))
    rule = f"the tolerance ({'; '.join(TOLERANCE[kind] for kind in dict.fromkeys(cell.kind for cell in found))})"
    if over := sum(cell.share > 1 for cell in found):
        return Verdict(name, "failed", (text, f"{over} beyond {rule}"), (listed,))
    return Verdict(name, "verified", (), (f"{text}; all within {rule}", listed))


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in PLACE)


def _rows(entry: Entry) -> Iterator[Mapping[str, Any]]:
    """Every row with the sums that are compared: not confusions, which refine counts, and not curves, of few samples each."""
    for row in rows_of(entry).get("rows", ()):
        is_look = row["evaluator"] in LOSSES and row["step"] is not None
        left_out = ("loss", "correct") if is_look else ("task_confusion",)
        yield row | {"sums": {name: column for name, column in row["sums"].items() if name not in left_out}}


def cells(entry: Entry, row: Mapping[str, Any], sums: Mapping[str, Any]) -> Iterator[Cell]:
    """Every number of a row of `entry` against the sums of the repeat's."""
    evaluator, step, role = row["evaluator"], row["step"], row.get("role")
    where = f"{evaluator}[{row['experience']}]" + (f" {role}" if role else "") + ("" if step is None else f" step {step}")
    n, sizes = row["sums"].get("n", entry["n"]), entry.get("class_n")
    for name, column in row["sums"].items():
        for j, (said, found) in enumerate(zip(column, sums[name], strict=True) if name != "n" else ()):
            place, size = f"{where}.{name}[{j}]", n[j] or 0
            if evaluator in LOSSES and name == "loss" and size and said is not None and found is not None:
                yield Cell("losses", place, said / size, found / size, NEAR_LOSS, f" {measure_of(entry)}")
            elif name == "class_correct" and sizes and said is not None and found is not None:
                for k, (a, b, size) in enumerate(zip(said, found, sizes[j], strict=True)):
                    yield from _numbers(f"{place}[{k}]", a, b, size)
            else:
                yield from _numbers(place, said, found, size)


def _numbers(where: str, said: Any, found: Any, n: int) -> Iterator[Cell]:
    """One sum, or each number of one that is a list; a value on one side alone is never allowed."""
    if isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        for k, (a, b) in enumerate(zip(said, found, strict=True)):
            yield from _numbers(f"{where}[{k}]", a, b, n)
    elif isinstance(said, int) and isinstance(found, int) and 0 <= min(said, found) and max(said, found) <= n:
        yield Cell("counts", where, said, found, tolerance(n, found)[1], f" of {n}")
    elif isinstance(said, int | float) and isinstance(found, int | float):
        yield Cell("sums", where, said, found, NEAR * abs(said))
    elif said is not None or found is not None:
        said, found = (v if isinstance(v, int | float) else None for v in (said, found))
        yield Cell("sums", where, said, found, 0.0)


def machine(entry: Entry, again: Entry) -> Iterator[str]:
    """What differs between the machines of two records that may move counts; a record that does not say counts as different."""
    mine, other = again["machine"], entry.get("machine") or {}
    kinds = [str(m.get("device", "?")).split(":")[0] for m in (other, mine)]
    parts = {"device": kinds, "processor": [other.get("cpu"), mine.get("cpu")]}
    parts |= {key: [(m.get("flags") or {}).get(key, _SINCE.get(key)) for m in (other, mine)] for key in _FLAGS}
    parts |= {key: [(r.get("versions") or {}).get(key) for r in (entry, again)] for key in _VERSIONS}
    for name, (then, now) in parts.items():
        if then != now:
            yield f"{name} {'unknown' if then is None else then} then, {now} now"
