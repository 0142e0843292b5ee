"""Why a value is no record: keys, types and shapes, so that whatever passes can be shown. What is true is `verify`'s question.

`schema` describes the same form for other programs; a test compares the two.
"""

from __future__ import annotations

import math
import re
from typing import Any

from clbench.records.schema import BINS, SCHEMA, STATUSES

_NEEDED: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "run_id": str,
    "status": str,
    "numbers_version": int,
    "config": dict,
    "scenario": dict,
    "learner": dict,
    "model": dict,
    "seed": int,
    "n": list,
    "first_seen": list,
    "seconds": dict,
    "error": (dict, type(None)),
}
_TABLES = ("correct", "correct_masked", "correct_top5")
_AMOUNTS = ("peak_memory_bytes", "stored_bytes", "exemplars", "exemplar_bytes")
_LARGEST = 1 << 53  # beyond it a count is no longer exact as a float


def fault(record: Any) -> str | None:
    """Why a value is no record, or None. What passes here, `report` can show; whether it is true is `verify`'s question."""
    if not isinstance(record, dict):
        return "not a JSON object"
    if type(record.get("schema")) is int and record["schema"] > SCHEMA:
        return f"schema {record['schema']} is newer than this clbench knows ({SCHEMA})"
    for key, kind in _NEEDED.items():
        if key not in record:
            return f"key {key!r} is missing"
        if not isinstance(record[key], kind) or (kind is int and isinstance(record[key], bool)):
            return f"key {key!r} has the wrong type {type(record[key]).__name__}"
    if record["status"] not in STATUSES:
        return f"status {record['status']!r} is none of {', '.join(STATUSES)}"
    if not re.fullmatch(r"[0-9a-f]{16}", record["run_id"]):
        return f"run_id {record['run_id'][:40]!r} is not 16 hex digits"
    if any(not isinstance(record[part].get("name"), str) for part in ("scenario", "learner", "model")):
        return "scenario, learner and model need a name"
    return _fault_in_extras(record) or _fault_in_counts(record) or _fault_in_details(record)


def _fault_in_extras(record: dict[str, Any]) -> str | None:
    """The parts that describe and cost: each may be absent, none may be of the wrong kind."""
    marks = record.get("marks", [])
    if not isinstance(marks, list) or not all(isinstance(mark, str) for mark in marks):
        return "key 'marks' must be a list of words"
    if not all(_is_number(value) for value in record["seconds"].values()):
        return "key 'seconds' must hold numbers"
    for key in _AMOUNTS:
        if record.get(key) is not None and not _is_number(record[key]):
            return f"key {key!r} must be a number, got {str(record[key])[:40]!r}"
    if not _is_number(record["seed"]):
        return "key 'seed' is out of range"
    names = record["scenario"].get("eval_names")
    if names is not None and (not isinstance(names, list) or len(names) != len(record["n"])):
        return "scenario.eval_names must be a list with a name for each evaluation set"
    return None


def _fault_in_counts(record: dict[str, Any]) -> str | None:
    """Sizes and shapes of the tables, so that every metric is defined."""
    n, first = record["n"], record["first_seen"]
    if len(first) != len(n):
        return "keys 'n' and 'first_seen' differ in length"
    if not all(_is_count(size) and size > 0 for size in n) or not all(_is_count(i) and i >= 0 for i in first):
        return "keys 'n' and 'first_seen' must hold positive whole numbers and indices of experiences"
    for key in _TABLES if record["status"] == "ok" else ():
        table = record.get(key)
        if table is None and (key != "correct" or "sum_loss" in record):
            continue
        if table is None or not _is_table(table, len(n)):
            return f"key {key!r} must be a table of counts with a column for each of the {len(n)} evaluation sets"
        if len(table) != len(record.get("correct") or ()):
            return f"keys {key!r} and 'correct' differ in length"
        if max(first, default=0) >= len(table):
            return f"first_seen names experience {max(first)}, key {key!r} has {len(table)} rows"
    return None


def _fault_in_details(record: dict[str, Any]) -> str | None:
    """Calibration and confusion: absent in records of earlier versions, and of runs that began under one."""
    if record["status"] != "ok" or not isinstance(record.get("correct"), list):
        return None
    steps, sets = len(record["correct"]), len(record["n"])
    if (found := record.get("calibration")) is not None:
        table = found.get("table") if isinstance(found, dict) else None
        if not isinstance(table, list) or found.get("bins") != BINS or type(found["bins"]) is not int or len(table) != steps:
            return f"key 'calibration' must hold bins ({BINS}) and a table with a row for each experience"
        for i, row in enumerate(table):
            if row is not None and not _is_calibration(row):
                return f"calibration.table[{i}] must hold n, nll, brier, bin_n, bin_conf and bin_correct, or be null"
    if (tables := record.get("task_confusion")) is not None:
        if not isinstance(tables, list) or len(tables) != steps:
            return "key 'task_confusion' must be a list with a table for each experience"
        for i, table in enumerate(tables):
            if table is not None and not _is_confusion(table, sets, steps):
                return f"task_confusion[{i}] must have a row of {steps} counts, or null, for each of the {sets} evaluation sets"
    return None


def _is_calibration(row: Any) -> bool:
    if not isinstance(row, dict) or not _is_count(row.get("n")) or row["n"] < 1:
        return False
    sums = [row.get("nll"), row.get("brier")]
    lists = [row.get(name) for name in ("bin_n", "bin_conf", "bin_correct")]
    known = [values for values in lists if isinstance(values, list) and len(values) == BINS]
    if len(known) < len(lists):
        return False
    counts, floats = [*known[0], *known[2]], [*sums, *known[1]]
    return all(_is_count(c) and c >= 0 for c in counts) and all(_is_number(v) and math.isfinite(v) and v >= 0 for v in floats)


def _is_confusion(table: Any, sets: int, steps: int) -> bool:
    rows = table if isinstance(table, list) and len(table) == sets else [0]
    known = [row for row in rows if row is not None]
    return all(isinstance(row, list) and len(row) == steps and all(_is_count(c) and c >= 0 for c in row) for row in known)


def _is_count(value: Any) -> bool:
    return type(value) is int and abs(value) < _LARGEST


def _is_number(value: Any) -> bool:
    return _is_count(value) or isinstance(value, float)


def _is_table(value: Any, columns: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and columns > 0
        and all(isinstance(row, list) and len(row) == columns for row in value)
        and all(cell is None or _is_count(cell) for row in value for cell in row)
    )
