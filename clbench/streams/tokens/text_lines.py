"""Text tasks as a stream: lines with a prompt and an answer, one task after another. Imports no torch.

Experiences may also be *stages* of several tasks, and a later one may bring back a share of earlier lines: with specialised
tasks first and a general one behind them this is dual-stage mixed fine-tuning (DMT, Dong et al. 2024, arXiv 2310.05492).

A *line* is a prompt and an answer that ends with the end token; a learner is trained to say the answer after the prompt. A task
is an experience and an evaluation set of other lines. Every set is asked from the start, so that transfer to later tasks is
known. The *old text* is of the kind that the decoder was pre-trained on: what it loses there is what pre-training knew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from clbench.interfaces import Budget, Facts, UserError
from clbench.streams import rng
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
    owner   [N] int64, the task of each line
    old     old text [M, L], the first token of each row is given; no rows: none is asked
    floor   exact loss of the source on it, nats per token, where it is known
    gap     nats per token above the floor that the decoder may have on it: another does not know its text and is refused
    scores  of each evaluation set: names of `evaluation.generated.SCORES`
    decode  tokens of an answer -> text, for these
    target  [M] int64, lines that are the target of a selection: neither trained on nor asked
    """

    name: str
    manifest: Manifest
    lines: Lines
    owner: np.ndarray
    old: np.ndarray
    floor: float | None = None
    gap: float | None = None
    scores: tuple[tuple[str, ...], ...] = ()
    decode: Callable[[np.ndarray], str] | None = None
    target: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    asks: ClassVar[Literal["next_token"]] = "next_token"

    @property
    def budget(self) -> Budget:
        """The rules of the stream."""
        return Budget(**self.manifest.budget)

    def facts(self) -> Facts:
        """What is compared with a learner's capabilities."""
        has = {"has_target": bool(len(self.target))}
        return Facts(self.name, "next_token", self.manifest.discloses_task, True, False, self.budget, **has)

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
    target: Sequence[tuple[int, Sequence[Pair]]] = (),
    discloses_task: bool = True,
    budget: Mapping[str, Any] | None = None,
    decode: Callable[[np.ndarray], str] | None = None,
    stages: Sequence[int] | None = None,
    old_share: float = 0.0,
) -> TextScenario:
    """Tasks in their order; the context is that of the longest line.

    stages     how many tasks each experience has; None: one. Where one has several, no task is disclosed
    target     (number of a task, further lines of it): what a learner may be told to become good at; they stand last
    old_share  of the training lines of each earlier task, drawn once: they stand among the new ones of every later experience
    """
    _check_tasks(tasks)
    every = [part for task in tasks for part in (task.train, task.test)] + [part for _, part in target]
    lines = Lines.of(pair for part in every for pair in part)
    old = np.zeros((0, 2), np.int64) if old is None else old
    sizes = np.array([(len(task.train), len(task.test)) for task in tasks])
    edges = np.concatenate([[0], np.cumsum(sizes.ravel())])
    parts = [np.arange(a, b) for a, b in pairwise(edges.tolist())]  # training and test lines of each task in turn
    owner = np.repeat([*range(len(tasks)), *(i for i, _ in target)], [*sizes.sum(1), *(len(part) for _, part in target)])
    groups, names = _stages(len(tasks), stages), [task.name for task in tasks]
    kept = [_drawn(part, old_share, i) for i, part in enumerate(parts[::2])] if old_share else []
    experiences, evals = [], []
    for s, group in enumerate(groups):
        own = [parts[2 * i] for i in group] + kept[: group[0]]
        experiences.append(ExperienceEntry("+".join(names[i] for i in group), group[0], train=np.concatenate(own)))
        evals += [EvalEntry(names[i], i, ids=parts[2 * i + 1], first_seen=s) for i in group]
    mixed = len(groups) < len(tasks) or bool(old_share)
    manifest = Manifest(
        kind=TEXTS,
        dataset={"name": dataset, "sha256": _sha256(lines, old), "num_samples": len(lines)},
        vocab=vocab,
        context=int(max(lines.lengths.max(), old.shape[1])),
        experiences=tuple(experiences),
        evals=tuple(evals),
        discloses_task=discloses_task and not mixed,
        budget=budget_of(budget, "next_token").rules("next_token"),
    )
    wanted = np.arange(edges[-1], len(lines))
    return TextScenario(name, manifest, lines, owner, old, floor, gap, tuple(task.scores for task in tasks), decode, wanted)


def _check_tasks(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if not task.train or not task.test:
            raise UserError(f"task {task.name} has {len(task.train)} training and {len(task.test)} test lines: it needs both")


def _sha256(lines: Lines, old: np.ndarray) -> str:
    """Over all lines and the old text."""
    rows = hashlib.sha256(np.ascontiguousarray(old, "<i8").tobytes()).hexdigest()
    return hashlib.sha256((lines.sha256() + rows).encode()).hexdigest()


def _stages(tasks: int, stages: Sequence[int] | None) -> list[range]:
    """The numbers of the tasks of each experience; `UserError` where `stages` does not count them."""
    sizes = [1] * tasks if stages is None else list(stages)
    if not all(type(n) is int and n >= 1 for n in sizes) or sum(sizes) != tasks:
        raise UserError(f"scenario.stages must be whole numbers from 1 whose sum is the {tasks} tasks, got {sizes}")
    edges = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    return [range(a, b) for a, b in pairwise(edges)]


def _drawn(ids: np.ndarray, share: float, task: int) -> np.ndarray:
    """A share of a task's training lines, without replacement, in their order."""
    chosen = rng.permutation(rng.key("text_tasks", "old lines", task), len(ids))[: round(share * len(ids))]
    return ids[np.sort(chosen)]
