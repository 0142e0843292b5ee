"""A linear classifier for each task, for streams that disclose the task of a sample; or for each domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.models.heads import LinearHead


class TaskHeads:
    """One `Linear(D, classes of the task)` per task, over classes that may be those of other tasks too.

    A sample is answered by the head of its task; one whose task has not been learned by the newest head.
    """

    def __init__(self, num_features: int, init: Any = "normal"):
        self.linear = LinearHead(num_features, init=init)
        self.tasks: list[int] = []
        self.classes: list[list[int]] = []

    def to(self, device: torch.device | str) -> TaskHeads:
        self.linear.to(device)
        return self

    def add(self, task: int, classes: Sequence[int], generator: torch.Generator) -> int:
        """The place of a task's head, made where the task is new; `UserError` where it comes back with other classes."""
        if task in self.tasks:
            place = self.tasks.index(task)
            if self.classes[place] != list(classes):
                raise UserError(f"task {task} comes back with other classes: one head a task cannot hold them")
            return place
        self.linear.grow(len(classes), generator)
        self.tasks.append(task)
        self.classes.append(list(classes))
        return len(self.tasks) - 1

    def place(self, task: int | None) -> int:
        """Which head answers for a task."""
        return self.tasks.index(task) if task in self.tasks else len(self.tasks) - 1

    def head(self, place: int) -> torch.nn.Module:
        """The head at a place: features [B, D] -> logits of its classes, in their order."""
        return self.linear.blocks[place]

    def targets(self, place: int, y: Tensor) -> Tensor:
        """Columns of the head that labels [B] belong to."""
        keep = torch.as_tensor(self.classes[place], device=y.device)
        order = keep.argsort()
        return order[torch.searchsorted(keep[order], y)]

    def spread(self, place: int, z: Tensor, width: int) -> Tensor:
        """Logits of a head as scores over all classes [B, width]: those of others are one below the sample's lowest."""
        scores = (z.amin(1, keepdim=True) - 1).expand(len(z), width).clone()
        scores[:, self.classes[place]] = z
        return scores

    @property
    def width(self) -> int:
        """Classes that have been seen."""
        return 1 + max(max(classes) for classes in self.classes)

    def state_dict(self) -> dict[str, Any]:
        """Weights, tasks and their classes."""
        return {"linear": self.linear.state_dict(), "tasks": list(self.tasks), "classes": [list(c) for c in self.classes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Fill in place; heads that are missing are added, heads too many are removed."""
        self.linear.load_state_dict(state["linear"])
        self.tasks, self.classes = list(state["tasks"]), [list(c) for c in state["classes"]]
