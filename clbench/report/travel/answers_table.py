"""The answers of many runs as one parquet file, a row for each sample that was asked: `pd.read_parquet(FILE)`. Needs pyarrow.

Made of RESULTS_DIR/predictions/RUN_ID.npz (`save_predictions=true`). What is written is counted again: the right answers of
each run, row and set are those of its record, and the file is the one that the record names. Columns: `COLUMNS`, each with
what it means in its metadata (`about`); the schema's own metadata holds FORM.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.records import predictions
from clbench.records.predictions import Predictions
from clbench.report.runs import Filter, scan

FORM = "clbench-predictions/1"  # of the columns; a column that changes its meaning raises it
COLUMNS: dict[str, tuple[str, str]] = {
    "run_id": ("name", "identity of the run, and the name of its record"),
    "scenario": ("name", "chosen name"),
    "learner": ("name", "chosen name"),
    "model": ("name", "chosen name"),
    "variant": ("name", "short hash of everything but the seed: rows of the leaderboard"),
    "seed": ("int64", "of the run"),
    "after": ("int32", "place of the evaluation, from 0: row of the accuracy matrix"),
    "set": ("int32", "place of the evaluation set, from 0: column of the accuracy matrix"),
    "set_name": ("name", "its name"),
    "sample": ("int64", "the data set's number of the sample"),
    "label": ("int32", "its class, as the learner sees it: classes are numbered in the order of their first appearance"),
    "answer": ("int32", "the class with the highest score; of a set that discloses its task, among the task's classes"),
    "right": ("bool", "whether answer is label"),
    "score": ("float32", "the answer's score"),
    "answers": ("classes", "up to five classes with the highest scores, highest first"),
    "scores": ("values", "their scores"),
    "source_class": ("int32", "the data set's own number of the label's class: class_order[label] of the record"),
}


def write(results: Path, path: Path, wanted: Filter | None = None) -> tuple[int, int]:
    """Write the answers of the chosen records of a folder in one move -> records, rows.

    `UserError` where no chosen record has answers, or where a file is not what its record says.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("parquet needs pyarrow: pip install 'clbench[tables]'")
    import pyarrow as pa
    from pyarrow import parquet

    light: dict[str, Mapping[str, Any]] = {}
    found = scan(results, wanted, lambda entry, run: light.__setitem__(run.run_id, _light(entry)))
    held = [run for run in found.runs if run.status == "ok" and light[run.run_id]["sha256"]]
    held = [run for run in held if predictions.path_of(results, run.run_id).is_file()]
    if not held:
        raise UserError(f"no chosen record of {results} has predictions; clbench run ... save_predictions=true keeps them")
    names = pa.dictionary(pa.int32(), pa.string())
    kinds = {"name": names, "int64": pa.int64(), "int32": pa.int32(), "bool": pa.bool_(), "float32": pa.float32()}
    kinds |= {"classes": pa.list_(pa.int32()), "values": pa.list_(pa.float32())}
    fields = [pa.field(name, kinds[kind], metadata={"about": about}) for name, (kind, about) in COLUMNS.items()]
    schema = pa.schema(fields, metadata={"clbench": FORM})
    temporary, rows = path.with_name(f".{path.name}.{os.getpid()}.tmp"), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for run in held:
                about = {name: getattr(run, name) for name in ("run_id", "scenario", "learner", "model", "variant", "seed")}
                for part in _parts(results, run.run_id, light[run.run_id]):
                    rows += (number := len(part["sample"]))
                    part |= {name: [value] * number for name, value in about.items()}
                    writer.write_table(pa.table({name: part[name] for name in COLUMNS}, schema=schema))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(held), rows


def _light(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is read of a record besides its run."""
    order = entry["scenario"].get("class_order")
    return {"sha256": entry.get("predictions_sha256"), "correct": entry.get("correct"), "order": order}


def _parts(results: Path, run_id: str, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns of each evaluation of each set of a run, counted against its record."""
    path = predictions.path_of(results, run_id)
    if predictions.sha256(path) != record["sha256"]:
        raise UserError(f"{path} does not hold the predictions that the record {run_id} names")
    found = predictions.read(path)
    made = []
    for i, row in enumerate(record["correct"] or ()):
        for j, count in enumerate(row):
            right = found.right(i, j)
            if (None if right is None else int(right.sum())) != count:
                raise UserError(f"{path}: set {j} after evaluation {i} does not give the {count} right answers of the record")
            if right is not None:
                made.append(_columns(found, i, j, right, record["order"]))
    return made


def _columns(found: Predictions, i: int, j: int, right: np.ndarray, order: Any) -> dict[str, Any]:
    """Columns of one evaluation of one set, a value for each of its samples."""
    answers, scores, y = found.answers[i, j], found.scores[i, j], found.y[j]
    source = None if order is None else np.asarray(order, np.int32)[y]
    return {
        "after": np.full(len(y), i, np.int32),
        "set": np.full(len(y), j, np.int32),
        "set_name": [found.sets[j]] * len(y),
        "sample": found.ids[j],
        "label": y,
        "answer": answers[:, 0],
        "right": right,
        "score": scores[:, 0],
        "answers": answers.tolist(),
        "scores": scores.tolist(),
        "source_class": [None] * len(y) if source is None else source,
    }


def schema_text() -> str:
    """The columns for people."""
    kinds = {"name": "string", "classes": "int32 list", "values": "float32 list"}
    return "\n".join(f"  {name:<13} {kinds.get(kind, kind):<13} {about}" for name, (kind, about) in COLUMNS.items())
