"""Checkpoints of a run, from which a killed run is resumed bit-identically.

Files in the run's own folder, each written to a temporary name and moved with `os.replace`:
`experience.pt` (the state after the last finished experience) and `fit-<k>.pt` (the k-th `fit` call of the current one:
its middle, or its end). At most one plus the number of `fit` calls in one `learn`; the latter go when the experience ends.
"""

from __future__ import annotations

import logging
import math
import os
import pathlib
import pickle
import shutil
import time
from typing import Any

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.training import distributed_checkpoint
from clbench.training.distributed import ALONE, Group

log = logging.getLogger("clbench")
LARGE = 1 << 20  # bytes; above it a tensor is written by itself
_PACKED = "\0packed"


def pack(state: Any) -> dict[str, Any]:
    """A nested state as {"tree", "tensors"}: small tensors of one type lie together, since each costs `torch.save` as much time
    as a large one. `unpack` undoes it.

    In the tree a packed tensor is its note: _PACKED, type, first element, shape. One that occurs twice lies there once.
    """
    parts: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}
    notes: dict[Any, str] = {}

    def note(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: note(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(note(item) for item in value)
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.nbytes > LARGE:
            return value
        kind = str(value.dtype).removeprefix("torch.")
        met = (kind, value.data_ptr(), value.shape, value.stride())
        if met not in notes or not value.numel():
            first = sizes.get(kind, 0)
            parts.setdefault(kind, []).append(value.detach().reshape(-1).cpu())
            sizes[kind] = first + value.numel()
            notes[met] = " ".join([_PACKED, kind, str(first), *map(str, value.shape)])
        return notes[met]

    tree = note(state)
    return {"tree": tree, "tensors": {kind: torch.cat(found) for kind, found in parts.items()}}


def unpack(packed: dict[str, Any]) -> Any:
    """What `pack` was given; tensors are new."""

    def read(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: read(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(read(item) for item in value)
        if not (isinstance(value, str) and value.startswith(_PACKED)):
            return value
        _, kind, first, *shape = value.split(" ")
        lengths = [int(length) for length in shape]
        return packed["tensors"][kind].narrow(0, int(first), math.prod(lengths)).reshape(lengths).clone()

    return read(packed["tree"])


def save_atomic(path: pathlib.Path, state: Any) -> None:
    """Write a state with `torch.save`; a full disk or an unwritable folder raises `UserError` and leaves the old file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(pack(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        full = shutil.disk_usage(path.parent).free < temporary.stat().st_size if temporary.exists() else False
        temporary.unlink(missing_ok=True)
        reason = "No space left on device" if full else str(error).splitlines()[0]  # torch hides the system's own words
        raise UserError(f"cannot write the checkpoint {path}: {reason}") from error


class Journal:
    """Snapshots of the run in `folder`; `Journal()` keeps none. `seconds` is the least time between two snapshots of a fit.

    Of several processes in `group` the first writes and all read; tensors that are spread over them are written by all.
    `data` names the stream (its manifest's SHA-256): counters and weights of another one are refused.

    experience  the one that is being learned or was learned last, from 0; -1 before the first
    finished    experiences whose end is saved
    """

    def __init__(self, folder: pathlib.Path | None = None, seconds: float = 60.0, group: Group = ALONE, data: str = ""):
        self.folder, self.seconds, self.group, self.data = folder, seconds, group, data
        self.calls, self.experience, self.finished = 0, -1, 0
        self.last = time.monotonic()
        if folder is not None and group.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.tmp"):
                left.unlink()

    def begin(self, experience: int) -> None:
        """A new `learn` starts: `fit` calls are numbered from 0."""
        self.calls, self.experience = 0, experience

    def next_call(self, name: str) -> str:
        """The key of the next `fit` call."""
        self.calls += 1
        return f"fit-{self.calls - 1}"

    def load(self, key: str) -> dict[str, Any] | None:
        """The snapshot under a key, or None. `UserError` where it belongs to another stream.

        One from inside an experience that cannot be read is left out with a warning; else that is a `UserError` too.
        """
        path = None if self.folder is None else self.folder / f"{key}.pt"
        if path is None or not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = unpack(state) if "tree" in state else state
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if key == "experience" or self.group.size > 1:  # several processes go on from the same place or not at all
                raise UserError(f"cannot read the checkpoint {path}: {reason}; force=true starts anew") from error
            log.warning("cannot read the checkpoint %s: %s; the experience begins anew", path, reason)
            return None
        if (data := state.pop("data", "")) and self.data and data != self.data:
            raise UserError(
                f"the saved run read other data: its manifest is {data[:12]}, not {self.data[:12]}; force=true starts anew"
            )
        if key == "experience":
            self.experience, self.finished = state["experience"], state["experience"] + 1
        elif state["experience"] != self.experience:
            return None
        return distributed_checkpoint.load(path.parent, state, self.group) if "shards" in state else state

    def save(self, key: str, state: dict[str, Any]) -> None:
        """Write a snapshot now."""
        if self.folder is not None:
            if self.group.kind == "fsdp":
                state = distributed_checkpoint.save(self.folder, key, state, self.group)
            if self.group.rank == 0:
                state = {**state, "data": self.data}
                save_atomic(self.folder / f"{key}.pt", state)
                distributed_checkpoint.remove(self.folder, key, besides=state.get("shards"))
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether enough time has passed for another snapshot."""
        return self.folder is not None and self.group.rank == 0 and time.monotonic() - self.last >= self.seconds

    def finish_experience(self, state: dict[str, Any]) -> None:
        """Write the state after an experience, then drop the snapshots of its `fit` calls."""
        self.save("experience", state)
        self.finished = state["experience"] + 1
        self.forget_fits()

    def inside(self) -> bool:
        """Whether there is a snapshot from inside the experience that is being learned."""
        return self.folder is not None and any(self.folder.glob("fit-*.pt"))

    def forget_fits(self) -> None:
        """Drop what was saved inside the current experience: it goes on from the end of the one before."""
        self._drop("fit-*")

    def clear(self) -> None:
        """The run is over, or starts anew."""
        self._drop("*")

    def _drop(self, pattern: str) -> None:
        if self.folder is not None and self.group.rank == 0:
            for path in self.folder.glob(f"{pattern}.pt"):
                path.unlink()
            distributed_checkpoint.remove(self.folder, pattern)
