"""The one optimisation loop. A learner hands it parameters, a loss and batches that are a pure function of the step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from clbench.interfaces import Place, Schedule, UserError
from clbench.training import looks
from clbench.training.runtime import Interrupted, Runtime
from clbench.training.schedules import constant
from clbench.training.state import detached

# Steps whose losses are looked at together: looking makes the processor wait for the device.
LAG = {"cpu": 1}
LAGGING = 32  # everywhere else


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

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Schedule = constant
    clip: float | None = None
    accumulate: int = 1

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimiser over `groups`."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay)
        if self.optimizer not in ("adam", "adamw"):
            raise UserError(f"unknown optimizer {self.optimizer!r}: choose sgd, adam or adamw")
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        return kind(groups, betas=self.betas, weight_decay=self.weight_decay)


class _Call:
    """One `fit` call: its optimiser, its place in the journal, its running sums."""

    def __init__(self, runtime: Runtime, name: str, learner: Any, groups: Sequence[dict[str, Any]], recipe: Recipe):
        self.runtime, self.name, self.learner = runtime, name, learner
        self.groups = [{**group, "params": list(group["params"])} for group in groups]
        self.groups = [group for group in self.groups if group["params"]]
        if not self.groups:
            raise UserError(f"fit {name!r}: no parameter to train")
        self.params = [p for group in self.groups for p in group["params"]]
        self.rates = [float(group["lr"]) for group in self.groups]
        self.optimizer = recipe.build(self.groups)
        self.step, self.loss_sum, self.loss_last = 0, 0.0, math.nan
        self.unchecked: list[tuple[Tensor, Place, float]] = []
        self.key = runtime.journal.next_call(name)
        if runtime.optimizer_state == "keep":
            self.names = _names(learner, self.params, name)
            self._take_over(runtime.optimizers.get(name, {}))

    def _take_over(self, kept: dict[str, Any]) -> None:
        """Moments of parameters that an earlier experience trained under the same name; others start without."""
        for p in self.params:
            if (state := kept.get(self.names[id(p)])) is not None and list(state["shape"]) == list(p.shape):
                moments = state["state"].items()  # Adam counts its steps on the CPU
                self.optimizer.state[p] = {k: detached(value, None if k == "step" else p.device) for k, value in moments}

    def keep(self) -> None:
        """Keep the moments for the next experience."""
        if self.runtime.optimizer_state == "keep":
            found = {self.names[id(p)]: (p, self.optimizer.state[p]) for p in self.params if p in self.optimizer.state}
            made = {key: {"shape": list(p.shape), "state": detached(state)} for key, (p, state) in found.items()}
            self.runtime.optimizers[self.name] = self.runtime.optimizers.get(self.name, {}) | made

    def look(self, least: int = 1) -> None:
        """Add up the losses since the last look, if there are `least`; FloatingPointError names the first bad one."""
        if len(self.unchecked) < least:
            return
        seen, self.unchecked = self.unchecked, []
        for value, (_, place, multiplier) in zip(torch.stack([loss for loss, _, _ in seen]).tolist(), seen, strict=True):
            if not math.isfinite(value):
                rates = ", ".join(f"{rate * multiplier:g}" for rate in self.rates)
                raise FloatingPointError(
                    f"loss is {value} in experience {place.experience}, fit {self.name!r}, step {place.step} of {place.steps}, "
                    f"learning rate {rates}"
                )
            self.loss_sum, self.loss_last = self.loss_sum + value, value

    def snapshot(self) -> dict[str, Any]:
        runtime = self.runtime
        return {
            "experience": runtime.experience,
            "name": self.name,
            "step": self.step,
            "learner": detached(self.learner.state_dict()),
            "params": [p.detach() for p in self.params],
            "optimizer": self.optimizer.state_dict(),
            "sums": [self.loss_sum, self.loss_last],
            "meter": runtime.meter.state_dict(),
            "used": [runtime.used_visits, runtime.used_new],
            "looks": looks.state_dict(),
        }

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
        self.runtime.meter.load_state_dict(state["meter"])
        self.runtime.used_visits, self.runtime.used_new = state["used"]
        looks.load_state_dict(state.get("looks"))


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
    after_step: Callable[[Place, Any], None] | None = None,
) -> dict[str, float]:
    """Minimise `loss_fn(batch)` (a scalar) over `batches` -> {name_loss, name_steps}.

    `groups` are torch parameter groups with their base rate `lr`. `at_place(place)` comes before a step's batches are made and
    says where the loss is asked next, `before_step(params, grads)` may change gradients in place, `after_step(place, batch)`
    may change the learner. Everything that changes must be in `learner.state_dict()`:
    then a killed run goes on from the middle of this call without any code of the learner's own.

    Raises FloatingPointError on a NaN or infinite loss, `BudgetExceeded` when visits run out, `Interrupted` on Ctrl-C.
    """
    call = _Call(runtime, name, learner, groups, recipe)
    call.restore()
    steps = -(-batches.steps // recipe.accumulate)
    start = time.perf_counter()
    meter, lag = runtime.meter, LAG.get(runtime.device.type, LAGGING)
    meter.trained = max(meter.trained, sum(p.numel() for p in call.params))
    while call.step < steps:
        if call.step == 0 and runtime.stop:
            raise Interrupted
        place = Place(runtime.experience, call.step, steps, meter.by_name.get(name, 0))
        if at_place is not None:
            at_place(place)
        first = call.step * recipe.accumulate
        group = [batches(i) for i in range(first, min(first + recipe.accumulate, batches.steps))]
        multiplier = recipe.schedule(place)
        for options, rate in zip(call.optimizer.param_groups, call.rates, strict=True):
            options["lr"] = rate * multiplier
        call.unchecked.append((_gradients(call, group, loss_fn), place, multiplier))
        call.look(lag)
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(call.params, recipe.clip)
        if before_step is not None:
            before_step(list(call.params), [p.grad for p in call.params])
        call.optimizer.step()
        if after_step is not None:
            after_step(place, group[-1])
        call.step += 1
        meter.add_step(name)
        start += looks.after_step(call.step, runtime.used_new)
        if runtime.progress is not None:
            runtime.progress(name, call.step, steps, call.loss_last)
        if runtime.stop or runtime.journal.due():
            start = _note(call, start)
        runtime.check_stop()
    call.look()
    call.keep()
    call.optimizer.zero_grad(set_to_none=True)
    meter.add_seconds(f"fit:{name}", time.perf_counter() - start)
    return {f"{name}_loss": call.loss_sum / max(1, steps), f"{name}_steps": float(steps)}


def _names(learner: Any, params: Sequence[Tensor], fit_name: str) -> dict[int, str]:
    """Identity of a parameter -> its place in the learner, the same in every process. `UserError` where one has none."""
    found: dict[int, str] = {}
    for attribute, part in vars(learner).items():
        if isinstance(part, torch.nn.Module):
            for name, p in part.named_parameters():
                found.setdefault(id(p), f"{attribute}.{name}")
        elif isinstance(part, torch.nn.Parameter):
            found.setdefault(id(part), attribute)
    if any(id(p) not in found for p in params):
        kind = type(learner).__name__
        raise UserError(f"optimizer_state=keep: fit {fit_name!r} of {kind} trains parameters that are in no attribute of it")
    return found


def _note(call: _Call, start: float) -> float:
    """Write a snapshot; the seconds until now belong to it."""
    call.look()
    call.runtime.meter.add_seconds(f"fit:{call.name}", time.perf_counter() - start)
    start = time.perf_counter()
    call.runtime.journal.save(call.key, call.snapshot())
    return start


def _gradients(call: _Call, group: list[Any], loss_fn: Callable[[Any], Tensor]) -> Tensor:
    """Gradients of the mean loss over `group`; counts the images first -> the loss, a float64 scalar where it was computed."""
    sizes = [max(1, len(batch)) if hasattr(batch, "__len__") else 1 for batch in group]
    call.optimizer.zero_grad(set_to_none=True)
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
