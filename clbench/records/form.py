"""What a record is: one class, the same for every kind of run, checked with pydantic. `fault` says what is wrong with one.

`record.schema.json` is generated from it: `python -m clbench.records.form` prints the file's text, a test compares. Unknown
keys are allowed everywhere: newer records stay readable.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Discriminator, Field, InstanceOf, Tag
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from typing_extensions import TypedDict  # typing's is not enough for pydantic before Python 3.12

from clbench.records.migrations import SCHEMA
from clbench.records.rows import ACCURACY, BINS, LOSSES

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
    """The stream: its manifest's hash, what the experiences bring, what the learner may use.

    `class_names` stand in the order of `class_order`; they are left out where every class is named by its id.
    """

    model_config = _FORM
    name: Text
    kind: Text | None = None
    unit: Literal["tokens", "images"] | None = None
    manifest_sha256: Text | None = None
    num_experiences: Count | None = None
    class_order: list[Whole] | None = None
    class_names: list[Text] | None = None
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
    evaluators: dict[str, Text] = {}
    code: dict[str, Text] = {}
    checksum: Text | None = None


assert Record.model_fields["schema_"].annotation == Literal[SCHEMA]


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
