"""`clbench report explain`: every number that tables have, its formula, what others call it, and its value in one record.

Made from `metrics.FORMULAS`, `metrics.DETAILS` and `peer_metrics.PEERS`: the values are what the functions return. Which
formula of clbench a peer's number is, is found by trying both on random matrices: it cannot say what the code does not do.
"""

from __future__ import annotations

import functools
import inspect
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clbench.config.signatures import nearest
from clbench.evaluation import edit_metrics, loss_metrics, metrics, peer_metrics, row_metrics, setting_metrics
from clbench.interfaces import UserError
from clbench.records import loss_facts, record
from clbench.report.columns import ACCURACY, EDITS, LOSS, Leaderboard
from clbench.report.formats import Table, plain
from clbench.report.runs import summarize

EXAMPLE = ((80, 90, 10, 5), (85, 70, 15, 8), (75, 72, 60, 20), (60, 65, 75, 80))
SIZES = (400, 100, 100, 100)
UNTRAINED = 10.0
SYMBOLS = (
    "a[i][j]: accuracy on set j after experience i, i and j from 0; n[j]: samples of set j; T experiences; own(j): the "
    "experience of set j; old sets: own(j) < T-1; macro: every set weighs the same, micro: every sample does"
)

LOSS_SYMBOLS = (
    "r[i][j]: loss on set j after experience i; own(j): the experience that reads its domain first; old sets: own(j) "
    "before the last; trunk: the same before the rate was annealed"
)


@dataclass(frozen=True)
class Case:
    """A matrix in per cent [T, E] with NaN, sizes [E], experiences of the sets [E], and the record that it came from."""

    title: str
    a: np.ndarray
    n: Sequence[int]
    first_seen: Sequence[int]
    untrained: float | None
    entry: Mapping[str, Any]

    def square(self) -> bool:
        """Whether set j belongs to experience j: what the peers' formulas speak of."""
        return list(self.first_seen) == list(range(len(self.a)))


def example() -> Case:
    """The worked example: four experiences, unequal test sizes, zero-shot cells, an untrained model at 10 %."""
    title = "worked example: per cent after experience 0..3 on sets of 400, 100, 100, 100 samples; untrained model 10"
    return Case(title, np.array(EXAMPLE, np.float64), SIZES, range(4), UNTRAINED, {})


def of_record(word: str, results: pathlib.Path) -> list[Table]:
    """The tables of a record, given by path, run id or the beginning of one."""
    path = pathlib.Path(word).expanduser()
    if not path.is_file():
        folder = results / "records"
        ids = sorted(p.stem for p in folder.glob("*.json")) if folder.is_dir() else []
        near = [name for name in ids if name.startswith(word)] if word else []
        if len(near) != 1:
            many = (
                f"{len(near)} run ids begin so: {', '.join(near[:6])}"
                if near
                else f"nor a run id in {folder}{nearest(word, ids)}"
            )
            raise UserError(f"{word!r} is no file{';' if near else ','} {many}")
        path = folder / f"{near[0]}.json"
    entry = record.read(path)
    names = [plain(entry[part]["name"]) for part in ("scenario", "learner", "model")]
    title = f"record {entry['run_id']}: {' '.join(names)} seed {entry['seed']}"
    run = summarize(entry)
    if run.usable and run.leaderboard is LOSS:
        return loss_tables(entry, run.values, f"{title}, {loss_facts.measure_of(entry)}")
    if run.usable and run.leaderboard is EDITS:
        return edit_tables(entry, run.values, title)
    if entry["status"] != "ok" or not isinstance(entry.get("correct"), list):
        raise UserError(f"{path} has no accuracies: its status is {entry['status']}")
    a = peer_metrics.percent(entry["correct"], entry["n"])
    return tables(Case(f"{title}, per cent", a, entry["n"], entry["first_seen"], None, entry))


def tables(case: Case) -> list[Table]:
    """`matrix`, `formulas`, `peers`, `details`, `columns`, and without a record those of losses."""
    made = [_matrix(case), _formulas(case), _peers(case), _details(case), _columns(ACCURACY)]
    return made if case.entry else [*made, _columns(LOSS), _losses(None), _columns(EDITS), _edit_numbers(None)]


def loss_tables(entry: Mapping[str, Any], values: Mapping[str, float], title: str) -> list[Table]:
    """`matrix`, `numbers`, `gaps`, `ledger` and `columns` of a finished record of pre-training with its numbers."""
    return [_loss_matrix(entry, title), _losses(values), _gaps(entry), _ledger(entry), _columns(LOSS)]


def edit_tables(entry: Mapping[str, Any], values: Mapping[str, float], title: str) -> list[Table]:
    """`course`, `numbers` and `columns` of a finished record of edits with its numbers."""
    steps = edit_metrics.course(entry)
    names = tuple(name for name in ("edits", *edit_metrics.ABOUT) if any(name in step for step in steps))
    rows = [{name: step.get(name) for name in names} for step in steps]
    return [Table("course", f"{title}, over the stream", names, rows, (), {"edits": 0}), _edit_numbers(values), _columns(EDITS)]


def _edit_numbers(values: Mapping[str, float] | None) -> Table:
    """The numbers of model editing with what they mean; `values` are those of a record."""
    rows = [{"name": name, "value": (values or {}).get(name), "formula": text} for name, text in edit_metrics.ABOUT.items()]
    if values is None:
        return Table("edits", "numbers of model editing", ("name", "formula"), rows, ())
    return Table("numbers", "numbers of model editing", ("name", "value", "formula"), rows, ())


def _matrix(case: Case) -> Table:
    names = tuple(f"set {j}" for j in range(case.a.shape[1]))
    rows = [{"after": i, **dict(zip(names, (float(v) for v in row), strict=True))} for i, row in enumerate(case.a)]
    return Table("matrix", case.title, ("after", *names), rows, (SYMBOLS,), dict.fromkeys(names, 2))


def value(name: str, case: Case) -> float:
    """A formula of clbench on a matrix, in per cent; NaN where the matrix does not give it."""
    function = metrics.FORMULAS[name].function
    baseline = None if case.untrained is None else np.full(case.a.shape[1], case.untrained / 100)
    known = {"n": case.n, "first_seen": case.first_seen, "baseline": baseline, "reference": None}
    given = {key: known[key] for key in list(inspect.signature(function).parameters)[1:]}
    return math.nan if any(v is None for v in given.values()) else 100 * function(case.a / 100, **given)


def _formulas(case: Case) -> Table:
    rows = []
    for name, entry in metrics.FORMULAS.items():
        rows.append({"clbench": name, "value": value(name, case), "formula": entry.text, "also called": entry.also})
    notes = ("-: not in this matrix: fwt_* need cells above the diagonal or an untrained model, intransigence a joint run",)
    return Table("formulas", "clbench", ("clbench", "value", "formula", "also called"), rows, notes, {"value": 2})


def _peers(case: Case) -> Table:
    columns = ("library", "kind", "calls it", "value", "formula", "in clbench")
    rows: list[dict[str, Any]] = []
    for key, peer in peer_metrics.PEERS.items():
        found = _peer_values(peer, case) if case.square() else {}
        for kind, (name, text) in peer.values.items():
            known = {"library": peer.library, "kind": kind, "calls it": name, "value": found.get(kind), "formula": text}
            rows.append(known | {"in clbench": twin(key, kind)})
    kinds = ("average", "last", "forgetting", "bwt", "fwt")
    rows.sort(key=lambda row: kinds.index(row["kind"].split("_")[0]))
    notes = [
        "in clbench: the formula with the same value on random matrices; ~: up to the peer's rounding; none: no such formula"
    ]
    if not case.square():
        notes.append("no values: the peers' formulas need one evaluation set for each experience, in their order")
    return Table("peers", "other libraries on the same matrix", columns, rows, tuple(notes), {"value": 2})


def _peer_values(peer: peer_metrics.Peer, case: Case) -> peer_metrics.Values:
    takes_init = "init" in inspect.signature(peer.function).parameters
    if not takes_init:
        return peer.function(case.a, case.n)
    start = None if case.untrained is None else [case.untrained] * len(case.a)
    values = dict(peer.function(case.a, case.n, init=start))
    return values if start is not None else values | {"fwt": math.nan}


@functools.lru_cache(maxsize=1)
def _trials() -> tuple[Case, ...]:
    random = np.random.Generator(np.random.PCG64(5))
    return tuple(
        Case("", np.round(random.uniform(5, 95, (5, 5)), 3), [int(v) for v in random.integers(50, 500, 5)], range(5), 10.0, {})
        for _ in range(4)
    )


@functools.lru_cache(maxsize=256)
def twin(key: str, kind: str) -> str:
    """The formula of clbench that a peer's value is, '~' where they differ by less than two rounded decimals, or 'none'."""
    theirs = [_peer_values(peer_metrics.PEERS[key], case)[kind] for case in _trials()]
    for room, mark in ((1e-9, ""), (0.0101, "~ ")):
        for sign in ("", "-"):
            for name in metrics.FORMULAS:
                ours = [value(name, case) * (-1 if sign else 1) for case in _trials()]
                if all(abs(x - y) <= room for x, y in zip(ours, theirs, strict=True)):
                    return mark + sign + name
    return "none"


def _details(case: Case) -> Table:
    found = metrics.summary(case.entry) if case.entry else {}
    rows: list[dict[str, Any]] = []
    for name, text in metrics.DETAILS.items():
        last = found.get(name, found.get(f"last_{name}"))
        rows.append({"name": name, "last": last, "step": found.get(f"step_{name}"), "formula": text})
    about = setting_metrics.ABOUT | dict.fromkeys((name for name in found if "/" in name), row_metrics.ABOUT)
    rows += [{"name": name, "last": found.get(name), "step": None, "formula": text} for name, text in about.items()]
    notes = (
        "fractions, not per cent; last: after the last experience, step: mean over experiences; -: the record does not have it",
    )
    return Table(
        "details",
        "calibration, confusion, stability, and what a setting adds",
        ("name", "last", "step", "formula"),
        rows,
        notes,
    )


def _columns(board: Leaderboard) -> Table:
    part = {"leaderboard": "columns", "losses": "loss columns"}.get(board.part, "edit columns")
    rows = [{"column": name, "meaning": text} for name, text in board.about.items()]
    return Table(part, f"columns of {board.file}, in their order", ("column", "meaning"), rows)


def _loss_matrix(entry: Mapping[str, Any], title: str) -> Table:
    names = tuple(plain(name) for name in entry["scenario"]["eval_names"])
    tokens, trunks = entry["tokens"], entry.get("sum_loss_trunk") or ()
    measure = "nats" if loss_facts.unit_of(entry) == "tokens" else "squared error"

    def line(label: str, values: Any, unit: str = measure) -> dict[str, Any]:
        found = [None if v is None else float(v) for v in values]
        known = [v for v in found if v is not None and math.isfinite(v)]
        mean = sum(known) / len(known) if len(known) == len(found) else None
        return {"after": label, "unit": unit, **dict(zip(names, found, strict=True)), "mean": mean}

    start, *after = loss_metrics.loss_matrix([entry["sum_loss_start"], *entry["sum_loss"]], tokens)
    rows = [line("before", start)]
    for i, values in enumerate(after):
        if i < len(trunks) and trunks[i] is not None:
            rows.append(line(f"{i} trunk", loss_metrics.loss_matrix([trunks[i]], tokens)[0]))
        rows.append(line(str(i), values))
    if any(value is not None for value in entry["floor"]):
        rows.append(line("floor", entry["floor"]))
    bits = loss_metrics.bits_per_byte(after[-1], entry["bytes_per_token"])
    if np.isfinite(bits).any():
        rows.append(line(f"{len(after) - 1}", [v if np.isfinite(v) else None for v in bits], "bits per byte"))
    return Table("matrix", title, ("after", "unit", *names, "mean"), rows, (LOSS_SYMBOLS,))


def _losses(values: Mapping[str, float] | None) -> Table:
    """The numbers of pre-training with their formulas; `values` are those of a record."""
    rows = [{"name": name, "value": (values or {}).get(name), "formula": text} for name, text in loss_metrics.ABOUT.items()]
    if values is None:
        return Table("losses", "numbers of pre-training", ("name", "formula"), rows, (LOSS_SYMBOLS,))
    note = "-: not in this record alone: recovery_ratio and rate_share need other runs, a floor is known of synthetic languages"
    return Table("numbers", "numbers of pre-training", ("name", "value", "formula"), rows, (note,))


def _gaps(entry: Mapping[str, Any]) -> Table:
    """The stability gap of every old set in every later experience."""
    curves = entry.get("curves") or {"tokens": ()}
    found = loss_metrics.gaps(curves, entry["scenario"]["eval_names"], entry["first_seen"]) if curves["tokens"] else []
    rows = []
    for gap in found:
        back = None if gap["tokens"] is None else round(gap["tokens"])
        rows.append({**gap, "set": plain(gap["set"]), "area": round(gap["area"]), "tokens": back})
    note = "depth: highest loss within the experience - loss at its start; tokens: until it is back, -: never"
    return Table(
        "gaps", "stability gaps", ("experience", "set", "start", "depth", "peak_step", "area", "tokens"), rows, (note,)
    )


def _ledger(entry: Mapping[str, Any]) -> Table:
    rows = [{"tokens": name, "number": value} for name, value in entry["ledger"].items()]
    return Table("ledger", "ledger", ("tokens", "number"), rows, ("replay_bytes are bytes, flops operations",), {"number": 0})
