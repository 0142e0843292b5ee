"""State-dict functions: collect, restore in place, copy, size in bytes, SHA-256 fingerprint."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench.training.distributed import full_tensor

NUMBER = 8  # bytes that a number of Python counts as


def collect(owner: object, *names: str) -> dict[str, Any]:
    """Gather attributes by name: whatever has a `state_dict` gives that, everything else is taken as it is."""
    state = {}
    for name in names:
        value = getattr(owner, name)
        state[name] = value.state_dict() if hasattr(value, "state_dict") else value
    return state


def restore(owner: object, state: dict[str, Any]) -> None:
    """Undo `collect`: parts with a `load_state_dict` are filled in place, the rest is assigned.

    Tensors are copied to the device of the owner's runtime: snapshots come back on the CPU.
    """
    device = getattr(getattr(owner, "runtime", None), "device", None)
    for name, value in state.items():
        part = getattr(owner, name)
        if hasattr(part, "load_state_dict"):
            part.load_state_dict(value)
        elif isinstance(value, Tensor) and isinstance(part, Tensor) and part.shape == value.shape:
            with torch.no_grad():
                part.copy_(value)
        else:
            setattr(owner, name, detached(value, device))


def detached(value: Any, device: torch.device | None = None) -> Any:
    """A deep copy of a state: tensors are cloned without their graph, on `device` if given; containers are rebuilt."""
    if isinstance(value, Tensor):
        return value.detach().clone() if device is None else value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: detached(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(detached(item, device) for item in value)
    return value


def leaves(state: Any) -> Iterator[Any]:
    """Everything in a nested state that is no container, depth first; of dictionaries also keys that are no strings."""
    if isinstance(state, dict):
        for key, item in state.items():
            if not isinstance(key, str):
                yield from leaves(key)
            yield from leaves(item)
    elif isinstance(state, list | tuple | set | frozenset):
        for item in state:
            yield from leaves(item)
    elif isinstance(state, np.ndarray) and state.dtype == object:
        yield from leaves(state.ravel().tolist())
    else:
        yield state


def num_bytes(state: Any) -> int:
    """Bytes that a state takes, in whatever it is held.

    Distinct tensors and NumPy arrays (met twice, they count once), bytes and strings by their length, 8 for every number.
    Nothing for None and for the names in dictionaries.
    """
    total, seen = 0, dict[tuple[int, int], int]()
    for leaf in leaves(state):
        if isinstance(leaf, Tensor):
            own = getattr(leaf, "to_local", lambda leaf=leaf: leaf)()  # of a spread tensor, what lies here
            if own.numel():
                seen[own.data_ptr(), own.numel()] = own.numel() * own.element_size()
        elif isinstance(leaf, np.ndarray):
            seen[leaf.__array_interface__["data"][0], leaf.size] = leaf.nbytes
        elif isinstance(leaf, str):
            total += len(leaf.encode("utf-8", "surrogatepass"))
        elif isinstance(leaf, bytes | bytearray | memoryview):
            total += memoryview(leaf).nbytes
        elif isinstance(leaf, numbers.Number):
            total += NUMBER
    return total + sum(seen.values())


def fingerprint(state: Any) -> str:
    """SHA-256 over a nested state: keys in sorted order, dtypes, shapes and bytes -> hex digest."""
    digest = hashlib.sha256()
    _absorb(digest, state)
    return digest.hexdigest()


def _absorb(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        array = full_tensor(value.detach()).cpu().contiguous()
        digest.update(f"tensor {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)}".encode())
        for key in sorted(value, key=str):
            digest.update(f"{key!r}:".encode())
            _absorb(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)}".encode())
        for item in value:
            _absorb(digest, item)
    else:
        digest.update(repr(value).encode())


def parameters_of(*modules: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of several modules, in order."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def groups_of(*parts: tuple[nn.Module, float]) -> list[dict[str, Any]]:
    """Parameter groups for `fit`: the trainable parameters of each module with their base learning rate."""
    return [{"params": parameters_of(module), "lr": lr} for module, lr in parts]
