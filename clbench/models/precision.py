"""The precision of a network's passes. Only the network computes in it: heads, distances, losses and closed forms see float32.

A score in bf16 has eight bits: classes tie, and ties go to the older class. So autocast is opened by the network, around each
of its passes, and by nothing that a learner is called from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from clbench.interfaces import UserError

PRECISIONS = ("fp32", "bf16")


class MixedPrecision:
    """A network that opens autocast by itself, `with self.lowered(device_type):` around its passes, and returns float32."""

    precision: str = "fp32"

    def lowered(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast where `precision` asks for it, else nothing."""
        if self.precision == "bf16":
            return torch.autocast(device_type, torch.bfloat16)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Passes in float32 for a while: for statistics that are made of gradients."""
        before, self.precision = self.precision, "fp32"
        try:
            yield
        finally:
            self.precision = before


def set_precision(model: Any, precision: str) -> Any:
    """Let a network's passes compute in `precision` -> the network. `UserError` for one that computes in fp32 only."""
    if precision not in PRECISIONS:
        raise UserError(f"precision must be fp32 or bf16, got {precision!r}")
    if isinstance(model, MixedPrecision):
        model.precision = precision
    elif precision != "fp32":
        name = type(model).__name__
        raise UserError(f"precision={precision} has no effect on a {name}: it is no clbench.models.precision.MixedPrecision")
    return model
