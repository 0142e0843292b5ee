"""A record against a repeat of its first experiences: equal to the last count, or by how much not. Pure comparison.

On one machine with the versions, threads and flags of the record every count must be equal. Elsewhere the arithmetic may round
otherwise, and training carries that on; there a count may differ by at most `tolerance`, which a verdict states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clbench.records.verify import Verdict

Entry = Mapping[str, Any]
_TABLES = ("correct", "correct_masked", "correct_top5")
_VERSIONS = ("clbench", "python", "torch", "torchvision", "timm", "numpy", "pillow")
_FLAGS = ("num_threads", "matmul", "fused_attention", "class_token_tail", "deterministic")
_SINCE = {"class_token_tail": False}  # what records that are older than a flag ran under


SAME = 1e-9  # relative: sums of floats, in the same order
NEAR = 0.05  # relative: what training on another machine may move a sum of floats by


@dataclass(frozen=True)
class Difference:
    """One sum that came out differently; `error` is the standard error of a count and `allowed` the tolerance, in samples."""

    where: str
    said: float
    found: float
    n: int
    error: float
    allowed: float

    @property
    def size(self) -> float:
        """In samples."""
        return abs(self.said - self.found)


def tolerance(n: int, count: int) -> tuple[float, float]:
    """Standard error of a count of n samples (share by Laplace's rule), and what it may differ by: 3 of them, at least 2."""
    p = (count + 1) / (n + 2)
    error = math.sqrt(n * p * (1 - p))
    return error, max(2.0, 3 * error)


def compare(name: str, entry: Entry, again: Entry) -> Verdict:
    """The verdict on a record by the rows that `again`, a repeat of its first experiences, has."""
    steps = len(again["correct"])
    shape = [[c is None for c in row] for row in entry["correct"][:steps]] == [[c is None for c in r] for r in again["correct"]]
    if not shape or entry["n"] != again["n"]:
        return Verdict(name, "failed", ("a repeat evaluates other sets",))
    if (missing := missing_rows(entry, again, steps)) is not None:
        return Verdict(name, "failed", (missing,))
    cells = [*_cells(entry, again, steps), *row_cells(entry, again, steps)]
    found = [difference for difference in cells if difference.size]
    others = list(machine(entry, again))
    if not found:
        note = f"repeated {steps} experiences: all {len(cells)} counts are equal"
        return Verdict(name, "verified", (), (note + (f", although {listed(others)}" if others else ""),))
    most = max(found, key=lambda d: d.size)
    text = (
        f"repeated {steps} experiences: {len(found)} of {len(cells)} counts differ, {most.where} most: the record says "
        f"{most.said} of {most.n}, the repeat {most.found} (standard error {most.error:.1f})"
    )
    if not others:
        return Verdict(name, "failed", (f"{text}, on the same processor with the same versions and flags",))
    over = [d for d in found if d.size > d.allowed]
    rule = "3 standard errors, at least 2 samples"
    if over:
        worst = max(over, key=lambda d: d.size - d.allowed)
        why = f"{len(over)} beyond the tolerance ({rule}), such as {worst.where}: {worst.said}, repeated {worst.found}"
        return Verdict(name, "failed", (text, why), (listed(others),))
    return Verdict(name, "verified", (), (f"{text}; all within the tolerance ({rule})", listed(others)))


def listed(others: list[str]) -> str:
    """What differs, in words."""
    return f"the machine differs: {', '.join(others)}"


def _cells(entry: Entry, again: Entry, steps: int) -> Iterator[Difference]:
    """Every count that both have: over sets, by class, by head."""
    for i in range(steps):
        for j, n in enumerate(entry["n"]):
            if entry["correct"][i][j] is None:
                continue
            pairs = {key: (entry[key][i][j], again[key][i][j]) for key in _TABLES if isinstance(entry.get(key), list)}
            for name, table in (entry.get("heads") or {}).items():
                pairs[f"heads.{name}"] = (table[i][j], again["heads"][name][i][j])
            for key, (said, found) in pairs.items():
                yield _difference(f"{key}[{i}][{j}]", said, found, n)
            if isinstance(entry.get("class_correct"), list):
                counts = zip(entry["class_correct"][i][j], again["class_correct"][i][j], entry["class_n"][j], strict=True)
                for k, (said, found, size) in enumerate(counts):
                    yield _difference(f"class_correct[{i}][{j}][{k}]", said, found, size)


def _rows(entry: Entry) -> Iterator[Mapping[str, Any]]:
    """Rows that no table shows, and looks inside experiences."""
    yield from entry.get("rows") or ()
    for look in (entry.get("stability") or {}).get("trace") or ():
        sums = {name: look[name] for name in ("correct", "n") if name in look}
        yield {"evaluator": "accuracy", "experience": look["experience"], "step": look.get("step"), "sums": sums}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("evaluator", "experience", "step", "role"))


def missing_rows(entry: Entry, again: Entry, steps: int) -> str | None:
    """What a repeat of the first `steps` experiences should have and does not have of other evaluators' rows and of looks."""
    have = {_key(row): row["sums"] for row in _rows(again)}
    for row in _rows(entry):
        if row["experience"] < steps and (lost := row["sums"].keys() - have.get(_key(row), {}).keys() - {"n"}):
            return f"a repeat has no {min(lost)} of {row['evaluator']} for experience {row['experience']}"
    return None


def row_cells(entry: Entry, again: Entry, steps: int) -> Iterator[Difference]:
    """Every sum of other evaluators' rows and of looks: whole numbers as counts, others relative to themselves."""
    have = {_key(row): row["sums"] for row in _rows(again)}
    for row in _rows(entry):
        if row["experience"] >= steps:
            continue
        step = "" if row.get("step") is None else f" step {row['step']}"
        place, n = f"{row['evaluator']}[{row['experience']}]{step}", row["sums"].get("n", entry["n"])
        for name, column in row["sums"].items():
            for j, (said, found) in enumerate(zip(column, have[_key(row)].get(name, column), strict=True)):
                yield from _sums(f"{place}.{name}[{j}]", said, found, n[j] or 0)


def _sums(where: str, said: Any, found: Any, n: int) -> Iterator[Difference]:
    """One sum, or each number of one that is a list; a value on one side alone is never allowed."""
    if isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        for k, (a, b) in enumerate(zip(said, found, strict=True)):
            yield from _sums(f"{where}[{k}]", a, b, n)
    elif isinstance(said, int) and isinstance(found, int):
        inside = 0 <= found <= n and 0 <= said <= n
        yield _difference(where, said, found, n) if inside else Difference(where, said, found, n, 0.0, NEAR * abs(said))
    elif isinstance(said, int | float) and isinstance(found, int | float):
        same = abs(said - found) <= SAME * abs(said)
        yield Difference(where, said, said if same else found, n, 0.0, NEAR * abs(said))
    elif said is not None or found is not None:
        yield Difference(where, math.inf, 0.0, n, 0.0, 0.0)


def _difference(where: str, said: int, found: int, n: int) -> Difference:
    return Difference(where, said, found, n, *tolerance(n, found))


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
