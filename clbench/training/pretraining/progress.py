"""Resume of a pre-training run; a changed plan is an error that names the differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clbench.interfaces import UserError
from clbench.training.pretraining.segments import PretrainRuntime, Segment


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lines 'place: old -> new' for everything in which two plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{where}.{k}" if where else str(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{where}[{i}]")]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


class Progress:
    """Where a killed run was inside an experience, and how a running one writes that down.

    Restores ledger, meter and observer at once; `saved` is None where nothing was saved, else the learner's part of it.
    """

    def __init__(self, runtime: PretrainRuntime, plan: Sequence[Segment]):
        self.runtime, self.described = runtime, [segment.describe() for segment in plan]
        self.saved: dict[str, Any] | None = None
        self.segment, self.step = 0, plan[0].first if plan else 0
        state = runtime.journal.load(runtime.journal.next_call("pretrain"))
        if state is not None:
            changed = differences(state["plan"], self.described)
            if changed:
                lines = "\n".join(f"  {line}" for line in changed)
                raise UserError(f"the saved run had another plan; force=true starts anew\n{lines}")
            self.saved, self.segment, self.step = state["learner"], state["segment"], state["step"]
            runtime.go_on(state)
            runtime.ledger.load_state_dict(state["ledger"])
        runtime.plan[:] = [p for p in runtime.plan if p["experience"] != runtime.experience] + self.described

    def save(self, segment: int, step: int, learner: dict[str, Any]) -> None:
        """Write a snapshot: `step` is the next one of segment number `segment`."""
        own = {"plan": self.described, "segment": segment, "step": step, "learner": learner}
        state = own | self.runtime.snapshot() | {"ledger": self.runtime.ledger.state_dict()}
        self.runtime.journal.save("fit-0", state)
