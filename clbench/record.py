"""One JSON file per run: identity, counts, costs. Immutable once it says ok; derived numbers are recomputed by `report`.

Written to a temporary name in the same folder and moved with `os.replace`; carries a checksum over itself, so that a
changed record is noticed. Unknown keys are kept: newer records stay readable.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

from clbench.interfaces import UserError

SCHEMA = 1
NUMBERS_VERSION = 1
STATUSES = ("running", "ok", "failed")
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


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same text for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()


def run_id(config: dict[str, Any], manifest_sha256: str, weights_sha256: str, plugin: str | None) -> str:
    """Identity of a run, 16 hex digits: configuration without machine options, stream, weights, plug-in, numbers version."""
    return digest([NUMBERS_VERSION, config, manifest_sha256, weights_sha256, plugin])[:16]


def checksum(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its own checksum."""
    return digest({key: value for key, value in record.items() if key != "checksum"})


def ensure_writable(folder: pathlib.Path) -> None:
    """Make a folder and try to write into it, or raise `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".try-", suffix=".tmp")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file in one move; on a full disk the old file stays and `UserError` is raised."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def write(record: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Write a record to `folder`/<run_id>.json with its checksum -> the path."""
    whole = copy.deepcopy(record)
    whole["checksum"] = checksum(json.loads(json.dumps(whole)))
    path = folder / f"{record['run_id']}.json"
    write_text(path, _pretty(whole))
    return path


def _pretty(record: dict[str, Any]) -> str:
    """Readable in a review: one line per key, tables one line per row."""
    lines = []
    for key, value in record.items():
        rows = isinstance(value, list) and value and all(isinstance(v, list) for v in value)
        if rows:
            text = "[\n" + ",\n".join("  " + json.dumps(row) for row in value) + "\n ]"
        elif isinstance(value, dict):
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(path: pathlib.Path) -> dict[str, Any]:
    """Read and validate one record; `UserError` names the file and the key."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a record: {error}") from None
    why = fault(record)
    if why:
        raise UserError(f"{path} is not a record: {why}")
    return record


def fault(record: Any) -> str | None:
    """Why a value is no record, or None."""
    if not isinstance(record, dict):
        return "not a JSON object"
    for key, kind in _NEEDED.items():
        if key not in record:
            return f"key {key!r} is missing"
        if not isinstance(record[key], kind) or (kind is int and isinstance(record[key], bool)):
            return f"key {key!r} has the wrong type {type(record[key]).__name__}"
    if record["schema"] > SCHEMA:
        return f"schema {record['schema']} is newer than this clbench knows ({SCHEMA})"
    if record["status"] not in STATUSES:
        return f"status {record['status']!r} is none of {', '.join(STATUSES)}"
    if any(not isinstance(record[part].get("name"), str) for part in ("scenario", "learner", "model")):
        return "scenario, learner and model need a name"
    if record["status"] == "ok" and not _is_table(record.get("correct"), len(record["n"])) and "sum_loss" not in record:
        return "key 'correct' must be a table with a column for each evaluation set"
    if len(record["first_seen"]) != len(record["n"]):
        return "keys 'n' and 'first_seen' differ in length"
    return None


def _is_table(value: Any, columns: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(row, list) and len(row) == columns for row in value)
        and all(cell is None or (isinstance(cell, int) and not isinstance(cell, bool)) for row in value for cell in row)
    )


def read_all(folder: pathlib.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every record of a folder in the order of file names, and a line for each file that is none."""
    records, problems = [], []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            record = read(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if record["run_id"] != path.stem:
            problems.append(f"{path} holds run {record['run_id']}")
            continue
        records.append(record)
    return records, problems


def is_dead(record: dict[str, Any], results: pathlib.Path) -> bool:
    """Whether a record says `running` although no process holds the run's lock."""
    if record["status"] != "running":
        return False
    lock = results / "runs" / record["run_id"] / "lock"
    if not lock.exists():
        return True
    from filelock import FileLock, Timeout

    try:
        with FileLock(str(lock), timeout=0):
            return True
    except Timeout:
        return False
    except OSError:
        return True
