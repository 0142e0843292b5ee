"""Stored images by handle and row: what data and batches hold instead of pixels. See `handles`."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from clbench.streams.handles import Handle, end, is_live, opened
from clbench.streams.images.pixels import Pipeline
from clbench.streams.scenario import ArrayImages, ImageSource

_ORIGINS: weakref.WeakKeyDictionary[ImageSource, int] = weakref.WeakKeyDictionary()
_NUMBERS = itertools.count()


def origin(source: ImageSource) -> int:
    """A number of its own for every source. Features are remembered by it, so invented ids of other pixels find nothing."""
    try:
        return _ORIGINS.setdefault(source, next(_NUMBERS))
    except TypeError:  # it cannot be referred to weakly, or not hashed
        return next(_NUMBERS)


@dataclass(frozen=True, eq=False)
class Opened:
    """What a handle to images opens: positions [N] in a source, and the sample ids [N]."""

    source: ImageSource
    places: np.ndarray
    ids: np.ndarray
    origin: int


class Stored:
    """B stored images: part [B] says which of `handles` an image belongs to, row [B] which image of that handle it is.

    shape  (H, W) where all images of all handles have one size, else None: then each is decoded and resized alone
    """

    __slots__ = ("handles", "part", "row", "shape")

    def __init__(self, handles: tuple[Handle, ...], part: np.ndarray, row: np.ndarray, shape: tuple[int, int] | None):
        self.handles, self.part, self.row, self.shape = handles, part, row, shape

    @staticmethod
    def issue(source: ImageSource, places: np.ndarray, ids: np.ndarray, name: str, within: tuple[Handle, ...] = ()) -> Stored:
        """A new handle to images of `source` at `places` [N], known by `ids` [N]."""
        opens = Opened(source, np.array(places, np.int64), np.array(ids, np.int64), origin(source))
        handle = Handle(name, opens, within)
        return Stored((handle,), np.zeros(len(places), np.int64), np.arange(len(places)), source.shape)

    def __len__(self) -> int:
        return len(self.row)

    def take(self, rows: np.ndarray) -> Stored:
        """Some of the images, by position or mask."""
        return Stored(self.handles, self.part[rows], self.row[rows], self.shape)

    @staticmethod
    def join(parts: Sequence[Stored]) -> Stored:
        """Several one after another. Each image stays readable for as long as its own handle."""
        first = np.cumsum([0] + [len(p.handles) for p in parts]).tolist()
        shapes = {p.shape for p in parts}
        return Stored(
            tuple(handle for p in parts for handle in p.handles),
            np.concatenate([p.part + start for p, start in zip(parts, first, strict=False)]),
            np.concatenate([p.row for p in parts]),
            shapes.pop() if len(shapes) == 1 else None,
        )

    def cut(self, name: str) -> Stored:
        """The same images behind new handles that open nothing else. They end with these, or before."""
        places, ids, used = self._open()
        within = tuple(self.handles[part] for part in self._parts())
        if len({one.origin for one, _ in used}) == 1:
            made = Stored.issue(used[0][0].source, places, ids, name, within)
            return Stored(made.handles, made.part, made.row, self.shape)
        made = [Stored.issue(one.source, places[rows], ids[rows], name, within) for one, rows in used]
        part, row = np.empty_like(self.part), np.empty_like(self.row)
        for i, (_, rows) in enumerate(used):
            part[rows], row[rows] = i, np.arange(len(rows))
        return Stored(tuple(one.handles[0] for one in made), part, row, self.shape)

    def closed(self, name: str) -> Stored:
        """The same images behind handles that open nothing; the handles of these stay as they are."""
        handle = Handle(name, None)
        end(handle)
        return Stored((handle,) * len(self.handles), self.part, self.row, self.shape)

    def check(self) -> None:
        """`UserError` where a handle to one of the images was ended."""
        for part in self._parts():
            opened(self.handles[part])

    def end(self) -> None:
        """End all handles: these images, and all that were issued with them, cannot be read any more."""
        for handle in self.handles:
            end(handle)

    def names(self) -> list[tuple[int, int]] | None:
        """(number of the source, sample id) of each image, as it was issued; None where a handle was ended."""
        if not all(is_live(self.handles[part]) for part in self._parts()):
            return None
        _, ids, used = self._open()
        origins = np.empty(len(self), np.int64)
        for one, rows in used:
            origins[rows] = one.origin
        return list(zip(origins.tolist(), ids.tolist(), strict=True))

    def _parts(self) -> list[int]:
        """The handles that are used."""
        return [0] * (len(self) > 0) if len(self.handles) == 1 else np.unique(self.part).tolist()

    def _open(self) -> tuple[np.ndarray, np.ndarray, list[tuple[Opened, np.ndarray]]]:
        """Positions in their sources [B], sample ids [B], and what is opened with the rows of this batch that belong to it."""
        places, ids, used = np.empty(len(self), np.int64), np.empty(len(self), np.int64), []
        for part in self._parts():
            one: Opened = opened(self.handles[part])
            rows = np.flatnonzero(self.part == part)
            places[rows], ids[rows] = one.places[self.row[rows]], one.ids[self.row[rows]]
            used.append((one, rows))
        return places, ids, used

    def raw(self) -> list[np.ndarray]:
        """Stored pixels, uint8 [H, W, 3] each."""
        places, _, used = self._open()
        if len({one.origin for one, _ in used}) == 1:
            return used[0][0].source.raw(places)
        found: list[np.ndarray] = [np.zeros(0)] * len(self)
        for one, rows in used:
            for row in rows.tolist():
                (found[row],) = one.source.raw(places[row : row + 1])
        return found

    def pixels(self, pipeline: Pipeline, ids: np.ndarray, key: int | None) -> Tensor:
        """Model input [B, 3, S, S]; `ids` [B] and `key` choose the augmentation, see `Pipeline`."""
        places, _, used = self._open()
        if self.shape is None:
            source = {row: one.source for one, rows in used for row in rows.tolist()}
            return pipeline([lambda i=i: source[i].raw(places[i : i + 1])[0] for i in range(len(self))], ids, key)
        if len({one.origin for one, _ in used}) == 1 and isinstance(used[0][0].source, ArrayImages):
            return pipeline(pipeline.stored(used[0][0].source, places), ids, key)
        return pipeline(np.stack(self.raw()), ids, key)
