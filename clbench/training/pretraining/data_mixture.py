"""Composition of every batch in pre-training: exact quotas per source, and the index of each replayed sequence.

Compute-equivalent: replayed sequences displace new ones, a batch never grows. The number of sequences of each source in each
step is a table made before the first step, by carrying rounding errors over from step to step, so that 1 % of batches of 32
is 1 % in the long run and no count is ever a whole sequence away from its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.tokens import sequences
from clbench.streams.tokens.data import TokenData


@dataclass(frozen=True)
class Replay:
    """Old text in every batch.

    share         of each batch while replay is on; 0 for none, null with allocation=inverse_t
    allocation    over old experiences: "tokens" in proportion to the tokens each was trained on so far, replayed ones included
                  (Ibrahim et al. 2024); "equal"; "inverse_t": every experience, the newest too, has 1/t of the batch (TiC-LM)
    source        "original": the order in which it was read the first time; "reshuffled": a new order in each pass;
                  "buffer": only what fits in `buffer_bytes`, shared equally by old experiences, reshuffled
                  "generated": no old text, but text that the model of the experience before writes, each once
    timing        "all", or the "first" or "last" `window` share of the experience's steps
    """

    share: float | None = 0.0
    allocation: Literal["tokens", "equal", "inverse_t"] = "tokens"
    source: Literal["original", "reshuffled", "buffer", "generated"] = "original"
    buffer_bytes: int | None = None
    timing: Literal["all", "first", "last"] = "all"
    window: float = 1.0

    def __post_init__(self) -> None:
        if (self.share is None) != (self.allocation == "inverse_t"):
            raise UserError("replay.share must be null with replay.allocation=inverse_t, which sets it, and a number otherwise")
        if self.share is not None and not 0 <= self.share < 1:
            raise UserError(f"replay.share must be at least 0 and below 1, got {self.share}")
        if (self.buffer_bytes is None) == (self.source == "buffer"):
            raise UserError("replay.buffer_bytes belongs to replay.source=buffer, and is needed there")
        if self.buffer_bytes is not None and self.buffer_bytes < 1:
            raise UserError(f"replay.buffer_bytes must be at least 1, got {self.buffer_bytes}")
        if self.generated and self.allocation != "tokens":
            raise UserError("replay.source=generated is one text for all old experiences: replay.allocation must be tokens")
        if not 0 < self.window <= 1 or (self.timing == "all" and self.window != 1):
            raise UserError(f"replay.window must lie in 0..1, and be 1 with timing=all, got {self.window}")

    @property
    def active(self) -> bool:
        """Whether anything is ever replayed."""
        return self.share is None or self.share > 0

    @property
    def generated(self) -> bool:
        """Whether the model writes what is replayed."""
        return self.source == "generated" and self.active

    def sequences(self, steps: int, batch: int) -> int:
        """The most that are replayed in an experience of so many steps."""
        return int(np.ceil(float(self.share or 0.0) * batch * int(self.on(steps).sum()))) + 1

    def shares(self, trained: Sequence[int]) -> np.ndarray:
        """Share of a batch for each old experience and, last, the new one, while replay is on: [t] float64, sum 1.

        trained [t - 1]: sequences that the model was trained on from each old experience so far.
        """
        t = len(trained) + 1
        if self.allocation == "inverse_t":
            return np.full(t, 1 / t)
        share = float(self.share or 0.0) if t > 1 else 0.0
        weights = np.asarray(trained, np.float64) if self.allocation == "tokens" else np.ones(t - 1)
        assert t == 1 or weights.sum() > 0
        return np.append(share * weights / max(weights.sum(), 1e-300), 1 - share)

    def table(self, steps: int, trained: Sequence[int]) -> np.ndarray:
        """`shares` for every step of an experience: [S, t] float64, all new where replay is off."""
        alone = np.append(np.zeros(len(trained)), 1.0)
        return np.where(self.on(steps)[:, None], self.shares(trained), alone) if len(trained) else np.ones((steps, 1))

    def on(self, steps: int) -> np.ndarray:
        """In which steps of an experience replay is on -> [steps] bool."""
        length = round(self.window * steps)
        places = np.arange(steps)
        return places >= steps - length if self.timing == "last" else places < length

    def numbers(self, old: TokenData, seen: int, num_old: int, positions: np.ndarray) -> np.ndarray:
        """Replayed sequences by position in the stream of replays -> [B] int64 numbers among those of `old`.

        seen: how many of its sequences were read when it was new.
        """
        if self.source in ("original", "generated"):
            return old.numbers(positions % seen, seen)
        held = min(seen, self.capacity(old, num_old))
        inside = sequences.passes(rng.key(old.key, "replay"), held, positions)
        if self.source == "buffer":  # a shrinking buffer keeps the front of one order: what was dropped never comes back
            inside = sequences.permuted(rng.key(old.key, "buffer"), seen, inside)
        return old.numbers(inside, seen)

    def capacity(self, old: TokenData, num_old: int) -> int:
        """Sequences of one old experience that may be held; `UserError` if the buffer is too small for one."""
        if self.buffer_bytes is None:
            return 1 << 62
        held = self.buffer_bytes // (num_old * old.sequence_bytes)
        if held < 1:
            raise UserError(f"replay.buffer_bytes={self.buffer_bytes} holds no sequence of {old.sequence_bytes} bytes")
        return held

    def held_bytes(self, old: Sequence[TokenData], seen: Sequence[int]) -> int:
        """Bytes of old text that replay needs at hand."""
        if not self.active:
            return 0
        return sum(min(n, self.capacity(o, len(old))) * o.sequence_bytes for o, n in zip(old, seen, strict=True))


@dataclass(frozen=True)
class KeptShare(Replay):
    """Replay from a memory that keeps the share `kept` of every old experience, drawn once, and never drops any of it."""

    source: Literal["original", "reshuffled", "buffer"] = "buffer"
    buffer_bytes: int | None = 1 << 62  # no other limit than the share
    kept: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.kept, bool) or not 0 < self.kept <= 1:
            raise UserError(f"learner.kept must be a share above 0 and at most 1, got {self.kept}")

    def capacity(self, old: TokenData, num_old: int) -> int:
        """Sequences of one old experience that are held."""
        return max(1, round(self.kept * len(old)))


def quotas(shares_SK: np.ndarray, batch: int, carry: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers of sequences per step and source by error diffusion -> (counts [S, K] int64, carry [K]).

    Each row sums to `batch`. A source is owed its share of all sequences so far minus what it got; every step it gets the
    whole part of that, and what is left goes to those that are owed most. `carry` goes on from an earlier table.
    """
    steps, sources = shares_SK.shape
    owed = np.zeros(sources) if carry is None else np.array(carry, np.float64)
    counts = np.empty((steps, sources), np.int64)
    for s in range(steps):
        owed += shares_SK[s] * batch
        row = np.maximum(np.floor(owed + 1e-9), 0).astype(np.int64)
        row[shares_SK[s] == 0] = 0
        left = batch - int(row.sum())
        order = np.argsort(-(owed - row) + (shares_SK[s] == 0) * 1e9, kind="stable")
        for i in range(abs(left)):
            row[order[i % sources] if left > 0 else max(range(sources), key=lambda k: row[k])] += 1 if left > 0 else -1
        owed -= row
        counts[s] = row
    return counts, owed


class Mixture:
    """The batches of some steps: step -> sequences [B, context + 1], old ones first.

    shares_SK  share of each source in each step from `first` on, the new one last
    seen       how many sequences of each old experience were read when it was new
    starts     where the streams stand: replays of each old experience, then the new one
    size       only the first so many sequences of the new text are used, again and again
    """

    def __init__(
        self,
        new: TokenData,
        old: Sequence[TokenData],
        replay: Replay,
        shares_SK: np.ndarray,
        *,
        first: int = 0,
        seen: Sequence[int] = (),
        starts: Sequence[int] | None = None,
        carry: Sequence[float] | None = None,
        size: int | None = None,
    ):
        self.new, self.old, self.replay, self.seen, self.first = new, list(old), replay, list(seen), first
        self.size = size or new.size
        self.starts = np.zeros(len(self.old) + 1, np.int64) if starts is None else np.asarray(starts, np.int64)
        self.counts, self.carry = quotas(shares_SK, new.batch, None if carry is None else np.asarray(carry, np.float64))
        nothing = np.zeros((1, len(self.old) + 1), np.int64)
        self.before = np.concatenate([nothing, np.cumsum(self.counts, 0)])

    def __call__(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The batch of a step, or some rows of it: [B, context + 1] int64, or rows of images uint8."""
        counts, start = self.counts[step - self.first], self.starts + self.before[step - self.first]
        begin, end, _ = rows.indices(int(counts.sum()))
        parts, at = [], 0
        for k, count in enumerate(counts.tolist()):
            inside = np.arange(max(begin - at, 0), min(end - at, count))
            at += count
            if not len(inside):
                continue
            if k == len(self.old):
                parts.append(self.new.read(start[k] + inside, self.size))
            else:
                positions = start[k] + inside
                numbers = self.replay.numbers(self.old[k], self.seen[k], len(self.old), positions)
                parts.append(self.old[k].take(numbers, "replay", positions))
        return np.concatenate(parts)

    def used(self, first: int, last: int) -> np.ndarray:
        """Sequences of each source in steps first..last-1 -> [K] int64, the new one last."""
        return self.before[last - self.first] - self.before[first - self.first]

    def repeated(self, first: int, last: int) -> int:
        """How many of them were read before: every replayed one, and new ones past the first pass."""
        begin, end = (self.starts + self.before[at - self.first] for at in (first, last))
        fresh = min(int(end[-1]), self.size) - min(int(begin[-1]), self.size)
        return int((end - begin).sum()) - fresh
