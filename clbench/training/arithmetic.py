"""Process-wide arithmetic: threads, determinism, matmul precision, attention kernel. Set for every job anew.

The option `arithmetic` of a run says who chooses:
  auto              what `calibration.py` measured once on this machine: the fastest path that keeps the accuracy
  reference         torch's defaults, which published code runs with: highest+fused
  MATMUL+ATTENTION  MATMUL highest, high or medium (torch.set_float32_matmul_precision), ATTENTION fused (one kernel for the
                    whole attention) or explicit (product, softmax, product); with +tail the last block of a ViT is run for
                    the class token alone where nothing else is read (`models/class_token.py`); with +channels_last networks
                    of convolutions keep channels innermost, which rounds differently
The environment variable CLBENCH_ARITHMETIC takes the place of `auto`, for machines that must all compute alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import random
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from clbench.interfaces import UserError
from clbench.models.memory_layout import lay_out
from clbench.training import kernel_timing, torchrun

REFERENCE = "highest+fused"
Network = TypeVar("Network", bound=nn.Module)


def choose_device(name: str) -> torch.device:
    """The torch device: "auto" takes cuda, else cpu; anything torch knows otherwise. An absent device raises `UserError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if torchrun.size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise UserError(f"device={name}, and {torchrun.size()} processes: say device=cuda, each takes one of its own")
        name = f"cuda:{torchrun.local()[0]}"
    try:
        device = torch.device(name)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={name} is not available here: {str(error).splitlines()[0]}") from error
    return device


def choose_threads(wanted: str | int) -> int:
    """Threads: "auto" takes the processors this process may use, at most 8; the same number whatever the launcher has set."""
    if wanted == "auto":
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        return max(1, min(8, usable // torchrun.local()[1]))
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise UserError(f"num_threads must be auto or a number from 1, got {wanted!r}")
    return wanted


def chosen(wanted: Any, device: torch.device, threads: int, precision: str, measure: bool = True) -> dict[str, Any]:
    """What the option `arithmetic` asks for -> its flags, and who chose them ("arithmetic"). Raises `UserError`.

    Without `measure` nothing is measured: what is not known yet is `REFERENCE`.
    """
    wanted = os.environ.get("CLBENCH_ARITHMETIC") or "auto" if wanted == "auto" else wanted
    name = REFERENCE if wanted == "reference" else wanted
    if wanted == "auto":
        name = kernel_timing.choice(device, threads, precision) if measure else kernel_timing.known(device, threads, precision)
        name = name or REFERENCE
    last = isinstance(name, str) and name.endswith(kernel_timing.CHANNELS_LAST)
    path = kernel_timing.PATHS.get(name.removesuffix(kernel_timing.CHANNELS_LAST)) if isinstance(name, str) else None
    if path is None:
        ways = ", ".join(("auto", "reference", *kernel_timing.PATHS, "each with +channels_last or not"))
        raise UserError(f"arithmetic must be one of {ways}, got {wanted!r}")
    by = {"auto": "measured", "reference": "reference"}.get(str(wanted), "given")
    flags = {"matmul": path.matmul, "fused_attention": path.fused, "class_token_tail": path.tail, "arithmetic": by}
    return flags | ({"channels_last": True} if last else {})


@functools.cache
def keep_memory() -> bool:
    """Have the C library keep the memory of large tensors for the next ones instead of returning it -> whether it could.

    Fetching 40 MB blocks anew from the system costs a third of a forward pass of 128 images on a CPU. glibc only.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(mmap, 1 << 30)) and bool(mallopt(trim, (1 << 31) - 1))


def pin(model: Network, flags: dict[str, Any]) -> Network:
    """Give a network that is built already the path of `flags`: timm's layers choose their attention when they are made."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = flags["fused_attention"]
        if hasattr(module, "class_token_tail"):
            module.class_token_tail = flags.get("class_token_tail", False)
        if hasattr(module, "channels_last"):
            lay_out(module, flags.get("channels_last", False))
    return model


def apply(
    device: torch.device,
    threads: int,
    seed: int,
    kept: dict[str, Any] | None = None,
    *,
    wanted: Any = "auto",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Set every flag of the process -> what was set. `kept` (a resumed run's flags) wins over what is `wanted` now."""
    _set_process(device, threads)
    if device.type == "cpu":
        keep_memory()
    flags = dict(kept or chosen(wanted, device, threads, precision))
    _set_path(flags, seed)
    return {**flags, "num_threads": threads, "deterministic": True}


@contextlib.contextmanager
def borrowed(device: torch.device, threads: int, seed: int, wanted: Any, precision: str) -> Iterator[dict[str, Any]]:
    """The flags that `apply` would set, for as long as the `with` block lasts: then all is put back. Nothing is measured."""
    from timm.layers.config import set_fused_attn, use_fused_attn

    deterministic: Any = torch.utils.deterministic
    were = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, fused = deterministic.fill_uninitialized_memory, (use_fused_attn(), use_fused_attn(experimental=True))
    drawn, shuffled = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=None if device.type == "cuda" else []):
            _set_process(device, threads)
            flags = chosen(wanted, device, threads, precision, measure=False)
            _set_path(flags, seed)
            yield {**flags, "num_threads": threads, "deterministic": True}
    finally:
        np.random.set_state(drawn)  # noqa: NPY002
        random.setstate(shuffled)
        torch.set_num_threads(were[0])
        torch.set_default_dtype(were[1])
        torch.set_grad_enabled(were[2])
        torch.set_float32_matmul_precision(were[3])
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
        deterministic.fill_uninitialized_memory = filled
        set_fused_attn(*fused)


def _set_process(device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # nothing here reads uninitialised memory; filling costs time
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


def _set_path(flags: dict[str, Any], seed: int) -> None:
    from timm.layers.config import set_fused_attn

    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 plug-ins may use the global generator
    torch.set_float32_matmul_precision(flags["matmul"])
    set_fused_attn(flags["fused_attention"])
