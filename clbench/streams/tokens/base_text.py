"""The text that the decoder of the made text tasks is pre-trained on: half of it Markov text, half lines. Imports no torch.

    1/2   letters and blanks of a Markov chain, whose entropy is known: the *old text*, on which forgetting of what pre-training
          knew is measured
    .3    lines of `copy`, and of a lookup: pairs of a letter and a digit, a letter that is asked, its digit
    .2    four lines under one random tag, all reversed or all shifted by one number, drawn anew: what reversing and shifting
          is can be learned of them, which tag means what cannot

A row of lines begins with a line, as every question of a task does. What stands before `=` is drawn letter by letter, so only
answers count in the loss. Own choices: shares of lookups, lengths.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from clbench.streams import rng
from clbench.streams.tokens import languages
from clbench.streams.tokens.made_tasks import ALPHABET, END, EQUALS, MadeTask, walks
from clbench.streams.tokens.markov import Markov
from clbench.streams.tokens.texts import window_floor

SYMBOLS = ALPHABET + " "
CONTEXT = 96
_BYTES = np.frombuffer(SYMBOLS.encode(), np.uint8)


@cache
def language() -> Markov:
    """The source of old text, over the numbers of `SYMBOLS`."""
    made: Any = languages.synthetic(len(SYMBOLS), len(SYMBOLS), "markov", 0.0, 0, 0)
    return made


def old_text(count: int, length: int, key: int) -> np.ndarray:
    """Rows of Markov text [count, length] int64 as bytes."""
    return _BYTES[walks(language(), count, length, key)].astype(np.int64)


def old_floor(rows: np.ndarray) -> float:
    """Exact loss of the source on rows of `old_text`, nats per predicted byte."""
    places = np.zeros(256, np.int64)
    places[_BYTES] = np.arange(len(SYMBOLS))
    return window_floor(language(), places[rows])


def text(count: int, length: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the mixture [count, length] int64 as bytes, each of one kind, and which bytes count in the loss (bool)."""
    kinds = rng.uniform(rng.key(key, "kind"), np.arange(count))
    made = np.empty((count, length), np.int64)
    made[kinds < 0.5] = old_text(int((kinds < 0.5).sum()), length, rng.key(key, "old"))
    for i in np.flatnonzero(kinds >= 0.5):
        draw, own = (_known if kinds[i] < 0.8 else _fresh), rng.key(key, "lines", int(i))
        row, n = b"", 0
        while len(row) < length:
            row, n = row + draw(rng.key(own, n)), n + 1
        made[i] = np.frombuffer(row[:length], np.uint8)
    marks = (made == EQUALS).astype(np.int64) - (made == END)
    counts = np.zeros((count, length), bool)
    counts[:, 1:] = marks.cumsum(1)[:, :-1] > 0
    return made, counts | (kinds < 0.5)[:, None]


def _known(key: int) -> bytes:
    """A line of copy or of lookup."""
    a, b = rng.integers(rng.key(key, "which"), 2, 1 << 16)
    if a % 3:
        ((word, answer),) = MadeTask("copy", ()).pairs(key, 1)
        return f"{MadeTask('copy', ()).tag}{word}={answer}\n".encode()
    letters = rng.permutation(rng.key(key, "letters"), 26)[:4]
    digits = rng.integers(rng.key(key, "digits"), 4, 10)
    said = "".join(f"{ALPHABET[x]}{d}" for x, d in zip(letters, digits, strict=True))
    return f"ka{said}{ALPHABET[letters[b % 4]]}={digits[b % 4]}\n".encode()


def _fresh(key: int) -> bytes:
    """Four lines of one function under one tag."""
    which, a, b = rng.integers(rng.key(key, "which"), 3, 1 << 16)
    task = MadeTask("reverse", ()) if which % 2 else MadeTask("shift", (1 + int(a) % 25,))
    tag = ALPHABET[a // 26 % 26] + ALPHABET[b % 26]
    return "".join(f"{tag}{word}={answer}\n" for word, answer in task.pairs(rng.key(key, "words"), 4)).encode()
