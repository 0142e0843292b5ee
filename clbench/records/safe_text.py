"""Texts of records as a terminal may show them: a record is foreign input."""

from __future__ import annotations

import unicodedata
from typing import Any

_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: Any) -> str:
    """One line without control characters, broken surrogates and text-direction marks: nothing that a terminal obeys."""
    word = " ".join(str(text).split())
    if word.isascii() and word.isprintable():
        return word
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI else c for c in word)
