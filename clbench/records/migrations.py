"""Records of older schemas, made readable: one function for each step from a schema to the next. The file stays as it is.

A record of a schema in `OTHER_NUMBERS` is marked `legacy` in memory, so that no table mixes it silently with newer ones; from
schema 1 on a step only changes the form. A checksum belongs to the form on disk: `verify` looks at that, and `record.checked`
before anything of a record that will be marked is believed.

To add a step: raise `SCHEMA`, write `_from_N`, enter it in `STEPS`, and commit a record of schema N for the test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clbench.records.rows import rows_of

SCHEMA = 2
OTHER_NUMBERS = (0,)
_SIGNS = ("run_id", "status", "config", "scenario")  # of a record that does not say its schema


def is_old(record: Any, schema: int) -> bool:
    """Whether a value is a record of a schema before `schema`. Without a `schema` key it must look like a record."""
    if not isinstance(record, dict):
        return False
    if "schema" not in record:
        return all(key in record for key in _SIGNS)
    return type(record["schema"]) is int and record["schema"] < schema and record["schema"] in STEPS


def migrate(record: Mapping[str, Any], schema: int) -> dict[str, Any]:
    """A record of an older schema in the form of `schema`, which shares parts with it. What cannot be derived is left out."""
    made = dict(record)
    first = version = made.get("schema", 0)
    while version < schema:
        made = STEPS[version](made)
        version += 1
        made["schema"] = version
    if first in OTHER_NUMBERS:
        marks = made.get("marks")
        made["marks"] = [*(marks if isinstance(marks, list) else []), "legacy"]
    return made


def _from_0(record: dict[str, Any]) -> dict[str, Any]:
    """Schema 0 had no `schema`, `numbers_version`, `first_seen` or `error`, and `seconds` was one number."""
    made = {"numbers_version": 0, "error": None} | record
    seconds = made.get("seconds", 0.0)
    if isinstance(seconds, int | float) and not isinstance(seconds, bool):
        made["seconds"] = {"total": float(seconds)}
    if "first_seen" not in made and (first := _first_seen(made)) is not None:
        made["first_seen"] = first
    return made


def _first_seen(record: Mapping[str, Any]) -> list[int] | None:
    """The experience after which the last class of each set is known, or the first in which it was evaluated; else None."""
    try:
        steps = record["scenario"]["experiences"]
        known: list[set[Any]] = []
        for step in steps:
            known.append((known[-1] if known else set()) | set(step["classes"]))
        return [next(i for i, seen in enumerate(known) if set(classes) <= seen) for classes in record["eval_classes"]]
    except (KeyError, TypeError, StopIteration):
        pass
    table: Sequence[Any] = record["correct"] if isinstance(record.get("correct"), list) else ()
    try:
        return [next(i for i, row in enumerate(table) if row[j] is not None) for j in range(len(record["n"]))]
    except (KeyError, TypeError, IndexError, StopIteration):
        return None


def _from_1(record: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 had a table for each kind of number instead of rows, and lists by set instead of sets."""
    return rows_of(record) | {key: record[key] for key in ("checksum",) if key in record}


STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_0, 1: _from_1}
