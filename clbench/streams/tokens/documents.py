"""Streaming reader of documents in text and JSONL files: neither a file nor a document must fit into memory. Imports no torch.

A reader yields (name, text): a name starts a document, None goes on with it.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from clbench.interfaces import UserError
from clbench.streams.file_kinds import HEAD, PACKED, no_text

MARK = b"<|doc|>"
PIECE = 1 << 20
LONGEST_LINE = 256 << 20
Piece = tuple[str | None, str]


class _Frames(io.RawIOBase):
    """The content of one zstd frame after another; EOFError where the last one is cut short."""

    def __init__(self, path: Path, start: Callable[[], Any]):
        self._file, self._start, self._frame = path.open("rb"), start, start()
        self._left, self._begun = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the file gives -> bytes; 0 at its end."""
        while not self._left:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._start(), False
            packed = packed or self._file.read(PIECE)
            if not packed:
                if self._begun:
                    raise EOFError("it ends inside a frame")
                return 0
            self._left, self._begun = self._frame.decompress(packed), True
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstd(path: Path, mode: str) -> Any:
    """A .zst file unpacked, by the package zstandard (extra: zst)."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} is compressed by zstd: pip install 'clbench[zst]' reads it, zstd -d unpacks it") from None
    return io.BufferedReader(_Frames(path, lambda: zstandard.ZstdDecompressor().decompressobj()))


_OPENERS: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _zstd}


def is_jsonl(path: Path) -> bool:
    """By its name: .jsonl, .ndjson or .json, perhaps compressed."""
    suffixes = path.suffixes[:-1] if path.suffix in PACKED else path.suffixes
    return bool(suffixes) and suffixes[-1] in (".jsonl", ".ndjson", ".json")


def check(path: Path) -> None:
    """`UserError` for a file that is no text: what it is, and what to do with it."""
    with _read_errors(path), _opened(path) as file:
        found = no_text(path, file.read(HEAD))
    if found is not None:
        raise UserError(f"{path} is {found}")


def _opened(path: Path) -> Any:
    return _OPENERS.get(path.suffix, open)(path, "rb")


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        if not error.strerror:  # the unpackers raise it without one for what is not theirs
            raise UserError(f"{path} cannot be unpacked: {error}") from None
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise UserError(f"{path} cannot be unpacked: {error}") from None


def read(path: Path, field: str = "text", name_field: str | None = None) -> Iterator[Piece]:
    """Pieces of the documents of a file; .gz, .xz, .bz2 and .zst (extra: zst) are unpacked on the way.

    Text: a line "<|doc|>name" starts a document; a file without one is a document named after the file. The line end before
    such a line, and the last one of the file, belong to no document. JSON lines (.jsonl, .ndjson, .json): a line is an object,
    its text stands under `field`, its name under `name_field`, else it is FILE:LINE. What cannot be read raises `UserError`.
    """
    check(path)
    stem = path.name.partition(".")[0]
    with _read_errors(path), _opened(path) as file:
        yield from _jsonl(file, path, field, name_field) if is_jsonl(path) else _text(file, stem)


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
    number, begun = 0, False
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
            if not begun and ".json" in path.suffixes:
                raise UserError(_one_document(path)) from None
            raise UserError(f"{where} is not JSON: {str(error)[:100]}") from None
        if not begun and not isinstance(found, dict) and ".json" in path.suffixes:
            raise UserError(_one_document(path))
        begun = True
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


def _one_document(path: Path) -> str:
    lines = f"jq -c '.[]' {path.name} > {path.name.partition('.')[0]}.jsonl"
    return f"{path} is one JSON document, not JSON lines: write an object on each line ({lines})"
