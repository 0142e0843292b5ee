"""HAT: Hard Attention to the Task (Serra, Suris, Miron & Karatzoglou, ICML 2018, arXiv 1801.01423, "Overcoming Catastrophic
Forgetting with Hard Attention to the Task"). The task of a sample must be disclosed, at test time too.

Every hidden unit u (`models.units`) is multiplied by a gate a_u = sigmoid(s e_t[u]) of its task's embedding e_t, N(0, 1) at the
start; each task has a head of its own. With A = the largest gate of the other tasks at s_max (0 before there are any),
  loss = CE over the task's classes + strength sum_u a_u (1 - A_u) / sum_u (1 - A_u)
  s    = 1 / s_max + (s_max - 1 / s_max) x progress within the epoch, from 0 to 1; s_max at test time
  dW[i, j] *= 1 - min(A[i], A[j]) for the weight from unit j to unit i, db[i] *= 1 - A[i]; a pixel or an output has A = 1
  de *= (s_max / s) (cosh(clamp(s e, +-50)) + 1) / (cosh(e) + 1), gradients are clipped to norm 1e4, and e to +-6
Steps are those of plain SGD, so that a weight without gradient stays as it is.

variant  "official" (default): progress = samples before the batch / samples, which never reaches 1. "paper": (b - 1) / (B - 1)
         for batch b of B.

Deviations: constant rate, and the last weights; the release divides the rate by 3 after 5 epochs without gain on validation
data, stops below 1e-4 and takes the best weights. That is not built: the number of steps of a `fit` is known before it begins,
since budgets and schedules count them. Networks that HAT was not made for: what is no weight or bias beside a hidden unit
(attention, residual sums, tokens, normalisation) is trained on the first task alone, and BatchNorm keeps that task's
statistics.
A task that comes back goes on where it was, within what the others do not use.
Published number: none read.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import TaskHead
from clbench.models.units import Units, hidden_units, keep_statistics
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore

LARGEST = 6.0  # of an embedding
STEEPEST = 50.0  # of s e in the compensation
CLIP = 1e4


class Hat:
    """State: backbone, a head and an embedding [units] for each task."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["official", "paper"] = "official",
        strength: float = 0.75,  # of the term that keeps gates closed
        s_max: float = 400.0,
        lr: float = 0.05,  # heads and gates
        backbone_lr: float = 0.05,
        epochs: int | None = None,
        batch_size: int = 64,
        schedule: Schedule = constant,
    ):
        if s_max <= 1:
            raise UserError(f"learner.s_max must be above 1, got {s_max}")
        self.model, self.runtime, self.strength, self.s_max = model, runtime, strength, s_max
        self.units = hidden_units(model)
        if not self.units:
            raise UserError(f"learner hat: model {model.identity['name']} has no layer whose units one other layer reads alone")
        self.paper, self.s = variant == "paper", s_max
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", 0.0, schedule=schedule)
        self.heads = TaskHead(model.num_features).to(runtime.device)
        self.embeddings: list[nn.Parameter] = []
        self._gates: dict[str, Tensor] = {}
        for one in self.units:
            if one.reader is not None:
                one.reader.register_forward_pre_hook(partial(self._before_reader, one))

    def parts(self, gates: Tensor) -> dict[str, Tensor]:
        """Values of all units [U] by layer."""
        split = gates.split([one.count for one in self.units])
        return {one.name: part for one, part in zip(self.units, split, strict=True)}

    def _before_reader(self, one: Units, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.gated(one, args[0]), *args[1:])

    def gated(self, one: Units, x: Tensor) -> Tensor:
        """What a layer's reader is given, times the gates in force."""
        return one.gated(x, self._gates[one.name]) if one.name in self._gates else x

    def features(self, batch: Any, gates: Tensor) -> Tensor:
        """Features [B, D] under gates [U]."""
        self._gates = self.parts(gates)
        try:
            features = self.model.features(batch)
            for one in self.units:
                features = self.gated(one, features) if one.reader is None else features
        finally:
            self._gates = {}
        return features

    def used(self, place: int) -> Tensor | None:
        """A [U]: the largest gate that tasks other than the one at `place` have; None where there is no other."""
        others = [torch.sigmoid(self.s_max * e.detach()) for i, e in enumerate(self.embeddings) if i != place]
        return torch.stack(others).amax(0) if others else None

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train head, gates and what other tasks leave of the network."""
        assert experience.task is not None
        place = self.heads.grow(experience.task, experience.classes, self.runtime.generator("head"))
        if place == len(self.embeddings):
            drawn = torch.randn(sum(one.count for one in self.units), generator=self.runtime.generator("gates"))
            self.embeddings.append(nn.Parameter(drawn.to(self.runtime.device)))
        used, e, head = self.used(place), self.embeddings[place], self.heads.at(place)
        factors = {} if used is None else self.factors(used)
        free = torch.ones_like(e) if used is None else 1 - used
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            gates = torch.sigmoid(self.s * e)
            z = head(self.features(batch, gates))
            return F.cross_entropy(z, self.heads.targets(place, batch.y)) + self.strength * (gates * free).sum() / free.sum()

        def at_place(at: Place) -> None:
            first, per_epoch = at.step % batches.per_epoch, batches.per_epoch
            share = first / max(1, per_epoch - 1) if self.paper else first * self.batch_size / len(experience.train)
            self.s = 1 / self.s_max + (self.s_max - 1 / self.s_max) * share

        def before(params: list[Tensor], grads: list[Tensor | None]) -> None:
            self.protect(factors, e)
            torch.nn.utils.clip_grad_norm_(params, CLIP)

        def after(at: Place, batch: Batch) -> None:
            with torch.no_grad():
                e.clamp_(-LARGEST, LARGEST)

        self.model.train()
        if used is not None:
            keep_statistics(self.model)
        groups = [*groups_of((self.model, self.backbone_lr), (head, self.lr)), {"params": [e], "lr": self.lr}]
        log = fit(
            self.runtime, "train", self, groups, loss, batches, self.recipe,
            at_place=at_place, before_step=before, after_step=after,
        )  # fmt: skip
        gates = torch.sigmoid(self.s_max * e.detach())
        taken = gates if used is None else torch.maximum(gates, used)
        return {**log, "capacity_used": float(taken.mean())}

    def protect(self, factors: dict[str, Tensor], e: nn.Parameter) -> None:
        """Gradients of weights that others use become small, those of the gates large."""
        for name, p in self.model.named_parameters():
            if name in factors and p.grad is not None:
                p.grad.mul_(factors[name])
        assert e.grad is not None
        e.grad.mul_(compensation(e.detach(), self.s, self.s_max))

    def factors(self, used: Tensor) -> dict[str, Tensor]:
        """What gradients are multiplied by, by parameter name; `used` is A [U]."""
        part = self.parts(used)
        made: dict[Any, Tensor] = {one.layer: part[one.name] for one in self.units}
        made |= {one.norm: part[one.name] for one in self.units if one.norm is not None}
        read: dict[Any, Tensor] = {one.reader: part[one.name].repeat_interleave(one.each) for one in self.units}
        found = {}
        for name, module in self.model.named_modules():
            for own, p in module.named_parameters(recurse=False):
                out = made.get(module, torch.ones(1, device=p.device))
                factor = 1 - out
                if module in read and own == "weight":
                    factor = 1 - torch.minimum(out[:, None], read[module][None])
                factor = factor.reshape(*factor.shape, *[1] * (p.ndim - factor.ndim))
                found[f"{name}.{own}" if name else own] = factor
        return found

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]; only those of the task's classes say something."""
        self.model.eval()
        place = self.heads.place(batch.task)
        z = self.heads.at(place)(self.features(batch, torch.sigmoid(self.s_max * self.embeddings[place])))
        return self.heads.spread(place, z)

    def state_dict(self) -> dict[str, Any]:
        return {**collect(self, "model", "heads"), "embeddings": [e.detach() for e in self.embeddings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, {name: state[name] for name in ("model", "heads")})
        del self.embeddings[len(state["embeddings"]) :]
        with torch.no_grad():
            for i, value in enumerate(state["embeddings"]):
                if i == len(self.embeddings):
                    self.embeddings.append(nn.Parameter(value.to(self.runtime.device, copy=True)))
                self.embeddings[i].copy_(value)


def compensation(e: Tensor, s: float, s_max: float) -> Tensor:
    """What an embedding's gradient is multiplied by, so that its size does not depend on s."""
    steep = torch.cosh((s * e).clamp(-STEEPEST, STEEPEST)) + 1
    return s_max / s * steep / (torch.cosh(e) + 1)
