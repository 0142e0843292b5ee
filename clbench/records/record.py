"""One JSON file per run: identity, sums, costs. Immutable once it says ok; derived numbers are recomputed by `report`.

Written to a temporary name in the same folder and moved with `os.replace`; carries a checksum over itself, so that a
changed record is noticed. Unknown keys are kept: newer records stay readable. Older schemas are read through `migrations`.
On disk a record has the `form` of this schema; in memory it is the view with `tables`, a plain dictionary.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from clbench.config.moved import first_edition
from clbench.interfaces import UserError
from clbench.records import liveness, migrations
from clbench.records.migrations import SCHEMA
from clbench.records.rows import rows_of
from clbench.records.tables import tables

__all__ = ["SCHEMA"]

NUMBERS_VERSION = 1
_RAISED = (  # parts of a configuration whose runs have numbers of version 2: what the changelog names
    {"precision": "bf16"},
    {"learner": {"_target_": "clbench.learners.coda_prompt.CodaPrompt"}},
    {"learner": {"_target_": "clbench.learners.ovor.Ovor"}},
    {"learner": {"_target_": "clbench.learners.l2p.L2p", "variant": "l2p_pp"}},
    {"learner": {"_target_": "clbench.learners.dualprompt.DualPrompt", "compat_reshape": True}},
    {"learner": {"_target_": "clbench.learners.mos.Mos", "variant": "official_raw"}},
    {"learner": {"_target_": "clbench.learners.cbp.Cbp", "optimizer": "adam"}},
    {"learner": {"_target_": "clbench.learners.cls_er.ClsEr"}},
)
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same text for the same value."""
    return _CANONICAL.encode(value)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()


def numbers_version(config: Mapping[str, Any]) -> int:
    """Version of the code's numbers for a configuration: raised for the runs whose numbers a change moves, and no others."""
    learner = config.get("learner") or {}
    ours = str(learner.get("_target_")).startswith("clbench.learners.")
    updates = learner.get("updates", 1)  # below 1 they are counted over the run, not in an experience
    seldom = ours and isinstance(updates, int | float) and updates < 1
    return 2 if seldom or any(_holds(config, part) for part in _RAISED) else NUMBERS_VERSION


def _holds(config: Any, part: Any) -> bool:
    """Whether every option of `part` has this value in a configuration."""
    if isinstance(part, Mapping):
        return isinstance(config, Mapping) and all(_holds(config.get(key), value) for key, value in part.items())
    return config == part


def run_id(
    config: dict[str, Any],
    manifest_sha256: str,
    weights_sha256: str,
    plugin: str | None,
    version: int | None = None,
    outside: Mapping[str, str] | None = None,
) -> str:
    """Identity of a run, 16 hex digits: configuration without machine options, stream, weights, plug-in, numbers version.

    `version`: `numbers_version(config)` where None. `outside`: versions of evaluators, scenario and
    operators that are not clbench's, by name.
    """
    version = numbers_version(config) if version is None else version
    parts = [version, _first_names(config), manifest_sha256, weights_sha256, plugin]
    return digest([*parts, dict(outside)] if outside else parts)[:16]


def _first_names(node: Any) -> Any:
    """A configuration with the targets that the first edition would name: a module that moves leaves the identity alone."""
    if isinstance(node, Mapping):
        return {k: first_edition(v) if k == "_target_" and isinstance(v, str) else _first_names(v) for k, v in node.items()}
    return [_first_names(item) for item in node] if isinstance(node, list | tuple) else node


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
    """Write a view (`tables`) as `folder`/<run_id>.json in the form of this schema with its checksum -> the path.

    Rows that it gives under `rows` add to those of its tables, and win where both speak of one place and sum.
    """
    form = rows_of(record) | {"schema": SCHEMA}
    path = folder / f"{record['run_id']}.json"
    write_text(path, _pretty(form | {"checksum": checksum(json.loads(json.dumps(form)))}))
    return path


def _pretty(record: dict[str, Any]) -> str:
    """Readable in a review: one line per key, tables one line per row."""
    return _text(record, "") + "\n"


def _text(value: Any, left: str) -> str:
    """JSON: keys of a mapping and rows of a table on lines of their own."""
    if isinstance(value, dict) and value:
        lines = [f"{left} {json.dumps(key)}: {_text(inner, left + ' ')}" for key, inner in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{left}}}"
    if isinstance(value, list) and any(isinstance(inner, list | dict) for inner in value):
        return "[\n" + ",\n".join(f"{left} {json.dumps(inner)}" for inner in value) + f"\n{left}]"
    return json.dumps(value)


def read(path: pathlib.Path, details: bool = True) -> dict[str, Any]:
    """Read and validate one record -> its view (`tables`); `UserError` names the file and the key.

    One of an older schema is migrated in memory. Without `details` the tables by class, head and bin are left out.
    """
    return checked(load(path), path, details)


def load(path: pathlib.Path) -> Any:
    """The JSON of a file as it lies there; `UserError` names the file."""
    from pydantic_core import from_json  # twice as fast as json, which says better what is wrong

    try:
        text = path.read_bytes()
        with contextlib.suppress(ValueError):
            return from_json(text)
        return json.loads(text.decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a record: {error}") from None


def checked(found: Any, path: pathlib.Path, details: bool = True) -> dict[str, Any]:
    """The view of what `load` gave, or `UserError`. A seal is looked at before the numbers of another version are marked."""
    old = migrations.is_old(found, SCHEMA)
    if old and found.get("schema", 0) in migrations.OTHER_NUMBERS and found.get("checksum") not in (None, checksum(found)):
        raise UserError(f"{path} is not a record: its checksum does not fit its content, so it is not migrated")
    try:
        found = migrations.migrate(found, SCHEMA) if old else found
        why = fault(found)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} is not a record: {type(error).__name__}: {error}") from None
    if why:
        raise UserError(f"{path} is not a record: {why}")
    return tables(found, details)


def fault(found: Any) -> str | None:
    """Why a value is no record as it lies on disk, in one line, or None; one of an older schema is migrated first."""
    from clbench.records.fault import fault  # here: pydantic is not imported by commands that read no record

    return fault(migrations.migrate(found, SCHEMA) if migrations.is_old(found, SCHEMA) else found)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that should be records, in order; a folder that cannot be listed raises `UserError`.

    Names that begin with a dot are files being written, or left by a writer that was killed.
    """
    try:
        found = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from None
    return sorted(path for path in found if path.suffix == ".json" and not path.name.startswith("."))


def entries(folder: pathlib.Path, problems: list[str], details: bool = True) -> Iterator[dict[str, Any]]:
    """Every record of a folder in the order of file names, one at a time; a line in `problems` for each file that is none."""
    for path in files(folder):
        try:
            record = read(path, details)
        except UserError as error:
            problems.append(str(error))
            continue
        if record["run_id"] != path.stem:
            problems.append(f"{path} holds run {record['run_id']}")
            continue
        yield record


def read_all(
    folder: pathlib.Path, keep: Callable[[Mapping[str, Any]], bool] | None = None, details: bool = True
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every record of a folder in the order of file names, and a line for each file that is none.

    `keep` chooses among them while they are read; without `details` the tables by class, head and bin are left out, which
    is most of a record. `entries` holds one at a time.
    """
    problems: list[str] = []
    return [record for record in entries(folder, problems, details) if keep is None or keep(record)], problems


def is_dead(record: dict[str, Any], results: pathlib.Path) -> bool:
    """Whether a record says `running` although its process is gone; one of which that is not known is not dead."""
    if record["status"] != "running":
        return False
    return not liveness.may_live(record.get("process"), results / "runs" / record["run_id"])
