"""Homeostatic networks: a learning rate that the network's own decisions move, for online concept shift (Man, Damasio & Neven,
2022, arXiv 2205.08645, "Need is All You Need: Homeostatic Neural Networks Adapt to Concept Shift").

Samples act on the network that perceives them: a class c raises its learning rate eta by a step or lowers it, e(c) = +1 or -1.
With the first sample (x, y) of each batch the network decides whether it takes that effect. It imagines the update by the
gradient g of this sample under two rates, and counts right answers on the `recent` samples before it:
  leave  theta - eta / B g                                      B samples of a batch
  take   theta - (eta + step eta_0 e(c)) / B g                  c the class that it predicts for x
Where "take" answers more of them, it takes the sample, whose effect is that of its label: eta <- eta + step eta_0 e(y). So a
network that is mistaken about the world is moved the wrong way. A rate below 0 becomes 1e-8. Then comes the update: SGD with
eta on the mean gradient of the batch, for backbone and head alike.

Read in the released code: the decision, its order, and the constants (eta_0 0.001, step 0.1, 20 recent samples, batches of 10,
SGD without momentum; a perceptron of 80 and 60 units). There digits from 5 on raise the rate and smaller ones lower it.
Choices: classes of odd numbers in the order of their appearance raise it, since nobody knows how many will come; the imagined
networks answer in evaluation mode; no decision before there are `recent` samples; recent samples are exemplars of the budget
and seen under the test transform. `step=0` is online fine-tuning.
Published (abstract): the greatest advantage is at the highest rates of shift; no number read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, BudgetExceeded, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import OnlineHead
from clbench.streams.images.data import ImageBatch
from clbench.training.fit import Recipe, fit
from clbench.training.online import Augment, OnlineBatch, OnlineStream, gradients, grow, labels, scores
from clbench.training.runtime import Runtime
from clbench.training.state import collect, groups_of, restore
from clbench.training.stream_memory import allowed_stream_memory

LEAST = 1e-8
RECENT = 20


def effect(c: int) -> int:
    """What a class does to the rate: +1 raises, -1 lowers it."""
    return 1 if c % 2 else -1


def changed(rate: float, step: float, c: int) -> float:
    """The rate after the effect of a class."""
    moved = rate + step * effect(c)
    return moved if moved >= 0 else LEAST


class Homeostatic:
    """State: backbone, head with the classes that have appeared, the recent samples, the rate."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_boundaries=False, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        step: float = 0.1,  # of a change, as a share of lr; 0: the rate stays
        recent: int | None = None,  # samples that a decision is judged by; null: 20, or what the budget allows if that is less
        augment: Augment = "new",
        lr: float = 0.001,  # eta_0, of backbone and head
        epochs: int | None = None,
        batch_size: int = 10,
    ):
        if step < 0 or lr <= 0:
            raise UserError(f"learner.step={step} must be at least 0, learner.lr={lr} above 0")
        allowed = runtime.budget.exemplars
        if recent is None:
            recent = RECENT if allowed is None else min(RECENT, allowed)
        if isinstance(recent, bool) or not isinstance(recent, int) or recent < 1:
            raise UserError(f"learner.recent must be a whole number from 1, got {recent!r}")
        if allowed is not None and recent > allowed:
            raise BudgetExceeded(f"learner.recent={recent}, the scenario's budget allows {allowed}")
        self.model, self.runtime, self.augment, self.updates = model, runtime, augment, 1.0
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.lr, self.step, self.recent, self.rate = lr, step * lr, recent, lr
        self.recipe = Recipe("sgd", 0.0)
        self.head = OnlineHead(model.num_features).to(runtime.device)
        self.memory = allowed_stream_memory(runtime, "task_ring", recent)

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass (or what the budget allows), a decision and an update with each batch."""
        grow(self, experience)
        stream = OnlineStream(self, experience, replay=None, trained=0)
        stream.index = 0  # one cell of the ring for the whole run: the newest samples, whatever they came with
        at_hand: list[OnlineBatch] = []

        def loss(batch: OnlineBatch) -> Tensor:
            self.model.train()
            at_hand[:] = [batch]
            return F.cross_entropy(scores(self, batch.new), labels(batch.new))

        def decide(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
            batch = at_hand.pop()
            if self.step and batch.old is not None and len(batch.rows) == self.recent and not batch.again:
                self.decide(batch.new, batch.old, params)
            for grad in grads:
                if grad is not None:
                    grad.mul_(self.rate / self.lr)

        groups = groups_of((self.model, self.lr), (self.head, self.lr))
        options: Any = {"before_step": decide, "after_step": stream.store}
        log = fit(self.runtime, "train", self, groups, loss, stream, self.recipe, **options)
        return {**log, "rate": self.rate, "exemplars": float(len(self.memory))}

    def decide(self, new: ImageBatch, recent: ImageBatch, params: Sequence[Tensor]) -> bool:
        """Take the effect of the first new sample where that promises more right answers on recent ones -> whether it did."""
        self.model.eval()
        one = new.select(torch.tensor([0]))
        z, y = scores(self, one), int(labels(one)[0])
        g = [part / len(new) for part in gradients(F.cross_entropy(z, labels(one)), params)]
        imagined = changed(self.rate, self.step, int(z.argmax(1)[0]))
        leave, take = (self.right(recent, params, g, rate) for rate in (self.rate, imagined))
        if take > leave:
            self.rate = changed(self.rate, self.step, y)
        return take > leave

    @torch.no_grad()
    def right(self, recent: ImageBatch, params: Sequence[Tensor], g: Sequence[Tensor], rate: float) -> int:
        """Right answers on recent samples after an imagined update."""
        before = [p.detach().clone() for p in params]
        for p, part in zip(params, g, strict=True):
            p.sub_(rate * part)
        count = int((scores(self, recent).argmax(1) == labels(recent)).sum())
        for p, value in zip(params, before, strict=True):
            p.copy_(value)
        return count

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]; a class that has not appeared has the lowest."""
        self.model.eval()
        return scores(self, batch)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory", "rate")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
