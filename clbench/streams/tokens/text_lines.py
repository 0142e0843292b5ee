"""Text tasks as a stream: lines with a prompt and an answer, one task after another. Imports no torch.

A *line* is a prompt and an answer that ends with the end token; a learner is trained to say the answer after the prompt. A task
is an experience and an evaluation set of other lines. Every set is asked from the start, so that transfer to later tasks is
known. The *old text* is of the kind that the decoder was pre-trained on: what it loses there is what pre-training knew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from clbench.interfaces import Budget, Facts, UserError
from clbench.streams.entries import EvalEntry, ExperienceEntry
from clbench.streams.manifest import TEXTS, Manifest
from clbench.streams.manifest_rules import budget_of
from clbench.streams.manifest_text import described

Part = bytes | np.ndarray  # bytes, or tokens [L]
Pair = tuple[Part, Part]


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines one after another: `tokens` int32, line i from starts[i] to starts[i + 1], prompts[i] of them a prompt."""

    tokens: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    @staticmethod
    def of(pairs: Iterable[Pair]) -> Lines:
        """Prompts and answers as tokens; of bytes, a token is a byte."""
        found = list(pairs)
        sizes = [len(p) + len(a) for p, a in found]
        parts = [np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part for pair in found for part in pair]
        tokens = np.concatenate(parts).astype(np.int32)
        return Lines(tokens, np.concatenate([[0], np.cumsum(sizes)]), np.array([len(p) for p, _ in found], np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each line [N]."""
        return np.diff(self.starts)

    def line(self, i: int) -> np.ndarray:
        """The tokens of a line [L] int32, a copy."""
        return self.tokens[self.starts[i] : self.starts[i + 1]].copy()

    def sha256(self) -> str:
        """Over prompts and answers."""
        found = hashlib.sha256()
        for array in (self.tokens, self.starts, self.prompts):
            found.update(np.ascontiguousarray(array, "<i8").tobytes())
        return found.hexdigest()


class Task(NamedTuple):
    """One task: its name, lines to train on and lines to ask, and how answers are scored beside exact matches."""

    name: str
    train: Sequence[Pair]
    test: Sequence[Pair]
    scores: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TextScenario:
    """A stream of text tasks that can be run.

    lines   of all tasks; ids of the manifest are their numbers
    old     old text [M, L], the first token of each row is given; no rows: none is asked
    floor   exact loss of the source on it, nats per token, where it is known
    gap     nats per token above the floor that the decoder may have on it: another does not know its text and is refused
    scores  of each evaluation set: names of `evaluation.generated.SCORES`
    decode  tokens of an answer -> text, for these
    """

    name: str
    manifest: Manifest
    lines: Lines
    old: np.ndarray
    floor: float | None = None
    gap: float | None = None
    scores: tuple[tuple[str, ...], ...] = ()
    decode: Callable[[np.ndarray], str] | None = None
    asks: ClassVar[Literal["next_token"]] = "next_token"

    @property
    def budget(self) -> Budget:
        """The rules of the stream."""
        return Budget(**self.manifest.budget)

    def facts(self) -> Facts:
        """What is compared with a learner's capabilities."""
        return Facts(self.name, "next_token", self.manifest.discloses_task, True, False, self.budget)

    def text(self) -> str:
        """The stream for people."""
        return self.manifest.text()

    def describe(self) -> dict[str, Any]:
        """What a record says about the stream and its evaluation sets."""
        found = described(self.manifest)
        known = {} if self.floor is None else {"old_floor": self.floor}
        return {**found, "scenario": {"name": self.name, **found["scenario"], **known}}


def scenario(
    name: str,
    dataset: str,
    tasks: Sequence[Task],
    *,
    old: np.ndarray | None = None,
    floor: float | None = None,
    gap: float | None = None,
    vocab: int = 256,
    discloses_task: bool = True,
    budget: Mapping[str, Any] | None = None,
    decode: Callable[[np.ndarray], str] | None = None,
) -> TextScenario:
    """Tasks in their order; the context is that of the longest line."""
    for task in tasks:
        if not task.train or not task.test:
            raise UserError(f"task {task.name} has {len(task.train)} training and {len(task.test)} test lines: it needs both")
    lines = Lines.of(pair for task in tasks for part in (task.train, task.test) for pair in part)
    old = np.zeros((0, 2), np.int64) if old is None else old
    experiences, evals, first = [], [], 0
    for i, task in enumerate(tasks):
        parts = [np.arange(len(part)) for part in (task.train, task.test)]
        experiences.append(ExperienceEntry(task.name, i, train=first + parts[0]))
        evals.append(EvalEntry(task.name, i, ids=first + len(parts[0]) + parts[1], first_seen=i))
        first += len(task.train) + len(task.test)
    sha = hashlib.sha256((lines.sha256() + hashlib.sha256(np.ascontiguousarray(old, "<i8").tobytes()).hexdigest()).encode())
    manifest = Manifest(
        kind=TEXTS,
        dataset={"name": dataset, "sha256": sha.hexdigest(), "num_samples": len(lines)},
        vocab=vocab,
        context=int(max(lines.lengths.max(), old.shape[1])),
        experiences=tuple(experiences),
        evals=tuple(evals),
        discloses_task=discloses_task,
        budget=budget_of(budget, "next_token").rules("next_token"),
    )
    return TextScenario(name, manifest, lines, old, floor, gap, tuple(task.scores for task in tasks), decode)
