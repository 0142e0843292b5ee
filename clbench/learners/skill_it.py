"""Online mixing of domains by their losses (Chen et al. 2023, "Skill-it!", arXiv 2307.14430).

The share of domain i among all seen so far, the newest included, is moved `updates` times in an experience:
p_i ~ exp(eta * sum over the last `window` updates of sum_j A_ij L_j), with L_j the loss on domain j since the update before.

graph  "spread": the identity, and `spread` everywhere else. "learned": by pilots when an experience begins, from the weights of
       that moment, as `training/pretraining/skill_graph.py` says. A list of lists: given, rows i by columns j, of all domains
       of the stream in the order of their experiences

Deviations: a learner here sees no validation text, so L_j is the training loss of the sequences of domain j in those steps; a
domain that had none keeps its last loss. The paper learns its graph once, before training; here domains come one by one. The
ledger counts what pilots read as looked at. The paper's setting is eta 0.5, window 3, an update every 1000 of 6000 steps.
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
from clbench.training.pretraining.skill_graph import Pilots
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
        graph: Literal["spread", "learned"] | Sequence[Sequence[float]] = "spread",
        pilot: int = 50,  # steps of each training by which a graph is learned
        repeats: int = 3,  # of each of them; an edge stands where all agree
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
        self.given = _checked(graph, spread, pilot, repeats, runtime)
        self.pilot, self.repeats, self.rest = pilot, repeats, rest
        self.texts: list[Any] = []  # of the experience at hand, the newest last
        self.graph: list[list[float]] = []
        self.shares: list[float] = []
        self.losses: list[list[float]] = []  # [updates][domains] since the experience began
        self.sums: list[list[float]] = []  # [summed loss, sequences] of each domain since the last update

    def plan(self, experience: Experience) -> list[Segment]:
        """The experience in `updates` pieces, between which the shares move."""
        (whole,) = self.inner.plan(experience)
        if isinstance(self.given, list) and len(self.given) <= experience.index:
            raise UserError(f"learner.graph has {len(self.given)} rows, experience {experience.index} needs one more")
        mixture = {"updates": self.updates, "eta": self.eta, "window": self.window, "spread": self.spread}
        if self.given != "spread":
            mixture |= {"graph": self.given, "pilot": self.pilot, "repeats": self.repeats}
        edges = sorted({round(i * whole.last / self.updates) for i in range(self.updates + 1)})
        pieces = [replace(whole, first=a, last=b, mixture=mixture) for a, b in itertools.pairwise(edges)]
        return [pieces[0], *(replace(piece, start_from="here", optimizer="keep") for piece in pieces[1:])]

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train piece after piece -> the last shares."""
        self.texts = [*experience.past, experience.train]
        result = self.inner.run(experience, self.plan(experience), self._table, self._after_step, owner=self)
        self.texts = []
        pairs = {f"edge_{i}_{j}": a for i, row in enumerate(self.graph) for j, a in enumerate(row) if i != j}
        return result | {f"share_{i}": share for i, share in enumerate(self.shares)} | (pairs if self.given != "spread" else {})

    def _table(self, segment: Segment) -> np.ndarray:
        domains = segment.experience + 1
        if len(self.shares) != domains:
            self.shares, self.losses = [1 / domains] * domains, []
            self.sums = [[0.0, 0.0] for _ in range(domains)]
            self.graph = self._graph(domains).tolist()
        return np.repeat(np.array([self.shares]), segment.last - segment.first, 0)

    def _graph(self, domains: int) -> np.ndarray:
        """A [K, K] of the domains so far."""
        if self.given == "spread":
            return np.full((domains, domains), self.spread) + (1 - self.spread) * np.eye(domains)
        if self.given != "learned":
            return np.array(self.given, np.float64)[:domains, :domains]
        if domains == 1:
            return np.ones((1, 1))
        ledger, size = self.runtime.ledger, self.texts[0].context
        adam = {"betas": self.rest["betas"], "weight_decay": self.rest["weight_decay"], "clip": self.rest["clip"]}
        pilots = Pilots(
            self.inner.model,
            self.texts,
            **{"steps": self.pilot, "lr": self.inner.lr, "adam": adam, "key": self.runtime.key("pilots")},
            check_stop=self.runtime.check_stop,
            read=lambda number: ledger.look("probe", number * size, 3 * self.runtime.flops_per_token),
        )
        with self.runtime.phase("pilots"):
            found = pilots.graph(self.repeats)
        self.inner.model.train()
        return found

    def _after_step(self, segment: Segment, step: int, losses: Tensor, counts: np.ndarray) -> None:
        """Sum up the losses [B, L] of each domain; at the end of a piece, move the shares."""
        source = np.repeat(np.arange(len(counts)), counts)
        sums = np.bincount(source, losses.mean(1).double().cpu().numpy(), len(counts))
        self.sums = [[a + float(b), n + int(m)] for (a, n), b, m in zip(self.sums, sums, counts, strict=True)]
        if step == segment.last:
            before = self.losses[-1] if self.losses else [0.0] * len(counts)
            self.losses.append([a / n if n else old for (a, n), old in zip(self.sums, before, strict=True)])
            self.sums = [[0.0, 0.0] for _ in counts]
            score = self.eta * np.array(self.graph) @ np.sum(self.losses[-self.window :], 0)
            weights = np.exp(score - score.max())
            self.shares = (weights / weights.sum()).tolist()

    def loss(self, tokens: Tensor) -> Tensor:
        """Nats of every token after the first: tokens [B, L + 1] int64 -> [B, L]."""
        return self.inner.loss(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, data cursor; shares and losses."""
        own: dict[str, Any] = {"shares": self.shares, "losses": self.losses, "sums": self.sums}
        own |= {"graph": self.graph} if self.given != "spread" else {}
        return {"inner": self.inner.state_dict(), **detached(own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.shares, self.losses, self.sums = (detached(state[name]) for name in ("shares", "losses", "sums"))
        self.graph = detached(state["graph"]) if "graph" in state else self._graph(len(self.shares)).tolist()


def _checked(graph: Any, spread: float, pilot: int, repeats: int, runtime: PretrainRuntime) -> str | list[list[float]]:
    """What `learner.graph` says: a word, or rows of numbers; `UserError` for anything else."""
    if pilot < 1 or repeats < 1:
        raise UserError("learner.pilot and learner.repeats must be at least 1")
    if graph in ("spread", "learned"):
        if graph == "learned" and (spread or runtime.group.kind != "none"):
            what = "learner.spread belongs to graph=spread" if spread else "it is for one process, parallel=none"
            raise UserError(f"learner.graph=learned: {what}")
        return graph
    rows = [list(row) for row in graph] if isinstance(graph, Sequence) and not isinstance(graph, str) else []
    square = rows and all(len(row) == len(rows) for row in rows)
    if not square or not all(isinstance(a, int | float) and not isinstance(a, bool) for row in rows for a in row):
        raise UserError(f"learner.graph must be spread, learned, or a square list of lists of numbers, got {graph!r}")
    return [[float(a) for a in row] for row in rows]
