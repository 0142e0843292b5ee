"""Alternating replay of continual pre-training, a baseline of Singh et al. 2025 (arXiv 2503.02844).

A memory keeps the share `kept` of every earlier experience, drawn once (released: 0.05, 0.4, 0.5). From the second experience
on new samples and remembered ones alternate, so that half of every batch is old; earlier experiences have equal parts of it.

steps  "equal" (default): as many as the stream gives, so the model sees half of the new data that it would see without replay.
       "double": as released, where the epochs double once there is a memory: twice the compute of the other learners, which the
       ledger says

What `rewarm_replay` replays is a share of each batch out of all that was read. Published number: none read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.learners.pretrain import Pretrain
from clbench.training.pretraining.data_mixture import KeptShare
from clbench.training.pretraining.segments import PretrainRuntime, Segment
from clbench.training.schedules import constant


class CptEr:
    """`Pretrain` with half of each batch from a memory of fixed shares. State: that of `Pretrain`."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="loss", stores_exemplars=True, supports_parallel=True)

    def __init__(
        self,
        model: nn.Module,
        runtime: PretrainRuntime,
        *,
        kept: float = 0.05,  # share of every earlier experience that is remembered
        steps: Literal["equal", "double"] = "equal",
        lr: float = 3e-3,
        schedule: Schedule = constant,
        boundary: Literal["keep", "reset", "reset_moments"] = "reset",
        betas: Sequence[float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
    ):
        if steps not in ("equal", "double"):
            raise UserError(f"learner.steps must be equal or double, got {steps!r}")
        replay = KeptShare(share=0.5, allocation="equal", kept=kept)
        rest: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay, "clip": clip}
        self.model, self.runtime, self.doubles = model, runtime, steps == "double"
        self.inner = Pretrain(model, runtime, lr=lr, schedule=schedule, boundary=boundary, replay=replay, **rest)

    def plan(self, experience: Experience) -> list[Segment]:
        """One segment, of twice the steps where there is a memory and `steps` says so."""
        (whole,) = self.inner.plan(experience)
        if not self.doubles or not experience.index:
            return [whole]
        first = self.runtime.stream_steps[0] if self.runtime.stream_steps else whole.steps
        return [replace(whole, last=2 * whole.last, steps=2 * whole.steps, before=2 * whole.before - first)]

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on new and remembered samples."""
        return self.inner.run(experience, self.plan(experience))

    def loss(self, tokens: Tensor) -> Tensor:
        """Losses of tokens [B, L + 1] -> [B, L], of images [B, ...] -> [B, 1]."""
        return self.inner.loss(tokens)

    def state_dict(self) -> dict[str, Any]:
        """That of `Pretrain`."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)
