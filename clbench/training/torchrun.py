"""Whether this process is one of several that train one model, as `torchrun` says in the environment. Imports no torch."""

from __future__ import annotations

import os
import sys
import time

from clbench.interfaces import Capabilities, UserError

KINDS = ("auto", "none", "ddp", "fsdp")
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def size() -> int:
    """How many processes train together; 1 for a process that is alone."""
    return _number("WORLD_SIZE", 1) if all(name in os.environ for name in _NEEDED) else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return _number("RANK", 0) if size() > 1 else 0


def local() -> tuple[int, int]:
    """Which of the processes on this machine this one is, and how many they are."""
    return (_number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", size())) if size() > 1 else (0, 1)


def choose(wanted: str) -> str:
    """How they train together: "auto" is ddp for several and none for one. `UserError` where the two do not fit."""
    if wanted == "auto":
        return "ddp" if size() > 1 else "none"
    if wanted == "none" and size() > 1:
        raise UserError(f"parallel=none, and {size()} processes were started: they would all do the same")
    if wanted in ("ddp", "fsdp") and size() == 1:
        raise UserError(f"parallel={wanted} needs several processes: torchrun --nproc-per-node 2 -m clbench run ...")
    return wanted


def check(kind: str, scenario: str, asks: str, learner: str, can: Capabilities) -> None:
    """Several processes train one model only where scenario and learner are made for it."""
    if kind == "none":
        return
    if asks != "loss":
        raise UserError(f"scenario {scenario} is made of images: such a run is for one process, without torchrun")
    if not can.supports_parallel:
        raise UserError(f"learner {learner} does not declare supports_parallel: it trains in one process, without torchrun")


def refuse(command: str, multirun: bool) -> None:
    """Only a single run is for several processes; everything else would be done several times."""
    if size() > 1 and (command != "run" or multirun):
        what = "a sweep is launched by machine=..." if multirun else f"clbench {command} is for one process"
        raise UserError(f"{what}, not by torchrun, which starts {size()} of them")


def from_launcher() -> None:
    """Where submitit started several tasks for one job, say so in the environment as torchrun would."""
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


def wait_for_the_first(seconds: float = 20.0) -> None:
    """Before another process than the first one says what is wrong: mostly the first says the same, and all are ended."""
    if rank():
        time.sleep(seconds)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {name} must be a number, got {text!r}") from None
