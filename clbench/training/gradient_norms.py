"""Gradient norms of every update of pre-training (`gradient_norms=l1 | l2`): what a schedule can be refined from.

Of the raw gradient over all trained parameters, before clipping: sum of absolute values (l1, for methods of the Adam kind) or
Euclidean norm (l2, for SGD); see `pretraining.refinement`. Noting them changes no number of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import Place, UserError

MOST = 1000  # values of an experience in a record; more are averaged in as many pieces


class GradientNorms:
    """The norms of each experience in the order of its updates. State: these."""

    def __init__(self, kind: Literal["l1", "l2"]):
        self.kind, self.values = kind, {}

    def add(self, place: Place, params: Sequence[Tensor]) -> None:
        """Note the norm before the update of `place`."""
        grads = [p.grad for p in params if p.grad is not None]
        total = torch.stack(
            [g.abs().sum(dtype=torch.float64) if self.kind == "l1" else g.double().square().sum() for g in grads]
        )
        norm = float(total.sum())
        noted = self.values.setdefault(place.experience, [])
        assert len(noted) == place.step
        noted.append(norm if self.kind == "l1" else norm**0.5)

    def described(self) -> dict[str, Any]:
        """For the record: the kind, and for each experience at most `MOST` norms of five digits."""
        made = {}
        for experience, values in self.values.items():
            pieces = np.array_split(np.array(values), min(len(values), MOST))
            made[str(experience)] = [float(f"{piece.mean():.5g}") for piece in pieces]
        return {"kind": self.kind, "updates": {str(k): len(v) for k, v in self.values.items()}, "values": made}

    def state_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {"kind": self.kind, "values": {k: list(v) for k, v in self.values.items()}}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from there; `UserError` where the run so far has noted none, or others."""
        if state is None or state["kind"] != self.kind:
            raise UserError(
                f"gradient_norms={self.kind}: the run that goes on here noted no such norms: force=true starts anew"
            )
        self.values = {int(k): list(v) for k, v in state["values"].items()}
