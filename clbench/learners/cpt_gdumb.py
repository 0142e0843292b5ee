"""GDumb in continual pre-training, a baseline of Singh et al. 2025 (arXiv 2503.02844), after Prabhu et al. (ECCV 2020).

A memory keeps the share `kept` of every experience, the newest too, drawn once. In each experience the model starts from its
first weights with a fresh optimiser, and is trained on the memory alone, equal parts of each experience in every batch.

steps  "equal" (default): as many as the stream gives an experience, so a small memory is read many times. "passes": as many
       passes over the memory as the stream makes over its data

Deviations: the paper's memory is balanced over classes; here no learner sees labels, and experiences take their place. The
released code leaves optimiser and probe with the network of the first experience, so that nothing that is evaluated is trained
any more: that is `learner=frozen`, and is not built again. Published number: none read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.learners.pretrain import Pretrain
from clbench.training.pretraining.data_mixture import KeptShare
from clbench.training.pretraining.segments import PretrainRuntime, Segment
from clbench.training.schedules import constant
from clbench.training.state import detached


class CptGDumb:
    """Anew on a memory of fixed shares. State: that of `Pretrain`."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="loss", stores_exemplars=True, supports_parallel=True)

    def __init__(
        self,
        model: nn.Module,
        runtime: PretrainRuntime,
        *,
        kept: float = 0.05,  # share of every experience that is remembered
        steps: Literal["equal", "passes"] = "equal",
        lr: float = 3e-3,
        schedule: Schedule = constant,
        betas: Sequence[float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
    ):
        if steps not in ("equal", "passes"):
            raise UserError(f"learner.steps must be equal or passes, got {steps!r}")
        replay = KeptShare(share=0.5, allocation="equal", kept=kept)  # where samples come from; the shares are this learner's
        rest: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay, "clip": clip}
        self.model, self.runtime, self.kept, self.passes = model, runtime, kept, steps == "passes"
        self.inner = Pretrain(model, runtime, lr=lr, schedule=schedule, boundary="reset", replay=replay, **rest)
        self.inner.trunk.initial = detached(model.state_dict())
        self.inner.passes = 1 / kept  # of the newest text, too, the first share is all that is read

    def plan(self, experience: Experience) -> list[Segment]:
        """One segment from fresh weights."""
        (whole,) = self.inner.plan(experience)
        mixture = {"kept": self.kept, "alone": True}
        steps = whole.steps
        if self.passes:
            steps = max(1, round(whole.steps * self.kept * (experience.index + 1)))
        return [replace(whole, start_from="init", last=steps, steps=steps, mixture=mixture)]

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the memory."""
        return self.inner.run(experience, self.plan(experience), _equal)

    def loss(self, tokens: Tensor) -> Tensor:
        """Losses of tokens [B, L + 1] -> [B, L], of images [B, ...] -> [B, 1]."""
        return self.inner.loss(tokens)

    def state_dict(self) -> dict[str, Any]:
        """That of `Pretrain`."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def _equal(segment: Segment) -> np.ndarray:
    """Every experience so far has one share: [S, K]."""
    number = segment.experience + 1
    return np.full((segment.last - segment.first, number), 1 / number)
