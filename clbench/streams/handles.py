"""Handles: permission to read some stored samples until it is ended. Imports no torch.

What a learner is given (an experience, its batches, remembered features) holds handles. What a handle opens stands in
this module's table, so no attribute, container, closure or base array leads from a learner to the samples of somebody else.
The code that reads for a learner (`stored`, `cpt`, `feature_memory`) opens the handle, and reads what the handle was made for.

This keeps apart what a learner may read and what it may not; it is no sandbox. Code that imports this module to open handles,
replaces functions of clbench, climbs the frames of the caller or searches the garbage collector can read anything, as can code
that loads the data set again.
"""

from __future__ import annotations

from typing import Any

from clbench.interfaces import UserError

_OPENS: dict[int, tuple[Any, tuple[Handle, ...]]] = {}  # by the identity of a live handle; no weak references, whose callbacks
# would lead from the handle to this table


class Handle:
    """What it opens is released with the last reference to it, or by `end`. Copies are the same handle; it is never pickled.

    within  handles that it was made from: when one of them ends, it has ended too
    """

    __slots__ = ("name",)

    def __init__(self, name: str, opens: Any, within: tuple[Handle, ...] = ()):
        self.name = name
        _OPENS[id(self)] = opens, within

    def __del__(self) -> None:
        if _OPENS is not None:  # at the end of the process
            _OPENS.pop(id(self), None)

    def __copy__(self) -> Handle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a handle belongs to its process and cannot be pickled")


def is_live(handle: Handle) -> bool:
    """Whether it was issued and neither it nor a handle that it was made from was ended."""
    found = _OPENS.get(id(handle))
    return found is not None and all(map(is_live, found[1]))


def opened(handle: Handle) -> Any:
    """What a live handle opens; `UserError` for any other."""
    if not is_live(handle):
        name = getattr(handle, "name", "an unknown experience")
        raise UserError(f"data of {name} is gone: a learner that needs it must declare stores_all_data or keep exemplars")
    return _OPENS[id(handle)][0]


def end(handle: Handle) -> None:
    """It opens nothing from now on."""
    _OPENS.pop(id(handle), None)
