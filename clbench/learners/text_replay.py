"""Experience replay on text tasks: a share of every batch is lines of earlier tasks.

Sources: ER (Chaudhry et al. 2019, arXiv 1902.10486; `replay.py`), as baselines of continual fine-tuning have it: 1 % of each
old task is kept (Razdaibiedina et al. 2023, arXiv 2301.12314), 10 % and a general set (TRACE: Wang et al. 2023, arXiv
2310.06762). The loss is on answers alone, of old lines too; old text is not replayed.

memory   lines kept, `memory_bytes` the same in bytes; None takes what the scenario's budget allows
policy   reservoir | balanced (the same of every task), see `training/memory.py`
share    of each batch that is old lines, from the second task on: they take the place of new ones, and the steps stay as many,
         so that it costs what fine-tuning costs and sees a share less of the new task

Deviations: in the code of Razdaibiedina et al. replay is further optimiser steps, as many as there are old tasks, every few
steps; TRACE trains again after each task, as long as on the task, on the first tenth of every old one. Both cost more with each
task. Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.streams.images.data import shuffled
from clbench.streams.tokens.text_data import TextBatch
from clbench.training.answer_loss import answer_loss
from clbench.training.fit import Recipe, fit
from clbench.training.memory import Mixed, allowed_memory
from clbench.training.optimizers import Optimizer
from clbench.training.optimizers import check as check_optimizer
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


class TextReplay:
    """Trains everything on new and remembered lines. State: weights, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="next_token", stores_exemplars=True, needs_random_access=True)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        policy: Literal["reservoir", "balanced"] = "balanced",
        memory: int | None = None,  # lines; null: what the scenario's budget allows
        memory_bytes: int | None = None,
        share: float = 0.25,  # of a batch that is old lines
        lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 16,
        optimizer: Optimizer = "adamw",
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        schedule: Schedule = constant,
    ):
        if policy not in ("reservoir", "balanced"):
            raise UserError(f"unknown learner.policy={policy} of lines: choose reservoir, balanced")
        check_optimizer(optimizer, lr=lr)
        self.model, self.runtime, self.lr = model, runtime, lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.old = round(share * batch_size)
        if not 0 <= share < 1 or self.old >= batch_size:
            raise UserError(f"learner.share must be from 0 to below 1, and leave a new line in {batch_size}, got {share}")
        self.recipe = Recipe(optimizer, weight_decay=weight_decay, schedule=schedule, clip=clip)
        self.memory = allowed_memory(runtime, policy, memory, memory_bytes)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the task among old lines, then choose again what is kept."""
        self.model.train()

        def loss(batch: TextBatch) -> Tensor:
            return answer_loss(self.model, batch)

        stored = self.memory.data(experience.train)
        old = 0 if stored is None else self.old
        new = shuffled(experience.train, self.batch_size - old, self.epochs, self.runtime.key("train"))
        batches = Mixed(new, stored, old, self.runtime.key("replay"))
        batches.steps = self.epochs * -(-len(experience.train) // self.batch_size)
        log = fit(self.runtime, "train", self, groups_of((self.model, self.lr)), loss, batches, self.recipe)
        self.memory.update(experience.train)
        return {**log, "exemplars": float(len(self.memory))}

    def next_token(self, batch: TextBatch) -> Tensor:
        """Scores of the token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        return self.model(batch.tokens)

    def state_dict(self) -> dict[str, Any]:
        """The weights and the stored lines."""
        return collect(self, "model", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
