"""Rank and world size as `torchrun` sets them in the environment, and checks of distributed runs. Imports no torch."""

from __future__ import annotations

import os
import sys
import time

from clbench.interfaces import UserError

KINDS = ("auto", "none", "ddp", "fsdp")
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def size() -> int:
    """World size; 1 for a single process."""
    return _number("WORLD_SIZE", 1) if all(name in os.environ for name in _NEEDED) else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return _number("RANK", 0) if size() > 1 else 0


def local() -> tuple[int, int]:
    """(local rank, local world size)."""
    return (_number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", size())) if size() > 1 else (0, 1)


def choose(wanted: str) -> str:
    """The kind of parallelism: "auto" is ddp for several processes, none for one. `UserError` where the two do not fit."""
    if wanted == "auto":
        return "ddp" if size() > 1 else "none"
    if wanted == "none" and size() > 1:
        raise UserError(f"parallel=none, and {size()} processes were started: they would all do the same")
    if wanted in ("ddp", "fsdp") and size() == 1:
        raise UserError(f"parallel={wanted} needs several processes: torchrun --nproc-per-node 2 -m clbench run ...")
    return wanted


def check_single_run(command: str, multirun: bool) -> None:
    """Raises `UserError` for a command that several processes would only repeat: everything but a single run."""
    if size() > 1 and (command != "run" or multirun):
        what = "a sweep is launched by machine=..." if multirun else f"clbench {command} is for one process"
        raise UserError(f"{what}, not by torchrun, which starts {size()} of them")


def from_launcher() -> None:
    """Where submitit started several tasks for one job, set the environment variables of torchrun."""
    submitit = sys.modules.get("submitit")
    if submitit is None or size() > 1:
        return
    try:
        tasks = submitit.JobEnvironment().num_tasks
    except RuntimeError:  # this process was started otherwise
        return
    if tasks > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def delay_nonzero_ranks(seconds: float = 20.0) -> None:
    """Sleep on ranks other than 0 before they print an error: mostly rank 0 prints the same, and all are ended."""
    if rank():
        time.sleep(seconds)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {name} must be a number, got {text!r}") from None
