"""Experts: several networks of one architecture, each with a head for every task that it was trained on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from clbench.models.backbone import Backbone
from clbench.models.heads import TaskHead


class Expert:
    """One network and its heads. State: both."""

    def __init__(self, model: Backbone, heads: TaskHead):
        self.model, self.heads = model, heads

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "heads": self.heads.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill in place, heads as in `TaskHead`."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])


class Experts:
    """A list of experts. A new one is a copy of `start`, whose own weights never change; its heads are empty."""

    def __init__(self, start: Backbone):
        self.start = start
        self.members: list[Expert] = []

    def add(self, like: Expert | None = None) -> Expert:
        """A new expert: the weights of `start`, or those of another expert, all of them trainable."""
        model = copy.deepcopy(self.start if like is None else like.model)
        model.unfreeze()
        device = next(model.parameters()).device
        self.members.append(Expert(model, TaskHead(model.num_features).to(device)))
        return self.members[-1]

    def that_know(self, task: int) -> list[Expert]:
        """Those that have a head for a task, in the order in which they were made."""
        return [expert for expert in self.members if task in expert.heads.tasks]

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.members)

    def __getitem__(self, index: int) -> Expert:
        return self.members[index]

    def state_dict(self) -> list[dict[str, Any]]:
        return [expert.state_dict() for expert in self.members]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Fill in place; experts that are missing are made first, those too many go."""
        while len(self.members) < len(state):
            self.add()
        del self.members[len(state) :]
        for expert, saved in zip(self.members, state, strict=True):
            expert.load_state_dict(saved)
