"""All records of a folder as one parquet file, a row each: `pd.read_parquet(FILE)`. Needs pyarrow (`clbench[tables]`).

Its columns are `COLUMNS` and one float64 column for each number that any record has, named as `clbench report explain` names
it; a number that a record does not have is null. Every column carries what it means in its metadata (`about`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.interfaces import UserError
from clbench.records import record
from clbench.report.columns import ACCURACY, EDITS, LOSS
from clbench.report.runs import Filter, Run, scan

FORM = "clbench-results/1"  # of the columns; a column that changes its meaning raises it
COLUMNS: dict[str, tuple[str, str]] = {
    "run_id": ("string", "identity of the run, and the name of its record"),
    "status": ("string", "ok, failed or running; numbers are null where it is not ok"),
    "scenario": ("string", "chosen name"),
    "kind": ("string", "what kind of stream: class_incremental, ..."),
    "manifest": ("string", "SHA-256 of the exact stream"),
    "experiences": ("int64", "evaluations after which the record holds a row"),
    "learner": ("string", "chosen name"),
    "learner_target": ("string", "class of the learner"),
    "plugin": ("string", "package and version of a learner from outside; null for clbench's own"),
    "model": ("string", "chosen name"),
    "model_state": ("string", "SHA-256 of the weights that the run began with"),
    "seed": ("int64", "of the run"),
    "variant": ("string", "short hash of everything but the seed: rows of the leaderboard"),
    "marks": ("string", "reference, transductive, adapts_at_test, test_tuned, classes_tuned, legacy, with spaces between"),
    "legacy": ("bool", "numbers of another numbers_version than this code's: not comparable"),
    "numbers_version": ("int64", "version of the code's numbers"),
    "precision": ("string", "fp32 or bf16"),
    "device": ("string", "what it ran on"),
    "clbench": ("string", "version of clbench"),
    "revision": ("string", "git revision of the code; null where none is known"),
    "dirty": ("bool", "whether the code had changes that were not committed"),
    "created": ("string", "when it began, ISO 8601"),
    "finished": ("string", "when it ended, ISO 8601"),
    "seconds": ("float64", "wall seconds in all"),
    "peak_memory_bytes": ("int64", "largest memory"),
    "stored_bytes": ("int64", "what the learner held at the end besides exemplars"),
    "exemplars": ("int64", "kept samples"),
    "config": ("string", "the whole configuration as JSON with sorted keys"),
    "checksum": ("string", "SHA-256 of the record"),
}


def row_of(entry: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """The columns of one record that are no numbers of evaluators."""
    git, machine = entry.get("git") or {}, entry.get("machine") or {}
    scenario, learner, model = entry["scenario"], entry["learner"], entry["model"]
    return {
        **{
            name: entry.get(name) for name in ("run_id", "status", "seed", "numbers_version", "created", "finished", "checksum")
        },
        **{name: entry.get(name) for name in ("peak_memory_bytes", "stored_bytes", "exemplars")},
        **{"scenario": scenario["name"], "kind": scenario.get("kind"), "manifest": scenario.get("manifest_sha256")},
        **{"experiences": scenario.get("num_experiences"), "learner": learner["name"], "learner_target": learner.get("target")},
        **{"plugin": learner.get("plugin"), "model": model["name"], "model_state": model.get("state_sha256")},
        **{"variant": run.variant, "marks": " ".join(run.marks), "legacy": run.legacy},
        **{"precision": entry["config"].get("precision"), "device": machine.get("device")},
        **{"clbench": (entry.get("versions") or {}).get("clbench"), "revision": git.get("revision"), "dirty": git.get("dirty")},
        **{"seconds": (entry.get("seconds") or {}).get("total"), "config": record.canonical(entry["config"])},
    }


def rows(results: Path, wanted: Filter | None = None) -> list[dict[str, Any]]:
    """A row for each record that is shown, numbers of evaluators behind the columns. `UserError` where there is none."""
    held: dict[str, dict[str, Any]] = {}
    found = scan(results, wanted, lambda entry, run: held.__setitem__(run.run_id, row_of(entry, run)))
    if not found.runs:
        raise UserError(f"no records in {results / 'records'}")
    return [held[run.run_id] | (dict(run.values) if run.usable else {}) for run in found.runs]


def write(made: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows of `rows` as parquet in one move."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("parquet needs pyarrow: pip install 'clbench[tables]'")
    import pyarrow as pa
    from pyarrow import parquet

    numbers = sorted({name for row in made for name in row} - COLUMNS.keys())
    kinds = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
    fields = [pa.field(name, kinds[kind], metadata={"about": about}) for name, (kind, about) in COLUMNS.items()]
    fields += [pa.field(name, pa.float64(), metadata={"about": number(name)}) for name in numbers]
    columns = {f.name: [row.get(f.name) for row in made] for f in fields}
    table = pa.table(columns, schema=pa.schema(fields, metadata={"clbench": FORM}))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def number(name: str) -> str:
    """What a number means, where the leaderboards' columns say it; else where to look."""
    for board in (ACCURACY, LOSS, EDITS):
        if said := board.about.get(f"{name}_mean"):
            return said.removeprefix("mean over seeds: ")
    return "a number that clbench report explain names" if "/" not in name else "a sum of an evaluator, divided by its n"


def schema_text() -> str:
    """The columns for people."""
    return "\n".join(f"  {name:<18} {kind:<8} {about}" for name, (kind, about) in COLUMNS.items())
