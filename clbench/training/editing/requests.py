"""The requests of an experience one after another, with snapshots, stops and looks between them; and the steps of one edit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from clbench.interfaces import Experience, Place, UserError
from clbench.streams.tokens.edits import EditData, Request
from clbench.training import looks
from clbench.training.runtime import Runtime
from clbench.training.state import detached


def edit_data(experience: Experience) -> EditData:
    """The requests of an experience of a stream of edits."""
    data: Any = experience.train
    return data


def each(runtime: Runtime, learner: Any, experience: Experience, batch: int = 1) -> Iterator[list[Request]]:
    """Requests in stream order, `batch` at a time; those that are asked for next stand for the ones before being done.

    Between them a snapshot is written where it is time or somebody asks to stop, and the runner's observer may ask the learner.
    A killed run goes on after the last request that is in a snapshot: all that changes must be in `learner.state_dict()`.
    """
    data = edit_data(experience)
    key, total, done = runtime.journal.next_call("edit"), len(data), 0
    state = runtime.journal.load(key)
    if state is not None:
        learner.load_state_dict(state["learner"])
        done = state["step"]
        runtime.go_on(state)
    while True:
        if runtime.pause(done > 0):
            own = {"name": "edit", "step": done, "learner": detached(learner.state_dict())}
            runtime.journal.save(key, own | runtime.snapshot())
        runtime.check_stop()
        if done == total:
            return
        start, first = time.perf_counter(), done
        done = min(done + batch, total)
        yield [data.request(i) for i in range(first, done)]
        runtime.meter.add_seconds("edit", time.perf_counter() - start)
        looks.at_step("edit", Place(experience.index, done, total, done), 0.0, done)
        if runtime.progress is not None:
            runtime.progress("edit", done, total, math.nan)


def whole(request: Request, device: torch.device) -> Tensor:
    """Prompt and answer as one text [1, P + T]."""
    return torch.cat([torch.from_numpy(request.prompt), torch.from_numpy(request.target)])[None].to(device)


def descend(
    runtime: Runtime,
    params: Sequence[Tensor],
    loss_fn: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    stop_below: float = 0.0,
    after_step: Callable[[], None] | None = None,
    is_done: Callable[[], bool] | None = None,
) -> int:
    """At most `steps` steps on `params` alone, none from a loss below `stop_below` or `is_done()` on -> steps made.

    Raises FloatingPointError on a loss that is NaN or infinite: the model is beyond repair.
    """
    for step in range(steps):
        loss = loss_fn()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of an edit is {value} in experience {runtime.experience}, step {step}")
        if value < stop_below or (is_done is not None and is_done()):
            return step
        for p, grad in zip(params, torch.autograd.grad(loss, list(params)), strict=True):
            p.grad = grad
        optimizer.step()
        for p in params:
            p.grad = None
        if after_step is not None:
            after_step()
        runtime.meter.add_step("edit")
    return steps


def check_options(**least: tuple[Any, float]) -> None:
    """`name=(value, least)` of numeric options of a learner: finite, and at least so much; `UserError` names the option."""
    for name, (value, bound) in least.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < bound:
            raise UserError(f"learner.{name} must be a number from {bound:g}, got {value!r}")
