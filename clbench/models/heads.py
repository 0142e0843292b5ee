"""Classifiers that grow with the classes. Shapes: features [B, D] -> scores [B, K].

Loading a state with more classes than a head has grows it first; blocks that are there already are filled in place, so that
an optimiser which holds their parameters stays valid. Nothing here touches the global random generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from clbench.interfaces import Experience, UserError

LOWEST = -1e30  # score of a class without samples: finite, below every other
Init = Literal["normal", "kaiming_uniform"]


class LinearHead(nn.Module):
    """One `Linear(D, classes of an experience)` per experience; logits are concatenated. New rows have bias 0.

    init  "normal": weights normal(0, std), as timm's ViTs; "kaiming_uniform": U(-sqrt(3 / D), sqrt(3 / D)), which has a
          standard deviation of 1 / sqrt(D), as `SimpleLinear` of PyCIL and PILOT (`std` has no effect)

    Another name raises `UserError`.
    """

    def __init__(
        self,
        num_features: int,
        std: float = 0.02,
        bias: bool = True,
        init: Init = "normal",
    ):
        super().__init__()
        if init not in get_args(Init):
            raise UserError(f"unknown initialisation {init!r} of a linear head: choose {' or '.join(get_args(Init))}")
        self.num_features, self.std, self.bias = num_features, std, bias
        self.init: Init = init
        self.blocks = nn.ModuleList()
        self.anchor: Tensor
        self.register_buffer("anchor", torch.zeros(0), persistent=False)  # where new blocks go

    @property
    def widths(self) -> list[int]:
        """Classes of each block."""
        return [int(block.out_features) for block in self.blocks]  # type: ignore[arg-type]

    @property
    def num_classes(self) -> int:
        return sum(self.widths)

    def _block(self, count: int) -> nn.Linear:
        return skip_init(nn.Linear, self.num_features, count, bias=self.bias)  # type: ignore[return-value]

    def grow(self, count: int, generator: torch.Generator) -> None:
        """Append `count` classes; weights are drawn from a CPU generator (normal: torch's trunc_normal_, bounds -2 and 2)."""
        block = self._block(count)
        if self.init == "normal":
            nn.init.trunc_normal_(block.weight, std=self.std, generator=generator)
        else:
            nn.init.kaiming_uniform_(block.weight, nonlinearity="linear", generator=generator)
        if self.bias:
            nn.init.zeros_(block.bias)
        self.blocks.append(block.to(self.anchor.device))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, K]."""
        assert len(self.blocks), "the head has no class yet"
        return torch.cat([block(features) for block in self.blocks], dim=1)

    def joined(self) -> LinearHead:
        """The same function as one block, a copy: one product instead of one for every experience."""
        twin = LinearHead(self.num_features, self.std, self.bias, self.init)
        twin.blocks.append(twin._block(self.num_classes).to(self.anchor.device))
        self._exchange(twin.blocks[0], lambda mine, joint: joint.copy_(mine))
        return twin

    def take(self, joined: LinearHead) -> None:
        """The values of a head that `joined` gave, in place."""
        self._exchange(joined.blocks[0], lambda mine, joint: mine.copy_(joint))

    @torch.no_grad()
    def _exchange(self, joint: Any, copy: Callable[[Tensor, Tensor], Any]) -> None:
        for name in ("weight", "bias") if self.bias else ("weight",):
            parts = getattr(joint, name).split(self.widths)
            for block, part in zip(self.blocks, parts, strict=True):
                copy(getattr(block, name), part)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill in place; blocks that are missing are added, blocks too many are removed."""
        widths = [len(state[f"blocks.{i}.weight"]) for i in range(sum(key.endswith(".weight") for key in state))]
        while len(self.blocks) > len(widths):
            del self.blocks[-1]
        for i, width in enumerate(widths):
            if i == len(self.blocks):
                self.blocks.append(self._block(width).to(self.anchor.device))
            elif self.blocks[i].out_features != width:
                self.blocks[i] = self._block(width).to(self.anchor.device)
        return super().load_state_dict(state, strict, assign)


class TaskHead(nn.Module):
    """A linear head of its own for every task, or domain: a sample is answered for its task's classes alone.

    The classes of two tasks may be the same ones: each task has rows of its own for them. A sample of a task that has not been
    learned is answered by the newest head. `init` as in `LinearHead`.
    """

    def __init__(self, num_features: int, init: Init = "normal"):
        super().__init__()
        self.num_features = num_features
        self.init: Init = init
        self.heads, self.classes = nn.ModuleDict(), nn.ParameterDict()
        self.anchor: Tensor
        self.register_buffer("anchor", torch.zeros(0), persistent=False)  # where new heads go

    @property
    def num_classes(self) -> int:
        """Classes seen in any task: they are numbered from 0 in the order of their appearance."""
        return 1 + max(int(classes.max()) for classes in self.classes.values())

    @property
    def tasks(self) -> list[int]:
        """Numbers of the tasks in the order in which they came: their places."""
        return [int(name) for name in self.heads]

    def place(self, task: int | None) -> int:
        """Which head answers for a task: its own, or the newest where it has none."""
        return self.tasks.index(task) if task in self.tasks else len(self.heads) - 1

    def at(self, place: int) -> LinearHead:
        """The head at a place: features [B, D] -> logits of its classes, in their order."""
        return self.heads[str(self.tasks[place])]  # type: ignore[return-value]

    def targets(self, place: int, y: Tensor) -> Tensor:
        """Columns of the head at a place that labels [B] belong to."""
        known = self.classes[str(self.tasks[place])]
        order = known.argsort()
        return order[torch.searchsorted(known[order], y)]

    def spread(self, place: int, own: Tensor) -> Tensor:
        """Logits of one head [B, C] -> [B, K], `LOWEST` elsewhere: a softmax over all classes is one over the task's."""
        whole = own.new_full((len(own), self.num_classes), LOWEST)
        return whole.index_copy(1, self.classes[str(self.tasks[place])], own)

    def grow(self, task: int, classes: Sequence[int], generator: torch.Generator) -> int:
        """Give a task the classes that it has not yet, weights drawn from a CPU generator -> its place."""
        name = str(task)
        if name not in self.heads:
            self.heads[name] = LinearHead(self.num_features, init=self.init).to(self.anchor.device)
            self._name(name, [])
        known = self.classes[name].tolist()
        if new := [c for c in classes if c not in known]:
            self.heads[name].grow(len(new), generator)  # type: ignore[operator]
            self._name(name, [*known, *new])
        return self.place(task)

    def _name(self, task: str, classes: Sequence[int]) -> None:
        numbers = torch.tensor(classes, dtype=torch.int64, device=self.anchor.device)
        self.classes[task] = nn.Parameter(numbers, requires_grad=False)

    def forward(self, features: Tensor, task: int | None) -> Tensor:
        """Logits [B, K] of the task's head, spread over all classes."""
        place = self.place(task)
        return self.spread(place, self.at(place)(features))

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill in place; heads that are missing are added, heads too many are removed."""
        given = {key.removeprefix("classes."): value for key, value in state.items() if key.startswith("classes.")}
        for task in [task for task in self.heads if task not in given]:
            del self.heads[task], self.classes[task]
        for task, classes in given.items():
            if task not in self.heads:
                self.heads[task] = LinearHead(self.num_features, init=self.init).to(self.anchor.device)
            start = f"heads.{task}."
            part = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            self.heads[task].load_state_dict(part)
            self._name(task, classes.tolist())
        return super().load_state_dict(state, strict, assign)


Kind = Literal["single", "per_task"]


def linear_head(kind: Kind, num_features: int, init: Init = "normal") -> LinearHead | TaskHead:
    """One head over all classes, or a head for every task. Another kind raises `UserError`."""
    if kind not in get_args(Kind):
        raise UserError(f"learner.head must be single or per_task, got {kind!r}")
    return LinearHead(num_features, init=init) if kind == "single" else TaskHead(num_features, init)


def grow(head: LinearHead | TaskHead, experience: Experience, generator: Callable[[], torch.Generator]) -> None:
    """Rows for the classes of an experience that have none yet."""
    if isinstance(head, TaskHead):
        assert experience.task is not None, "needs_task_id is declared"
        head.grow(experience.task, experience.classes, generator())
    elif experience.new_classes:
        head.grow(len(experience.new_classes), generator())


def scores(head: LinearHead | TaskHead, features: Tensor, task: int | None) -> Tensor:
    """Logits [B, K] of either kind of head."""
    return head(features, task) if isinstance(head, TaskHead) else head(features)


class CosineHead(nn.Module):
    """sigma * cos(f, w_c): learnable sigma, 1 at the start; one block per experience.

    Rows start as U(-1/sqrt(D), 1/sqrt(D)), or as normal(0, std) where `std` is given.
    """

    def __init__(self, num_features: int, std: float | None = None):
        super().__init__()
        self.std = std
        self.linear = LinearHead(num_features, bias=False, std=0.02 if std is None else std)
        self.sigma = nn.Parameter(torch.ones(1))

    @property
    def num_classes(self) -> int:
        return self.linear.num_classes

    @property
    def blocks(self) -> nn.ModuleList:
        """One `Linear` without bias per experience."""
        return self.linear.blocks

    def grow(self, count: int, generator: torch.Generator) -> None:
        """Append `count` classes; weights are drawn from a CPU generator."""
        if self.std is not None:
            self.linear.grow(count, generator)
            return
        bound = self.linear.num_features**-0.5
        drawn = torch.empty(count, self.linear.num_features).uniform_(-bound, bound, generator=generator)
        self.linear.grow(count, generator)
        with torch.no_grad():
            self.blocks[-1].weight.copy_(drawn)  # type: ignore[operator]

    def assign(self, first: int, prototypes: Tensor) -> None:
        """Overwrite the rows of classes first, first + 1, ... in place by prototypes [P, D]."""
        if first < 0 or first + len(prototypes) > self.num_classes:
            raise UserError(f"prototypes for classes {first}..{first + len(prototypes) - 1}, the head has {self.num_classes}")
        row = 0
        with torch.no_grad():
            for block in self.blocks:
                for i in range(len(block.weight)):  # type: ignore[arg-type]
                    if first <= row < first + len(prototypes):
                        block.weight[i].copy_(prototypes[row - first])  # type: ignore[index]
                    row += 1

    def cosines(self, features: Tensor) -> Tensor:
        """Cosines of features and rows [B, K]."""
        assert len(self.blocks), "the head has no class yet"
        rows = torch.cat([block.weight for block in self.blocks])  # type: ignore[misc]
        return F.linear(F.normalize(features, dim=1), F.normalize(rows, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Scaled cosines [B, K]."""
        return self.sigma * self.cosines(features)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill in place, growing first where needed."""
        part = {key.removeprefix("linear."): value for key, value in state.items() if key.startswith("linear.")}
        self.linear.load_state_dict(part)
        return super().load_state_dict(state, strict, assign)


class OnlineHead(nn.Module):
    """A classifier whose classes appear one by one in the stream: one that has not been seen scores LOWEST.

    Rows of an experience's classes are there from its start, so that an optimiser knows them; a row takes part in scores and
    losses from the first sample of its class (`see`) on. So whoever is asked in mid-experience never answers with a class
    that the stream has not shown.

    kind  "linear": weights and biases as in `LinearHead`; "cosine10": 10 cos(f, w), no bias (ER-ACE's released code)
    """

    def __init__(self, num_features: int, kind: Literal["linear", "cosine10"] = "linear"):
        super().__init__()
        if kind not in ("linear", "cosine10"):
            raise UserError(f"unknown learner.head={kind}: choose linear or cosine10")
        self.inner: LinearHead | CosineHead = LinearHead(num_features) if kind == "linear" else CosineHead(num_features)
        if isinstance(self.inner, CosineHead):
            self.inner.sigma.data.fill_(10.0)
            self.inner.sigma.requires_grad_(False)
        self.seen_K: Tensor
        self.register_buffer("seen_K", torch.zeros(0, dtype=torch.bool))

    @property
    def num_classes(self) -> int:
        return self.inner.num_classes

    def grow(self, count: int, generator: torch.Generator) -> None:
        """Append rows of `count` classes, none of them seen yet; weights are drawn from a CPU generator."""
        self.inner.grow(count, generator)
        self.seen_K = torch.cat([self.seen_K, self.seen_K.new_zeros(count)])

    def see(self, y: Tensor) -> None:
        """Samples of classes y [B] have come."""
        self.seen_K[y.to(self.seen_K.device)] = True

    def forward(self, features: Tensor) -> Tensor:
        """Scores [B, K]."""
        z = self.inner(features)
        return z.masked_fill(~self.seen_K, LOWEST)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill in place, growing first where needed."""
        self.inner.load_state_dict({k.removeprefix("inner."): v for k, v in state.items() if k.startswith("inner.")})
        if self.seen_K.shape != state["seen_K"].shape:
            self.seen_K = torch.zeros_like(state["seen_K"], device=self.seen_K.device)
        return super().load_state_dict(state, strict, assign)


class PrototypeHead:
    """Class means of everything ever seen: sums [K, D] and counts [K] in float64, so the order of arrival does not matter.

    metric "euclidean": -||f - mean||^2; "cosine": cos(f, mean), the mean taken over un-normalised features.
    """

    def __init__(self, num_features: int, metric: str = "euclidean"):
        if metric not in ("euclidean", "cosine"):
            raise UserError(f"unknown metric {metric!r}: choose euclidean or cosine")
        self.metric = metric
        self.sums_KD = torch.zeros(0, num_features, dtype=torch.float64)
        self.counts_K = torch.zeros(0, dtype=torch.float64)

    def to(self, device: torch.device | str) -> PrototypeHead:
        """Move the statistics; they stay on the CPU for devices without float64."""
        device = torch.device("cpu") if torch.device(device).type == "mps" else device
        self.sums_KD, self.counts_K = self.sums_KD.to(device), self.counts_K.to(device)
        return self

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [N, D], y [N] below `num_classes`."""
        more = num_classes - len(self.counts_K)
        if more > 0:
            self.sums_KD = torch.cat([self.sums_KD, self.sums_KD.new_zeros(more, self.sums_KD.shape[1])])
            self.counts_K = torch.cat([self.counts_K, self.counts_K.new_zeros(more)])
        f, y = features.detach().to(self.sums_KD), y.to(self.sums_KD.device)
        for c in y.unique().tolist():
            rows = y == c
            self.sums_KD[c] += f[rows].sum(0)
            self.counts_K[c] += rows.sum()

    @property
    def means_KD(self) -> Tensor:
        """Means [K, D] float64; a class without samples has mean 0."""
        return self.sums_KD / self.counts_K.clamp_min(1)[:, None]

    def __call__(self, features: Tensor) -> Tensor:
        """Scores [B, K] float32 where the features are; classes without samples get the lowest."""
        f, means = features.to(self.sums_KD), self.means_KD
        if self.metric == "cosine":
            z = F.normalize(f, dim=1) @ F.normalize(means, dim=1).T
        else:
            z = 2 * f @ means.T - means.square().sum(1) - f.square().sum(1, keepdim=True)
        return z.masked_fill(self.counts_K == 0, LOWEST).float().to(features.device)

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts."""
        return {"sums_KD": self.sums_KD, "counts_K": self.counts_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill in place where the shapes agree, else replace."""
        for name in ("sums_KD", "counts_K"):
            mine, given = getattr(self, name), state[name]
            if mine.shape == given.shape:
                mine.copy_(given)
            else:
                setattr(self, name, given.to(mine).clone())
