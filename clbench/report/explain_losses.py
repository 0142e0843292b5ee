"""`clbench report explain` of a pre-training record: its loss matrix, its numbers with their formulas, its stability gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from clbench.evaluation import loss_metrics
from clbench.records import loss_facts
from clbench.report.formats import Table, plain
from clbench.report.losses import ABOUT

SYMBOLS = (
    "r[i][j]: loss on set j after experience i; own(j): the experience that reads its domain first; old sets: own(j) "
    "before the last; trunk: the same before the rate was annealed"
)


def tables(entry: Mapping[str, Any], title: str) -> list[Table]:
    """`matrix`, `numbers`, `gaps`, `ledger` and `columns` of a finished record."""
    return [_matrix(entry, title), _numbers(entry), _gaps(entry), _ledger(entry), columns()]


def _matrix(entry: Mapping[str, Any], title: str) -> Table:
    names = tuple(plain(name) for name in entry["scenario"]["eval_names"])
    tokens, trunks = entry["tokens"], entry.get("sum_loss_trunk") or ()

    measure = "nats" if loss_facts.unit_of(entry) == "tokens" else "squared error"

    def line(label: str, values: Any, unit: str = measure) -> dict[str, Any]:
        found = [None if v is None else float(v) for v in values]
        known = [v for v in found if v is not None and math.isfinite(v)]
        mean = sum(known) / len(known) if len(known) == len(found) else None
        return {"after": label, "unit": unit, **dict(zip(names, found, strict=True)), "mean": mean}

    after = loss_metrics.loss_matrix(entry["sum_loss"], tokens)
    rows = [line("before", loss_metrics.loss_matrix([entry["sum_loss_start"]], tokens)[0])]
    for i, values in enumerate(after):
        if i < len(trunks) and trunks[i] is not None:
            rows.append(line(f"{i} trunk", loss_metrics.loss_matrix([trunks[i]], tokens)[0]))
        rows.append(line(str(i), values))
    if any(value is not None for value in entry["floor"]):
        rows.append(line("floor", entry["floor"]))
    bits = loss_metrics.bits_per_byte(after[-1], entry["bytes_per_token"])
    if np.isfinite(bits).any():
        rows.append(line(f"{len(after) - 1}", [v if np.isfinite(v) else None for v in bits], "bits per byte"))
    return Table("matrix", title, ("after", "unit", *names, "mean"), rows, (SYMBOLS,))


def _numbers(entry: Mapping[str, Any]) -> Table:
    found = loss_metrics.summary(entry)
    rows = [{"name": name, "value": found.get(name), "formula": text} for name, text in loss_metrics.ABOUT.items()]
    notes = (
        "-: not in this record alone: recovery_ratio and rate_share need other runs, a floor is known of synthetic languages",
    )
    return Table("numbers", "numbers of pre-training", ("name", "value", "formula"), rows, notes)


def _gaps(entry: Mapping[str, Any]) -> Table:
    """The stability gap of every old set in every later experience."""
    curves = entry.get("curves") or {"tokens": ()}
    names = entry["scenario"]["eval_names"]
    found = loss_metrics.gaps(curves, names, entry["first_seen"]) if curves["tokens"] else []
    known = ("experience", "set", "start", "depth", "peak_step", "area", "tokens")
    rows = [{**gap, "set": plain(gap["set"]), "area": round(gap["area"]), "tokens": _whole(gap["tokens"])} for gap in found]
    notes = ("depth: highest loss within the experience - loss at its start; tokens: until it is back, -: never",)
    return Table("gaps", "stability gaps", known, rows, notes)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _ledger(entry: Mapping[str, Any]) -> Table:
    rows = [{"tokens": name, "number": value} for name, value in entry["ledger"].items()]
    return Table("ledger", "ledger", ("tokens", "number"), rows, ("replay_bytes are bytes, flops operations",), {"number": 0})


def columns() -> Table:
    """The columns of `leaderboard_loss.csv`."""
    rows = [{"column": name, "meaning": text} for name, text in ABOUT.items()]
    return Table("loss columns", "columns of leaderboard_loss.csv, in their order", ("column", "meaning"), rows)
