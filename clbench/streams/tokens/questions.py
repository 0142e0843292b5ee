"""Multiple-choice questions made of a validation text: which continuation follows, what stands in a gap. Imports no torch.

Each question is made of one window [L + 1] of an evaluation set, and its wrong options of other windows of the same set, so
that the domain alone gives nothing away. In a text of bytes options are whole words; elsewhere they are spans of fixed length.
Options are distinct, and no draw is made: the same windows give the same questions.

completion  the front of the window is given, up to the first word of its second half; options go on from there for at most
            L / 4 bytes, and end with a word (the form is that of HellaSwag, Zellers et al. 2019, arXiv 1905.07830)
cloze       a word of the second half is missing, of 4 to L / 8 bytes (of L / 8, where that is less than 4); options are such
            words, with a capital letter or without as it is; the L / 8 bytes behind the gap are given too (the form is that
            of the Children's Book Test, Hill et al. 2016, arXiv 1511.02301)
Tokens that are not bytes: a completion has L / 4 of them, a gap is one.

answer      which of the two bits a row of a LEGO chain ends with (`lego.py`): the one thing in it that reasoning can tell
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clbench.interfaces import UserError

OPTIONS = 4
SHORTEST = 16  # context from which questions can be made


@dataclass(frozen=True, eq=False)
class Question:
    """Tokens before the options, the options (the right one first), tokens behind them."""

    before: np.ndarray
    options: tuple[np.ndarray, ...]
    after: np.ndarray


def letters(tokens: np.ndarray) -> np.ndarray:
    """Which bytes belong to words: ASCII letters and every byte of a longer UTF-8 character -> [...] bool."""
    lower = tokens | 32
    return ((lower >= 97) & (lower <= 122) & (tokens < 128)) | (tokens >= 128)


def words(window: np.ndarray) -> np.ndarray:
    """Whole words of a window, those that touch its ends left out -> [N, 2] starts and ends."""
    change = np.flatnonzero(np.diff(letters(window).astype(np.int8))) + 1
    if letters(window)[0]:
        change = change[1:]
    return change[: len(change) // 2 * 2].reshape(-1, 2)


def completions(windows: np.ndarray, of_bytes: bool) -> list[Question]:
    """One question for each window [N, L + 1] that has one."""
    length = windows.shape[1] - 1
    spans = []
    for window in windows:
        if not of_bytes:
            spans.append((length // 2, length // 2 + length // 4))
            continue
        found = words(window)
        starts = found[(found[:, 0] >= length // 2) & (found[:, 0] <= length * 3 // 4), 0]
        start = int(starts[0]) if len(starts) else length
        ends = found[(found[:, 0] >= start) & (found[:, 1] <= start + length // 4), 1]
        spans.append((start, int(ends[-1])) if len(ends) else None)
    return _questions(windows, spans, 0, lambda a, b: True)


def clozes(windows: np.ndarray, of_bytes: bool) -> list[Question]:
    """One question for each window [N, L + 1] that has one."""
    length = windows.shape[1] - 1
    spans = []
    for window in windows:
        if not of_bytes:
            spans.append((length // 2, length // 2 + 1))
            continue
        found = words(window)
        size = found[:, 1] - found[:, 0]
        good = (size >= min(4, length // 8)) & (size <= length // 8)
        found = found[good & (found[:, 0] >= length // 2) & (found[:, 0] <= length * 3 // 4)]
        spans.append((int(found[0, 0]), int(found[0, 1])) if len(found) else None)
    return _questions(windows, spans, length // 8, _same_case if of_bytes else lambda a, b: True)


def answers(windows: np.ndarray, of_bytes: bool) -> list[Question]:
    """One question of two options for each window [N, L + 1] that holds "val 0," or "val 1,"."""
    made, bits = [], [np.array([48]), np.array([49])]
    for window in windows:
        text = bytes(window.astype(np.uint8)) if window.max() < 128 else b""
        at = max(text.rfind(b"val 0,"), text.rfind(b"val 1,")) + 4
        if at > 4:
            made.append(Question(window[:at], tuple(bits if text[at] == 48 else bits[::-1]), window[:0]))
    return made


KINDS: dict[str, Callable[[np.ndarray, bool], list[Question]]] = {
    "cloze": clozes,
    "completion": completions,
    "answer": answers,
}


def _same_case(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether both begin with a capital letter (of ASCII), or neither."""
    return bool(65 <= a[0] <= 90) == bool(65 <= b[0] <= 90)


def _questions(
    windows: np.ndarray,
    spans: Sequence[tuple[int, int] | None],
    behind: int,
    fits: Callable[[np.ndarray, np.ndarray], bool],
) -> list[Question]:
    """Wrong options of a window are those of the next windows that fit; one that finds too few asks nothing."""
    pieces = [(j, windows[j, span[0] : span[1]]) for j, span in enumerate(spans) if span is not None]
    made = []
    for place, (j, right) in enumerate(pieces):
        options = [right]
        for _, other in [*pieces[place + 1 :], *pieces[:place]]:
            if fits(right, other) and not any(np.array_equal(other, one) for one in options):
                options.append(other)
            if len(options) == OPTIONS:
                span = spans[j]
                assert span is not None
                made.append(Question(windows[j, : span[0]], tuple(options), windows[j, span[1] : span[1] + behind]))
                break
    return made


def check(names: Sequence[str], sets: Sequence[tuple[str, np.ndarray]], of_bytes: bool) -> None:
    """`UserError` where an evaluator that asks questions finds none in an evaluation set."""
    for name in names:
        for label, windows in sets if name in KINDS else ():
            if windows.shape[1] <= SHORTEST:
                raise UserError(f"evaluator {name} needs scenario.context of at least {SHORTEST}, got {windows.shape[1] - 1}")
            if not KINDS[name](windows, of_bytes):
                raise UserError(f"evaluator {name} finds no question in {label}: a larger scenario.eval_tokens may do")
