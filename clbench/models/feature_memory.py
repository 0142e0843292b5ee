"""Features that were computed already, in memory and, where the run has a store, on disk. What `Backbone.features` looks into.

A sample's *name* is its id, whether autocast was on, and the tags of the modules at work: (id, lower, tag, ...). Names that
differ in the id only share a group of the store. Values are float32 on the CPU; the first answer stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clbench.models.feature_store import FeatureStore
from clbench.models.weights import state_sha256

MEMO_BYTES = 2 << 30
Name = tuple[Any, ...]
Group = Callable[[Name], "str | None"]


class FeatureMemory:
    """`rows` by name, up to MEMO_BYTES; `store` is set by the runner. A deep copy starts empty, with the same store."""

    def __init__(self, store: FeatureStore | None = None):
        self.store = store
        self.rows: dict[Name, Tensor] = {}
        self._groups: dict[Name, str | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureMemory:
        return FeatureMemory(self.store)

    def forget(self) -> None:
        """Drop what memory holds: something that it was made with has changed. In the store it has the old state's name."""
        self.rows.clear()
        self._groups.clear()

    def find(self, names: Sequence[Name], group: Group) -> tuple[dict[Name, Tensor], int]:
        """What is known of `names` -> ({name: features [D]}, how many came from the store). `group(tags)` names the state."""
        known = {name: self.rows[name] for name in names if name in self.rows}
        stored = 0
        for which, part in self._by_group([n for n in dict.fromkeys(names) if n not in known], group).items():
            found = {} if which is None or self.store is None else self.store.take(which, [name[0] for name in part])
            known |= {name: found[name[0]] for name in part if name[0] in found}
            stored += len(found)
        self._hold(known)
        return known, stored

    def keep(self, fresh: Mapping[Name, Tensor], group: Group) -> None:
        """Remember features [D] by name: on disk where there is a store, in memory as far as there is room."""
        for which, part in self._by_group(list(fresh), group).items():
            if which is not None and self.store is not None:
                self.store.add(which, [name[0] for name in part], torch.stack([fresh[name] for name in part]))
        self._hold(fresh)

    def _hold(self, rows: Mapping[Name, Tensor]) -> None:
        width = max((len(row) for row in rows.values()), default=0)
        if (len(self.rows) + len(rows)) * width * 4 <= MEMO_BYTES:
            for name, row in rows.items():
                self.rows.setdefault(name, row)

    def _by_group(self, names: Sequence[Name], group: Group) -> dict[str | None, list[Name]]:
        """Names by the group of the store that they belong to; None: to no group."""
        out: dict[str | None, list[Name]] = {}
        for name in names:
            tags = name[1:]
            if self.store is not None and tags not in self._groups:
                self._groups[tags] = group(tags)
            out.setdefault(self._groups.get(tags), []).append(name)
        return out


def state_group(model: Any, tags: Name) -> str | None:
    """The store's name for a network as it stands with the modules at work; None where something unknown hangs on it."""
    modules = list(model.net.modules())
    if not model.pets and any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    active = [pet for pet in model.pets if pet.active]
    kinds = [type(m).__name__ for m in modules]
    digests = [f"{pet.kind} {state_sha256(pet.in_use_by(tag))}" for pet, tag in zip(active, tags[1:], strict=True)]
    return model.memory.store.group(tags[0], state_sha256(model.net.state_dict()), kinds, digests)
