"""Writes folders of shards (see `corpus`): in bounded memory, whole documents to either split.

The folder appears in one move when everything in it is on disk; what a killed build left behind is removed by the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from clbench.interfaces import UserError
from clbench.streams.tokens import documents
from clbench.streams.tokens.corpus import KIND, MANIFEST, PARTS, SCHEMA, SPLITS, Shards, content_key, file_sha256, width_of
from clbench.streams.tokens.tokenizers import Encoder

PIECE = 1 << 18  # characters of a document that are encoded at once; longer ones are cut at a line end
BATCH = 1 << 21  # characters that wait to be encoded together


@dataclass(frozen=True)
class CorpusRecipe:
    """What a corpus is made from besides its files and its tokenizer.

    validation  this share of the documents (rounded, at least one) is set aside: those whose names, with `seed`, hash lowest
    field       of a JSONL object, where the text stands; `name_field` where the document's name does
    """

    validation: float = 0.05
    seed: int = 0
    field: str = "text"
    name_field: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise UserError(f"--validation must lie between 0 and 1, got {self.validation}")

    def place(self, name: str) -> int:
        """Where a document stands in the queue for validation, 64 bits: a pure function of its name."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:8], "little")


@dataclass
class _Split:
    """One split while it is written."""

    folder: Path
    name: str
    kind: str
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("tokens", "documents", "bytes"), 0))

    def __post_init__(self) -> None:
        self.files: dict[str, BinaryIO] = {part: open(self.folder / f"{self.name}.{part}", "wb") for part in PARTS}
        self.digests = {part: hashlib.sha256() for part in PARTS}

    def write(self, part: str, data: bytes) -> None:
        self.files[part].write(data)
        self.digests[part].update(data)

    def add(self, ids: np.ndarray, size: int) -> None:
        self.write("tokens", np.ascontiguousarray(ids, self.kind).tobytes())
        self.counts["tokens"] += len(ids)
        self.counts["bytes"] += size

    def end(self, mark: int, name: str) -> None:
        self.add(np.array([mark]), 1)
        self.counts["documents"] += 1
        self.write("documents", self.counts["tokens"].to_bytes(8, "little"))
        self.write("names", name.encode("utf-8") + b"\n")

    def close(self) -> dict[str, Any]:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {**self.counts, "sha256": {part: digest.hexdigest() for part, digest in self.digests.items()}}


def build(
    files: Sequence[Path],
    out: Path,
    encoder: Encoder,
    recipe: CorpusRecipe = CorpusRecipe(),
    progress: Callable[[int], object] | None = None,
) -> tuple[Shards, bool]:
    """Write a corpus -> it, and whether it had been there already, made from the same files in the same way.

    `progress(characters)` is told what was read. Raises `UserError` for files that cannot be read, an `out` that holds
    something else, no document in a split, and a disk that is full.
    """
    for path in files:
        documents.check(path)
    sources = [{"name": path.name, "bytes": _size(path), "sha256": file_sha256(path)} for path in files]
    plan = {"sources": sources, "tokenizer": encoder.describe(), "vocab": encoder.vocab, "end": encoder.end, **vars(recipe)}
    if out.exists():
        found = _same(out, plan)
        if found is None:
            raise UserError(
                f"{out} is there already and was made from other files or in another way: remove it or name another"
            )
        return found, True
    part = out.absolute().parent / f".{out.name}.part"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{part}.lock", timeout=0):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                _write(files, part, encoder, recipe, plan, progress)
                os.rename(part, out)
            finally:
                shutil.rmtree(part, ignore_errors=True)
                Path(f"{part}.lock").unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process builds {out} at this moment") from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    return Shards.open(out), False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _same(out: Path, plan: dict[str, Any]) -> Shards | None:
    try:
        found = Shards.open(out)
    except UserError:
        return None
    return found if all(found.manifest.get(name) == value for name, value in plan.items()) else None


def _write(
    files: Sequence[Path],
    folder: Path,
    encoder: Encoder,
    recipe: CorpusRecipe,
    plan: dict[str, Any],
    progress: Callable[[int], object] | None,
) -> None:
    last_held = _last_held(files, recipe)
    splits = {name: _Split(folder, name, width_of(encoder.vocab)) for name in SPLITS}
    try:
        for batch in _batches(files, recipe):
            encoded = _encoded(encoder, batch)
            for (_, name, text, last), ids in zip(batch, encoded, strict=True):
                split = splits["validation" if recipe.place(name) <= last_held else "train"]
                split.add(ids, len(text.encode("utf-8")))
                if last:
                    split.end(encoder.end, name)
            if progress is not None:
                progress(sum(len(text) for _, _, text, _ in batch))
    finally:
        entries = {name: split.close() for name, split in splits.items()}
    if not entries["train"]["documents"]:
        raise UserError("every document is in the validation split: a smaller --validation, or names that differ, would help")
    body = {"kind": KIND, "schema": SCHEMA, **plan, "splits": entries}
    body["sha256"] = content_key(body)
    (folder / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _last_held(files: Sequence[Path], recipe: CorpusRecipe) -> int:
    """The highest place of a document that is set aside: a first pass, which reads names only and keeps 8 bytes of each."""
    places, place = array("Q"), None
    for path in files:
        for name, text in documents.read(path, recipe.field, recipe.name_field):
            if name is not None:
                place = recipe.place(name)
            if text and place is not None:
                places.append(place)
                place = None
        place = None
    if len(places) < 2:
        raise UserError(f"{len(places)} documents: at least two are needed, because whole ones are set aside for validation")
    number = max(1, round(recipe.validation * len(places)))
    return int(np.partition(np.frombuffer(places, np.uint64), number - 1)[number - 1])


Part = tuple[Path, str, str, bool]  # file, document, text, whether it ends the document


def _encoded(encoder: Encoder, batch: Sequence[Part]) -> list[np.ndarray]:
    """Ids of the texts; the `UserError` of one that cannot be encoded names its file and document."""
    try:
        return encoder.encode([text for _, _, text, _ in batch])
    except UserError:
        for path, name, text, _ in batch:
            try:
                encoder.encode([text])
            except UserError as error:
                raise UserError(f"{path}, document {name}: {error}") from None
        raise


def _batches(files: Sequence[Path], recipe: CorpusRecipe) -> Iterator[list[Part]]:
    """Parts of documents in lists of about BATCH characters."""
    batch, size = [], 0
    for entry in _cut(files, recipe):
        batch.append(entry)
        size += len(entry[2])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut(files: Sequence[Path], recipe: CorpusRecipe) -> Iterator[Part]:
    """Documents in parts of about PIECE characters, cut at line ends where there are any; empty documents are left out."""
    for path in files:
        name, waiting, size, begun = "", [], 0, False
        for starts, text in documents.read(path, recipe.field, recipe.name_field):
            if starts is not None:
                if size or begun:
                    yield path, name, "".join(waiting), True
                name, waiting, size, begun = starts, [], 0, False
            if text:
                waiting.append(text)
                size += len(text)
            while size > PIECE:
                whole = "".join(waiting)
                at = whole.rfind("\n", 0, PIECE) + 1 or PIECE
                yield path, name, whole[:at], False
                waiting, size, begun = [whole[at:]], len(whole) - at, True
        if size or begun:
            yield path, name, "".join(waiting), True
