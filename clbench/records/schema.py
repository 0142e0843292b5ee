"""What a record is, for programs: the types below are the one source of `record.schema.json`, which a test compares with them.

`python -m clbench.records.schema` prints the file's text; `clbench verify --schema` prints the file. Unknown keys are allowed
everywhere: newer records stay readable.
"""

import json
import types
from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict, Union, get_args, get_origin, get_type_hints

SCHEMA = 1
STATUSES = ("running", "ok", "failed")
BINS = 15
_LARGEST = (1 << 53) - 1  # beyond it a count is no longer exact as a float

Whole = Annotated[int, ("minimum", -_LARGEST), ("maximum", _LARGEST)]
Count = Annotated[int, ("minimum", 0), ("maximum", _LARGEST)]
Positive = Annotated[int, ("minimum", 1), ("maximum", _LARGEST)]
Amount = Annotated[float, ("minimum", 0)]
RunId = Annotated[str, ("pattern", "^[0-9a-f]{16}$")]
Cells = Annotated[list[Whole | None], ("minItems", 1)]
Counts = Annotated[list[Cells], ("minItems", 1)]
PerBin = Annotated[list[Count], ("minItems", BINS), ("maxItems", BINS)]
AmountPerBin = Annotated[list[Amount], ("minItems", BINS), ("maxItems", BINS)]


class Scenario(TypedDict, total=False):
    """The stream: its manifest's hash, what the experiences bring, what the learner may use."""

    name: Required[str]
    kind: str
    unit: Literal["tokens", "images"]
    manifest_sha256: str
    num_experiences: Count
    eval_names: list[Any] | None
    class_order: list[Whole]
    experiences: list[dict[str, Any]]
    budget: dict[str, Any]


class LearnerPart(TypedDict, total=False):
    """The method: chosen name, class, version of its plug-in (null: clbench's own), capabilities."""

    name: Required[str]
    target: str
    plugin: str | None
    capabilities: dict[str, Any]


class ModelPart(TypedDict, total=False):
    """The backbone and the hashes of its weights: of the file, and of the state that was loaded from it."""

    name: Required[str]
    timm: str
    source: str
    profile: str
    file_sha256: str | None
    state_sha256: str


class CalibrationRow(TypedDict):
    """Sums over the sets seen after an experience: p is the softmax of the scores, 15 equal bins of the largest p."""

    n: Positive
    nll: Amount
    brier: Amount
    bin_n: PerBin
    bin_conf: AmountPerBin
    bin_correct: PerBin


class Calibration(TypedDict):
    """One row for each experience."""

    bins: Annotated[int, ("const", BINS)]
    table: list[CalibrationRow | None]


class Curves(TypedDict, total=False):
    """Looks while a model is pre-trained, one number each, and by set; tokens at each boundary."""

    tokens: Required[list[Count]]
    experience: Required[list[Count]]
    step: Required[list[Count]]
    lr: Required[list[float]]
    role: list[str]
    boundaries: Required[list[Count]]
    loss: Required[dict[str, list[float | None]]]
    accuracy: dict[str, list[float | None]]


class Probe(TypedDict):
    """Right answers of a linear probe out of `n`, before and after each experience: for each set, and among all sets seen."""

    n: list[Positive]
    own_start: list[Count]
    own: list[list[Count]]
    seen: list[list[Count | None]]


class Record(TypedDict, total=False):
    """One run of clbench: identity, integer counts, costs."""

    schema: Required[Annotated[int, ("const", SCHEMA)]]
    run_id: Required[RunId]
    status: Required[Literal["running", "ok", "failed"]]
    numbers_version: Required[int]
    config: Required[dict[str, Any]]
    scenario: Required[Scenario]
    learner: Required[LearnerPart]
    model: Required[ModelPart]
    seed: Required[Whole]
    n: Required[list[Positive]]
    first_seen: Required[list[Count]]
    seconds: Required[dict[str, float]]
    error: Required[dict[str, Any] | None]
    correct: Counts | None
    correct_masked: Counts | None
    correct_top5: Counts | None
    class_correct: list[list[list[Count] | None]] | None
    class_n: list[list[Count]] | None
    eval_classes: list[list[Whole]] | None
    heads: dict[str, Counts] | None
    calibration: Calibration | None
    task_confusion: list[list[list[Count] | None] | None] | None
    tokens: list[Positive]
    floor: list[float | None]
    bytes_per_token: list[float | None]
    sum_loss: list[list[float]] | None
    sum_loss_start: list[float] | None
    sum_loss_trunk: list[list[float] | None] | None
    curves: Curves | None
    ledger: dict[str, Amount] | None
    plan: list[dict[str, Any]] | None
    probe: Probe | None
    stability: Any
    experiences: list[dict[str, float | None]] | None
    passes: dict[str, Count]
    visits: dict[str, Count]
    steps: Count
    flops: Any
    parameters: dict[str, Count]
    peak_memory_bytes: float | None
    stored_bytes: float | None
    exemplars: float | None
    exemplar_bytes: float | None
    final_state_sha256: str
    tuning: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    git: dict[str, Any]
    created: str
    finished: str | None
    pid: Count
    process: dict[str, Any]
    resumed: Count
    marks: list[str]
    checksum: str


_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_FINISHED = {
    "if": {"properties": {"status": {"const": "ok"}}},
    "then": {
        "anyOf": [
            {"required": ["correct"], "properties": {"correct": {"type": "array"}}},
            {"required": ["sum_loss", "ledger"], "properties": {"sum_loss": {"type": "array"}}},
        ]
    },
}


def _of(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a type."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin in (Required, NotRequired):
        return _of(args[0])
    if origin is Annotated:
        return _of(args[0]) | dict(args[1:])
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        parts = [_of(arg) for arg in args]
        return {"type": [part["type"] for part in parts]} if all(set(p) == {"type"} for p in parts) else {"anyOf": parts}
    if origin is list:
        return {"type": "array"} | ({"items": items} if (items := _of(args[0])) else {})
    if origin is dict:
        return {"type": "object"} | ({"additionalProperties": inner} if (inner := _of(args[1])) else {})
    if isinstance(kind, type) and issubclass(kind, dict):
        return _object(kind)
    return {"type": _PLAIN[kind]}


def _object(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a TypedDict; its docstring is the description."""
    hints = get_type_hints(kind, include_extras=True)
    made: dict[str, Any] = {"description": " ".join((kind.__doc__ or "").split()), "type": "object"}
    made["properties"] = {name: _of(hint) for name, hint in hints.items()}
    return made | {"required": [name for name in hints if name in kind.__required_keys__]}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a record, as a plain dictionary."""
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"clbench record, schema {SCHEMA}",
    }
    return head | _object(Record) | _FINISHED


def text() -> str:
    """`record.schema.json`."""
    return json.dumps(json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    print(text(), end="")
