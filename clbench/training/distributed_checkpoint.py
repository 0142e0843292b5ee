"""Checkpoints of sharded tensors: each rank writes its shards, any number of ranks can read them.

A snapshot is a plain file with everything that is not spread, and a folder beside it (torch.distributed.checkpoint) with what
is. The folder is complete before the file names it, so a run that is killed while it writes has its last snapshot.
"""

from __future__ import annotations

import pathlib
import secrets
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.training.distributed import Group

_MARK = "spread_over_processes"


def take_out(state: Any, found: dict[str, Tensor], path: str = "") -> Any:
    """A copy of a nested state in which spread tensors are notes of their place, shape and type; they go to `found`."""
    if hasattr(state, "full_tensor"):
        found[path] = state.detach()
        return {_MARK: path, "shape": list(state.shape), "dtype": str(state.dtype).removeprefix("torch.")}
    if isinstance(state, dict):
        return {key: take_out(value, found, f"{path}/{key}") for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(take_out(value, found, f"{path}/{i}") for i, value in enumerate(state))
    return state


def put_back(state: Any, found: dict[str, Tensor]) -> Any:
    """Undo `take_out`."""
    if isinstance(state, dict):
        if _MARK in state:
            return found[state[_MARK]]
        return {key: put_back(value, found) for key, value in state.items()}
    return type(state)(put_back(value, found) for value in state) if isinstance(state, list | tuple) else state


def _notes(state: Any) -> Iterator[dict[str, Any]]:
    if isinstance(state, dict) and _MARK in state:
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _notes(value)


def save(folder: pathlib.Path, key: str, state: dict[str, Any], group: Group) -> dict[str, Any]:
    """Write the spread tensors of a state, all processes together -> the state with notes in their place, for the file."""
    found: dict[str, Tensor] = {}
    plain = take_out(state, found)
    name = group.broadcast_object(f"{key}.{secrets.token_hex(4)}.shards")
    checkpoint = _library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own insides
        try:
            checkpoint.save(found, checkpoint_id=folder / name)
        except checkpoint.CheckpointException as error:
            raise UserError(f"cannot write the checkpoint {folder / name}: {_reason(error)}") from error
    return plain | {"shards": name}


def load(folder: pathlib.Path, plain: dict[str, Any], group: Group) -> dict[str, Any]:
    """Read a state back: with `fsdp` spread over the processes that there are now, else whole, at every process."""
    name = plain.pop("shards")
    found = {note[_MARK]: _room(note, group) for note in _notes(plain)}
    checkpoint = _library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own insides
        try:
            checkpoint.load(found, checkpoint_id=folder / name, no_dist=group.kind != "fsdp")
        except checkpoint.CheckpointException as error:
            raise UserError(f"cannot read the checkpoint {folder / name}: {_reason(error)}") from error
    return put_back(plain, found)


def remove(folder: pathlib.Path, key: str, besides: str | None = None) -> None:
    """Remove the folders of snapshots under a key that no file names any more."""
    for path in folder.glob(f"{key}.*.shards"):
        if path.name != besides:
            shutil.rmtree(path, ignore_errors=True)


def _room(note: dict[str, Any], group: Group) -> Tensor:
    shape, dtype = note["shape"], getattr(torch, note["dtype"])
    if group.kind != "fsdp":
        return torch.empty(shape, dtype=dtype)
    from torch.distributed.tensor import Shard, empty

    return empty(shape, dtype=dtype, device_mesh=group.mesh, placements=[Shard(0)])


def _reason(error: Any) -> str:
    causes = [str(cause[0] if isinstance(cause, tuple) else cause) for cause in getattr(error, "failures", {}).values()]
    return (causes or [str(error)])[0].splitlines()[0]


def _library() -> Any:
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint
