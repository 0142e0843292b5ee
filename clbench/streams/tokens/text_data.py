"""What learners of text tasks are handed: lines of one task, batches of them, until the experience ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import Experience
from clbench.streams.handles import Handle, end, opened
from clbench.streams.tokens import sequences
from clbench.streams.tokens.text_lines import Lines, TextScenario

PAD = 0


class TextBatch:
    """Some lines, padded on the right, where no earlier token can see it.

    ids       [B] int64, of no meaning at test time
    tokens    [B, L] int64 on the device: prompt, answer with its end, padding
    prompts   [B] int64 on the CPU: tokens of each prompt; lengths [B]: of prompt and answer
    y         [B] int64, the number of each line's task; None at test time
    task      the task of all lines where the scenario discloses it, else None
    replayed  how many lines come from a memory; begins: the first lines of an evaluation set are among them
    """

    def __init__(
        self, ids: Tensor, tokens: Tensor, prompts: Tensor, lengths: Tensor, y: Tensor | None = None, task: int | None = None
    ):
        self.ids, self.tokens, self.prompts, self.lengths, self.y, self.task = ids, tokens, prompts, lengths, y, task
        self.replayed, self.begins = 0, False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def asked(self) -> Tensor:
        """Which predictions are of an answer [B, L - 1] bool: place p is that of token p + 1, which follows the first p + 1."""
        place = torch.arange(1, self.tokens.shape[1])
        return ((place >= self.prompts[:, None]) & (place < self.lengths[:, None])).to(self.tokens.device)

    @property
    def real(self) -> Tensor:
        """Which predictions are of a token of a line, of its prompt too [B, L - 1] bool."""
        return (torch.arange(1, self.tokens.shape[1]) < self.lengths[:, None]).to(self.tokens.device)

    @staticmethod
    def of_lines(
        lines: Sequence[np.ndarray],
        prompts: Sequence[int] | np.ndarray,
        device: torch.device,
        ids: np.ndarray | None = None,
        y: np.ndarray | None = None,
        task: int | None = None,
    ) -> TextBatch:
        """Lines [L] each as a batch."""
        lengths = np.array([len(line) for line in lines], np.int64)
        table = np.full((len(lines), lengths.max()), PAD, np.int64)
        for row, line in zip(table, lines, strict=True):
            row[: len(line)] = line
        numbers = torch.from_numpy(np.arange(len(lines)) if ids is None else np.array(ids, np.int64))
        labels = None if y is None else torch.from_numpy(np.array(y, np.int64)).to(device)
        tokens, sizes = torch.from_numpy(table).to(device), torch.from_numpy(np.array(prompts, np.int64))
        return TextBatch(numbers, tokens, sizes, torch.from_numpy(lengths), labels, task)

    @staticmethod
    def cat(parts: Sequence[TextBatch]) -> TextBatch:
        """Several batches as one; labels are kept when all have them, the task when it is the same."""
        width = max(p.tokens.shape[1] for p in parts)
        tokens = [torch.nn.functional.pad(p.tokens, (0, width - p.tokens.shape[1]), value=PAD) for p in parts]
        labels = [p.y for p in parts if p.y is not None]
        joined = TextBatch(
            torch.cat([p.ids for p in parts]),
            torch.cat(tokens),
            torch.cat([p.prompts for p in parts]),
            torch.cat([p.lengths for p in parts]),
            torch.cat(labels) if len(labels) == len(parts) else None,
            parts[0].task if len({p.task for p in parts}) == 1 else None,
        )
        joined.replayed = sum(p.replayed for p in parts)
        return joined


class _Held(NamedTuple):
    """Lines that a handle opens: their tokens and the sizes of their prompts."""

    lines: list[np.ndarray]
    prompts: np.ndarray


class TextData:
    """Lines of one experience, or of a memory; implements `interfaces.Data`. Until `close` of the data it was made from.

    `ids` and `y` (the number of each line's task) are [N] int64.
    """

    def __init__(
        self, held: Sequence[Handle], rows: np.ndarray, ids: np.ndarray, y: np.ndarray, device: Any, task: int | None, name: str
    ):
        self.held, self.rows, self.ids, self.y = tuple(held), rows, ids, y
        self.device, self.task, self.name = device, task, name

    @staticmethod
    def issue(
        lines: Sequence[np.ndarray],
        prompts: np.ndarray,
        ids: np.ndarray,
        y: np.ndarray,
        device: Any,
        task: int | None,
        name: str,
    ) -> TextData:
        """Data behind a handle of its own."""
        handle = Handle(name, _Held(list(lines), np.asarray(prompts)))
        rows = np.stack([np.zeros(len(ids), np.int64), np.arange(len(ids))], 1)
        return TextData([handle], rows, np.asarray(ids), np.asarray(y), device, task, name)

    def __len__(self) -> int:
        return len(self.ids)

    def _own(self, rows: Sequence[int] | np.ndarray) -> tuple[list[np.ndarray], list[int], np.ndarray]:
        inside = sequences.own(np.asarray(rows, np.int64), len(self), self.name)
        opens = [opened(handle) for handle in self.held]
        found = [(opens[part].lines[i], int(opens[part].prompts[i])) for part, i in self.rows[inside]]
        return [line for line, _ in found], [size for _, size in found], inside

    def batch(self, rows: Sequence[int] | np.ndarray, key: int | None = None) -> TextBatch:
        """Lines by row; nothing is augmented, so `key` has no effect."""
        lines, prompts, inside = self._own(rows)
        return TextBatch.of_lines(lines, prompts, self.device, self.ids[inside], self.y[inside], self.task)

    def test_batches(self, batch_size: int) -> Iterator[TextBatch]:
        """All lines in order."""
        for first in range(0, len(self), batch_size):
            yield self.batch(np.arange(first, min(first + batch_size, len(self))))

    def raw(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """What a memory may keep of lines: the size of the prompt, then the tokens, int32."""
        lines, prompts, _ = self._own(rows)
        return [np.concatenate([[size], line]).astype(np.int32) for size, line in zip(prompts, lines, strict=True)]

    def remembered(self, stored: Sequence[np.ndarray], y: np.ndarray, ids: np.ndarray) -> TextData:
        """What was kept of lines as data."""
        prompts = np.array([line[0] for line in stored], np.int64)
        return TextData.issue([line[1:] for line in stored], prompts, ids, y, self.device, None, "memory")

    def subset(self, rows: np.ndarray) -> TextData:
        """Some of the lines, as long as these can be read."""
        return TextData(self.held, self.rows[rows], self.ids[rows], self.y[rows], self.device, self.task, self.name)

    @staticmethod
    def join(parts: Sequence[Any]) -> TextData:
        """Several data sets one after another."""
        if len(parts) == 1:
            return parts[0]
        first = np.cumsum([0, *(len(p.held) for p in parts)])
        rows = np.concatenate([p.rows + np.array([n, 0]) for p, n in zip(parts, first, strict=False)])
        held = [handle for p in parts for handle in p.held]
        task = parts[0].task if len({p.task for p in parts}) == 1 else None
        ids, y = (np.concatenate([getattr(p, k) for p in parts]) for k in ("ids", "y"))
        return TextData(held, rows, ids, y, parts[0].device, task, "joined data")

    def close(self) -> None:
        """Let go: the experience is over."""
        for handle in self.held:
            end(handle)


def open_experience(scenario: TextScenario, index: int, device: Any) -> Experience:
    """Experience `index` as a learner sees it."""
    entry = scenario.manifest.experiences[index]
    assert entry.task is not None
    task = entry.task if scenario.manifest.discloses_task else None
    lines, name = scenario.lines, f"experience {index} ({entry.name})"

    def issued(ids: np.ndarray, task: int | None, name: str) -> Any:
        own = [lines.line(i) for i in ids]
        return TextData.issue(own, lines.prompts[ids], ids.copy(), scenario.owner[ids], device, task, name)

    data = issued(entry.train, task, name)
    target = issued(scenario.target, None, f"target of {name}") if len(scenario.target) else None
    budget = replace(scenario.budget, **entry.budget) if entry.budget else scenario.budget
    return Experience(index, entry.name, data, (), (), (), 0, task, budget, target=target)


def asked_batches(
    lines: Lines, ids: np.ndarray, size: int, device: Any, task: int | None
) -> Iterator[tuple[np.ndarray, TextBatch]]:
    """An evaluation set in batches of `size` lines, the shortest first -> (places in `ids`, the batch without labels)."""
    order = np.argsort(lines.lengths[ids], kind="stable")
    for first in range(0, len(ids), size):
        places = order[first : first + size]
        batch = TextBatch.of_lines([lines.line(i) for i in ids[places]], lines.prompts[ids[places]], device, places, None, task)
        batch.begins = first == 0
        yield places, batch
