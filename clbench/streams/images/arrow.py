"""Images in Arrow tables: `.parquet` files, and folders that the `datasets` library wrote with `save_to_disk`.

A folder holds data_*.arrow (streams of record batches), dataset_info.json (features: which column is an image, names of the
classes) and state.json (which files, in order); several splits lie in folders below dataset_dict.json. Images are encoded
files (`bytes`), or paths. Needs pyarrow, the extra `tables`.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.images.arrays import Pool
from clbench.streams.images.decoding import decoded
from clbench.streams.images.tables import chosen_columns, files_of, pool_of
from clbench.streams.scenario import ImageSource
from clbench.streams.splits import Share

DICT, INFO, STATE = "dataset_dict.json", "dataset_info.json", "state.json"


class EncodedImages:
    """Encoded images in memory, or in a file mapped into it: decoded when asked for. Safe to use from several threads."""

    shape = None

    def __init__(self, chunks: Sequence[Any], rows: np.ndarray, names: Sequence[str]) -> None:
        self.chunks, self.rows, self.names = chunks, rows, names
        self.first = np.cumsum([0, *(len(chunk) for chunk in chunks)])

    def __len__(self) -> int:
        return len(self.rows)

    def content(self, i: int) -> bytes:
        """The encoded image i."""
        part = int(np.searchsorted(self.first, self.rows[i], side="right")) - 1
        return self.chunks[part][int(self.rows[i] - self.first[part])].as_py()

    def sizes(self) -> list[int]:
        """Bytes of every encoded image."""
        compute = importlib.import_module("pyarrow.compute")
        found = [compute.binary_length(chunk).to_numpy(zero_copy_only=False) for chunk in self.chunks]
        return np.concatenate(found)[self.rows].tolist()

    def opened(self, i: int) -> tuple[IO[bytes], str]:
        """The bytes of image i to read from, and its name for messages."""
        return io.BytesIO(self.content(i)), self.names[i]

    def raw(self, ids: np.ndarray) -> list[np.ndarray]:
        """Pixels of samples by id: uint8 [H, W, 3] each. An image that cannot be decoded raises `UserError` with its name."""
        return [decoded(*self.opened(int(i))) for i in ids]


def _pyarrow(path: Path) -> Any:
    try:
        for part in ("ipc", "parquet"):
            importlib.import_module(f"pyarrow.{part}")
    except ImportError:
        raise UserError(f"{path} is an Arrow table: pip install 'clbench[tables]' brings pyarrow, which reads it") from None
    return importlib.import_module("pyarrow")


def read_parquet(path: Path, share: Share | None = None) -> Pool:
    """Read a `.parquet` table of images, or of paths, and labels."""
    pyarrow = _pyarrow(path)
    try:
        table = pyarrow.parquet.read_table(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: damaged, or no Parquet file ({' '.join(str(error).split())})") from None
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {}) if isinstance(described, dict) else {}
    return _pool(table, features, share, path, {})


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / DICT).is_file() or ((folder / INFO).is_file() and (folder / STATE).is_file())


def read_saved(folder: Path, share: Share | None = None) -> Pool:
    """Read a folder that `save_to_disk` wrote: one data set, or one for each split."""
    pyarrow = _pyarrow(folder)
    if not (folder / DICT).is_file():
        return _pool(_table(pyarrow, folder), _features(folder), share, folder, {})
    names = _json(folder / DICT).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and "/" not in name for name in names):
        raise UserError(f"{folder / DICT} names no splits")
    tables = [_table(pyarrow, folder / name) for name in names]
    features = _features(folder / names[0])
    try:
        table = pyarrow.concat_tables(tables)
    except pyarrow.ArrowException as error:
        raise UserError(f"{folder}: its splits have different columns ({' '.join(str(error).split())})") from None
    split = [name for name, part in zip(names, tables, strict=True) for _ in range(len(part))]
    return _pool(table, features, share, folder, {"split": split} if len(names) > 1 else {})


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a mapping")
    return found


def _features(folder: Path) -> Mapping[str, Any]:
    found = _json(folder / INFO).get("features")
    return found if isinstance(found, dict) else {}


def _table(pyarrow: Any, folder: Path) -> Any:
    """The rows of one split, mapped into memory."""
    state = _json(folder / STATE)
    if state.get("_indices_files"):
        raise UserError(f"{folder} holds a selection of rows: flatten_indices() before save_to_disk writes it plainly")
    files = [str(one.get("filename", "")) for one in state.get("_data_files") or () if isinstance(one, dict)]
    if not files or any(Path(name).name != name for name in files):
        raise UserError(f"{folder / STATE} names no data files")
    try:
        return pyarrow.concat_tables(
            [pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / name))).read_all() for name in files]
        )
    except OSError as error:
        raise UserError(f"cannot read the data files of {folder}: {error.strerror or error}") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read the data files of {folder}: {' '.join(str(error).split())}") from None


def _pool(table: Any, features: Mapping[str, Any], share: Share | None, path: Path, extra: dict[str, list[str]]) -> Pool:
    """Columns of an Arrow table -> samples; `extra` are columns that stand elsewhere."""
    found = chosen_columns([name for name in table.column_names if name.lower() not in extra], str(path))
    texts = {role: _texts(table[name], f"{path}: {name}") for role, name in found.items() if role != "path"} | extra
    names = _class_names(features.get(found["label"]), texts["label"], f"{path}: {found['label']}")
    column = table[found["path"]]
    fields = {field.name for field in column.type} if str(column.type).startswith("struct") else set()
    paths = _texts(column, f"{path}: {found['path']}") if not fields and "binary" not in str(column.type) else []

    def images(rows: np.ndarray) -> tuple[ImageSource, list[str]]:
        if paths:
            return files_of(path if path.is_file() else path / "table", [paths[i] for i in rows.tolist()])
        return _encoded(column, fields, rows, path)

    return pool_of(texts, images, share, str(path), paths, names)


def _texts(column: Any, where: str) -> list[str]:
    values = column.to_pylist()
    for row, value in enumerate(values):
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise UserError(f"{where}, row {row + 1} is {value!r}: expected text or a whole number")
    return [str(value) for value in values]


def _class_names(feature: Any, labels: Sequence[str], where: str) -> list[str]:
    """Names of the classes where the feature is a ClassLabel and every label has one; else none."""
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    if not isinstance(names, list):
        return []
    for row, label in enumerate(labels):
        if not label.isdecimal() or int(label) >= len(names):
            raise UserError(f"{where}, row {row + 1} is {label}: it has no name among {len(names)} classes")
    return [str(name) for name in names]


def _encoded(column: Any, fields: set[str], rows: np.ndarray, path: Path) -> tuple[ImageSource, list[str]]:
    """A column of encoded images: binary, or structures of `bytes` and `path`."""
    if fields and "bytes" not in fields:
        raise UserError(f"{path}: its images are structures of {', '.join(sorted(fields))}; expected bytes and path")
    named = (
        [one.as_py() for chunk in column.chunks for one in chunk.field("path")] if "path" in fields else [None] * len(column)
    )
    chunks = [chunk.field("bytes") if fields else chunk for chunk in column.chunks]
    missing = np.concatenate([chunk.is_null().to_numpy(zero_copy_only=False) for chunk in chunks])
    names = [f"{path}, row {i + 1}" + (f" ({named[i]})" if named[i] else "") for i in rows.tolist()]
    if missing[rows].any():
        name = names[int(missing[rows].argmax())]
        raise UserError(f"{name}: the image is not embedded, only its path; save it with its bytes")
    return EncodedImages(chunks, rows, names), [str(i) for i in rows.tolist()]
