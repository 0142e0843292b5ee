"""What a record is: one class, the same for every kind of run, checked with pydantic. What is true is `verify`'s question.

`record.schema.json` is generated from it: `python -m clbench.records.form` prints the file's text, a test compares. Unknown
keys are allowed everywhere: newer records stay readable. Whatever passes, `report` can show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Discriminator, Field, InstanceOf, Tag, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from typing_extensions import TypedDict  # typing's is not enough for pydantic before Python 3.12

from clbench.records.migrations import SCHEMA
from clbench.records.tables import ACCURACY, BINS, LOSSES, PROBE

_LARGEST = (1 << 53) - 1  # beyond it a count is no longer exact as a float
_FORM = ConfigDict(strict=True, extra="allow")

Whole = Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Positive = Annotated[int, Field(ge=1, le=_LARGEST)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = InstanceOf[str]  # half a surrogate pair too, which a str of pydantic is not
Object = InstanceOf[dict[str, Any]]
Counts = list[Count | None]
Lists = list[list[Count] | None]
Column = Annotated[list[Number | None] | list[list[Whole] | None], Field(union_mode="left_to_right")]
PerBin = Annotated[list[Count], Field(min_length=BINS, max_length=BINS)]
AmountPerBin = Annotated[list[Amount], Field(min_length=BINS, max_length=BINS)]


class Scenario(BaseModel):
    """The stream: its manifest's hash, what the experiences bring, what the learner may use."""

    model_config = _FORM
    name: Text
    kind: Text | None = None
    unit: Literal["tokens", "images"] | None = None
    manifest_sha256: Text | None = None
    num_experiences: Count | None = None
    class_order: list[Whole] | None = None
    experiences: list[Object] | None = None
    budget: Object | None = None


class Learner(BaseModel):
    """The method: chosen name, class, version of its plug-in (null: clbench's own), capabilities."""

    model_config = _FORM
    name: Text
    target: Text | None = None
    plugin: Text | None = None
    capabilities: Object | None = None


class Model(BaseModel):
    """The backbone and the hashes of its weights: of the file, and of the state that was loaded from it."""

    model_config = _FORM
    name: Text
    timm: Text | None = None
    source: Text | None = None
    profile: Text | None = None
    file_sha256: Text | None = None
    state_sha256: Text | None = None


class EvaluationSet(TypedDict):
    """A set on which the learner is evaluated: samples (tokens), the experience that belongs to it, classes, least loss."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    name: NotRequired[Text | None]
    n: Positive
    first_seen: Count
    classes: NotRequired[list[Whole] | None]
    class_n: NotRequired[list[Count] | None]
    tokens: NotRequired[Positive | None]
    floor: NotRequired[Number | None]
    bytes_per_token: NotRequired[Number | None]


class Calibration(TypedDict):
    """Sums over the sets seen after an experience: p is the softmax of the scores, 15 equal bins of the largest p."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    n: Positive
    nll: Amount
    brier: Amount
    bin_n: PerBin
    bin_conf: AmountPerBin
    bin_correct: PerBin


class AccuracySums(BaseModel):
    """Right answers by set (null: not evaluated): among all classes seen, the set's own, the first five, by class, by head.

    `task_confusion` are predictions by the experience that brought the predicted class; heads are sums `heads/NAME`.
    """

    model_config = _FORM
    __pydantic_extra__: dict[str, Column]
    correct: Counts
    correct_masked: Counts = []
    correct_top5: Counts = []
    class_correct: Lists = []
    task_confusion: Lists = []


class Row(TypedDict):
    """Sums of one evaluator by evaluation set, null where it was not evaluated; rows are typed dictionaries, for speed.

    experience  -1: before the first
    step        null: after the experience
    sums        by name, a value for each set; `n` are the samples that were looked at, where it is left out all of the set
    total       sums over all sets seen, of what is too large to keep by set
    role        of the model that was looked at: trunk or branch; absent: the learner's answer
    lr          learning rate of the step
    trained     tokens or images trained on before
    """

    __pydantic_config__ = _FORM  # type: ignore[misc]
    experience: Annotated[int, Field(ge=-1, le=_LARGEST)]
    step: Count | None
    evaluator: Annotated[str, Field(min_length=1, json_schema_extra={"not": {"enum": [ACCURACY, *LOSSES]}})]
    sums: dict[str, Column]
    total: NotRequired[dict[str, Whole | Number | list[Number] | None]]
    role: NotRequired[Text]
    lr: NotRequired[Number | None]
    trained: NotRequired[Count]


class AccuracyRow(Row):
    """Counts of right answers; `total` is the calibration."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    evaluator: Literal["accuracy"]  # type: ignore[misc]
    sums: AccuracySums  # type: ignore[misc]
    total: NotRequired[Calibration]  # type: ignore[misc]


class LossRow(Row):
    """Losses of next tokens (nats), or of reconstructed images (squared errors)."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    evaluator: Literal["token_loss", "reconstruction"]  # type: ignore[misc]
    sums: Annotated[dict[str, Column], Field(json_schema_extra={"required": ["loss"]})]  # type: ignore[misc]


_KINDS = {ACCURACY: ACCURACY, **dict.fromkeys(LOSSES, "loss")}


def _kind(row: Any) -> str:
    evaluator = row.get("evaluator") if isinstance(row, dict) else getattr(row, "evaluator", None)
    return _KINDS.get(evaluator, "other") if isinstance(evaluator, str) else "other"


AnyRow = Annotated[
    Annotated[AccuracyRow, Tag(ACCURACY)] | Annotated[LossRow, Tag("loss")] | Annotated[Row, Tag("other")],
    Discriminator(_kind),
]
_FINISHED = {
    "if": {"properties": {"status": {"const": "ok"}}},
    "then": {
        "properties": {
            "sets": {"minItems": 1},
            "rows": {"contains": {"properties": {"experience": {"minimum": 0}, "step": {"type": "null"}}}},
        }
    },
}


class Record(BaseModel):
    """One run of clbench: identity, status, configuration, evaluation sets, rows of sums, costs."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra=_FINISHED)
    schema_: Annotated[Literal[2], Field(alias="schema")]
    run_id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    status: Literal["running", "ok", "failed"]
    numbers_version: int
    config: Object
    scenario: Scenario
    learner: Learner
    model: Model
    seed: Whole
    seconds: dict[str, float]
    error: Object | None
    sets: list[EvaluationSet]
    rows: list[AnyRow]
    ledger: dict[str, float] | None = None
    plan: list[Object] | None = None
    experiences: list[dict[str, float | None]] | None = None
    passes: dict[str, Count] = {}
    visits: dict[str, Count] = {}
    parameters: dict[str, Count] = {}
    steps: Count | None = None
    peak_memory_bytes: float | None = None
    stored_bytes: float | None = None
    exemplars: float | None = None
    exemplar_bytes: float | None = None
    final_state_sha256: Text | None = None
    tuning: Object | None = None
    machine: Object | None = None
    versions: dict[str, Text] = {}
    git: Object | None = None
    created: Text | None = None
    finished: Text | None = None
    pid: Count | None = None
    resumed: Count = 0
    marks: list[Text] = []
    checksum: Text | None = None


assert Record.model_fields["schema_"].annotation == Literal[SCHEMA]
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
    for row in [row for row in rows if row["step"] is None]:
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
    for k, row in enumerate(rows):
        if row["step"] is not None:
            if "trained" not in row and row["evaluator"] in LOSSES:
                yield f"rows[{k}].trained is missing"
        elif "n" in row["sums"] and row["evaluator"] in (ACCURACY, *LOSSES):
            if any(n is not None and n != one["n"] for n, one in zip(row["sums"]["n"], sets, strict=True)):
                yield f"rows[{k}].sums.n differs from the sizes of the sets"


def _whole_tables(rows: Sequence[Mapping[str, Any]], sets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Counts after every experience or after none, and experiences that belong to the sets."""
    names = rows[0]["sums"].keys() - {"class_correct", "task_confusion"}
    for i, row in enumerate(rows):
        held = row["sums"]
        if held.keys() - {"class_correct", "task_confusion"} != names:
            yield f"the rows of {ACCURACY} after experience 0 and {i} have other sums"
        for counts in held.get("task_confusion") or ():
            if counts is not None and len(counts) != len(rows):
                yield f"task_confusion after experience {i} must have {len(rows)} counts for each set, or null"
    if (last := max(one["first_seen"] for one in sets)) >= len(rows):
        yield f"first_seen names experience {last}, the rows of {ACCURACY} end with experience {len(rows) - 1}"


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
    place, value, skipped = "", found, False
    for part in first["loc"]:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]  # type: ignore[index]
        elif first["type"] != "missing" or part != first["loc"][-1]:
            skipped |= "[" in str(part)
            continue
        place += f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" if place else _shown(part)
    top = place.split(".")[0].split("[")[0]
    shown = f"key {place!r}" if place == top else place
    if first["type"] == "missing":
        return f"{shown} is missing"
    if top in _SENTENCES:
        return _SENTENCES[top]
    if place == "status" and isinstance(value, str):
        return f"status {value[:40]!r} is none of {', '.join(Record.model_fields['status'].annotation.__args__)}"  # type: ignore[union-attr]
    if place == "run_id" and isinstance(value, str):
        return f"run_id {value[:40]!r} is not 16 hex digits"
    if skipped:
        return f"{place.rstrip(']0123456789').rstrip('[')} must be a list of numbers, or of lists of whole numbers, or null"
    context = first.get("ctx", {})
    kind = {"str": "be text", "dict": "be an object"}.get(str(context.get("class", "")).split("[")[0], f"be {first['type']}")
    must = _MUST.get(first["type"], kind).format_map(context)
    return f"{shown} must {must}, got {repr(value)[:40]}"


def _shown(name: Any) -> str:
    """A key on one line."""
    return repr(str(name))[1:-1][:80]


class _Untitled(GenerateJsonSchema):
    """Without titles of fields, which only repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> JsonSchemaValue:
    """The JSON Schema of a record, as a plain dictionary."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"clbench record, schema {SCHEMA}"}
    return head | {k: v for k, v in Record.model_json_schema(schema_generator=_Untitled).items() if k != "title"}


def text() -> str:
    """`record.schema.json`."""
    return json.dumps(json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    print(text(), end="")
