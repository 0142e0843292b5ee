"""EWC on text tasks: Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796) for a language model.

    loss on answers + (strength / 2) sum_p F_p (theta_p - theta*_p)^2

theta* are the weights after the last task, F the Fisher information of its answers, summed over tasks (`decay` < 1: online EWC,
Schwarz et al. 2018, arXiv 1805.06370).

fisher  "per_line" (default): the mean over a task's lines of the squared gradient of -log p(answer | prompt), at its end. The
        log-probability of the whole answer, not of a token: a mean over tokens would make F fall with the square of the length
        "path": as the released code of TRACE (Wang et al. 2023, arXiv 2310.06762): while training, squares of the gradients of
        every step of every epoch / steps of an epoch, of batch means, clipped and with the penalty's own gradient in them,
        summed over tasks and never normalised. Its strength is 400

At strength 0 it is fine-tuning; at an infinite one no weight with F > 0 moves. Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clbench.interfaces import Capabilities, Experience, Place, Schedule, UserError
from clbench.streams.images.data import shuffled
from clbench.streams.tokens.text_data import TextBatch
from clbench.training.answer_loss import answer_loss
from clbench.training.fisher import Weights, kept, quadratic_penalty, sum_per_sample, trained
from clbench.training.fit import Recipe, fit
from clbench.training.optimizers import Optimizer
from clbench.training.optimizers import check as check_optimizer
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


class TextEwc:
    """State: weights, the Fisher information so far (empty before the end of the first task)."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="next_token", needs_random_access=True)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        strength: float = 10.0,
        fisher: Literal["per_line", "path"] = "per_line",  # path: TRACE's; its strength is 400
        decay: float = 1.0,  # below 1: online EWC
        lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 16,
        optimizer: Optimizer = "adamw",
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        schedule: Schedule = constant,
    ):
        if fisher not in ("per_line", "path"):
            raise UserError(f"unknown learner.fisher={fisher} of lines: choose per_line, path")
        if not strength >= 0 or not 0 <= decay <= 1:
            raise UserError(f"learner.strength must be from 0 and decay from 0 to 1, got {strength} and {decay}")
        check_optimizer(optimizer, lr=lr)
        self.model, self.runtime, self.lr, self.strength = model, runtime, lr, strength
        self.kind, self.decay = fisher, decay
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe(optimizer, weight_decay=weight_decay, schedule=schedule, clip=clip)
        self.fisher: Weights = {}
        self.sums: Weights = {}
        self.reference: Weights = {}

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train under the penalty, then update the Fisher information."""
        self.reference = kept(self.model) if experience.index else {}
        self.model.train()

        def loss(batch: TextBatch) -> Tensor:
            nats = answer_loss(self.model, batch)
            return nats + self.strength * quadratic_penalty(self.model, self.reference, self.fisher) if self.reference else nats

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        hooks: dict[str, Any] = {}
        if self.kind == "path":
            hooks["after_step"] = self._along(-(-len(experience.train) // self.batch_size))
        log = fit(self.runtime, "train", self, groups_of((self.model, self.lr)), loss, batches, self.recipe, **hooks)
        if self.kind == "per_line":
            with self.runtime.phase("fisher"):
                new = self._per_line(experience)
            self.fisher = {name: self.decay * self.fisher.get(name, torch.zeros(())) + f for name, f in new.items()}
        else:
            self.fisher, self.sums = self.sums, {}
        return {**log, "fisher_mean": float(torch.cat([f.flatten() for f in self.fisher.values()]).mean())}

    def _along(self, steps: int) -> Any:
        """A hook that adds the squared gradients of each step / steps of an epoch."""
        self.sums = {
            n: self.decay * self.fisher.get(n, torch.zeros(())) + torch.zeros_like(p) for n, p in trained(self.model).items()
        }

        def add(place: Place, batch: Any) -> None:
            for name, p in trained(self.model).items():
                assert p.grad is not None
                self.sums[name] = self.sums[name] + p.grad.square() / steps

        return add

    def _per_line(self, experience: Experience) -> Weights:
        """The mean over the lines of a task of the squared gradient of each one's -log p(answer | prompt)."""
        self.model.eval()

        def nats(z: Tensor, target: Tensor) -> Tensor:
            wanted, asked = target
            each = functional.cross_entropy(z[0, :-1].float(), wanted, reduction="none")
            return (each * asked).sum()

        total: Weights = {}
        for batch in experience.train.test_batches(self.batch_size):
            self.runtime.check_stop()
            target = torch.stack([batch.tokens[:, 1:], batch.asked.long()], 1)  # type: ignore[attr-defined]
            part = sum_per_sample(self.model, batch.tokens, target, nats, Tensor.square)  # type: ignore[attr-defined]
            total = {name: f + total[name] if total else f for name, f in part.items()}
        return {name: f / len(experience.train) for name, f in total.items()}

    def next_token(self, batch: TextBatch) -> Tensor:
        """Scores of the token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        return self.model(batch.tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights, those before the task, Fisher information; within a task of kind "path" also what it adds up."""
        return collect(self, "model", "reference", "fisher", "sums")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
