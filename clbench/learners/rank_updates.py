"""Incremental Task Learning with Incremental Rank Updates (ECCV 2022). Every layer is a product of thin matrices to which each
task adds a few columns. The task of a sample must be disclosed, at test time too.

For task t, the weights [out, in] of a Linear layer, or of a convolution (its kernel is [out, in x height x width]), are
  W_t = U_{1:t} diag(s_t) V_{1:t}^T,    U_{1:t} = [U_{1:t-1}, dU_t],    V_{1:t} = [V_{1:t-1}, dV_t]
with `rank_first` columns from the first task and `rank` from each later one. Task t trains dU_t and dV_t (orthogonal at the
start), the selector s_t over all columns so far (at the start 0 for the old ones, 1 for the new ones), biases (0 at the start)
and a head (orthogonal rows). Old columns are frozen, so answers for a task stay the same to the last bit.

selector  "full" (default): s_t is trained as a whole, so a task takes what it can use of earlier tasks' columns.
          "new_only": the old entries stay 0, so nothing is handed on.

The layers' own weights are not used, pre-trained ones neither. A layer has no more new columns than its smaller side.
Choices: normalisation (with BatchNorm's statistics) and tokens are a task's own, as biases are, and start as the model has
them. A task that comes back trains all of its own where it is the newest, and else no columns: later tasks use them. The
paper's experiments with convolutions were not read.
Deviations: cross-entropy and normalised pixels. The release (permuted MNIST, MLP of 2 x 256, ranks 11 and 1, batches of 128)
minimises the squared error of the softmax on pixels from 0 to 255 with Adam at 1e-5, then 1e-4, for 500 epochs a task.
Published, read from the output of its notebook: mean accuracy of 20 tasks 85.50, of the first 96.45, of the second 79.08.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import TaskHead
from clbench.models.units import LAYERS
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import detached

FACTORS = ("up", "down")  # columns of U and of V


class RankUpdates:
    """State: a head for each task, its factors, selectors, biases and BatchNorm statistics by name; no dense weights."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        rank_first: int = 11,  # new columns of the first task
        rank: int = 1,  # of each later task
        selector: Literal["full", "new_only"] = "full",
        optimizer: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.9,  # of sgd
        lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 128,
        schedule: Schedule = constant,
    ):
        for name, value in (("rank_first", rank_first), ("rank", rank)):
            if value < 1:
                raise UserError(f"learner.{name} must be at least 1, got {value}")
        if selector not in ("full", "new_only"):
            raise UserError(f"unknown learner.selector={selector}: choose full or new_only")
        self.model, self.runtime, self.lr = model, runtime, lr
        self.ranks, self.reuses = (rank_first, rank), selector == "full"
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe(optimizer, momentum, schedule=schedule)
        model.requires_grad_(False)
        modules = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
        self.layers = {f"{name}.weight": module.weight.shape for name, module in modules.items()}
        self.biases = {f"{name}.bias" for name in modules}
        self.heads = TaskHead(model.num_features).to(runtime.device)
        self.updates = nn.ModuleList()  # what each task adds, by (what it is, name): `key`
        self.statistics: list[dict[str, Tensor]] = []  # BatchNorm's, of each task

    def learn(self, experience: Experience) -> dict[str, float]:
        """Add columns for a new task; train them, the selector, biases and the head."""
        assert experience.task is not None
        place = self.open(experience)
        head, newest = self.heads.at(place), place == len(self.updates) - 1
        own = [p for name, p in self.updates[place].items() if newest or not name.startswith(FACTORS)]  # type: ignore[operator]

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(head(self.features(batch, place)), self.heads.targets(place, batch.y))

        self.model.train()
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = [{"params": own, "lr": self.lr}, {"params": list(head.parameters()), "lr": self.lr}]
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe)

    def open(self, experience: Experience) -> int:
        """Head and update of the experience's task, made where it has none -> its place."""
        task, device = experience.task, self.runtime.device
        assert task is not None
        had = len(self.heads.at(self.heads.place(task)).blocks) if task in self.heads.tasks else 0
        place = self.heads.grow(task, experience.classes, self.runtime.generator("head"))
        for block in list(self.heads.at(place).blocks)[had:]:
            orthogonal(block.weight, self.runtime.generator("rows"))  # type: ignore[arg-type]
        if place == len(self.updates):
            self.updates.append(nn.ParameterDict({name: value.to(device) for name, value in self.update(place).items()}))
            self.statistics.append({name: value.clone() for name, value in self.model.named_buffers()})
        return place

    def update(self, place: int) -> dict[str, Tensor]:
        """Values that a task starts with."""
        made = {}
        for name, shape in self.layers.items():
            out, into = shape[0], shape[1:].numel()
            new = min(self.ranks[min(1, place)], out, into)
            old = sum(part[key("up", name)].shape[1] for part in self.updates) if self.reuses else 0  # type: ignore[index]
            for what, side in zip(FACTORS, (out, into), strict=True):
                made[key(what, name)] = orthogonal(torch.empty(side, new), self.runtime.generator(what, name))
            made[key("select", name)] = torch.cat([torch.zeros(old), torch.ones(new)])
        for name, p in self.model.named_parameters():
            if name not in self.layers:
                made[key("own", name)] = torch.zeros_like(p) if name in self.biases else p.detach().clone()
        return made

    def values(self, place: int) -> dict[str, Tensor]:
        """The network's parameters for the task at `place`, by name."""
        parts: Any = list(self.updates[: place + 1] if self.reuses else self.updates[place : place + 1])
        made = {}
        for name, shape in self.layers.items():
            up, down = (torch.cat([part[key(what, name)] for part in parts], dim=1) for what in FACTORS)
            made[name] = ((up * parts[-1][key("select", name)]) @ down.T).view(shape)
        others = (name for name, _ in self.model.named_parameters() if name not in self.layers)
        return made | {name: parts[-1][key("own", name)] for name in others}

    def features(self, batch: Any, place: int) -> Tensor:
        """Features [B, D] by the weights of the task at `place`."""
        return functional_call(self.model, self.values(place) | self.statistics[place], (batch.x,))

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]; only those of the task's classes say something."""
        self.model.eval()
        place = self.heads.place(batch.task)
        return self.heads.spread(place, self.heads.at(place)(self.features(batch, place)))

    def state_dict(self) -> dict[str, Any]:
        updates = [detached(dict(part.items())) for part in self.updates]  # type: ignore[operator]
        return {"heads": self.heads.state_dict(), "updates": updates, "statistics": self.statistics}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heads.load_state_dict(state["heads"])
        self.statistics = detached(state["statistics"], self.runtime.device)
        del self.updates[len(state["updates"]) :]
        for i, given in enumerate(state["updates"]):
            if i == len(self.updates):
                self.updates.append(nn.ParameterDict(detached(given, self.runtime.device)))
            for name, value in given.items():
                self.updates[i][name].copy_(value)  # type: ignore[index]


def key(what: str, name: str) -> str:
    """Where a task's update holds something of a parameter: no dots."""
    return f"{what}/{name.replace('.', '/')}"


def orthogonal(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Fill with orthonormal columns (rows, where there are fewer of them)."""
    drawn = nn.init.orthogonal_(torch.empty(weight.shape), generator=generator)
    with torch.no_grad():
        return weight.copy_(drawn)
