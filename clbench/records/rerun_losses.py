"""A pre-training record against a repeat of its first experiences: every loss equal, or by how much not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from clbench.records import rerun
from clbench.records.verify import Verdict

Entry = Mapping[str, Any]
SAME = 1e-9  # relative: sums of floats, in the same order
NEAR = 0.05  # nats per token that training on another machine may move a loss by


def compare(name: str, entry: Entry, again: Entry) -> Verdict:
    """The verdict on a record by the rows that `again` has."""
    steps = len(again["sum_loss"])
    if entry["n"] != again["n"]:
        return Verdict(name, "failed", ("a repeat evaluates other sets",))
    cells = list(_cells(entry, again, steps))
    found = [cell for cell in cells if abs(cell[1] - cell[2]) > SAME * abs(cell[1])]
    others = list(rerun.machine(entry, again))
    if not found:
        note = f"repeated {steps} experiences: all {len(cells)} losses are equal"
        return Verdict(name, "verified", (), (note + (f", although {rerun.listed(others)}" if others else ""),))
    where, said, got = max(found, key=lambda cell: abs(cell[1] - cell[2]))
    text = f"repeated {steps} experiences: {len(found)} of {len(cells)} losses differ, {where} most: the record says"
    text += f" {said:.4f} nats per token, the repeat {got:.4f}"
    if not others:
        return Verdict(name, "failed", (f"{text}, on the same processor with the same versions and flags",))
    if abs(said - got) > NEAR:
        return Verdict(name, "failed", (f"{text}: beyond the tolerance of {NEAR}",), (rerun.listed(others),))
    return Verdict(name, "verified", (), (f"{text}; within the tolerance of {NEAR}", rerun.listed(others)))


def _cells(entry: Entry, again: Entry, steps: int) -> Iterator[tuple[str, float, float]]:
    """(place, said, found) in nats per token of every loss that both have."""
    rows = [("sum_loss_start", entry["sum_loss_start"], again["sum_loss_start"])]
    rows += [(f"sum_loss[{i}]", entry["sum_loss"][i], again["sum_loss"][i]) for i in range(steps)]
    trunks = zip(entry.get("sum_loss_trunk") or (), again.get("sum_loss_trunk") or (), strict=False)
    rows += [(f"sum_loss_trunk[{i}]", a, b) for i, (a, b) in enumerate(trunks) if a is not None and b is not None]
    for where, said, found in rows:
        for j, (a, b, n) in enumerate(zip(said, found, entry["n"], strict=True)):
            yield f"{where}[{j}]", a / n, b / n
