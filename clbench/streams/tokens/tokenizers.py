"""Tokenizers: bytes, or a tokenizer file of the `tokenizers` package (extra: text). Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clbench.interfaces import UserError


class Encoder(Protocol):
    """vocab: number of ids; end: the id after each document; describe: name and checksum for the manifest."""

    vocab: int
    end: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without any added mark."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids; what is no text is replaced."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values; the same values mean the same ids."""
        ...


class Bytes:
    """UTF-8 bytes; the end mark is byte 0, which does not occur in text."""

    vocab, end = 256, 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]
        if any(not part.all() for part in found):
            raise UserError("a text holds a zero byte, which is the end mark of bytes: it is no plain text")
        return found

    def decode(self, ids: np.ndarray) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", "replace")

    def describe(self) -> dict[str, Any]:
        return {"name": "bytes"}


class TokenizerFile:
    """A tokenizer.json. `end`: the token after each document, by its text; None: the first usual one that it has."""

    USUAL = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

    def __init__(self, path: Path, end: str | None = None):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("--tokenizer needs the package tokenizers: pip install 'clbench[text]'") from None
        try:
            content = path.read_bytes()
            self._made = Tokenizer.from_str(content.decode("utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except Exception as error:  # the package raises bare Exceptions
            raise UserError(f"{path} is no tokenizer file: {str(error).splitlines()[0][:120]}") from None
        self._made.no_truncation()
        self._made.no_padding()
        self._made.encode_special_tokens = True  # a mark that is spelled out in a text is text
        known = self._made.get_vocab(with_added_tokens=True)
        if len(known) < 2:
            raise UserError(f"{path}: the tokenizer has no vocabulary")
        mark = end if end is not None else next((word for word in self.USUAL if word in known), None)
        if mark is None or mark not in known:
            what = f"has no token {end!r}" if end is not None else f"has none of {', '.join(self.USUAL)}"
            raise UserError(f"{path}: the tokenizer {what}: --end names the token that stands after each document")
        self.vocab, self.end = max(known.values()) + 1, known[mark]
        self._about = {"name": path.name, "sha256": hashlib.sha256(content).hexdigest(), "end": mark}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._made.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in found]

    def decode(self, ids: np.ndarray) -> str:
        return self._made.decode([int(i) for i in ids], skip_special_tokens=False)

    def describe(self) -> dict[str, Any]:
        return dict(self._about)
