"""The process group of a distributed run: rows of a batch by rank, collectives, DDP and FSDP wrapping, error propagation.

Every rank composes the same run and holds the same plan; batches are pure functions of the step, so only gradients, sums of
losses and the stop flag are communicated. Rank 0 alone writes and prints. `torchrun`, or a cluster's launcher with the same
variables in the environment, starts the processes.
"""

from __future__ import annotations

import gc
import inspect
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.training import torchrun

GRACE = 30.0  # seconds that a rank which failed waits for rank 0 to write the record


class Lost(KeyboardInterrupt):
    """Another rank was killed without reporting an error. The run can be resumed from its last snapshot."""


class RankFailed(RuntimeError):
    """Another rank failed; the note holds its traceback."""


@dataclass(eq=False)
class Group:
    """The process group of a run. `Group()` is a single process: every collective is then the identity.

    kind  "none"; "ddp": every rank holds all weights; "fsdp": each holds a shard of every tensor
    """

    rank: int = 0
    size: int = 1
    kind: str = "none"
    store: Any = None
    mesh: Any = None
    calls: dict[str, int] = field(default_factory=dict)
    lost: bool = False

    def rows(self, batch: int) -> slice:
        """This rank's rows of a batch; those of all ranks in order are the batch."""
        return slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def check_batch(self, batch: int, micro: int | None) -> None:
        """Every rank needs a row; with `fsdp` all need the same number of micro-batches, because each gathers weights."""
        if batch < self.size:
            raise UserError(f"scenario.batch={batch} is too small for {self.size} processes: each needs a sequence")
        most, least = -(-batch // self.size), batch // self.size
        if self.kind == "fsdp" and micro is not None and -(-most // micro) != -(-least // micro):
            raise UserError(
                f"scenario.batch={batch} over {self.size} processes with micro_batch={micro} gives some more pieces"
            )

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def all_any(self, *flags: bool) -> list[bool]:
        """Logical or of each flag over all ranks."""
        return [bool(flag) for flag in flags] if self.size == 1 else [n > 0 for n in self.all_reduce_sum(*map(float, flags))]

    def all_gather_rows(self, values: Tensor, batch: int) -> Tensor:
        """Rows of all ranks: values [b, ...] -> [batch, ...]."""
        if self.size == 1:
            return values
        whole = values.new_zeros(batch, *values.shape[1:])
        whole[self.rows(batch)] = values
        torch.distributed.all_reduce(whole)
        return whole

    def broadcast_object(self, value: Any = None) -> Any:
        """The `value` of rank 0, at every rank; JSON types only."""
        if self.size == 1:
            return value
        name = self._name("broadcast")
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
            return value
        return json.loads(self.store.get(name))

    def _name(self, kind: str) -> str:
        self.calls[kind] = self.calls.get(kind, 0) + 1
        return f"clbench/{kind}/{self.calls[kind]}"

    def shard(self, model: nn.Module) -> nn.Module:
        """With `fsdp`, shard each parameter over the ranks, block by block; in place."""
        if self.kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for blocks in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
                for block in blocks:
                    if type(block).forward is not nn.Module.forward:
                        fully_shard(block, mesh=self.mesh)
            fully_shard(model, mesh=self.mesh, reshard_after_forward=True)  # else a look leaves whole tensors behind
            model.register_load_state_dict_pre_hook(_distribute)
        return model

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a run: destroys the process group afterwards."""
        try:
            yield
        finally:
            if self.size > 1:
                self._destroy()

    def _destroy(self) -> None:
        with suppress(RuntimeError):  # the store is gone with the process that hosted it
            self.store.set("clbench/over" if self.rank == 0 else f"clbench/left/{self.rank}", "1")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # wakes those that wait for this one
        for rank in range(1, self.size) if self.rank == 0 and not self.lost else ():
            _wait(self.store, f"clbench/left/{rank}", GRACE / self.size)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the work: reports an error of this rank to the others; raises the error of another rank as `RankFailed`."""
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            raise self._attribute(error) from error

    def _attribute(self, error: Exception) -> BaseException:
        reported = self._reported_error(2.0) if _of_communication(error) else None
        if reported is None and _of_communication(error):
            self.lost = True
            return Lost("another process was lost")
        if reported is not None:
            failed = RankFailed(f"rank {reported['rank']}: {reported['type']}: {reported['message']}")
            failed.add_note(reported["traceback"])
            return failed
        text = "".join(traceback.format_exception(error))
        report = {"rank": self.rank, "type": type(error).__name__, "message": str(error), "traceback": text}
        self.store.compare_set("clbench/error", "", json.dumps(report))
        traceback.clear_frames(error.__traceback__)  # they hold what holds the connections
        gc.collect()
        if self.rank:
            torch.distributed.destroy_process_group()
            _wait(self.store, "clbench/over", GRACE)
        return error

    def _reported_error(self, seconds: float) -> dict[str, Any] | None:
        """The report of the rank that failed first; None if none came within `seconds`."""
        return json.loads(self.store.get("clbench/error")) if _wait(self.store, "clbench/error", seconds) else None


ALONE = Group()


def init_group(kind: str, device: torch.device) -> Group:
    """Initialise the process group. kind as `torchrun.choose` gives it; waits for all ranks, at most five minutes."""
    if kind == "none":
        return ALONE
    distributed: Any = torch.distributed
    if not distributed.is_available():
        raise UserError(f"parallel={kind}: this build of torch has no torch.distributed")
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=timedelta(minutes=5)))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {torchrun.size()} processes did not find each other: {str(error).splitlines()[0]}") from error
    mesh = distributed.init_device_mesh(device.type, (size,)) if kind == "fsdp" else None
    return Group(rank, size, kind, store, mesh)


class Replica:
    """A model's loss as training calls it: tokens [b, L + 1] -> [b, L]; backward passes all-reduce gradients.

    A step calls it `pieces` times; gradients are synchronised after the last one only.
    """

    def __init__(self, group: Group, model: nn.Module, compiled: bool = False, pieces: int = 1):
        self.model, self.kind, self.pieces, self.calls = model, group.kind, pieces, 0
        self.loss: Callable[[Tensor], Tensor] = model.loss  # type: ignore[assignment]
        self.wrapped: Any = None
        if group.kind == "ddp":
            device = next(model.parameters()).device
            wrap: Any = nn.parallel.DistributedDataParallel
            known = inspect.signature(wrap).parameters
            still = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.wrapped = wrap(_Loss(model), device_ids=[device] if device.type == "cuda" else None, **{still: False})
            self.loss = self.wrapped
        if compiled:
            self.loss = torch.compile(self.loss)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The loss of a piece, whose backward pass comes before the next call."""
        self.calls += 1
        last = self.calls % self.pieces == 0
        if self.kind == "fsdp":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif self.kind == "ddp":
            self.wrapped.require_backward_grad_sync = last  # what its `no_sync` does
        return self.loss(tokens)


class _Loss(nn.Module):
    """Makes `loss` the forward pass, which is what DDP wraps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [b, L + 1] -> [b, L]."""
        return self.model.loss(tokens)  # type: ignore[operator]


def placed_like(value: Tensor, own: Tensor) -> Tensor:
    """A copy of a tensor placed like `own`: on its device and, where that is sharded, this rank's shard."""
    if not hasattr(own, "full_tensor") or hasattr(value, "full_tensor"):
        return value.detach().to(own.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    placed: Any = own
    whole = value.detach().to(own.device)
    return distribute_tensor(whole, placed.device_mesh, placed.placements, src_data_rank=None)


def _distribute(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Shard full tensors of a state (saved by one process) like the model's own; a load_state_dict pre-hook."""
    for name, own in module.state_dict().items():
        if prefix + name in state:
            state[prefix + name] = placed_like(state[prefix + name], own)


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; then a collective, which all ranks must call."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[operator]


def _of_communication(error: BaseException) -> bool:
    """Whether an error comes from communication with another rank."""
    words = ("gloo", "nccl", "connection", "peer", "process group", "store")
    known = isinstance(error, torch.distributed.DistError)
    return known or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def _wait(store: Any, name: str, seconds: float) -> bool:
    """Wait for a key of the store -> whether it was set in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if store.check([name]):
                return True
        except (RuntimeError, torch.distributed.DistError):
            return False  # the process that hosts the store is gone
        time.sleep(0.05)
    return False
