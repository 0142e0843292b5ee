"""A record as it lies on disk, made of the tables by experience and set that runs and reports speak of (see `tables`).

A row holds the sums of one evaluator over every evaluation set, after an experience or at a step inside one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

ACCURACY, PROBE = "accuracy", "linear_probe"
TOKEN_LOSS, IMAGE_LOSS = "token_loss", "reconstruction"
LOSSES = (TOKEN_LOSS, IMAGE_LOSS)
BINS = 15
COUNTS = ("correct", "correct_masked", "correct_top5", "class_correct")
SET_LISTS = {
    "n": "n",
    "first_seen": "first_seen",
    "eval_classes": "classes",
    "class_n": "class_n",
    "tokens": "tokens",
    "floor": "floor",
    "bytes_per_token": "bytes_per_token",
    "probe": "probe",
}
PLACE = ("experience", "step", "evaluator", "role")
_CURVES = frozenset(("tokens", "experience", "step", "lr", "role", "boundaries", "loss", "accuracy"))
_TRACE = frozenset(("experience", "step", "correct", "n"))
_MADE = frozenset(("sets", "rows", "checksum"))
Row = dict[str, Any]


def rows_of(view: Mapping[str, Any]) -> dict[str, Any]:
    """A view as it lies on disk: `sets` and `rows`. A table of another shape keeps its name; rows given win over tables."""
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
    """Take the lists by set out of a record and join them to `sets`; None where sizes and places are missing or do not fit."""
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
    if made.get("correct") is None:
        made.pop("correct", None)
        return []
    correct: Any = made["correct"]
    if not is_table(correct, width):
        return []
    steps = len(correct)
    tables = {key: made.pop(key) for key in COUNTS if is_table(made.get(key), width) and len(made[key]) == steps}
    heads = made.get("heads")
    if isinstance(heads, dict) and all(is_table(table, width) and len(table) == steps for table in heads.values()):
        tables |= {f"heads/{name}": table for name, table in made.pop("heads").items()}
    rows = [_end(i, ACCURACY, {key: table[i] for key, table in tables.items()}) for i in range(steps)]
    confusion: Any = made.get("task_confusion")
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
    if not isinstance(trace, list) or not all(isinstance(look, dict) and look.keys() <= _TRACE for look in trace):
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
        rows.append(_end(k, ACCURACY, {"correct": look["correct"], "n": look["n"]}) | {"step": look.get("step", place)})
    del made["stability"]
    return rows


def _are_whole(values: Sequence[Any], rising: bool = False) -> bool:
    return set(map(type, values)) <= {int} and (not rising or all(a <= b for a, b in itertools.pairwise(values)))


def _loss_rows(made: dict[str, Any], evaluator: str, width: int) -> list[Row]:
    """Summed losses before the first experience, of trunks that are not the answer, and after each experience."""
    table: Any = made.get("sum_loss")
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
    places = {tuple(row.get(key) for key in PLACE): row for row in reversed(rows)}
    more = []
    for row in given:
        if not _has_place(row):
            more.append(row)
            continue
        row = {"experience": row["experience"], "step": None, **row}
        own = places.setdefault(tuple(row.get(key) for key in PLACE), row)
        if own is row:
            more.append(row)
            continue
        sums, total = own["sums"] | row["sums"], own.get("total", {}) | row.get("total", {})
        own |= {**row, "sums": sums} | ({"total": total} if total else {})
    made = [*rows, *more]
    if all(_has_place(row) and type(row["experience"]) is int for row in made):
        made.sort(key=lambda row: (row["experience"], row["step"] is None))
    return made


def _has_place(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("sums"), dict) or not isinstance(row.get("total", {}), dict):
        return False
    return "experience" in row and all(isinstance(row.get(key), str | int | None) for key in PLACE)
