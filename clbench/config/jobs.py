"""The jobs of a sweep: composed when they are asked for, so that ten thousand take no more memory than ten.

Jobs that differ in their seed alone are composed once. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

SEED = re.compile(r"seed=(\d+)")
CHUNK = 64  # composed at a time


class Jobs(Sequence[dict[str, Any]]):
    """Resolved configurations by place. `words` are the overrides of each job, `compose` makes an unresolved configuration."""

    def __init__(self, words: Sequence[list[str]], compose: Callable[[list[list[str]]], list[dict[str, Any]]]):
        self.words, self._compose = words, compose

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Jobs(self.words[place], self._compose)
        return self._compose([self.words[place]])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in range(0, len(self), CHUNK):
            yield from self._compose(list(self.words[first : first + CHUNK]))


def without_seed(words: Sequence[str]) -> tuple[tuple[str, ...], int | None]:
    """Overrides without the seed, and the seed where one is named plainly (the last one counts)."""
    seeds = [int(found[1]) for one in words if (found := SEED.fullmatch(one))]
    return tuple(one for one in words if not SEED.fullmatch(one)), seeds[-1] if seeds else None
