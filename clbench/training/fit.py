"""The one optimisation loop. It is given parameters, a loss and batches that are a pure function of the step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from clbench.interfaces import Place, Schedule, UserError
from clbench.training import looks, optimizer_state, optimizers
from clbench.training.optimizers import Optimizer
from clbench.training.runtime import Runtime
from clbench.training.schedule_free import ScheduleFree
from clbench.training.schedules import constant
from clbench.training.state import detached

# Steps whose losses are checked together: that makes the processor wait for the device.
LAG = {"cpu": 1}
LAGGING = 64  # everywhere else


class Batches(Protocol):
    """Batch `step` of `steps`, the same whenever it is asked for: so a run can go on from any step."""

    steps: int

    def __call__(self, step: int) -> Any: ...


@dataclass(frozen=True)
class Recipe:
    """How to step. Learning rates stand in the parameter groups (`lr`); a group may override `weight_decay`.

    clip        largest global gradient norm, None for none
    accumulate  batches per optimiser step; their losses are averaged by their number of samples
    """

    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Schedule = constant
    clip: float | None = None
    accumulate: int = 1

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser over `groups`."""
        options = {"momentum": self.momentum, "nesterov": self.nesterov, "betas": self.betas, "weight_decay": self.weight_decay}
        return optimizers.build(self.optimizer, groups, **options)


@dataclass(frozen=True)
class FlooredRecipe(Recipe):
    """All groups end at the rate `floor`: where the schedule is at m, a group of rate r has floor + (r - floor) m."""

    floor: float = 0.0

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimiser; just before each step it adds the floor to the rates that `fit` has set."""
        optimizer = super().build(groups)
        base = [float(group["lr"]) for group in groups]

        def raise_rates(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                if rate > 0:
                    group["lr"] = self.floor + (rate - self.floor) * group["lr"] / rate

        optimizer.register_step_pre_hook(raise_rates)
        return optimizer


@dataclass(frozen=True)
class Part:
    """What a `fit` is told that does some steps of a longer training, whose optimiser and snapshots are the caller's.

    first   its first step; the last is that of its batches, of `steps` in all
    before  steps that schedules count before step 0
    start   the step to begin with: `first`, or where a killed run was
    save    writes a snapshot from which step `step` comes next
    """

    optimizer: torch.optim.Optimizer
    first: int
    start: int
    steps: int
    before: int
    save: Callable[[int], None]


class _Call:
    """One `fit` call: its optimiser, its place in the journal, its running sums."""

    def __init__(
        self, runtime: Runtime, name: str, learner: Any, groups: Sequence[dict[str, Any]], recipe: Recipe, part: Part | None
    ):
        self.runtime, self.name, self.learner, self.part = runtime, name, learner, part
        groups = [{**group, "params": list(group["params"])} for group in groups]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise UserError(f"fit {name!r}: no parameter to train")
        self.params = [p for group in groups for p in group["params"]]
        self.rates = [float(group["lr"]) for group in groups]
        if wrong := [rate for rate in self.rates if not 0 <= rate < math.inf]:
            raise UserError(f"fit {name!r}: a learning rate must be a finite number from 0, got {wrong[0]:g}")
        self.loss_sum, self.loss_last = 0.0, math.nan
        self.unchecked: list[tuple[Tensor, Place, list[float]]] = []
        self.since = time.perf_counter()
        if part is not None:
            self.optimizer, self.first, self.step = part.optimizer, part.first, part.start
            return
        self.optimizer, self.first, self.step = recipe.build(groups), 0, 0
        self.key = runtime.journal.next_call(name)
        if runtime.optimizer_state == "keep":
            optimizer_state.take_over(runtime, name, learner, self.optimizer)
        if isinstance(self.optimizer, ScheduleFree):
            self.optimizer.train()
        self.restore()

    def place(self, steps: int) -> Place:
        """Where the next step is, for schedules."""
        experience, part = self.runtime.experience, self.part
        if part is not None:
            return Place(experience, self.step, part.steps, part.before + self.step)
        return Place(experience, self.step, steps, self.runtime.meter.by_name.get(self.name, 0))

    def check(self, least: int = 1) -> None:
        """Add up the losses since the last check, if there are `least`; FloatingPointError names the first bad one."""
        if len(self.unchecked) < least:
            return
        seen, self.unchecked = self.unchecked, []
        values, group = torch.stack([loss for loss, _, _ in seen]).tolist(), self.runtime.group
        for total, (_, place, rates) in zip(group.all_reduce_sum(*values), seen, strict=True):
            value = total / group.size
            if not math.isfinite(value):
                where = f"fit {self.name!r}" if self.part is None else self.name
                raise FloatingPointError(
                    f"loss is {value} in experience {place.experience}, {where}, step {place.step} of {place.steps}, "
                    f"learning rate {', '.join(dict.fromkeys(f'{rate:g}' for rate in rates))}"
                )
            self.loss_sum, self.loss_last = self.loss_sum + value, value

    def observe(self, place: Place) -> None:
        """Let the observer evaluate; the seconds of that are not those of training."""
        average = self.optimizer if isinstance(self.optimizer, ScheduleFree) else None
        if average is not None:
            average.evaluate()
        self.since += looks.at_step(self.name, place, self.optimizer.param_groups[0]["lr"], self.runtime.used_new)
        if average is not None:
            average.train()

    def pause(self) -> None:
        """Between steps: write a snapshot if somebody asks to stop, or it is time; `Interrupted` on the former."""
        if self.runtime.pause(self.step > self.first):
            self.check()  # no snapshot of weights that a bad loss has spoilt
            if self.part is not None:
                self.part.save(self.step)
            else:
                self.clock()
                self.runtime.journal.save(self.key, self.snapshot())
        self.runtime.check_stop()

    def clock(self) -> None:
        """Count the seconds until now."""
        now = time.perf_counter()
        self.runtime.meter.add_seconds(f"fit:{self.name}", now - self.since)
        self.since = now

    def snapshot(self) -> dict[str, Any]:
        own = {"name": self.name, "step": self.step, "sums": [self.loss_sum, self.loss_last]}
        params = [p.detach() for p in self.params]
        state = {"learner": detached(self.learner.state_dict()), "params": params, "optimizer": self.optimizer.state_dict()}
        return own | state | self.runtime.snapshot()

    def restore(self) -> None:
        """Go on where the journal says this call was, if it says so."""
        state = self.runtime.journal.load(self.key)
        if state is None:
            return
        if state["name"] != self.name or len(state["params"]) != len(self.params):
            raise UserError(
                f"the journal holds fit {state['name']!r} where the learner now calls {self.name!r}: use force=true"
            )
        self.learner.load_state_dict(state["learner"])
        with torch.no_grad():
            for p, saved in zip(self.params, state["params"], strict=True):
                p.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, (self.loss_sum, self.loss_last) = state["step"], state["sums"]
        self.runtime.go_on(state)

    def end(self, place: Place) -> None:
        """After the last step."""
        self.check()
        if self.part is None or place.step == place.steps:
            self.observe(place)
        if self.part is None:
            self.pause()
            if self.runtime.optimizer_state == "keep":
                optimizer_state.keep(self.runtime, self.name, self.learner, self.optimizer)
            self.clock()
        if isinstance(self.optimizer, ScheduleFree):
            self.optimizer.evaluate()


def fit(
    runtime: Runtime,
    name: str,
    learner: Any,
    groups: Sequence[dict[str, Any]],
    loss_fn: Callable[[Any], Tensor],
    batches: Batches,
    recipe: Recipe = Recipe(),
    *,
    at_place: Callable[[Place], None] | None = None,
    before_step: Callable[[list[Tensor], list[Tensor | None]], None] | None = None,
    after_step: Callable[[Place, Any], Any] | None = None,
    part: Part | None = None,
) -> dict[str, float]:
    """Minimise `loss_fn(batch)` (a scalar) over `batches` -> {name_loss, name_steps}.

    `groups` are torch parameter groups with their base rate `lr`. `at_place(place)` comes before a step's batches are made and
    says where the loss is asked next, `before_step(params, grads)` may change gradients in place, `after_step(place, batch)`
    may change the learner, and the gradients are still there. Everything that changes must be in `learner.state_dict()`:
    then a killed run goes on from the middle of this call without any code of the learner's own. With a `part` the caller
    sees to that.

    Raises FloatingPointError on a NaN or infinite loss, `BudgetExceeded` when visits run out, `Interrupted` on Ctrl-C.
    """
    call = _Call(runtime, name, learner, groups, recipe, part)
    steps = -(-batches.steps // recipe.accumulate)
    meter, lag = runtime.meter, LAG.get(runtime.device.type, LAGGING)
    meter.trained = max(meter.trained, sum(p.numel() for p in call.params))
    call.optimizer.zero_grad(set_to_none=True)
    while call.step < steps:
        call.pause()
        place = call.place(steps)
        multiplier = recipe.schedule(place)
        rates = [rate * multiplier for rate in call.rates]
        for options, rate in zip(call.optimizer.param_groups, rates, strict=True):
            options["lr"] = rate
        call.observe(place)
        if at_place is not None:
            at_place(place)
        first = call.step * recipe.accumulate
        group = [batches(i) for i in range(first, min(first + recipe.accumulate, batches.steps))]
        call.unchecked.append((_gradients(call, group, loss_fn), place, rates))
        call.check(lag)
        if call.runtime.norms is not None:
            call.runtime.norms.add(place, call.params)
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(call.params, recipe.clip)
        if before_step is not None:
            before_step(list(call.params), [p.grad for p in call.params])
        call.optimizer.step()
        if after_step is not None:
            after_step(place, group[-1])
        group.clear()  # a memory may have given up what was replayed
        call.optimizer.zero_grad(set_to_none=True)
        call.step += 1
        meter.add_step(name)
        if runtime.progress is not None:
            runtime.progress(name, call.step - call.first, steps - call.first, call.loss_last)
    call.end(call.place(steps))
    return {f"{name}_loss": call.loss_sum / max(1, steps), f"{name}_steps": float(steps)}


def _gradients(call: _Call, group: list[Any], loss_fn: Callable[[Any], Tensor]) -> Tensor:
    """Gradients of the mean loss over `group`; counts the images first -> the loss, a float64 scalar where it was computed."""
    sizes = [max(1, len(batch)) if hasattr(batch, "__len__") else 1 for batch in group]
    total: Tensor | None = None
    for batch, size in zip(group, sizes, strict=True):
        if hasattr(batch, "ids"):
            replayed = int(getattr(batch, "replayed", 0))
            call.runtime.count_visits(len(batch) - replayed, replayed)
        loss = loss_fn(batch) * (size / sum(sizes))
        loss.backward()
        value = loss.detach() if loss.device.type == "mps" else loss.detach().double()
        total = value if total is None else total + value
    assert total is not None
    return total
