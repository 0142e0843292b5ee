"""Two views of one record: rows, as it lies on disk, and tables by experience and set, as reports and checks read it.

A row holds the sums of one evaluator over every evaluation set, after an experience or at a step inside one. Each table below
is made of the rows of one evaluator, and the rows of the tables:

    correct, correct_masked, correct_top5, class_correct, task_confusion, heads.NAME   accuracy: of these names, heads/NAME
    calibration.table[i]                                                               accuracy: what `total` holds
    stability.trace                                                                    accuracy with a step
    sum_loss, sum_loss_start (experience -1), sum_loss_trunk (role trunk)              token_loss or reconstruction: loss
    curves                                                                             with a step: loss / n, correct / n
    probe                                                                              linear_probe: own, seen

A row without the sum `n` was measured on the whole set, as those of `accuracy` and of losses after an experience always are.
`rows` of a view are those that no table shows: of other evaluators, and sums of other names. `sets` are there too, beside the
lists `n`, `first_seen`, `scenario.eval_names` and so on, which say the same and count when a view is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clbench.records.rows import ACCURACY, BINS, COUNTS, LOSSES, PLACE, PROBE, SET_LISTS, Row

DETAILS = ("class_correct", "class_n", "eval_classes", "heads", "calibration", "task_confusion", "stability")
_END = frozenset(("experience", "step", "evaluator", "sums", "total"))
_LOOK = frozenset(("experience", "step", "evaluator", "sums", "role", "lr", "trained"))
_ACCURACY_SUMS = frozenset((*COUNTS, "task_confusion", "n"))
_LOSS_SUMS = frozenset(("loss", "n"))
_LOOK_SUMS = frozenset(("n", "loss", "correct"))
_TRACE_SUMS = frozenset(("n", "correct"))
_PROBE_SUMS = frozenset(("n", "own", "seen"))


def tables(form: Mapping[str, Any], details: bool = True) -> dict[str, Any]:
    """The view of a valid record as it lies on disk; without `details` the tables by class, head and bin are left out."""
    view = {key: value for key, value in form.items() if key not in ("sets", "rows")}
    sets = view["sets"] = form["sets"]
    for key, name in SET_LISTS.items():
        if key in ("n", "first_seen") or (any(name in one for one in sets) and (details or key not in DETAILS)):
            view[key] = [one.get(name) for one in sets]
    if any("name" in one for one in sets):
        view["scenario"] = {**form["scenario"], "eval_names": [one.get("name") for one in sets]}
    found = _Groups(form["rows"])
    rest = found.rest
    _add_accuracy(view, found, rest, details)
    _add_losses(view, found, rest)
    if found.probe:
        view["probe"] = _probe(found.probe, view["n"], rest)
    view["rows"] = rest
    if not details:
        for key in DETAILS:
            view.pop(key, None)
    return view


class _Groups:
    """Rows by the table that they belong to; `rest` are those that no table shows."""

    def __init__(self, rows: Iterable[Row]):
        self.ends: list[Row] = []
        self.trace: list[Row] = []
        self.losses: list[Row] = []
        self.start: list[Row] = []
        self.trunks: list[Row] = []
        self.looks: list[Row] = []
        self.probe: list[Row] = []
        self.rest: list[Row] = []
        for row in rows:
            evaluator = row["evaluator"]
            if evaluator in LOSSES:
                (self.looks if row["step"] is not None else self._ends(row)).append(row)
            elif evaluator == ACCURACY and row["experience"] >= 0 and "role" not in row:
                (self.ends if row["step"] is None else self.trace).append(row)
            elif evaluator == PROBE and row["step"] is None and "role" not in row:
                self.probe.append(row)
            else:
                self.rest.append(row)

    def _ends(self, row: Row) -> list[Row]:
        """Where a row of losses after an experience, or before the first, belongs."""
        role = row.get("role")
        if row["experience"] < 0:
            return self.start if role is None else self.rest
        return {None: self.losses, "trunk": self.trunks}.get(role, self.rest)


def _add_rest(rest: list[Row], row: Row, keys: frozenset[str], sums: frozenset[str], but: tuple[str, ...] = ()) -> None:
    """Append to `rest` what a row holds beyond the keys and sums that its table shows."""
    held = row["sums"]
    if row.keys() <= keys and held.keys() <= sums:
        return
    more = {name: column for name, column in held.items() if name not in sums and not name.startswith(but)}
    extra = {key: value for key, value in row.items() if key not in keys}
    if more or extra:
        rest.append({key: row[key] for key in PLACE if key in row} | extra | {"sums": more})


def _add_accuracy(view: dict[str, Any], found: _Groups, rest: list[Row], details: bool) -> None:
    """Counts after each experience, calibration, and evaluations inside experiences."""
    rows, sums = found.ends, [row["sums"] for row in found.ends]
    view.setdefault("correct", [held.get("correct") for held in sums] if rows else None)
    for key in COUNTS[1:]:
        if any(key in held for held in sums):
            view[key] = [held.get(key) for held in sums]
    for row in rows:
        _add_rest(rest, row, _END, _ACCURACY_SUMS, ("heads/",))
    for row in found.trace:
        _add_rest(rest, row, _END - {"total"}, _TRACE_SUMS)
    if not details:
        return
    if any("task_confusion" in held for held in sums):
        view["task_confusion"] = [held.get("task_confusion") for held in sums]
    if rows:
        heads = dict.fromkeys(name for held in sums for name in held if name.startswith("heads/"))
        view.setdefault("heads", {name.removeprefix("heads/"): [held.get(name) for held in sums] for name in heads})
    if any("total" in row for row in rows):
        view["calibration"] = {"bins": BINS, "table": [row.get("total") for row in rows]}
    if found.trace:
        places = [{"experience": row["experience"], "step": row["step"]} for row in found.trace]
        held = [{"correct": row["sums"]["correct"], "n": row["sums"].get("n", view["n"])} for row in found.trace]
        view["stability"] = {"trace": [place | sums for place, sums in zip(places, held, strict=True)]}


def _add_losses(view: dict[str, Any], found: _Groups, rest: list[Row]) -> None:
    """Summed losses, and curves: means at every look."""
    if found.losses:
        view["sum_loss"] = [row["sums"]["loss"] for row in found.losses]
        trunks = {row["experience"]: row["sums"]["loss"] for row in found.trunks}
        made = [trunks.get(row["experience"]) for row in found.losses] if trunks else None
        view.setdefault("sum_loss_trunk", made)
    if found.start:
        view["sum_loss_start"] = found.start[0]["sums"]["loss"]
    for row in (*found.losses, *found.trunks, *found.start):
        _add_rest(rest, row, _END | {"role"}, _LOSS_SUMS)
    if (found.losses or found.looks) and "curves" not in view:
        view["curves"] = _curves(found.looks, view["sets"])
        for row in found.looks:
            _add_rest(rest, row, _LOOK, _LOOK_SUMS)


def _curves(rows: Sequence[Row], sets: Sequence[Row]) -> dict[str, Any]:
    """Columns of looks, one number each and by set; `boundaries` are the tokens at every step 0."""
    names = [one.get("name") or f"set {j}" for j, one in enumerate(sets)]
    tokens, steps = [row.get("trained") for row in rows], [row["step"] for row in rows]
    made: dict[str, Any] = {"tokens": tokens, "lr": [row.get("lr") for row in rows]}
    made |= {"experience": [row["experience"] for row in rows], "step": steps}
    roles = [row.get("role") for row in rows]
    made |= {"role": roles} if any(roles) or not rows else {}
    made["boundaries"] = [t for t, step in zip(tokens, steps, strict=True) if step == 0]
    sums = [row["sums"] for row in rows]
    for key, sum_name in (("loss", "loss"), ("accuracy", "correct")):
        held = [one.get(sum_name) for one in sums]
        if key == "loss" or not rows or any(held):
            columns = zip(*_means(held, sums, sets), strict=True) if rows else ((),) * len(sets)
            made[key] = dict(zip(names, map(list, columns), strict=True))
    return made


def _means(held: Sequence[Any], rows: Sequence[Row], sets: Sequence[Row]) -> list[Any]:
    """Sums of each look over the samples that it saw; where that was one, the sum is the mean."""
    sizes, ones = [one["n"] for one in sets], [1] * len(sets)
    made = []
    for values, sums in zip(held, rows, strict=True):
        n = sums.get("n", sizes)
        if values is None or n != ones:
            pairs = zip(values or [None] * len(ones), n, strict=True)
            values = [None if v is None or not m else v / m for v, m in pairs]
        made.append(values)
    return made


def _probe(rows: Sequence[Row], sizes: list[int], rest: list[Row]) -> dict[str, Any]:
    """Counts of a linear probe before and after each experience."""
    ends = [row for row in rows if row["experience"] >= 0]
    start = next((row["sums"].get("own") for row in rows if row["experience"] < 0), None)
    for row in rows:
        _add_rest(rest, row, _END - {"total"}, _PROBE_SUMS)
    made: dict[str, Any] = {"n": rows[0]["sums"].get("n", sizes), "own_start": start}
    return made | {name: [row["sums"].get(name) for row in ends] for name in ("own", "seen")}
