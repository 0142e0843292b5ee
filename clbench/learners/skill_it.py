"""Online mixing of domains by their losses (Chen et al. 2023, "Skill-it!", arXiv 2307.14430).

The share of domain i among all seen so far, the newest included, is moved `updates` times in an experience:
p_i ~ exp(eta * sum over the last `window` updates of sum_j A_ij L_j), with L_j the loss on domain j since the update before.

Deviations: a learner here sees no validation text, so L_j is the training loss of the sequences of domain j in those steps; a
domain that had none keeps its last loss. The graph A is the identity plus `spread` everywhere else (the paper learns one, or is
given it). The paper's setting is eta 0.5, window 3, an update every 1000 of 6000 steps; its tasks are others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.learners.pretrain import Pretrain
from clbench.training.pretraining.data_mixture import Replay
from clbench.training.pretraining.segments import PretrainRuntime, Segment
from clbench.training.schedules import constant
from clbench.training.state import detached


class SkillIt:
    """`Pretrain` with shares that follow the losses. State: that of `Pretrain`, shares, losses."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="loss", stores_exemplars=True, supports_parallel=True)

    def __init__(
        self,
        model: nn.Module,
        runtime: PretrainRuntime,
        *,
        lr: float = 3e-3,
        schedule: Schedule = constant,
        boundary: Literal["keep", "reset", "reset_moments"] = "reset",
        updates: int = 10,  # of the shares in an experience
        eta: float = 0.5,  # how strongly the losses move them
        window: int = 3,  # updates whose losses are summed
        spread: float = 0.0,  # of the graph: how much the loss of one domain counts for another
        betas: Sequence[float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
    ):
        if updates < 1 or window < 1:
            raise UserError("learner.updates and learner.window must be at least 1")
        replay = Replay(share=None, allocation="inverse_t")  # where replays come from; the shares are this learner's
        rest: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay, "clip": clip}
        self.inner = Pretrain(model, runtime, lr=lr, schedule=schedule, boundary=boundary, replay=replay, **rest)
        self.runtime, self.updates, self.eta, self.window, self.spread = runtime, updates, eta, window, spread
        self.shares: list[float] = []
        self.losses: list[list[float]] = []  # [updates][domains] since the experience began
        self.sums: list[list[float]] = []  # [summed loss, sequences] of each domain since the last update

    def plan(self, experience: Experience) -> list[Segment]:
        """The experience in `updates` pieces, between which the shares move."""
        (whole,) = self.inner.plan(experience)
        mixture = {"updates": self.updates, "eta": self.eta, "window": self.window, "spread": self.spread}
        edges = sorted({round(i * whole.last / self.updates) for i in range(self.updates + 1)})
        pieces = [replace(whole, first=a, last=b, mixture=mixture) for a, b in itertools.pairwise(edges)]
        return [pieces[0], *(replace(piece, start_from="here", optimizer="keep") for piece in pieces[1:])]

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train piece after piece -> the last shares."""
        result = self.inner.run(experience, self.plan(experience), self._table, self._after_step, owner=self)
        return result | {f"share_{i}": share for i, share in enumerate(self.shares)}

    def _table(self, segment: Segment) -> np.ndarray:
        domains = segment.experience + 1
        if len(self.shares) != domains:
            self.shares, self.losses = [1 / domains] * domains, []
            self.sums = [[0.0, 0.0] for _ in range(domains)]
        return np.repeat(np.array([self.shares]), segment.last - segment.first, 0)

    def _after_step(self, segment: Segment, step: int, losses: Tensor, counts: np.ndarray) -> None:
        """Sum up the losses [B, L] of each domain; at the end of a piece, move the shares."""
        source = np.repeat(np.arange(len(counts)), counts)
        sums = np.bincount(source, losses.mean(1).double().cpu().numpy(), len(counts))
        self.sums = [[a + float(b), n + int(m)] for (a, n), b, m in zip(self.sums, sums, counts, strict=True)]
        if step == segment.last:
            before = self.losses[-1] if self.losses else [0.0] * len(counts)
            self.losses.append([a / n if n else old for (a, n), old in zip(self.sums, before, strict=True)])
            self.sums = [[0.0, 0.0] for _ in counts]
            graph = np.full((len(counts), len(counts)), self.spread) + (1 - self.spread) * np.eye(len(counts))
            score = self.eta * graph @ np.sum(self.losses[-self.window :], 0)
            weights = np.exp(score - score.max())
            self.shares = (weights / weights.sum()).tolist()

    def loss(self, tokens: Tensor) -> Tensor:
        """Nats of every token after the first: tokens [B, L + 1] int64 -> [B, L]."""
        return self.inner.loss(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, data cursor; shares and losses."""
        own = {"shares": self.shares, "losses": self.losses, "sums": self.sums}
        return {"inner": self.inner.state_dict(), **detached(own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.shares, self.losses, self.sums = (detached(state[name]) for name in ("shares", "losses", "sums"))
