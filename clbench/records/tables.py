"""Two views of one record: rows, as it lies on disk, and tables by experience and set, as reports and checks read it.

A row holds the sums of one evaluator over every evaluation set, after an experience or at a step inside one. Each table below
is made of the rows of one evaluator, and the rows of the tables:

    correct, correct_masked, correct_top5, class_correct, task_confusion, heads.NAME   accuracy: sums of these names, heads/NAME
    calibration.table[i]                                                               accuracy: what `total` holds
    stability.trace                                                                    accuracy with a step
    sum_loss, sum_loss_start (experience -1), sum_loss_trunk (role trunk)              token_loss or reconstruction: loss
    curves                                                                             those with a step: loss / n, correct / n
    probe                                                                              linear_probe: own, seen

A row without the sum `n` was measured on the whole set, as those of `accuracy` and of losses after an experience always are.
`rows` of a view are those that no table shows: of other evaluators, and sums of other names. `sets` are there too, beside the
lists `n`, `first_seen`, `scenario.eval_names` and others that say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

ACCURACY, PROBE = "accuracy", "linear_probe"
TOKEN_LOSS, IMAGE_LOSS = "token_loss", "reconstruction"
LOSSES = (TOKEN_LOSS, IMAGE_LOSS)
BINS = 15
COUNTS = ("correct", "correct_masked", "correct_top5", "class_correct")
DETAILS = ("class_correct", "class_n", "eval_classes", "heads", "calibration", "task_confusion", "stability")
SET_LISTS = {
    "n": "n",
    "first_seen": "first_seen",
    "eval_classes": "classes",
    "class_n": "class_n",
    "tokens": "tokens",
    "floor": "floor",
    "bytes_per_token": "bytes_per_token",
}
_PLACE = ("experience", "step", "evaluator", "role")
_END = frozenset(("experience", "step", "evaluator", "sums", "total"))
_LOOK = frozenset(("experience", "step", "evaluator", "sums", "role", "lr", "trained"))
_TRACE = frozenset(("experience", "step", "evaluator", "sums"))
_CURVES = frozenset(("tokens", "experience", "step", "lr", "role", "boundaries", "loss", "accuracy"))
_ACCURACY_SUMS = frozenset((*COUNTS, "task_confusion", "n"))
_LOSS_SUMS = frozenset(("loss", "n"))
_LOOK_SUMS = frozenset(("n", "loss", "correct"))
_TRACE_SUMS = frozenset(("n", "correct"))
_PROBE_SUMS = frozenset(("n", "own", "seen"))
_MADE = frozenset(("sets", "rows", "checksum"))
Row = dict[str, Any]


def rows_of(view: Mapping[str, Any]) -> dict[str, Any]:
    """A view as it lies on disk: `sets` and `rows`. A table of another shape stays under its name; given rows win over it."""
    made = {key: value for key, value in view.items() if key not in _MADE}
    sets = _sets(made, view.get("sets"))
    if sets is None:
        return made | {key: view[key] for key in ("sets", "rows") if key in view}
    width, sizes = len(sets), [one.get("n") for one in sets]
    scenario = made.get("scenario")
    loss = IMAGE_LOSS if isinstance(scenario, Mapping) and scenario.get("unit") == "images" else TOKEN_LOSS
    rows = [*_accuracy_rows(made, width), *_trace_rows(made, width), *_loss_rows(made, loss, width)]
    rows += [*_curve_rows(made, loss, [one.get("name") for one in sets]), *_probe_rows(made, sizes)]
    rows.sort(key=lambda row: (row["experience"], row["step"] is None))
    given = view.get("rows", [])
    return made | {"sets": sets, "rows": _merged(rows, given) if isinstance(given, list) else given}


def _sets(made: dict[str, Any], given: Any) -> list[Row] | None:
    """Take the lists by set out of a record and join them to `sets`; None where there is none, or sizes do not fit."""
    scenario = made.get("scenario")
    sizes, first = made.get("n"), made.get("first_seen")
    if sizes is None and isinstance(given, list):
        sizes = first = [None] * len(given)
    if not isinstance(sizes, list) or not isinstance(first, list) or len(first) != len(sizes):
        return None
    sets: list[Row] = [{} for _ in sizes]
    if isinstance(given, list) and len(given) == len(sizes) and all(isinstance(one, Mapping) for one in given):
        sets = [dict(one) for one in given]
    if isinstance(scenario, Mapping) and _is_list(scenario.get("eval_names"), len(sizes)):
        for one, name in zip(sets, scenario["eval_names"], strict=True):
            one["name"] = name
        made["scenario"] = {key: value for key, value in scenario.items() if key != "eval_names"}
    for key, name in SET_LISTS.items():
        if _is_list(made.get(key), len(sizes)):
            for one, value in zip(sets, made.pop(key), strict=True):
                one[name] = value
    return sets


def _is_list(value: Any, size: int) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and len(value) == size


def is_table(value: Any, width: int) -> TypeGuard[list[list[Any]]]:
    """Whether a value is a list of rows with a cell for each of `width` sets."""
    return isinstance(value, list) and all(isinstance(row, list) and len(row) == width for row in value)


def _end(experience: int, evaluator: str, sums: Row, **more: Any) -> Row:
    return {"experience": experience, "step": None, "evaluator": evaluator, **more, "sums": sums}


def _accuracy_rows(made: dict[str, Any], width: int) -> list[Row]:
    """The rows of evaluator `accuracy` after each experience."""
    correct = made.get("correct")
    if correct is None:
        made.pop("correct", None)
    if not is_table(correct, width):
        return []
    steps = len(correct)
    tables = {key: made.pop(key) for key in COUNTS if is_table(made.get(key), width) and len(made[key]) == steps}
    heads = made.get("heads")
    if isinstance(heads, dict) and all(is_table(table, width) and len(table) == steps for table in heads.values()):
        tables |= {f"heads/{name}": table for name, table in made.pop("heads").items()}
    rows = [_end(i, ACCURACY, {key: table[i] for key, table in tables.items()}) for i in range(steps)]
    confusion = made.get("task_confusion")
    if _is_list(confusion, steps) and all(table is None or _is_list(table, width) for table in confusion):
        for row, table in zip(rows, made.pop("task_confusion"), strict=True):
            row["sums"] |= {} if table is None else {"task_confusion": table}
    found = made.get("calibration")
    if isinstance(found, dict) and found.keys() == {"bins", "table"} and found["bins"] == BINS and type(found["bins"]) is int:
        table = found["table"]
        if _is_list(table, steps) and all(total is None or isinstance(total, dict) for total in table):
            del made["calibration"]
            for row, total in zip(rows, table, strict=True):
                row |= {} if total is None else {"total": total}
    return rows


def _trace_rows(made: dict[str, Any], width: int) -> list[Row]:
    """Evaluations inside experiences; one that does not say its step gets its place within the experience."""
    found = made.get("stability")
    trace = found.get("trace") if isinstance(found, dict) and len(found) == 1 else None
    if not isinstance(trace, list) or not all(isinstance(look, dict) for look in trace):
        return []
    if not _are_whole([look.get("experience") for look in trace], rising=True):
        return []
    if not all(_is_list(look.get("correct"), width) and _is_list(look.get("n"), width) for look in trace):
        return []
    rows: list[Row] = []
    places: dict[int, int] = {}
    for look in trace:
        k = look["experience"]
        places[k] = place = places.get(k, -1) + 1
        more = {key: value for key, value in look.items() if key not in (*_PLACE, "correct", "n")}
        rows.append(_end(k, ACCURACY, {"correct": look["correct"], "n": look["n"]}, **more) | {"step": look.get("step", place)})
    del made["stability"]
    return rows


def _are_whole(values: Sequence[Any], rising: bool = False) -> bool:
    return set(map(type, values)) <= {int} and (not rising or all(a <= b for a, b in pairwise(values)))


def _loss_rows(made: dict[str, Any], evaluator: str, width: int) -> list[Row]:
    """Summed losses before the first experience, of trunks that are not the answer, and after each experience."""
    table = made.get("sum_loss")
    if not is_table(table, width):
        return []
    rows = [_end(i, evaluator, {"loss": row}) for i, row in enumerate(made.pop("sum_loss"))]
    if _is_list(made.get("sum_loss_start"), width):
        rows.append(_end(-1, evaluator, {"loss": made.pop("sum_loss_start")}))
    trunks = made.get("sum_loss_trunk")
    if trunks is None:
        made.pop("sum_loss_trunk", None)
    elif _is_list(trunks, len(table)) and all(row is None or _is_list(row, width) for row in trunks):
        del made["sum_loss_trunk"]
        ends = [_end(i, evaluator, {"loss": row}, role="trunk") for i, row in enumerate(trunks) if row is not None]
        rows = [*ends, *rows]
    return rows


def _curve_rows(made: dict[str, Any], evaluator: str, names: Sequence[Any]) -> list[Row]:
    """Looks while a model is trained: means over a few sequences of each set, so n is 1."""
    curves = made.get("curves")
    if not isinstance(curves, dict) or not _are_curves(curves, names):
        return []
    del made["curves"]
    loss = zip(*(_finite(curves["loss"][name]) for name in names), strict=True)
    right = zip(*(_finite(curves["accuracy"][name]) for name in names), strict=True) if "accuracy" in curves else None
    ones = [1] * len(names)
    rows: list[Row] = []
    for experience, step, lr, trained, losses in zip(
        *(curves[key] for key in ("experience", "step", "lr", "tokens")), loss, strict=True
    ):
        row = {"experience": experience, "step": step, "evaluator": evaluator, "lr": lr, "trained": trained}
        rows.append(row | {"sums": {"n": ones, "loss": list(losses)}})
    for row, shares in zip(rows, right or (), strict=right is not None):
        row["sums"]["correct"] = list(shares)
    for row, role in zip(rows, curves.get("role", ()), strict="role" in curves):
        row["role"] = role
    return rows


def _are_curves(curves: Mapping[str, Any], names: Sequence[Any]) -> bool:
    """Whether rows can hold curves: columns of one length by set, experiences in order, boundaries at the steps 0."""
    if not _CURVES - {"role", "accuracy"} <= curves.keys() <= _CURVES or len(set(map(str, names))) != len(names) or not names:
        return False
    by_set = [curves[key] for key in ("loss", "accuracy") if key in curves]
    if not all(isinstance(columns, dict) and list(columns) == list(names) for columns in by_set):
        return False
    numbers = [column for columns in by_set for column in columns.values()]
    columns = [curves[key] for key in ("tokens", "experience", "step", "lr", "role") if key in curves] + numbers
    if not all(_is_list(column, len(curves["tokens"])) for column in columns):
        return False
    if not all(set(map(type, column)) <= {float, int, type(None)} for column in numbers):
        return False
    if not _are_whole(curves["experience"], rising=True) or not _are_whole(curves["step"]):
        return False
    return curves["boundaries"] == [t for t, step in zip(curves["tokens"], curves["step"], strict=True) if step == 0]


def _finite(column: Sequence[Any]) -> Sequence[Any]:
    """Numbers with null for NaN and infinity, which a record does not hold."""
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in column]


def _probe_rows(made: dict[str, Any], sizes: Sequence[Any]) -> list[Row]:
    """Right answers of a linear probe before the first and after each experience."""
    probe, width = made.get("probe"), len(sizes)
    if not isinstance(probe, dict) or probe.keys() != {"n", "own_start", "own", "seen"}:
        return []
    if not _is_list(probe["n"], width) or not _is_list(probe["own_start"], width):
        return []
    if not is_table(probe["own"], width) or not is_table(probe["seen"], width) or len(probe["own"]) != len(probe["seen"]):
        return []
    del made["probe"]
    n = {} if probe["n"] == sizes else {"n": probe["n"]}
    pairs = zip(probe["own"], probe["seen"], strict=True)
    rows = [_end(i, PROBE, n | {"own": own, "seen": seen}) for i, (own, seen) in enumerate(pairs)]
    return [_end(-1, PROBE, n | {"own": probe["own_start"]}), *rows]


def _merged(rows: list[Row], given: Sequence[Any]) -> list[Any]:
    """Rows of tables and rows that are given: where both speak of one place, the given ones add to it and win."""
    if not given:
        return rows
    places = {tuple(row.get(key) for key in _PLACE): row for row in reversed(rows)}
    more = []
    for row in given:
        own = places.get(tuple(row.get(key) for key in _PLACE)) if _has_place(row) else None
        if own is None:
            more.append(row)
            continue
        sums, total = own["sums"] | row["sums"], own.get("total", {}) | row.get("total", {})
        own |= {**row, "sums": sums} | ({"total": total} if total else {})
    made = [*rows, *more]
    if all(_has_place(row) and type(row["experience"]) is int for row in made):
        made.sort(key=lambda row: (row["experience"], row.get("step") is None))
    return made


def _has_place(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("sums"), dict) or not isinstance(row.get("total", {}), dict):
        return False
    return "experience" in row and all(isinstance(row.get(key), str | int | None) for key in _PLACE)


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
        rest.append({key: row[key] for key in _PLACE if key in row} | extra | {"sums": more})


def _add_accuracy(view: dict[str, Any], found: _Groups, rest: list[Row], details: bool) -> None:
    """Counts after each experience, calibration, and evaluations inside experiences."""
    rows, sums = found.ends, [row["sums"] for row in found.ends]
    view.setdefault("correct", [held.get("correct") for held in sums] if rows else None)
    for key in COUNTS[1:]:
        if any(key in held for held in sums):
            view[key] = [held.get(key) for held in sums]
    for row in rows:
        _add_rest(rest, row, _END, _ACCURACY_SUMS, ("heads/",))
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
        known = {"evaluator", "sums"}
        trace = [{k: v for k, v in row.items() if k not in known} | row["sums"] for row in found.trace]
        view["stability"] = {"trace": trace}


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
