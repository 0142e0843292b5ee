"""The training sequences of one experience, as a learner of texts or an autoencoder has them. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clbench.streams import rng
from clbench.streams.entries import ExperienceEntry
from clbench.streams.handles import Handle, end, opened
from clbench.streams.tokens import sequences


class Source(NamedTuple):
    """All training sequences of a domain.

    size      how many
    itemsize  bytes of one token of a sequence
    read      (places [B] in the domain, role, positions [B]) -> rows [B, ...]
    """

    size: int
    itemsize: int
    read: Callable[[np.ndarray, str, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class _Span:
    """What the handle of a `TokenData` opens: sequences first..first+size-1 of `source`, in the order of `key`.

    Those are spread over the whole domain, so it is held whole (a mapped corpus stays mapped once). Others are refused.
    """

    name: str
    source: Source
    first: int
    size: int
    key: int

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Own sequences by number 0..size-1 -> [B] int64 places in the domain."""
        inside = sequences.own(numbers, self.size, self.name)
        return sequences.permuted(rng.key(self.key, "domain"), self.source.size, self.first + inside)


@dataclass(frozen=True, eq=False)
class TokenData:
    """`size` sequences of a domain, in an order drawn once by `key`. In a stream of images a sequence is an image.

    positions count sequences from 0; past `size` the same sequences come again in other orders. `text` is a handle: arrays come
    from `read` and `take` alone, which give this experience's own sequences, until `close`.
    """

    name: str
    domain: int
    text: Handle
    context: int
    batch: int
    steps: int
    first: int
    size: int
    key: int
    itemsize: int

    @staticmethod
    def of(entry: ExperienceEntry, source: Source, context: int, batch: int, key: int) -> TokenData:
        """What an entry says: so many sequences of a domain, from its first one in the order of `key`."""
        name = f"experience {entry.name}"
        text = Handle(name, _Span(name, source, entry.first, entry.sequences, key))
        shape = (context, batch, entry.steps, entry.first, entry.sequences)
        return TokenData(entry.name, entry.domain, text, *shape, key, source.itemsize)

    def __len__(self) -> int:
        return self.size

    @property
    def sequence_bytes(self) -> int:
        """What one stored sequence takes."""
        return self.context * self.itemsize

    def numbers(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Own sequences by position -> [B] int64 in 0..size-1; `size`: only the first so many are used."""
        return sequences.passes(self.key, size or self.size, positions, first_in_order=True)

    def ids(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Sequences by position -> [B] int64 places in the domain; `size`: only the first so many are used."""
        return opened(self.text).places(self.numbers(positions, size))

    def read(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Sequences by position -> [B, context + 1] int64; images -> rows [B, S * S * 3 + 8] uint8."""
        return self.take(self.numbers(positions, size), "new", positions)

    def take(self, numbers: np.ndarray, role: str, positions: np.ndarray) -> np.ndarray:
        """Own sequences by number; the mask and view of an image are drawn from (`role`, position in that stream).

        Raises `UserError` for a number outside 0..size-1, and after `close`.
        """
        span: _Span = opened(self.text)
        return span.source.read(span.places(numbers), role, positions)

    def close(self) -> None:
        """Let go of the text: the experience is over."""
        end(self.text)


def text_source(tokens: np.ndarray, context: int) -> Source:
    """Windows of a text [context + 1]."""
    whole = sequences.count(len(tokens), context)
    return Source(whole, tokens.dtype.itemsize, lambda places, role, positions: sequences.windows(tokens, places, context))
