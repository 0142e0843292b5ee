"""A corpus of token ids on disk, memory-mapped: a folder with two splits, their documents, and a manifest with checksums.

    manifest.json          what this is: vocabulary, tokenizer, counts, SHA-256 of every file
    SPLIT.tokens           ids, little-endian unsigned integers of 1, 2 or 4 bytes, an end mark after each document
    SPLIT.documents        where each document ends, little-endian 8-byte integers
    SPLIT.names            a line for each document
with SPLIT train and validation. `corpus_build` writes such folders. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import UserError

SCHEMA, KIND, MANIFEST = 1, "token_shards", "manifest.json"
SPLITS = ("train", "validation")
PARTS = ("tokens", "documents", "names")
HASHED_WHEN_OPENED = 256 << 20
_COUNTS = ("tokens", "documents", "bytes")


def width_of(vocab: int) -> str:
    """The narrowest stored type that holds ids 0..vocab-1."""
    return "u1" if vocab <= 1 << 8 else "<u2" if vocab <= 1 << 16 else "<u4"


@dataclass(frozen=True, eq=False)
class Shards:
    """An opened folder. Tokens stay on disk until they are read.

    manifest  its manifest.json, checked
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str, verify: bool | None = None) -> Shards:
        """Open a folder; `UserError` where it is not one, or damaged.

        verify  compare all checksums; None: those of files that are no larger than 256 MiB together. Sizes always are.
        """
        folder = Path(folder)
        made = cls(folder, _manifest(folder))
        sizes = 0
        for split, part in ((split, part) for split in SPLITS for part in PARTS):
            sizes += _check_size(made, split, part)
        if verify or (verify is None and sizes <= HASHED_WHEN_OPENED):
            for split, part in ((split, part) for split in SPLITS for part in PARTS):
                found = file_sha256(path := made.path(split, part))
                if found != made.manifest["splits"][split]["sha256"][part]:
                    raise UserError(f"{path} is damaged or was changed: its SHA-256 is not that of {folder / MANIFEST}")
        if verify:
            _check_content(made)
        return made

    def path(self, split: str, part: str) -> Path:
        """A file of a split."""
        return self.folder / f"{split}.{part}"

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self.manifest["vocab"]

    @property
    def end(self) -> int:
        """The id after each document."""
        return self.manifest["end"]

    @property
    def sha256(self) -> str:
        """SHA-256 of what a model reads: tokens, documents, splits, vocabulary; not of where they came from."""
        return self.manifest["sha256"]

    def split(self, name: str) -> np.ndarray:
        """All tokens of "train" or "validation" -> [M], mapped, read-only."""
        return self._map(name, "tokens", width_of(self.vocab))

    def documents(self, name: str) -> np.ndarray:
        """Where the documents of a split start and end (their end mark included) -> [N, 2] int64."""
        ends = np.asarray(self._map(name, "documents", "<u8"), np.int64)
        return np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)

    def names(self, name: str) -> list[str]:
        """The names of the documents of a split."""
        return self.path(name, "names").read_text(encoding="utf-8").split("\n")[:-1]

    def bytes_per_token(self, name: str) -> float:
        """Length of a split as UTF-8, an end mark counted as one byte, over its tokens."""
        entry = self.manifest["splits"][name]
        return entry["bytes"] / entry["tokens"]

    def text(self) -> str:
        """What there is, in a few lines."""
        m = self.manifest
        lines = [f"{self.folder}: {m['tokenizer']['name']}, {m['vocab']} token ids, sha256 {self.sha256}"]
        for split in SPLITS:
            entry = m["splits"][split]
            ratio = f"{self.bytes_per_token(split):.3f} bytes a token"
            lines.append(f"  {split:<11}{entry['tokens']:>13} tokens {entry['documents']:>9} documents  {ratio}")
        return "\n".join(lines)

    def _map(self, split: str, part: str, kind: str) -> np.ndarray:
        if split not in SPLITS:
            raise UserError(f"a corpus has the splits {' and '.join(SPLITS)}, not {split!r}")
        return np.memmap(self.path(split, part), kind, "r")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def content_key(manifest: Mapping[str, Any]) -> str:
    """The `sha256` of a manifest: over vocabulary, end mark, counts and checksums."""
    body = {name: manifest[name] for name in ("kind", "schema", "vocab", "end", "splits")}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"no folder of shards {folder}: clbench manifest corpus build TEXT --out {folder} makes one")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no folder of shards: it has no {MANIFEST}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"{path} is no manifest of shards")
    if found.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {found.get('schema')!r}, this clbench reads {SCHEMA}")
    if not _well_formed(found):
        raise UserError(f"{path} is damaged: something is missing or of another type")
    if content_key(found) != found["sha256"]:
        raise UserError(f"{path} was changed: its content has SHA-256 {content_key(found)}, it claims {found['sha256']}")
    return found


def _well_formed(m: Mapping[str, Any]) -> bool:
    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    try:
        good = whole(m["vocab"], 2) and whole(m["end"], 0) and m["end"] < m["vocab"] <= 1 << 32
        good = (
            good
            and isinstance(m["tokenizer"]["name"], str)
            and isinstance(m["sha256"], str)
            and set(m["splits"]) == set(SPLITS)
        )
        for entry in m["splits"].values():
            good = good and all(whole(entry[name], 1) for name in _COUNTS)
            good = good and all(isinstance(entry["sha256"][part], str) for part in PARTS)
        return good
    except (KeyError, TypeError, AttributeError):
        return False


def _check_size(shards: Shards, split: str, part: str) -> int:
    """Compare a file's size with the manifest -> its size."""
    path, entry = shards.path(split, part), shards.manifest["splits"][split]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{shards.folder} lacks {path.name}: {error.strerror or error}") from None
    width = {"tokens": np.dtype(width_of(shards.vocab)).itemsize, "documents": 8, "names": 0}[part]
    wanted = width * entry["documents" if part == "documents" else "tokens"]
    if width and size != wanted:
        raise UserError(f"{path} has {size} bytes, {shards.folder / MANIFEST} says {wanted}: it is cut or foreign")
    return size


def _check_content(shards: Shards) -> None:
    """Ids within the vocabulary; documents that follow each other and end with the mark."""
    for split in SPLITS:
        tokens, spans = shards.split(split), shards.documents(split)
        for start in range(0, len(tokens), 1 << 24):
            if int(tokens[start : start + (1 << 24)].max()) >= shards.vocab:
                raise UserError(f"{shards.path(split, 'tokens')} holds ids beyond the vocabulary of {shards.vocab}")
        if (spans[:, 1] <= spans[:, 0]).any() or spans[-1, 1] != len(tokens) or (tokens[spans[:, 1] - 1] != shards.end).any():
            raise UserError(f"{shards.path(split, 'documents')} does not fit the tokens")
