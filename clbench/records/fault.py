"""Why a value is no record, in one line. Whatever passes, `report` can show; whether it is true is `verify`'s question."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from clbench.records.form import Record
from clbench.records.migrations import SCHEMA
from clbench.records.rows import ACCURACY, BINS, LOSSES, PROBE

_check = Record.__pydantic_validator__.validate_python


def fault(found: Any) -> str | None:
    """Why a value is no record of this schema, in one line, or None."""
    if not isinstance(found, dict):
        return "not a JSON object"
    if type(found.get("schema")) is int and found["schema"] > SCHEMA:
        return f"schema {found['schema']} is newer than this clbench knows ({SCHEMA})"
    if (why := _leftover(found)) is not None:
        return why
    try:
        _check(found)
    except ValidationError as error:
        return _words(error, found)
    except UnicodeError:
        return "a key or a word holds half a surrogate pair"
    return next(_relations(found), None)


def _leftover(form: Mapping[str, Any]) -> str | None:
    """A table of schema 1 that could not become rows, because it has another shape."""
    if "sets" not in form and (known := form.keys() & {"n", "first_seen"}):
        missing = {"n", "first_seen"} - known
        return f"key {missing.pop()!r} is missing" if missing else "keys 'n' and 'first_seen' must be lists of one length"
    if isinstance(form.get("scenario"), dict) and form["scenario"].get("eval_names") is not None:
        return "scenario.eval_names must be a list with a name for each evaluation set"
    if form.get("status") != "ok" or not isinstance(form.get("sets"), list):
        return None
    sets = f"each of the {len(form['sets'])} evaluation sets"
    for key in ("correct", "correct_masked", "correct_top5", "sum_loss"):
        if form.get(key) is not None and (key != "sum_loss" or not form.get("rows")):
            what = "losses" if key == "sum_loss" else "counts"
            return f"key {key!r} must be a table of {what} with a row for each experience and a column for {sets}"
    if form.get("calibration") is not None:
        return f"key 'calibration' must hold bins ({BINS}) and a table with a row for each experience"
    if form.get("task_confusion") is not None:
        return f"key 'task_confusion' must hold a table for each experience, with a row or null for {sets}"
    if form.get("stability") not in (None, {}, {"trace": []}):
        return f"key 'stability' must hold a trace of evaluations, each with an experience and counts of {sets}"
    if form.get("eval_classes") is not None:
        return f"key 'eval_classes' must hold the classes of {sets}"
    return None


def _relations(form: Mapping[str, Any]) -> Iterator[str]:
    """What a type cannot say: lengths, and of a finished record that every table is whole."""
    sets, rows = form["sets"], form["rows"]
    width = len(sets)
    expected = {width}
    for k, row in enumerate(rows):
        sums = row["sums"]
        if not expected.issuperset(map(len, sums.values())):
            name = next(name for name, column in sums.items() if len(column) != width)
            yield f"rows[{k}].sums.{_shown(name)} must have {width} values, one for each evaluation set"
        if row["evaluator"] in LOSSES and "loss" not in sums:
            yield f"rows[{k}].sums.loss is missing"
    if form["status"] != "ok":
        return
    ends: dict[str, list[dict[str, Any]]] = {}
    places: set[tuple[Any, ...]] = set()
    for row in [row for row in rows if row["step"] is None]:
        place = (row["evaluator"], row["experience"], row.get("role"))
        if place in places:
            yield f"two rows of {_shown(place[0])} after experience {place[1]}"
        places.add(place)
        if row["experience"] >= 0 and "role" not in row:
            ends.setdefault(row["evaluator"], []).append(row)
    if not ends or not sets:
        yield "status ok, but no evaluator has a row with evaluation sets after an experience"
    for name in (ACCURACY, PROBE, *LOSSES):
        found = [row["experience"] for row in ends.get(name, ())]
        if found != list(range(len(found))):
            yield f"the rows of {name} after an experience are of experiences {str(found)[:60]}, not one of each in order"
    if sum(name in ends for name in LOSSES) > 1:
        yield f"rows of {' and of '.join(LOSSES)} in one record"
    if ACCURACY in ends:
        yield from _whole_tables(ends[ACCURACY], sets)
    for experience in form["scenario"].get("experiences") or ():
        if not isinstance(experience.get("classes", []), list):
            yield "scenario.experiences must hold lists of classes"
    for k, row in enumerate(rows):
        if row["step"] is not None:
            if row["evaluator"] == ACCURACY and not _is_look(row, len(ends.get(ACCURACY, ()))):
                yield f"rows[{k}], a look ('stability'), must be inside an experience, with counts out of n from 1"
            if "trained" not in row and row["evaluator"] in LOSSES:
                yield f"rows[{k}].trained is missing"
        elif "n" in row["sums"] and row["evaluator"] in (ACCURACY, *LOSSES):
            if any(n is not None and n != one["n"] for n, one in zip(row["sums"]["n"], sets, strict=True)):
                yield f"rows[{k}].sums.n differs from the sizes of the sets"


def _is_look(row: Mapping[str, Any], experiences: int) -> bool:
    """Whether an evaluation inside an experience can be made an accuracy: counts of samples, of a known experience."""
    sums = row["sums"]
    if not 0 <= row["experience"] < experiences or "correct" not in sums or "n" not in sums:
        return False
    return all(c is None or (type(n) is int and n >= 1) for c, n in zip(sums["correct"], sums["n"], strict=False))


def _whole_tables(rows: Sequence[Mapping[str, Any]], sets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Counts after every experience or after none, and experiences that belong to the sets."""
    first, names = rows[0]["sums"].keys(), _tabled(rows[0]["sums"])
    for i, row in enumerate(rows):
        held = row["sums"]
        if held.keys() != first and _tabled(held) != names:
            yield f"the rows of {ACCURACY} after experience 0 and {i} have other sums"
        for counts in held.get("task_confusion") or ():
            if counts is not None and len(counts) != len(rows):
                yield f"task_confusion after experience {i} must have {len(rows)} counts for each set, or null"
    if (last := max(one["first_seen"] for one in sets)) >= len(rows):
        yield f"first_seen names experience {last}, the rows of {ACCURACY} end with experience {len(rows) - 1}"


def _tabled(sums: Mapping[str, Any]) -> set[str]:
    """The counts of a row that must be there after every experience or after none."""
    return {name for name in sums if name in ("correct_masked", "correct_top5") or name.startswith("heads/")}


_MUST = {
    "int_type": "be a whole number",
    "float_type": "be a number",
    "finite_number": "be a finite number",
    "bool_type": "be true or false",
    "string_type": "be text",
    "list_type": "be a list",
    "dict_type": "be an object",
    "model_type": "be an object",
    "greater_than_equal": "be at least {ge}",
    "less_than_equal": "be at most {le}",
    "literal_error": "be {expected}",
    "too_short": "have at least {min_length} values",
    "too_long": "have at most {max_length} values",
    "string_pattern_mismatch": "match {pattern}",
    "string_too_short": "not be empty",
}
_SENTENCES = {
    "marks": "key 'marks' must be a list of words",
    "seconds": "key 'seconds' must hold numbers",
}


def _words(error: ValidationError, found: Any) -> str:
    """The first error of pydantic in plain words: the place, without its names of alternatives, and what is asked there."""
    first = error.errors(include_url=False)[0]
    place, value, kind = _place(first["loc"], found, first["type"])
    top = re.split(r"[.\[]", place)[0]
    shown = f"key {place!r}" if place == top else place
    if kind == "missing":
        return f"{shown} is missing"
    if kind == "column":
        return f"{shown} must be a list of numbers, or of lists of whole numbers, or null"
    if top in _SENTENCES:
        return _SENTENCES[top]
    if place == "status" and isinstance(value, str):
        return f"status {value[:40]!r} is none of {first['ctx']['expected']}"  # type: ignore[typeddict-item]
    if place == "run_id" and isinstance(value, str):
        return f"run_id {value[:40]!r} is not 16 hex digits"
    context = first.get("ctx", {})
    wanted = {"str": "be text", "dict": "be an object"}.get(str(context.get("class", "")).split("[")[0], f"be {kind}")
    return f"{shown} must {_MUST.get(kind, wanted).format_map(context)}, got {repr(value)[:40]}"


def _place(path: Sequence[str | int], found: Any, kind: str) -> tuple[str, Any, str]:
    """Where an error is, what lies there, and of what kind it is: also `missing`, and `column` where no alternative fits."""
    place, value = "", found
    for i, part in enumerate(path):
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]  # type: ignore[index]
        elif "[" in str(part):  # pydantic's name of an alternative, such as list[nullable[float]]
            return place, value, "column"
        elif i == len(path) - 1 and isinstance(value, dict):
            kind = "missing"
        else:  # the tag of an alternative
            continue
        place += f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" if place else _shown(part)
    return place, value, kind


def _shown(name: Any) -> str:
    """A key on one line."""
    return repr(str(name))[1:-1][:80]
