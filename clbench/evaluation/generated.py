"""Answers that a decoder generates, and scores that compare them with the right ones as texts.

Decoding is greedy, to the end mark or to the length of the longest right answer of the set; nothing is cached. Scores of a line
are from 0 to 1 (published tables of TRACE have `similarity` from 0 to 100). An empty answer scores 0.

    normalised       equal in lower case, without punctuation, blanks squeezed; articles stay, as O-LoRA evaluates
    first_character  the same first character, as TRACE does for ScienceQA
    rouge_l          F1 of the longest common subsequence of words (Lin 2004), in lower case, of letters and digits
    similarity       share of matching characters 2 M / T of Python's `difflib` (Ratcliff/Obershelp)
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from clbench.evaluation.answers import AskedLines, NextToken, scores_of
from clbench.streams.tokens.text_data import TextBatch, asked_batches

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal_form(text: str) -> str:
    """Lower case, no punctuation, one blank between words."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def normalised(said: str, right: str) -> float:
    """Equal but for case, punctuation and blanks."""
    return float(bool(said.strip()) and normal_form(said) == normal_form(right))


def first_character(said: str, right: str) -> float:
    """The same first character."""
    return float(said[:1] == right[:1] != "")


def rouge_l(said: str, right: str) -> float:
    """F1 of the longest common subsequence of words."""
    a, b = (re.findall(r"[^\W_]+", text.lower()) for text in (said, right))
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


def similarity(said: str, right: str) -> float:
    """Share of characters in matching blocks."""
    return difflib.SequenceMatcher(None, said, right, autojunk=False).ratio() if said else 0.0


SCORES: dict[str, Callable[[str, str], float]] = {
    "normalised": normalised,
    "first_character": first_character,
    "rouge_l": rouge_l,
    "similarity": similarity,
}


def greedy(answer: NextToken, batch: TextBatch, vocab: int, length: int, end: int) -> list[np.ndarray]:
    """At most `length` tokens after each prompt of a batch, until all have said `end`; answers in the batch are not shown."""
    rows = [row[:n].cpu().numpy() for row, n in zip(batch.tokens, batch.prompts.tolist(), strict=True)]
    for _ in range(length):
        grown = TextBatch.of_lines(
            [np.append(row, 0) for row in rows], batch.prompts.numpy(), batch.tokens.device, task=batch.task
        )
        z = scores_of(answer, grown, vocab)  # of the token after each but the last, which is not there yet
        last = torch.tensor([len(row) - 1 for row in rows], device=z.device)
        chosen = z[torch.arange(len(rows), device=z.device), last].argmax(-1).cpu().numpy()
        rows = [np.append(row, token) for row, token in zip(rows, chosen, strict=True)]
        if all(end in row[n:] for row, n in zip(rows, batch.prompts.tolist(), strict=True)):
            break
    return [row[n:] for row, n in zip(rows, batch.prompts.tolist(), strict=True)]


class Generated:
    """Sums over lines of the scores that a set asks for; `decode` makes text of tokens up to the end mark."""

    name = "generated"

    def __init__(self, decode: Callable[[np.ndarray], str]):
        self.decode = decode

    def __call__(self, learner: Any, data: AskedLines) -> dict[str, int | float]:
        """Named sums over the lines of `data`."""
        lines, scores = data.lines, list[Sequence[float]]()
        length = int((lines.lengths - lines.prompts)[data.ids].max())
        for places, batch in asked_batches(lines, data.ids, data.size, data.device, data.task):
            end = int(lines.line(int(data.ids[0]))[-1])
            said = greedy(learner.next_token, batch, data.vocab, length, end)
            for place, tokens in zip(places, said, strict=True):
                i = int(data.ids[place])
                right = lines.line(i)[lines.prompts[i] :]
                texts = self.decode(tokens), self.decode(right)
                scores.append([SCORES[name](*texts) for name in data.scores])
        totals = np.sum(np.array(scores, np.float64), axis=0)
        return {"n": len(data)} | {name: float(total) for name, total in zip(data.scores, totals, strict=True)}
