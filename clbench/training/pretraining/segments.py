"""Segments of a pre-training plan, and what `fit` needs to train one: trunk or branch, exact resume, looks at fixed steps.

A plan is a list of segments for each experience. The trunk is what the next experience continues from; a branch starts from
the trunk's end, is evaluated, and thrown away. Batches and rates are pure functions of the step, so a killed run needs the
weights, the optimiser and a step number, and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clbench.interfaces import Place, Schedule, UserError
from clbench.training.distributed import Replica
from clbench.training.fit import Part, Recipe, fit
from clbench.training.optimizer_state import Adam
from clbench.training.pretraining.adaptive_rate import Rate
from clbench.training.pretraining.data_mixture import Mixture
from clbench.training.pretraining.ledger import Ledger
from clbench.training.runtime import Runtime

AfterStep = Callable[["Segment", int, Tensor, np.ndarray], None]
Objective = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # tokens -> losses [B, L], and what is added to their mean


@dataclass(frozen=True)
class Segment:
    """Steps first..last-1 of a schedule that runs over `steps` steps of an experience.

    role        "trunk": the next experience continues from its end; "branch": evaluated, then thrown away
    start_from  "init": fresh weights; "base": the end of the first experience; "trunk": the end of the last trunk;
                "here": where the segment before ended
    optimizer   what happened to the optimiser at its start: "new", "keep", "reset", "reset_moments", "restore"
    before      steps of the experiences before this one, branches included
    """

    experience: int
    role: Literal["trunk", "branch"]
    start_from: Literal["init", "base", "trunk", "here"]
    optimizer: str
    first: int
    last: int
    steps: int
    lr: float
    schedule: Schedule
    mixture: dict[str, Any] = field(default_factory=dict)
    before: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of update `step`."""
        place = Place(self.experience, step, self.steps, self.before + step)
        return self.lr * self.schedule(place)

    def describe(self) -> dict[str, Any]:
        """Plain values: for the record, and to notice that a saved run had another plan."""
        plain = {name: getattr(self, name) for name in ("experience", "role", "start_from", "optimizer")}
        plain |= {name: getattr(self, name) for name in ("first", "last", "steps", "lr")}
        last = max(self.first, self.last - 1)
        marks = sorted({self.first, (3 * self.first + last) // 4, (self.first + last) // 2, (self.first + 3 * last) // 4, last})
        return plain | {
            "schedule": named(self.schedule),
            "rates": {str(step): self.rate(step) for step in marks},
            "mixture": self.mixture,
        }


def named(schedule: Any) -> dict[str, Any]:
    """A schedule's function and constants."""
    if isinstance(schedule, functools.partial):
        return {"name": named(schedule.func)["name"], **{key: schedule.keywords[key] for key in sorted(schedule.keywords)}}
    return {"name": getattr(schedule, "__name__", type(schedule).__name__)}


@dataclass
class PretrainRuntime(Runtime):
    """What a pre-training learner is given: the runtime of every learner, the ledger, and the processes that train together.

    processed_limit  tokens that one experience may be trained on, None for no limit
    micro_batch      sequences that pass the model at once, None for the whole batch: gradients are summed over the pieces
    compiled         torch.compile for the training pass
    trained_flops    operations per token of a training step where a part of the model is frozen; None: `flops_per_token`
    stream_steps     steps that the stream gives each experience; empty: to all as many as to the one at hand
    """

    ledger: Ledger = field(default_factory=Ledger)
    flops_per_token: float = 0.0
    processed_limit: int | None = None
    micro_batch: int | None = None
    plan: list[dict[str, Any]] = field(default_factory=list)
    compiled: bool = False
    stream_steps: tuple[int, ...] = ()
    trained_flops: float | None = None

    def count_step(self, role: str, new: int, old: int, repeated: int, batch: int) -> None:
        """Count the tokens of a step, and its sequences."""
        flops = self.flops_per_token if self.trained_flops is None else self.trained_flops
        self.ledger.train(role, new, old, repeated, flops)
        self.used_visits += batch


class _Pieces:
    """Batches of `fit`: this process's rows of each step on the device, in `number` pieces of `micro_batch` sequences.

    Read once, in order; a GPU's are read three steps ahead.
    """

    def __init__(self, runtime: PretrainRuntime, mixture: Mixture, step: int, last: int):
        self.mixture, self.device, self.rows = mixture, runtime.device, runtime.group.rows(mixture.new.batch)
        rows = self.rows.stop - self.rows.start
        self.size = runtime.micro_batch or rows
        self.number = -(-rows // self.size)
        self.steps, self.stream = last * self.number, self._read(step, last)

    def __call__(self, step: int) -> Tensor:
        """[b, context + 1] int64; `step` counts pieces."""
        return next(self.stream)

    def _own(self, step: int) -> Tensor:
        own = torch.from_numpy(self.mixture(step, self.rows))
        return own.pin_memory() if self.device.type == "cuda" else own

    def _read(self, first: int, last: int) -> Iterator[Tensor]:
        if self.device.type != "cuda":
            for step in range(first, last):
                yield from self._own(step).split(self.size)
            return
        with ThreadPoolExecutor(1) as pool:
            waiting = [pool.submit(self._own, step) for step in range(first, min(first + 3, last))]
            for step in range(first, last):
                if step + 3 < last:
                    waiting.append(pool.submit(self._own, step + 3))
                yield from waiting.pop(0).result().to(self.device, non_blocking=True).split(self.size)


def _loss(losses_of: Replica | Objective, share: float, found: list[Tensor] | None) -> Callable[[Tensor], Tensor]:
    """What `fit` minimises on a piece: the mean loss, over processes `share` of it, and an objective's penalty."""

    def loss(tokens: Tensor) -> Tensor:
        made = losses_of(tokens)
        losses, penalty = made if isinstance(made, tuple) else (made, None)
        if found is not None:
            found.append(losses.detach())
        mean = losses.mean() if share == 1 else losses.mean() * share
        return mean if penalty is None else mean + penalty

    return loss


def train(
    runtime: PretrainRuntime,
    model: nn.Module,
    optimizer: Adam,
    segment: Segment,
    mixture: Mixture,
    step: int,
    save: Callable[[int], None],
    after_step: AfterStep | None = None,
    adapt: Rate | None = None,
    objective: Objective | None = None,
) -> None:
    """Train a segment from `step` on. `save(step)` writes a snapshot; `after_step(segment, step, losses [B, L], counts [K])`.

    `adapt` is a factor on the schedule's rates that the training itself moves; `objective` (of one process) takes the place of
    the model's loss. The gradients are those of the mean over a batch. Over processes they are averaged, hence `share`: this
    one's of the batch times their number, 1 but for uneven rows.
    """
    group, batch, context = runtime.group, mixture.new.batch, mixture.new.context
    pieces = _Pieces(runtime, mixture, step, segment.last)
    replica = Replica(group, model, runtime.compiled, pieces.number)
    share = (pieces.rows.stop - pieces.rows.start) * group.size / batch
    found: list[Tensor] = []
    loss = _loss(objective or replica, share, None if after_step is None else found)

    def count(place: Place, _: Tensor) -> None:
        counts = mixture.counts[place.step - mixture.first]
        *old, new = (counts * context).tolist()
        repeated = mixture.repeated(place.step, place.step + 1) * context
        role = segment.role if adapt is None or not adapt.searching else "branch"  # its weights go nowhere
        runtime.count_step(role, new, sum(old), repeated, batch)
        if after_step is not None:
            losses = group.all_gather_rows(torch.cat(found), batch)
            found.clear()
            after_step(segment, place.step + 1, losses, counts)

    def ready(*_: Any) -> None:
        optimizer.clip_gradients()
        if adapt is not None:
            adapt.before_step(optimizer)

    model.train()
    schedule = segment.schedule if adapt is None else adapt.schedule(segment.schedule)
    groups = [{**options, "lr": segment.lr * options.get("share", 1.0)} for options in optimizer.param_groups]
    recipe = Recipe(schedule=schedule, accumulate=pieces.number)
    part = Part(optimizer, segment.first, step, segment.steps, segment.before, save)
    steps: dict[str, Any] = {"before_step": ready, "after_step": count, "part": part}
    fit(runtime, segment.role, model, groups, loss, pieces, recipe, **steps)


def check_plan(plan: Sequence[Segment], limit: int | None, tokens_per_step: int) -> None:
    """Refuse a plan that makes no sense, before anything is trained."""
    at = 0
    for i, segment in enumerate(plan):
        if not 0 <= segment.first < segment.last <= segment.steps:
            raise UserError(f"experience {segment.experience}: {segment.role} has no steps ({segment.first}..{segment.last})")
        if segment.first != at or (i > 0 and segment.start_from != "here"):
            raise UserError(f"experience {segment.experience}: segment {i} does not start where the one before it ended")
        if segment.role == "trunk" and i > 0 and plan[i - 1].role == "branch":
            raise UserError(f"experience {segment.experience}: a trunk cannot follow its branch")
        at = segment.last
    used = sum(segment.last - segment.first for segment in plan) * tokens_per_step
    if limit is not None and used > limit:
        raise UserError(f"experience {plan[0].experience}: the plan trains on {used} tokens, the budget allows {limit}")
