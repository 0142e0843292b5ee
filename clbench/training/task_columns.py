"""Columns of a head over all classes that belong to a task: where tasks are disclosed, a softmax may run over these alone.

GEM (CIFAR), A-GEM (CIFAR, CUB) and MIR (split streams) train, replay and answer so in their released code. A sample of the
memory has the columns of the experience that it came from.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import Experience, UserError
from clbench.models.heads import LOWEST

Columns = Literal["seen", "task"]


class TaskColumns:
    """Classes by experience, and tasks by experience. `kind` seen: all columns stay, and nothing is kept."""

    def __init__(self, kind: Columns):
        if kind not in get_args(Columns):
            raise UserError(f"unknown learner.columns={kind}: choose seen or task")
        self.by_task = kind == "task"
        self.classes: dict[int, list[int]] = {}
        self.tasks: dict[int, int] = {}

    def see(self, experience: Experience) -> None:
        """An experience begins; a task that comes back may bring more classes."""
        if self.by_task:
            assert experience.task is not None, "needs_task_id is declared"
            self.classes[experience.index], self.tasks[experience.index] = list(experience.classes), experience.task

    def of_experiences(self, z: Tensor, experiences: np.ndarray) -> Tensor:
        """Scores z [B, K] of samples from experiences [B], LOWEST where a class is none of their tasks'."""
        if not self.by_task:
            return z
        rows = {e: self._open(z, self.tasks[e]) for e in set(experiences.tolist())}
        return z.masked_fill(~torch.stack([rows[e] for e in experiences.tolist()]), LOWEST)

    def of_task(self, z: Tensor, task: int | None) -> Tensor:
        """Scores z [B, K] of test samples of a task; those of a task that was never learned stay as they are."""
        return z.masked_fill(~self._open(z, task), LOWEST) if self.by_task and task in self.tasks.values() else z

    def _open(self, z: Tensor, task: int | None) -> Tensor:
        found = torch.zeros(z.shape[1], dtype=torch.bool)
        for e, classes in self.classes.items():
            if self.tasks[e] == task:
                found[classes] = True
        return found.to(z.device)

    def state_dict(self) -> dict[str, Any]:
        """Both tables."""
        return {"classes": dict(self.classes), "tasks": dict(self.tasks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.classes = {int(e): list(classes) for e, classes in state["classes"].items()}
        self.tasks = {int(e): int(task) for e, task in state["tasks"].items()}
