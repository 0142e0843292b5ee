"""What a learner remembers: collecting it, restoring it in place, hashing it, weighing it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clbench.training.distributed import whole


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


def tensors(state: Any) -> Iterator[Tensor]:
    """Every tensor in a nested state, depth first, dictionaries in their own order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for item in state.values():
            yield from tensors(item)
    elif isinstance(state, list | tuple):
        for item in state:
            yield from tensors(item)


def num_bytes(state: Any) -> int:
    """Bytes of all distinct tensors of a state (a tensor met twice counts once)."""
    own = [getattr(t, "to_local", lambda t=t: t)() for t in tensors(state)]  # of a spread tensor, what lies here
    seen = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in own if t.numel()}
    return sum(seen.values())


def fingerprint(state: Any) -> str:
    """SHA-256 over a nested state: keys in sorted order, dtypes, shapes and bytes -> hex digest."""
    digest = hashlib.sha256()
    _absorb(digest, state)
    return digest.hexdigest()


def _absorb(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        array = whole(value.detach()).cpu().contiguous()
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
