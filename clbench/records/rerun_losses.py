"""A pre-training record against a repeat of its first experiences: every loss equal, or by how much not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from clbench.records import rerun
from clbench.records.verify import Verdict

Entry = Mapping[str, Any]
NEAR = 0.05  # nats per token that training on another machine may move a loss by


def compare(name: str, entry: Entry, again: Entry) -> Verdict:
    """The verdict on a record by the rows that `again` has."""
    steps = len(again["sum_loss"])
    if entry["n"] != again["n"]:
        return Verdict(name, "failed", ("a repeat evaluates other sets",))
    others = list(rerun.machine(entry, again))
    if (wrong := _rows(entry, again, steps, bool(others))) is not None:
        return Verdict(name, "failed", (wrong,))
    cells = list(_cells(entry, again, steps))
    found = [cell for cell in cells if abs(cell[1] - cell[2]) > rerun.SAME * abs(cell[1])]
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


def _rows(entry: Entry, again: Entry, steps: int, elsewhere: bool) -> str | None:
    """What is wrong with the rows of other evaluators; on another machine they may differ by their tolerance."""
    if (missing := rerun.missing_rows(entry, again, steps)) is not None:
        return missing
    cells = [d for d in rerun.row_cells(entry, again, steps) if d.size > (d.allowed if elsewhere else 0)]
    if not cells:
        return None
    most = max(cells, key=lambda d: d.size - d.allowed)
    return (
        f"{len(cells)} sums of other evaluators differ, {most.where} most: the record says {most.said}, the repeat {most.found}"
    )


def _cells(entry: Entry, again: Entry, steps: int) -> Iterator[tuple[str, float, float]]:
    """(place, said, found) in nats per token of every loss that both have."""
    rows = [("sum_loss_start", entry["sum_loss_start"], again["sum_loss_start"])]
    rows += [(f"sum_loss[{i}]", entry["sum_loss"][i], again["sum_loss"][i]) for i in range(steps)]
    trunks = zip(entry.get("sum_loss_trunk") or (), again.get("sum_loss_trunk") or (), strict=False)
    rows += [(f"sum_loss_trunk[{i}]", a, b) for i, (a, b) in enumerate(trunks) if a is not None and b is not None]
    for where, said, found in rows:
        for j, (a, b, n) in enumerate(zip(said, found, entry["n"], strict=True)):
            yield f"{where}[{j}]", a / n, b / n
