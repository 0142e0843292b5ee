"""Data of an experience whose samples come once, in stream order: what the budget's `in_order` allows. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from clbench.interfaces import UserError


class StreamData:
    """Labelled samples that can be had front to back, once; implements `interfaces.Data` over data with free access.

    The batch at hand is the last one taken. The next one must lie behind it, its rows next to each other; rows may be left
    out, so a killed pass goes on from the middle. The stored pixels of the batch at hand may be asked for (an online memory
    keeps some of them), those of earlier ones are gone. Anything else raises `UserError`.
    """

    def __init__(self, data: Any):
        self._data, self._first, self._end = data, 0, 0
        self.pipeline, self.task, self.name = data.pipeline, data.task, data.name

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, rows: Sequence[int] | np.ndarray, key: int | None = None) -> Any:
        """The next samples; `key` as in `Data.batch`."""
        return self._data.batch(self._next(rows), key)

    def test_batches(self, batch_size: int) -> Iterator[Any]:
        """All samples in order under the test transform: this is the one pass."""
        for first in range(0, len(self), batch_size):
            yield self.batch(np.arange(first, min(first + batch_size, len(self))))

    def raw(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Stored pixels of samples of the batch at hand."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < self._first or rows.max() >= self._end):
            self._refuse()
        return self._data.raw(rows)

    def subset(self, rows: Sequence[int] | np.ndarray) -> Any:
        """The next samples as data; they are had with it."""
        return self._data.subset(self._next(rows))

    def remembered(self, stored: Sequence[np.ndarray], y: np.ndarray, ids: np.ndarray) -> Any:
        """What was kept of samples of such data, as data with free access."""
        return self._data.remembered(stored, y, ids)

    @property
    def y(self) -> NoReturn:
        """Labels come with their batches."""
        self._refuse()

    @property
    def ids(self) -> NoReturn:
        """Ids come with their batches."""
        self._refuse()

    def close(self) -> None:
        """Let go of the pixels: the experience is over."""
        self._data.close()

    def _open(self) -> NoReturn:
        self._refuse()

    def _next(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        if len(rows) == 0 or rows[0] < self._end or rows[-1] >= len(self) or (np.diff(rows) != 1).any():
            self._refuse()
        self._first, self._end = int(rows[0]), int(rows[-1]) + 1
        return rows

    def _refuse(self) -> NoReturn:
        raise UserError(
            f"samples of {self.name} come once, in stream order: a learner that asks for others than the next ones "
            "must declare needs_random_access, and runs in streams without single_pass"
        )
