"""The trunk: weights, optimiser and data cursor carried over experiences, kept while a branch or average is evaluated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from clbench.interfaces import UserError
from clbench.training.optimizer_state import Adam
from clbench.training.pretraining.data_cursor import DataCursor
from clbench.training.pretraining.segments import Segment
from clbench.training.state import detached


class Trunk:
    """Keeps a copy of the trunk while its branch or average is evaluated, and puts it back at the next experience.

    initial  fresh weights, or those after the first experience, for segments that start from them
    based    whether `initial` is a part of the state: it was learned
    """

    def __init__(self, model: nn.Module, optimizer: Adam, cursor: DataCursor, initial: dict[str, Any], based: bool = False):
        self.model, self.optimizer, self.cursor, self.initial = model, optimizer, cursor, initial
        self.kept: dict[str, Any] | None = None
        self.based = based

    def base(self) -> None:
        """Segments that start from `initial` start from the weights of this moment."""
        self.initial = detached(self.model.state_dict())

    def keep(self) -> None:
        """Copy the trunk's end; training from here on is discarded at the next experience."""
        parts = {"model": self.model, "optimizer": self.optimizer, "places": self.cursor}
        self.kept = {name: detached(part.state_dict()) for name, part in parts.items()}

    def begin(self, segment: Segment) -> None:
        """Weights, optimiser and data cursor at the first segment of an experience, as its `start_from` and `optimizer` say.

        "keep" after a branch leaves the optimiser as the anneal left it; "restore" and "reset_moments" take the trunk's.
        """
        if segment.start_from in ("init", "base") and self.initial:
            self.model.load_state_dict(self.initial)
        elif self.kept is not None:
            self.model.load_state_dict(self.kept["model"])
            self.cursor.load_state_dict(self.kept["places"])
            if segment.optimizer in ("restore", "reset_moments"):
                self.optimizer.load_state_dict(self.kept["optimizer"])
        if segment.optimizer == "reset":
            self.optimizer.state.clear()
        elif segment.optimizer == "reset_moments":
            self.optimizer.reset_moments()
        self.kept = None

    def state_dict(self) -> dict[str, Any]:
        """The copy, or None; with `based` what segments start from."""
        return {"kept": self.kept} | ({"initial": self.initial} if self.based else {})

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        where = device or next(self.model.parameters()).device
        self.kept = detached(state["kept"], where)
        self.initial = detached(state["initial"], where) if self.based else self.initial


def check_trunk(trunk: Segment, branch: float) -> None:
    """A trunk that ends below the rate with which the next begins has a part of the anneal in it."""
    after = replace(trunk, experience=trunk.experience + 1, before=trunk.before + trunk.steps)
    ends, goes_on = trunk.rate(trunk.last - 1), after.rate(0)
    if ends < 0.99 * goes_on:
        raise UserError(
            f"learner.branch={branch} does not fit the schedule: the trunk of experience {trunk.experience} would end at rate "
            f"{ends:g}, the next would begin at {goes_on:g}; a trunk must end before the anneal begins"
        )
