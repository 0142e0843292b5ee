"""Streaming reader of documents in text and JSONL files: neither a file nor a document must fit into memory. Imports no torch.

A reader yields (name, text): a name starts a document, None goes on with it.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from clbench.interfaces import UserError

MARK = b"<|doc|>"
PIECE = 1 << 20
LONGEST_LINE = 256 << 20
Piece = tuple[str | None, str]
_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def is_jsonl(path: Path) -> bool:
    """By its name: .jsonl or .ndjson, perhaps compressed."""
    return any(suffix in (".jsonl", ".ndjson") for suffix in path.suffixes[-2:])


def read(path: Path, field: str = "text", name_field: str | None = None) -> Iterator[Piece]:
    """Pieces of the documents of a file; .gz, .xz and .bz2 are unpacked on the way.

    Text: a line "<|doc|>name" starts a document; a file without one is a document named after the file. The line end before
    such a line, and the last one of the file, belong to no document. JSONL: a line is an object, its text stands under
    `field`, its name under `name_field`, else it is FILE:LINE. What cannot be read raises `UserError`.
    """
    opener = _OPENERS.get(path.suffix)
    stem = path.name.partition(".")[0]
    try:
        with opener(path, "rb") if opener else path.open("rb") as file:
            yield from _jsonl(file, path, field, name_field) if is_jsonl(path) else _text(file, stem)  # type: ignore[arg-type]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from None
    except (lzma.LZMAError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _text(file: BinaryIO, stem: str) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    line_start, started, held = True, False, ""
    while piece := file.readline(PIECE):
        if line_start and piece.startswith(MARK):
            name = piece[len(MARK) :].decode("utf-8").strip()
            started, held = True, ""
            yield " ".join(name.split()) or stem, ""
        else:
            text = decoder.decode(piece)
            if not started and text.strip():
                started = True
                yield stem, ""
            if started:
                whole = held + text
                held = "\n" if whole.endswith("\n") else ""
                yield None, whole.removesuffix("\n")
        line_start = piece.endswith(b"\n")
    decoder.decode(b"", final=True)


def _jsonl(file: BinaryIO, path: Path, field: str, name_field: str | None) -> Iterator[Piece]:
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        where = f"{path}, line {number}"
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            raise UserError(f"{where} is longer than {LONGEST_LINE >> 20} MiB")
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {str(error)[:100]}") from None
        if not isinstance(found, dict) or not isinstance(text := found.get(field), str):
            has = f"; it has {', '.join(map(str, list(found)[:8]))}" if isinstance(found, dict) else ""
            raise UserError(f"{where} has no text under {field!r} (--field names another){has}")
        if name_field is not None and name_field not in found:
            raise UserError(f"{where} has nothing under {name_field!r} (--name-field)")
        name = f"{path.name}:{number}" if name_field is None else " ".join(str(found[name_field]).split())
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{where}: the text holds half a surrogate pair") from None
        yield name, text
