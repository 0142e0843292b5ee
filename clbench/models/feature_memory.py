"""Cache of computed features, in memory and, where the run has a store, on disk. Used by `Backbone.features`.

A sample's *name* is the number of its source, its id, whether autocast was on, and the tags of the modules at work:
(origin, id, lower, tag, ...). Names that differ in the id only share a group of the store. Values are float32 on the CPU; the
first answer stays.

Only samples that a live handle was issued for have names (`streams.stored`): ids alone are answered by nothing, nor is a batch
whose experience is over. Rows and store stand behind a handle themselves, so the model does not lead to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clbench.models.feature_store import FeatureStore
from clbench.models.weights import state_sha256
from clbench.streams.handles import Handle, opened
from clbench.streams.scenario import ImageSource
from clbench.streams.stored import Stored, origin

MEMO_BYTES = 2 << 30
Name = tuple[Any, ...]
State = tuple[bool, str, list[str], list[str]]
Group = Callable[[Name], "State | None"]


@dataclass
class _Table:
    """Rows [D] by name; the store, with the number of the one source that it is for; groups of the store by tags."""

    store: FeatureStore | None = None
    origin: int = -1
    rows: dict[Name, Tensor] = field(default_factory=dict)
    groups: dict[Name, str | None] = field(default_factory=dict)


class FeatureMemory:
    """Features by name, up to MEMO_BYTES. A deep copy starts empty, with the same store."""

    def __init__(self) -> None:
        self._table = Handle("remembered features", _Table())

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureMemory:
        twin, own = FeatureMemory(), self._open()
        table = twin._open()
        table.store, table.origin = own.store, own.origin
        return twin

    def __len__(self) -> int:
        return len(self._open().rows)

    def attach(self, store: FeatureStore | None, images: ImageSource) -> None:
        """Use a store, for samples of these images only: their ids are what its entries are found by."""
        table = self._open()
        table.store, table.origin = store, origin(images)
        table.groups.clear()

    def flush(self) -> None:
        """Write what waits for the store, if there is one."""
        if (store := self._open().store) is not None:
            store.flush()

    def forget(self) -> None:
        """Drop what memory holds: something that it was made with has changed. In the store it has the old state's name."""
        self._open().rows.clear()
        self._open().groups.clear()

    def find(self, samples: Stored, tags: Sequence[Name], group: Group) -> tuple[list[Name], dict[Name, Tensor], int]:
        """Names of samples, what is known of them {name: features [D]}, and how many of these came from the store.

        tags [B] of (lower, tag, ...), none: not to be remembered; `group(tags)` describes the network's state. No names either
        where a handle was ended.
        """
        issued = samples.names() if tags else None
        if issued is None:
            return [], {}, 0
        names = [(*name, *rest) for name, rest in zip(issued, tags, strict=True)]
        table, stored = self._open(), 0
        known = {name: table.rows[name] for name in names if name in table.rows}
        for which, part in _by_group(table, [n for n in dict.fromkeys(names) if n not in known], group).items():
            found = {} if which is None or table.store is None else table.store.take(which, [name[1] for name in part])
            known |= {name: found[name[1]] for name in part if name[1] in found}
            stored += len(found)
        _hold(table, known)
        return names, known, stored

    def keep(self, fresh: Mapping[Name, Tensor], group: Group) -> None:
        """Remember features [D] by name: on disk where there is a store, in memory as far as there is room."""
        table = self._open()
        for which, part in _by_group(table, list(fresh), group).items():
            if which is not None and table.store is not None:
                table.store.add(which, [name[1] for name in part], torch.stack([fresh[name] for name in part]))
        _hold(table, fresh)

    def _open(self) -> _Table:
        return opened(self._table)


def _hold(table: _Table, rows: Mapping[Name, Tensor]) -> None:
    width = max((len(row) for row in rows.values()), default=0)
    if (len(table.rows) + len(rows)) * width * 4 <= MEMO_BYTES:
        for name, row in rows.items():
            table.rows.setdefault(name, row)


def _by_group(table: _Table, names: Sequence[Name], group: Group) -> dict[str | None, list[Name]]:
    """Names by the group of the store that they belong to; None: to no group."""
    out: dict[str | None, list[Name]] = {}
    for name in names:
        tags, which = name[2:], None
        if table.store is not None and name[0] == table.origin:
            if tags not in table.groups:
                state = group(tags)
                table.groups[tags] = None if state is None else table.store.group(*state)
            which = table.groups[tags]
        out.setdefault(which, []).append(name)
    return out


def state_of(model: Any, tags: Name) -> State | None:
    """A network as it stands with the modules at work, for the store; None where something unknown hangs on it."""
    modules = list(model.net.modules())
    if not model.pets and any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    active = [pet for pet in model.pets if pet.active]
    kinds = [type(m).__name__ for m in modules]
    digests = [f"{pet.kind} {state_sha256(pet.in_use_by(tag))}" for pet, tag in zip(active, tags[1:], strict=True)]
    return tags[0], state_sha256(model.net.state_dict()), kinds, digests
