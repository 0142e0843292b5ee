"""DST: Continual Learning with Dynamic Sparse Training: Exploring Algorithms for Effective Model Updates (CPAL 2024). Each task
has a sparse network of its own inside one dense network. The task of a sample must be disclosed, at test time too.

Every weight of a Linear or convolutional layer of the backbone takes part in some tasks' masks. A new task
  1. draws a mask of `density`; weights of earlier tasks may be in it, and are used as they are;
  2. trains the weights of its mask that are in no other task's mask, and its head;
  3. every `interval` steps takes the share zeta of its weights out of the mask, layer by layer, and puts as many others in,
     which start at 0. zeta falls along half a cosine from `fraction` to `fraction_end` over the steps of the task.
A sample is answered under its task's mask. Weights that leave a mask are again what they were before the task.

init     "uniform": every layer has `density`. "erk": e (sum of a layer's dimensions) / (their product), all kernel dimensions
         among them, at most 1; e is such that the whole has `density`
prune    "magnitude": the smallest |w|. "set": half of them the smallest positive w, half the largest negative. "taylor": the
         smallest (w g)^2, g the gradient of the step
grow     "random"; "unfired": those first that have not been in the mask in this task; "gradient": the largest |g|;
         "momentum": the largest |m| / sqrt(v) of Adam's moments of g, whatever the optimiser
variant  "official": biases, normalisation, tokens and BatchNorm's statistics belong to all tasks and are always trained, so
         earlier tasks are forgotten; g is 0 at the weights of other tasks, so gradients never bring these in. "paper" (default,
         since the method promises that nothing is forgotten): they are trained in the first task alone; g is of every weight.

Choices and deviations: numbers of weights are rounded and exact; the release draws those of masks and of random growth with a
probability. A weight of another task that is put in has its own value at once (the release: 0 until the task ends). Heads are
dense, one a task. No mask changes after the last step. The last weights count, not those of the epoch with the best accuracy
in training. The release trains for 100 epochs and divides the rate by 10 at 1/2 and 3/4: schedule=multistep.
A task that comes back goes on with its mask, within what others leave. Published number: none read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import TaskHead
from clbench.models.units import LAYERS, keep_statistics
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.sparse_masks import Init, Prune, TaskMasks, densities, drawn, pruned, top
from clbench.training.state import collect, groups_of, restore

Grow = Literal["random", "unfired", "gradient", "momentum"]
Variant = Literal["official", "paper"]
BETAS = (0.9, 0.999)  # of the moments


class Dst:
    """State: backbone, a head for each task, a bit for each weight and task; inside a task what growth has to know."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Variant = "paper",
        init: Init = "erk",
        prune: Prune = "magnitude",
        grow: Grow = "gradient",
        density: float = 0.2,  # share of the weights that a mask holds
        interval: int = 400,  # steps
        fraction: float = 0.5,
        fraction_end: float = 0.005,
        optimizer: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.9,  # of sgd
        lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 64,
        schedule: Schedule = constant,
    ):
        words = {"variant": (variant, Variant), "init": (init, Init), "prune": (prune, Prune), "grow": (grow, Grow)}
        for name, (word, kind) in words.items():
            if word not in get_args(kind):
                raise UserError(f"unknown learner.{name}={word}: choose {' or '.join(get_args(kind))}")
        if not 0 < density <= 1:
            raise UserError(f"learner.density must lie in (0, 1], got {density}")
        if not 0 <= fraction_end <= fraction < 1:
            raise UserError(f"learner.fraction={fraction} must lie in [0, 1) and learner.fraction_end={fraction_end} below it")
        if interval < 1:
            raise UserError(f"learner.interval must be at least 1, got {interval}")
        self.model, self.runtime, self.shared = model, runtime, variant == "official"
        self.init: Init = init
        self.prune: Prune = prune
        self.growth, self.density = grow, density
        self.interval, self.fractions, self.lr = interval, (fraction, fraction_end), lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe(optimizer, momentum, schedule=schedule)
        self.heads = TaskHead(model.num_features).to(runtime.device)
        names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LAYERS)}
        self.weights = {name: p for name, p in model.named_parameters() if name in names}
        self.masks = TaskMasks(self.weights)
        self.fired: dict[str, Tensor] = {}  # what has been in the mask in this task, for grow=unfired
        self.moments: dict[str, list[Tensor]] = {}  # of the gradients in this task, for grow=momentum

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train a sparse network for the task, and its head."""
        assert experience.task is not None
        place = self.heads.grow(experience.task, experience.classes, self.runtime.generator("head"))
        self.begin(place)
        head, first = self.heads.at(place), len(self.heads.tasks) == 1
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in self.weights or self.shared or first)

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(head(self.features(batch, place)), self.heads.targets(place, batch.y))

        self.model.train()
        if not (self.shared or first):
            keep_statistics(self.model)
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.lr), (head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe, after_step=self.stepper(place))
        self.fired, self.moments = {}, {}
        total, share = sum(p.numel() for p in self.weights.values()), {}
        share["density"] = sum(int(self.masks.get(name, place).sum()) for name in self.weights) / total
        share["used_share"] = sum(int((packed != 0).any(0).sum()) for packed in self.masks.packed.values()) / total
        return log | share

    def begin(self, place: int) -> None:
        """Draw a mask for a task that has none; nothing is known of its gradients yet."""
        if place == self.masks.tasks:
            shares = densities([p.shape for p in self.weights.values()], self.density, self.init)
            for (name, p), share in zip(self.weights.items(), shares, strict=True):
                self.masks.put(name, place, drawn(p, share, self.runtime.generator("mask", name)))
        if self.growth == "unfired":
            self.fired = {name: self.masks.get(name, place) for name in self.weights}
        if self.growth == "momentum":
            self.moments = {name: [torch.zeros_like(p, requires_grad=False) for _ in BETAS] for name, p in self.weights.items()}

    def stepper(self, place: int) -> Callable[[Place, Batch], None]:
        """What comes after each step: weights outside the mask, and those of other tasks, are put back; the mask may change."""
        before = {name: p.detach().clone() for name, p in self.weights.items()}
        others = {name: self.masks.others(name, place) for name in self.weights}

        @torch.no_grad()
        def after(at: Place, batch: Batch) -> None:
            due = (at.step + 1) % self.interval == 0 and at.step + 1 < at.steps
            for name, p in self.weights.items():
                g = torch.zeros_like(p) if p.grad is None else p.grad
                g = g.masked_fill(others[name], 0) if self.shared else g
                mask = self.masks.get(name, place)
                for moment, beta, power in zip(self.moments.get(name, []), BETAS, (1, 2), strict=False):
                    moment.lerp_(g**power, 1 - beta)
                p.copy_(torch.where(mask & ~others[name], p, before[name]))
                if due:
                    mask, new = self.changed(name, mask, g, at)
                    self.masks.put(name, place, mask)
                    p.copy_(torch.where(mask & ~others[name], p.masked_fill(new, 0), before[name]))

        return after

    def changed(self, name: str, mask: Tensor, g: Tensor, at: Place) -> tuple[Tensor, Tensor]:
        """Prune and grow the mask of a layer -> the mask, and what is new in it."""
        first, last = self.fractions
        zeta = last + (first - last) * (1 + math.cos(math.pi * at.step / at.steps)) / 2
        gone = pruned(self.weights[name], g, mask, round(zeta * int(mask.sum())), self.prune)
        score = g.abs()
        if self.growth in ("random", "unfired"):
            score = torch.rand(g.shape, generator=self.runtime.generator("grow", name, at.step)).to(g.device)
        if self.growth == "unfired":
            score = score + ~self.fired[name]
        if self.growth == "momentum":
            m, v = self.moments[name]
            score = m.abs() / (v.sqrt() + torch.finfo(v.dtype).tiny)
        left = mask & ~gone
        new = top(score, ~left, int(gone.sum()))
        if self.growth == "unfired":
            self.fired[name] |= new
        return left | new, new

    def features(self, batch: Any, place: int) -> Tensor:
        """Features [B, D] under the mask of the task at `place`; gradients go to the weights outside of it too."""
        shown = {name: p - p.detach().masked_fill(self.masks.get(name, place), 0) for name, p in self.weights.items()}
        return functional_call(self.model, shown, (batch.x,))

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]; only those of the task's classes say something."""
        self.model.eval()
        place = self.heads.place(batch.task)
        return self.heads.spread(place, self.heads.at(place)(self.features(batch, place)))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "heads", "masks", "fired", "moments")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
