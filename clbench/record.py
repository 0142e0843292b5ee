"""One JSON file per run: identity, counts, costs. Immutable once it says ok; derived numbers are recomputed by `report`.

Written to a temporary name in the same folder and moved with `os.replace`; carries a checksum over itself, so that a
changed record is noticed. Unknown keys are kept: newer records stay readable.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import pathlib
import re
import secrets
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
_TABLES = ("correct", "correct_masked", "correct_top5")
_AMOUNTS = ("peak_memory_bytes", "stored_bytes", "exemplars", "exemplar_bytes")
_LARGEST = 1 << 53  # beyond it a count is no longer exact as a float


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
    """Write a file in one move; on a full disk or a stop the old file stays, and `UserError` is raised for the former."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
    return _fault_in_extras(record) or _fault_in_counts(record)


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
