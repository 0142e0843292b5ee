"""How this process computes: threads, determinism, matrix-multiplication mode, attention path. Set for every job anew."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from clbench import ranks
from clbench.interfaces import UserError


def choose_device(name: str) -> torch.device:
    """The torch device: "auto" takes cuda, else cpu; anything torch knows otherwise. An absent device raises `UserError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise UserError(f"device={name}, and {ranks.size()} processes: say device=cuda, each takes one of its own")
        name = f"cuda:{ranks.local()[0]}"
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
        return max(1, min(8, usable // ranks.local()[1]))
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise UserError(f"num_threads must be auto or a number from 1, got {wanted!r}")
    return wanted


def medium_is_exact() -> bool:
    """Whether the faster fp32 mode of this processor keeps fp32 accuracy: measured on one linear layer against float64."""
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 192, generator=rng), torch.randn(192, 384, generator=rng)
    exact = x.double() @ w.double()
    errors = {}
    for mode in ("highest", "medium"):
        torch.set_float32_matmul_precision(mode)
        errors[mode] = ((x @ w - exact).norm() / exact.norm()).item()
    torch.set_float32_matmul_precision("highest")
    return errors["medium"] <= 2 * errors["highest"]


def apply(device: torch.device, threads: int, seed: int, kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """Set every flag of the process -> what was set. `kept` (a resumed run's flags) wins over this machine's choice."""
    from timm.layers.config import set_fused_attn

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # nothing here reads uninitialised memory; filling costs time
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 plug-ins may use the global generator
    flags = dict(kept or {})
    if not flags:
        on_cpu = device.type == "cpu"
        flags = {"matmul": "medium" if on_cpu and medium_is_exact() else "highest", "fused_attention": not on_cpu}
    torch.set_float32_matmul_precision(flags["matmul"])
    set_fused_attn(flags["fused_attention"])
    return {**flags, "num_threads": threads, "deterministic": True}
