"""The failed record of a job that was refused before it had an identity; what a record says of an error."""

from __future__ import annotations

import pathlib
import traceback
from typing import Any

from clbench.records import record
from clbench.run import provenance


def path_of(config: dict[str, Any]) -> pathlib.Path:
    """Where a job that was refused before it had an identity leaves its failed record."""
    results = pathlib.Path(str(config["results_dir"])).expanduser().resolve()
    return results / "records" / f"{record.run_id(provenance.identity(config), '', '', None)}.json"


def write(config: dict[str, Any], error: Exception) -> pathlib.Path:
    """A job of a sweep that cannot even start is a failed record too; it goes when the same job starts after all."""
    path = path_of(config)
    entry = {
        "schema": record.SCHEMA,
        "run_id": path.stem,
        "status": "failed",
        "numbers_version": record.numbers_version(config),
        "config": provenance.identity(config),
        "scenario": {"name": str(config["scenario"].get("name", "?")), "manifest_sha256": ""},
        "learner": {"name": provenance.learner_name(config), "plugin": None},
        "model": {"name": provenance.model_name(config), "state_sha256": ""},
        "seed": config["seed"],
        "n": [],
        "first_seen": [],
        "correct": None,
        "seconds": {"total": 0.0},
        "finished": provenance.now(),
        "error": described(error),
    }
    return record.write(entry, path.parent)


def described(error: Exception) -> dict[str, Any]:
    """Type, message and traceback of an error."""
    text = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "message": str(error), "traceback": text}
