"""The runtime of a learner: seed, device, precision, budget, counters and the journal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from clbench.interfaces import Budget, BudgetExceeded, UserError
from clbench.streams import rng
from clbench.training import looks
from clbench.training.checkpoint import Journal
from clbench.training.distributed import ALONE, Group
from clbench.training.gradient_norms import GradientNorms


class Interrupted(KeyboardInterrupt):
    """The user asked to stop; everything up to the last finished step is in the journal."""


@dataclass
class Meter:
    """Counts that go into the record. `visits` are images that `fit` trained on, new and replayed ones apart.

    steps    optimiser steps of the run, whatever they train
    by_name  those of the `fit` calls of each name: what schedules see as `Place.global_step`
    """

    visits: dict[str, int] = field(default_factory=lambda: {"new": 0, "replayed": 0})
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    trained: int = 0
    by_name: dict[str, int] = field(default_factory=dict)

    def add_step(self, name: str) -> None:
        """Count an optimiser step of a `fit` call."""
        self.steps += 1
        self.by_name[name] = self.by_name.get(name, 0) + 1

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add to one phase of the cost table."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        counts = {"visits": dict(self.visits), "steps": self.steps, "by_name": dict(self.by_name)}
        return counts | {"seconds": dict(self.seconds), "trained": self.trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the numbers of `state`."""
        self.visits, self.steps = dict(state["visits"]), state["steps"]
        self.seconds, self.trained = dict(state["seconds"]), state["trained"]
        self.by_name = dict(state.get("by_name", {}))


@dataclass
class Runtime:
    """Handed to every learner. Randomness comes from `key` and `generator`, which depend on the seed and the words given.

    precision  "fp32" or "bf16", of the network's passes, which open autocast themselves; all else is fp32 or better
    budget     the scenario's; `fit` raises `BudgetExceeded` when an experience would use more
    exempt     a reference learner (capability `stores_all_data`): visits are counted, not limited
    optimizer_state  what a `fit` starts an experience with: "fresh" moments, or those that a `fit` of that name has ("keep")
    optimizers       the moments that are kept, by the name of the `fit` and the parameter's place in the learner
    group      the processes that train together, each on its rows of every batch
    norms      where `fit` notes gradient norms, None for nowhere
    """

    seed: int
    device: torch.device
    budget: Budget = field(default_factory=Budget)
    precision: str = "fp32"
    exempt: bool = False
    journal: Journal = field(default_factory=Journal)
    meter: Meter = field(default_factory=Meter)
    progress: Callable[[str, int, int, float], None] | None = None
    experience: int = 0
    used_visits: int = 0
    used_new: int = 0
    num_train: int | None = None
    stop: bool = False
    optimizer_state: str = "fresh"
    optimizers: dict[str, Any] = field(default_factory=dict)
    group: Group = ALONE
    norms: GradientNorms | None = None

    def begin(self, experience: int, num_train: int | None = None, budget: Budget | None = None) -> None:
        """The runner calls this before each `learn`: sets the experience, its size, its budget and the visit counts to 0.

        `budget` is that of the experience; None leaves the one in force.
        """
        self.experience, self.num_train = experience, num_train
        self.budget = self.budget if budget is None else budget
        self.used_visits = self.used_new = 0
        self.journal.begin(experience)

    def epochs(self, wanted: int | None) -> int:
        """Passes a learner makes: what it wants, or all that the budget allows when it does not say (None)."""
        allowed = self.budget.epochs
        if wanted is not None and wanted < 1:
            raise UserError(f"learner.epochs must be at least 1, got {wanted}")
        if wanted is not None and wanted > allowed and not self.exempt:
            raise BudgetExceeded(f"the learner wants {wanted} epochs, the scenario's budget allows {allowed}")
        return allowed if wanted is None else wanted

    def key(self, *parts: int | str) -> int:
        """A 64-bit key of the seed, the current experience and the parts."""
        return rng.key(self.seed, self.experience, *parts)

    def generator(self, *parts: int | str) -> torch.Generator:
        """A CPU generator of its own for the seed, the current experience and the parts."""
        return torch.Generator().manual_seed(self.key(*parts) >> 1)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a piece of `learn` under a name of the cost table."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.meter.add_seconds(name, time.perf_counter() - start)

    def count_visits(self, new: int, replayed: int) -> None:
        """Count images of one step, or raise before they are used."""
        self.used_visits += new + replayed
        self.used_new += new
        if not self.exempt:
            limit = self.budget.sample_visits
            if limit is not None and self.used_visits > limit:
                raise BudgetExceeded(
                    f"experience {self.experience}: {self.used_visits} sample visits, the budget allows {limit}"
                )
            passes = None if self.num_train is None else self.budget.epochs * self.num_train
            if passes is not None and self.used_new > passes:
                raise BudgetExceeded(
                    f"experience {self.experience}: {self.used_new} visits to its {self.num_train} samples, "
                    f"the budget allows {self.budget.epochs} epoch(s)"
                )
        self.meter.visits["new"] += new
        self.meter.visits["replayed"] += replayed

    def snapshot(self) -> dict[str, Any]:
        """What a snapshot from inside an experience holds besides the learner: counts, and what looks have found."""
        counts = {"meter": self.meter.state_dict(), "used": [self.used_visits, self.used_new]}
        noted = {} if self.norms is None else {"norms": self.norms.state_dict()}
        return {"experience": self.experience, **counts, "looks": looks.state_dict(), **noted}

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on from a `snapshot`."""
        self.meter.load_state_dict(state["meter"])
        if self.norms is not None:
            self.norms.load_state_dict(state.get("norms"))
        self.used_visits, self.used_new = state.get("used", (0, 0))
        looks.load_state_dict(state.get("looks", state.get("observer")))  # the other name is that of earlier versions

    def pause(self, begun: bool) -> bool:
        """Whether to write a snapshot now: somebody wants to stop, or it is time. The same answer in all processes."""
        self.stop, due = self.group.all_any(self.stop, begun and self.journal.due())
        return self.stop or due

    def check_stop(self) -> None:
        """Leave at a safe place when the user pressed Ctrl-C."""
        if self.stop:
            raise Interrupted
