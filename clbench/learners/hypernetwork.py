"""Hypernetworks: the weights of every task made by one network (von Oswald, Henning, Sacramento & Grewe, ICLR 2020, arXiv
1906.00695, "Continual learning with hypernetworks"). The task of a sample must be disclosed, at test time too.

The run's network and a linear head over the task's classes have no weights of their own: they are W_t = h(c_t, e; phi), cut
from the outputs of h for the chunk embeddings e_1, e_2, ..., `chunk` weights each. The embedding c_t is trained with its task.
  loss  CE(task t under W_t) + beta / (t - 1) sum over j < t of |h(c_j; phi*) - h(c_j; phi + dphi)|^2
phi (with the chunk embeddings) before the task is phi*; dphi = - lr x the gradient of the first term, seen as a constant. The
gradient of the second term is added to the first, then comes the step.

core    "chunk_mlp": a multilayer perceptron with ReLU, each chunk by itself. "lstm": its input is (c_t, e_i) and its state goes
        from chunk to chunk, so that later layers' weights depend on earlier ones' (dependency-preserving hypernetworks, WACV
        2023, whose own regulariser is not built: its rule could not be read)
grow    units that every hidden layer, or the LSTM, gains with each new task but the first. What they give to older units and to
        the outputs starts at weights of 0, so that the weights made for other tasks stay. (WACV 2023 grows the network where a
        task cannot be fitted; its rule could not be read, so growth with every task is a choice)
offset  "none" (default): W_t alone. "model": the network's first weights, which may be pre-trained, plus W_t

Choices: a weight tensor is h / sqrt(inputs of a unit), with h of variance 1 at the start, so that every layer starts at the
usual size; vectors (biases, gains) are their first value + h / sqrt(length); the head's weights are the last ones of W_t. New
chunk embeddings come where a task has more classes than any before, and change no other weight. A task that comes back trains
its embedding again. A random subset of old tasks counts as their mean.
Deviations: dphi is that of plain SGD; by default the release looks ahead with the optimiser's own step. No task inference.
Constants: those for split MNIST (Adam 1e-3, beta 0.01, batch 128), and sizes between its settings.
Published (recalled, not re-checked): split MNIST 99.79, permuted MNIST 97.57 %, task disclosed.

Legend: B batch, E embedding of a task, P weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST
from clbench.models.weight_maker import WeightMaker
from clbench.streams import rng
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, restore


class Hypernetwork:
    """State: h, the embedding of each task, numbers and classes of the tasks in the order of their appearance."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        core: Literal["chunk_mlp", "lstm"] = "chunk_mlp",
        hidden: Sequence[int] = (50, 50),  # units of h; lstm: one number
        chunk: int = 2000,  # weights that h gives at once
        task_width: int = 32,  # of a task's embedding
        chunk_width: int = 32,
        grow: int = 0,  # units that hidden layers gain with each new task
        beta: float = 0.01,
        lookahead: bool = True,  # false: dphi = 0
        reg_tasks: int | None = None,  # old tasks in a step's regulariser, drawn at random; null: all
        offset: Literal["none", "model"] = "none",
        optimizer: Literal["sgd", "adam"] = "adam",
        lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 128,
        schedule: Schedule = constant,
    ):
        check(model, core, hidden, offset, {"chunk": chunk, "task_width": task_width, "chunk_width": chunk_width})
        check_numbers(beta, reg_tasks, grow)
        self.model, self.runtime, self.beta, self.reg_tasks = model, runtime, beta, reg_tasks
        self.lookahead, self.task_width, self.grow = lookahead, task_width, grow
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe(optimizer, 0.0, schedule=schedule)
        model.requires_grad_(False)
        own = {name: p.detach() for name, p in model.named_parameters()}
        self.starts = {n: p.clone() if offset == "model" or p.ndim < 2 else torch.zeros_like(p) for n, p in own.items()}
        self.scales = {n: (p.numel() // len(p) if p.ndim > 1 else p.numel()) ** -0.5 for n, p in own.items() if p.numel()}
        widths = (chunk, task_width, chunk_width)
        self.maker = WeightMaker(core, list(hidden), *widths, runtime.generator("maker")).to(runtime.device)
        self.embeddings: list[nn.Parameter] = []
        self.tasks: list[int] = []
        self.classes: list[list[int]] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train h and the task's embedding, while what h gives for other tasks stays."""
        place = self.place_of(experience)
        others = [(e.detach(), self.count(i)) for i, e in enumerate(self.embeddings) if i != place]
        own = self.embeddings[place]
        with torch.no_grad():
            targets = [self.maker(e, count) for e, count in others]
        columns = torch.tensor(self.classes[place], device=self.runtime.device)
        order, at = columns.argsort(), Place(0, 0, 0, 0)

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            y = order[torch.searchsorted(columns[order], batch.y)]
            return F.cross_entropy(self.logits(batch, self.maker(own, self.count(place)), place), y)

        def at_place(now: Place) -> None:
            nonlocal at
            at = now

        def before(params: list[Tensor], grads: list[Tensor | None]) -> None:
            chosen = self.chosen(len(others), at.step)
            if chosen and self.beta:
                self.protect([others[i] for i in chosen], [targets[i] for i in chosen], self.lr * self.recipe.schedule(at))

        self.model.train()
        groups = [{"params": [*self.maker.parameters(), own], "lr": self.lr}]
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe, at_place=at_place, before_step=before)
        return {**log, "drift": self.drift(others, targets)}

    def place_of(self, experience: Experience) -> int:
        """Where the experience's task stands; a new one gets an embedding, and its classes join."""
        assert experience.task is not None
        if experience.task not in self.tasks:
            drawn = torch.randn(self.task_width, generator=self.runtime.generator("embedding")).to(self.runtime.device)
            self.tasks, self.classes = [*self.tasks, experience.task], [*self.classes, []]
            self.embeddings.append(nn.Parameter(drawn))
            self.maker.grow(self.grow if len(self.tasks) > 1 else 0, self.runtime.generator("units"))
        place = self.tasks.index(experience.task)
        joined = list(dict.fromkeys([*self.classes[place], *experience.classes]))
        self.classes = [joined if i == place else old for i, old in enumerate(self.classes)]
        self.maker.cover(self.count(place), self.runtime.generator("chunks"))
        return place

    def chosen(self, number: int, step: int) -> list[int]:
        """The old tasks of a step's regulariser."""
        if self.reg_tasks is None or self.reg_tasks >= number:
            return list(range(number))
        return rng.permutation(rng.key(self.runtime.key("old tasks"), step), number)[: self.reg_tasks].tolist()

    def protect(self, others: Sequence[tuple[Tensor, int]], targets: Sequence[Tensor], lr: float) -> None:
        """Add the regulariser's gradient at phi + dphi to that of the task."""
        own = dict(self.maker.named_parameters())
        ahead = {}
        for name, p in own.items():
            ahead[name] = p.detach().clone()
            if self.lookahead and p.grad is not None:
                ahead[name] -= lr * p.grad
            ahead[name].requires_grad_()
        total = torch.stack(
            [(functional_call(self.maker, ahead, pair) - t).square().sum() for pair, t in zip(others, targets, strict=True)]
        ).mean()
        found = torch.autograd.grad(self.beta * total, list(ahead.values()), allow_unused=True)
        for p, more in zip(own.values(), found, strict=True):
            if more is not None:
                p.grad = more if p.grad is None else p.grad.add_(more)

    @torch.no_grad()
    def drift(self, others: Sequence[tuple[Tensor, int]], targets: Sequence[Tensor]) -> float:
        """The largest |h(c_j) - W_j*| / |W_j*| over the other tasks."""
        moved = [float((self.maker(*pair) - t).norm() / t.norm()) for pair, t in zip(others, targets, strict=True)]
        return max(moved, default=0.0)

    def count(self, place: int) -> int:
        """Weights of a task: those of the network, and of a head over its classes."""
        return sum(p.numel() for p in self.starts.values()) + len(self.classes[place]) * (self.model.num_features + 1)

    def logits(self, batch: Any, made_P: Tensor, place: int) -> Tensor:
        """Logits [B, classes of the task] under made weights."""
        body, at = {}, 0
        for name, start in self.starts.items():
            body[name] = start + made_P[at : at + start.numel()].view(start.shape) * self.scales[name]
            at += start.numel()
        width, number = self.model.num_features, len(self.classes[place])
        weight, bias = made_P[at:].split([number * width, number])
        features = functional_call(self.model, body, (batch.x,))
        return F.linear(features, weight.view(number, width) / math.sqrt(width), bias / math.sqrt(width))

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen], `LOWEST` for other tasks' classes; an unknown task is answered as the newest."""
        self.model.eval()
        place = self.tasks.index(batch.task) if batch.task in self.tasks else len(self.tasks) - 1
        own = self.logits(batch, self.maker(self.embeddings[place], self.count(place)), place)
        whole = own.new_full((len(own), 1 + max(max(some) for some in self.classes)), LOWEST)
        return whole.index_copy(1, torch.tensor(self.classes[place], device=own.device), own)

    def state_dict(self) -> dict[str, Any]:
        return {**collect(self, "maker", "tasks", "classes"), "embeddings": [e.detach() for e in self.embeddings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill in place; embeddings that are missing are added, those too many go."""
        restore(self, {name: state[name] for name in ("maker", "tasks", "classes")})
        del self.embeddings[len(state["embeddings"]) :]
        with torch.no_grad():
            for i, value in enumerate(state["embeddings"]):
                if i == len(self.embeddings):
                    self.embeddings.append(nn.Parameter(value.to(self.runtime.device, copy=True)))
                self.embeddings[i].copy_(value)


def check(model: Backbone, core: str, hidden: Sequence[int], offset: str, numbers: dict[str, int]) -> None:
    """`UserError` for a network whose weights cannot be made, or options that fit nothing."""
    name = model.identity["name"]
    for option, value, known in (("core", core, ("chunk_mlp", "lstm")), ("offset", offset, ("none", "model"))):
        if value not in known:
            raise UserError(f"unknown learner.{option}={value}: choose {' or '.join(known)}")
    for option, value in [*numbers.items(), *(("hidden", n) for n in hidden)]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"learner.{option} must be a whole number from 1, got {value!r}")
    if not hidden or (core == "lstm" and len(hidden) != 1):
        raise UserError(f"learner.hidden={list(hidden)} does not fit core={core}: lstm has one number, chunk_mlp one or more")
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(f"learner hypernetwork: model {name} keeps running statistics: choose model.norm=group or none")
    if model.pretrained and offset == "none":
        raise UserError(f"learner hypernetwork makes all weights of model {name} anew: learner.offset=model keeps those it has")


def check_numbers(beta: float, reg_tasks: int | None, grow: int) -> None:
    """`UserError` for numbers out of range."""
    if beta < 0 or (reg_tasks is not None and reg_tasks < 1):
        raise UserError(f"learner.beta must be at least 0 and reg_tasks at least 1, got beta={beta} reg_tasks={reg_tasks}")
    if isinstance(grow, bool) or not isinstance(grow, int) or grow < 0:
        raise UserError(f"learner.grow must be a whole number from 0, got {grow!r}")
