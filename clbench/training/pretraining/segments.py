"""Segments of a pre-training plan and the loop that trains one: trunk or branch, exact resume, looks at fixed steps.

A plan is a list of segments for each experience. The trunk is what the next experience continues from; a branch starts from
the trunk's end, is evaluated, and thrown away. Batches and rates are pure functions of the step, so a killed run needs the
weights, the optimiser and a step number, and nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clbench.interfaces import Place, Schedule, UserError
from clbench.training import looks
from clbench.training.distributed import ALONE, Group, Replica, placed_like
from clbench.training.pretraining.data_mixture import Mixture
from clbench.training.pretraining.ledger import Ledger
from clbench.training.runtime import Runtime
from clbench.training.state import detached

AfterStep = Callable[["Segment", int, Tensor, np.ndarray], None]


@dataclass(frozen=True)
class Segment:
    """Steps first..last-1 of a schedule that runs over `steps` steps of an experience.

    role        "trunk": the next experience continues from its end; "branch": evaluated, then thrown away
    start_from  "init": fresh weights; "trunk": the end of the last trunk; "here": where the segment before ended
    optimizer   what happened to the optimiser at its start: "new", "keep", "reset", "reset_moments", "restore"
    before      steps of the experiences before this one, branches included
    """

    experience: int
    role: Literal["trunk", "branch"]
    start_from: Literal["init", "trunk", "here"]
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
    group            the processes that train together, each on its rows of every batch
    compiled         torch.compile for the training pass
    stream_steps     steps that the stream gives each experience; empty: to all as many as to the one at hand
    """

    ledger: Ledger = field(default_factory=Ledger)
    flops_per_token: float = 0.0
    processed_limit: int | None = None
    micro_batch: int | None = None
    plan: list[dict[str, Any]] = field(default_factory=list)
    group: Group = ALONE
    compiled: bool = False
    stream_steps: tuple[int, ...] = ()

    def pause(self, anywhere: bool) -> bool:
        """Whether to write a snapshot now: somebody wants to stop, or it is time. The same answer in all processes."""
        self.stop, due = self.group.all_any(self.stop, anywhere and self.journal.due())
        return self.stop or due


class Adam:
    """AdamW over a model's parameters, matrices decayed, vectors not; made anew, kept or cleaned at boundaries."""

    def __init__(self, model: nn.Module, betas: Sequence[float], weight_decay: float, clip: float | None):
        self.model, self.betas, self.weight_decay, self.clip = model, tuple(betas), weight_decay, clip
        self.made = self._make()

    def _make(self) -> torch.optim.AdamW:
        self.params = params = list(self.model.parameters())
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = params[0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW([g for g in groups if g["params"]], betas=self.betas, fused=fused)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget everything."""
        self.made = self._make()

    def reset_moments(self) -> None:
        """Zero both moments; the step count, which corrects their bias, stays."""
        for state in self.made.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].zero_()

    def step(self, rate: float) -> None:
        """One update with clipped gradients at this rate; gradients are gone afterwards."""
        for group in self.made.param_groups:
            group["lr"] = rate
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.params, self.clip)
        self.made.step()
        self.made.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """What torch gives."""
        return self.made.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; it is copied."""
        self.made = self._make()
        self.made.load_state_dict(detached(state))
        for param, moments in self.made.state.items():
            moments |= {name: placed_like(value, param) for name, value in moments.items() if value.shape == param.shape}


def batches(mixture: Mixture, first: int, last: int, device: torch.device, group: Group = ALONE) -> Iterator[Tensor]:
    """This process's rows of batches first..last-1 on the device, [b, context + 1] int64; a GPU's are read meanwhile."""
    rows = group.rows(mixture.new.batch)
    if device.type != "cuda":
        yield from (torch.from_numpy(mixture(step, rows)) for step in range(first, last))
        return

    def read(step: int) -> Tensor:
        return torch.from_numpy(mixture(step, rows)).pin_memory()

    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(read, step) for step in range(first, min(first + 3, last))]
        for step in range(first, last):
            if step + 3 < last:
                waiting.append(pool.submit(read, step + 3))
            yield waiting.pop(0).result().to(device, non_blocking=True)


class _Count:
    """Counts the tokens of a segment into the ledger, up to a step at a time."""

    def __init__(self, runtime: PretrainRuntime, segment: Segment, mixture: Mixture, step: int):
        self.runtime, self.segment, self.mixture, self.counted = runtime, segment, mixture, step

    def __call__(self, until: int) -> None:
        context, mixture = self.mixture.new.context, self.mixture
        *old, new = (int(number) * context for number in mixture.used(self.counted, until))
        repeated = mixture.repeated(self.counted, until) * context
        self.runtime.ledger.train(self.segment.role, new, sum(old), repeated, self.runtime.flops_per_token)
        self.runtime.meter.steps += until - self.counted
        self.counted = until


def train(
    runtime: PretrainRuntime,
    model: nn.Module,
    optimizer: Adam,
    segment: Segment,
    mixture: Mixture,
    step: int,
    save: Callable[[int], None],
    after_step: AfterStep | None = None,
) -> None:
    """Train a segment from `step` on. `save(step)` writes a snapshot; `after_step(segment, step, losses [B, L], counts [K])`.

    Raises FloatingPointError on a NaN or infinite loss (looked at in every step, on a GPU in every 64th), `Interrupted` on
    Ctrl-C.
    """
    count, group = _Count(runtime, segment, mixture, step), runtime.group
    batch, replica = mixture.new.batch, Replica(group, model, runtime.compiled)
    sums: list[Tensor] = []
    model.train()
    for tokens in batches(mixture, step, segment.last, runtime.device, group):
        if runtime.pause(step > segment.first):
            if sums:
                _check_losses(runtime, segment, step, sums)  # no snapshot of weights that a bad loss has spoilt
                sums = []
            count(step)
            save(step)
            runtime.check_stop()
        if looks.due(segment, step):
            count(step)
            looks.look(model, segment, step)
            model.train()
        losses = _gradients(runtime, replica, tokens, batch)
        optimizer.step(segment.rate(step))
        sums.append(losses.mean())
        if after_step is not None:
            after_step(segment, step + 1, group.all_gather_rows(losses, batch), mixture.counts[step - mixture.first])
        step += 1
        if runtime.device.type == "cpu" or step % 64 == 0 or step == segment.last:
            _check_losses(runtime, segment, step, sums)
            sums = []
    count(segment.last)
    if segment.last == segment.steps:
        looks.look(model, segment, step)


def _gradients(runtime: PretrainRuntime, replica: Replica, tokens: Tensor, batch: int) -> Tensor:
    """Add the gradients of the mean loss over a batch of which this process has `tokens` [b, L + 1] -> losses [b, L].

    In pieces of `micro_batch` sequences. Over processes gradients are averaged, hence their number in each one's share.
    """
    found, pieces = [], tokens.split(runtime.micro_batch or len(tokens))
    for i, piece in enumerate(pieces):
        with replica.piece(last=i + 1 == len(pieces)):
            losses = replica.loss(piece)
            (losses.mean() * (len(piece) * runtime.group.size / batch)).backward()
        found.append(losses.detach())
    return found[0] if len(found) == 1 else torch.cat(found)


def _check_losses(runtime: PretrainRuntime, segment: Segment, step: int, losses: list[Tensor]) -> None:
    """Stop at a loss that is no number; show how far it is."""
    mean = runtime.group.all_reduce_sum(float(torch.stack(losses).mean()))[0] / runtime.group.size
    if not math.isfinite(mean):
        where = f"experience {segment.experience}, {segment.role}, step {step - 1} of {segment.steps}"
        raise FloatingPointError(f"loss is {mean} in {where}, learning rate {segment.rate(step - 1):g}")
    if runtime.progress is not None:
        runtime.progress(segment.role, step - segment.first, segment.last - segment.first, mean)


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
