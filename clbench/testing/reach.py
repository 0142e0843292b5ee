"""What can be reached from an object, and whether it holds given samples: the means of `data_reach`.

`reachable` goes through attributes, slots, containers, closures, defaults, bound methods, partial functions, iterators, running
generators, weak references, base arrays and mapped files. Not through modules, globals of functions, or the frames of callers.
"""

from __future__ import annotations

import array
import collections
import functools
import mmap
import sys
import types
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTH = 16  # elements in a row by which a sample is recognised
ALIEN = {
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "hydra",
    "omegaconf",
    *sys.stdlib_module_names,
}  # their classes hold no samples
PLAIN = (str, int, float, complex, type(None), types.ModuleType, types.CodeType, torch.dtype, torch.device)
RAW = (bytes, bytearray, memoryview, mmap.mmap, array.array)
LISTS = (list, tuple, set, frozenset, collections.deque)
ITERATORS = tuple(type(one) for one in (iter([]), iter(()), iter({}), zip(), map(len, []), enumerate([]), reversed([])))
WIDTHS = {"u1": 1, "<u2": 2, "<u4": 4, "<i8": 8, "<f4": 4}  # as what a buffer of bytes may be read
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def reachable(roots: Mapping[str, Any], skip: Iterable[Any] = ()) -> Iterator[tuple[str, Any]]:
    """(path, object) of everything that can be reached, each object once; nothing is entered through those in `skip`."""
    waiting = list(roots.items())
    seen = {id(one): one for one in skip}  # held, so that no identity is used again
    while waiting:
        path, found = waiting.pop()
        if isinstance(found, PLAIN) or id(found) in seen:
            continue
        seen[id(found)] = found
        yield path, found
        new = [(step, child) for step, child in _children(found) if not isinstance(child, PLAIN) and id(child) not in seen]
        waiting += [(f"{path}{step}", child) for step, child in new]


def _children(found: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(found, RAW):
        if isinstance(found, memoryview):
            yield ".obj", found.obj
    elif isinstance(found, Mapping):
        with suppress(RuntimeError):
            for key, value in list(found.items()):
                yield f"[{str(key)[:40]!r}]", value
                yield ".keys()", key
    elif isinstance(found, LISTS):
        yield from ((f"[{i}]", item) for i, item in enumerate(list(found)))
    elif isinstance(found, np.ndarray):
        yield ".base", found.base
        if found.dtype == object:
            yield ".tolist()", found.ravel().tolist()
    elif isinstance(found, Tensor):
        leaf = False
        with suppress(RuntimeError):  # a view made under no_grad of what has changed since cannot say whether it is one
            leaf = found.is_leaf
        yield from ((f".{name}", getattr(found, name)) for name in (("_base", "grad") if leaf else ("_base",)))
    elif isinstance(found, weakref.ref):
        yield from (("()", found()), (".__callback__", found.__callback__))
    elif isinstance(found, ITERATORS):
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield ".__reduce__()", found.__reduce__()[1:]
    else:
        yield from _of_code(found)
    yield from _attributes(found)


def _of_code(found: Any) -> Iterator[tuple[str, Any]]:
    """Of functions, methods, generators, frames."""
    if isinstance(found, functools.partial):
        yield from ((f".{name}", getattr(found, name)) for name in ("func", "args", "keywords"))
    elif isinstance(found, types.MethodType | types.BuiltinFunctionType | types.MethodWrapperType):
        yield from ((".__self__", found.__self__), (".__func__", getattr(found, "__func__", None)))
    elif isinstance(found, types.FunctionType):
        for name, cell in zip(found.__code__.co_freevars, found.__closure__ or (), strict=True):
            with suppress(ValueError):  # not filled yet
                yield f".<closure {name}>", cell.cell_contents
        yield from ((".__defaults__", found.__defaults__), (".__kwdefaults__", found.__kwdefaults__))
    elif isinstance(found, types.CellType):
        with suppress(ValueError):
            yield ".cell_contents", found.cell_contents
    elif isinstance(found, types.GeneratorType):
        yield ".gi_yieldfrom", found.gi_yieldfrom
        if found.gi_frame is not None:
            yield ".gi_frame.f_locals", dict(found.gi_frame.f_locals)
    elif isinstance(found, staticmethod | classmethod):
        yield ".__func__", found.__func__
    elif isinstance(found, property):
        yield from ((f".{name}", getattr(found, name)) for name in ("fget", "fset"))


def _attributes(found: Any) -> Iterator[tuple[str, Any]]:
    with suppress(Exception):
        yield from ((f".{name}", value) for name, value in list(object.__getattribute__(found, "__dict__").items()))
    for kind in found.__mro__ if isinstance(found, type) else type(found).__mro__:
        if _is_alien(kind.__module__ or ""):
            continue
        slots = kind.__dict__.get("__slots__", ())
        for name in () if isinstance(found, type) else (slots,) if isinstance(slots, str) else slots:
            with suppress(Exception):
                yield f".{name}", object.__getattribute__(found, name)
        if kind is not found:
            yield f".<class {kind.__name__}>", kind  # the class itself: however many objects it has, it is entered once


@functools.cache
def _is_alien(module: str) -> bool:
    return module.split(".")[0] in ALIEN


def arrays(found: Any) -> list[np.ndarray]:
    """The numbers that an object itself holds: arrays by field, the whole storage of a tensor, buffers, lists of numbers."""
    if isinstance(found, np.ndarray):
        fields = found.dtype.names
        return [part for name in fields for part in arrays(found[name])] if fields else [found]
    if isinstance(found, Tensor):
        return _of_tensor(found)
    if isinstance(found, RAW):
        with suppress(ValueError, TypeError, BufferError):
            buffer = np.frombuffer(found, np.uint8)
            return [buffer[: len(buffer) // width * width].view(kind) for kind, width in WIDTHS.items()]
        return []
    if isinstance(found, list | tuple) and len(found) >= WIDTH and all(type(n) in (int, float) for n in found):
        with suppress(OverflowError):
            return [np.array(found)]
    return []


def _of_tensor(found: Tensor) -> list[np.ndarray]:
    if found.layout is not torch.strided or found.device.type == "meta":
        return []
    with torch.no_grad(), suppress(RuntimeError, NotImplementedError):
        whole = torch.empty(0, dtype=found.dtype, device=found.device).set_(found.detach().untyped_storage()).cpu()
        kinds = [whole.float() if whole.is_floating_point() else whole]
        return [kind.numpy() for kind in kinds]
    return []


class Marks:
    """Samples by a window of WIDTH elements each, so that they are found in any array, at any place, in any width of number.

    A window is the most varied one of its sample. Windows that the `own` arrays hold as well mark nothing; nor do windows of
    fewer than `least` different values.
    """

    def __init__(self, foreign: Mapping[str, np.ndarray], own: Sequence[np.ndarray] = (), least: int = 4):
        found: dict[bool, dict[int, tuple[int, str]]] = {True: {}, False: {}}
        known = {kind: {int(n) for a in own if _real(a) == kind for n in np.unique(_rolled(_codes(a)))} for kind in found}
        for name, sample in foreign.items():
            window = _varied(_codes(sample), least)
            if window is not None:
                mark = int(_rolled(window)[0])
                if mark not in known[_real(sample)]:
                    found[_real(sample)][mark] = (int(window[0]), name)
        self._names = {kind: {mark: name for mark, (_, name) in marks.items()} for kind, marks in found.items()}
        self._marks = {kind: np.array(sorted(marks), np.uint64) for kind, marks in found.items()}
        self._firsts = {kind: np.unique(np.array([f for f, _ in marks.values()], np.uint64)) for kind, marks in found.items()}

    def __len__(self) -> int:
        return sum(map(len, self._names.values()))

    def find(self, values: np.ndarray) -> str | None:
        """The name of a marked sample that the array holds, or None."""
        codes = _codes(values)
        if len(codes) < WIDTH or not len(firsts := self._firsts[_real(values)]):
            return None
        starts = np.flatnonzero(_among(codes[: len(codes) - WIDTH + 1], firsts))
        marks, names = self._marks[_real(values)], self._names[_real(values)]
        for first in range(0, len(starts), 1 << 16):
            rows = starts[first : first + (1 << 16), None] + np.arange(WIDTH)
            rolled = (codes[rows] * _powers()).sum(1, dtype=np.uint64)
            hits = np.flatnonzero(_among(rolled, marks))
            if len(hits):
                return names[int(rolled[hits[0]])]
        return None


def numbers_in(roots: Mapping[str, Any], skip: Iterable[Any] = ()) -> list[tuple[str, np.ndarray]]:
    """(path, numbers) of every array that can be reached, each place in memory once."""
    places: dict[tuple[int, int, str], tuple[str, np.ndarray]] = {}  # held, so that no place is used again
    for path, found in reachable(roots, skip):
        for values in arrays(found):
            places.setdefault((values.__array_interface__["data"][0], values.size, values.dtype.str), (path, values))
    return list(places.values())


def first_found(within: Iterable[tuple[str, np.ndarray]], marks: Marks) -> str | None:
    """'path: name of the sample' of the first marked sample in what `numbers_in` gave, or None."""
    hits = ((path, marks.find(values)) for path, values in within)
    return next((f"{path}: {name}" for path, name in hits if name is not None), None)


def found_in(roots: Mapping[str, Any], marks: Marks, skip: Iterable[Any] = ()) -> str | None:
    """The same of everything that can be reached."""
    return first_found(numbers_in(roots, skip), marks)


def _real(values: np.ndarray) -> bool:
    return values.dtype.kind == "f"


def _codes(values: np.ndarray) -> np.ndarray:
    """Elements in their order as uint64 [n]: whole numbers by value, others by their bits in float32."""
    if values.dtype.kind == "f":
        return np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32).astype(np.uint64)
    if values.dtype.kind in "iub":
        return np.ascontiguousarray(values).reshape(-1).astype(np.int64).view(np.uint64)
    return np.zeros(0, np.uint64)


def _powers() -> np.ndarray:
    return np.cumprod(np.full(WIDTH, _FACTOR, np.uint64), dtype=np.uint64)


def _rolled(codes: np.ndarray) -> np.ndarray:
    """One number for each window of WIDTH elements -> [n - WIDTH + 1] uint64."""
    if len(codes) < WIDTH:
        return np.zeros(0, np.uint64)
    return (np.lib.stride_tricks.sliding_window_view(codes, WIDTH) * _powers()).sum(1, dtype=np.uint64)


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which values are among sorted known ones."""
    if not len(known):
        return np.zeros(len(values), bool)
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


def _varied(codes: np.ndarray, least: int) -> np.ndarray | None:
    """The window with the most different values; None below `least`."""
    if len(codes) < WIDTH:
        return None
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(codes, WIDTH), 1)
    different = (windows[:, 1:] != windows[:, :-1]).sum(1) + 1
    best = int(different.argmax())
    return codes[best : best + WIDTH] if different[best] >= least else None
