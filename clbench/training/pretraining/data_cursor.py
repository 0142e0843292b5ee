"""Data cursor: sequences consumed and replayed of each experience, and the remainder of the quotas. Saved with the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from clbench.training.pretraining.data_mixture import Mixture


@dataclass
class DataCursor:
    """Numbers of sequences, for each experience so far. State-dict keys are the field names.

    seen      distinct ones consumed by the trunk while the experience was the newest
    trained   trained on at all, repeats and replays included
    replayed  position in the stream of replays
    new       position in the newest text
    carry     remainder of each source's quota, as `data_mixture.quotas` returns it
    """

    seen: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)
    new: int = 0
    carry: list[float] = field(default_factory=list)

    def begin(self, experience: int, replays_start_anew: bool) -> None:
        """A new experience: its position and the quota remainders are zero."""
        for name in ("seen", "trained", "replayed"):
            values = getattr(self, name)
            setattr(self, name, [*values, *[0] * (experience + 1 - len(values))])
        if replays_start_anew:
            self.replayed = [0] * (experience + 1)
        self.new, self.carry = 0, [0.0] * (experience + 1)

    def starts(self, old: int) -> list[int]:
        """Positions in the replay streams of `old` earlier texts and, last, in the new text."""
        return [*self.replayed[:old], self.new]

    def advance(self, used: Sequence[int] | np.ndarray, mixture: Mixture, experience: int) -> None:
        """Advance by the sequences of each source that a segment used, the new one last."""
        *old, new = (int(number) for number in used)
        for i, number in enumerate(old):
            self.replayed[i] += number
            self.trained[i] += number
        self.new += new
        self.trained[experience] += new
        self.seen[experience] = min(self.new, mixture.size)
        self.carry = mixture.carry.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, copied."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)
