"""Model Zoo: an ensemble of small networks, each for a few tasks (Ramesh & Chaudhari, ICLR 2022, "Model Zoo: A Growing Brain
That Learns Continually"). The task of a sample must be disclosed, at test time too.

Every experience adds a network, trained from the run's first weights with a head for each of its tasks: the new task and up to
`tasks_per_round` - 1 earlier ones, whose data it sees again. Networks are never trained again.
  choice     of earlier tasks, without replacement, with probability in proportion to
             w_j = clip(exp((l_j - m) / m), 1e-4, 1e3): l_j is the ensemble's mean loss on the training data of task j, m the
             mean of l over the earlier tasks
  prediction of task j: log of the weighted mean of the softmax outputs of all networks that saw j; the first of them, which
             saw all its data, counts 1 / replay_share, the others 1
tasks_per_round=1 (`learner=isolated`) replays nothing: one network for each task.

variant  "paper" (default): t earlier tasks, min(tasks_per_round - 1, t) of them replayed. "official": the release's count,
         min(tasks_per_round, t) - 1, so that the second task replays nothing.

With replay it is a reference, not a contender: it keeps all data, and is exempt from the sample budgets; `isolated` is not.
Choices: a replayed share is drawn anew in each round; a task that comes back is trained on all of its data so far (`isolated`:
on the new data) and adds a network. All networks begin with the same weights, as the release's, which seeds every one alike.
Deviations: m is taken over earlier tasks (the release: over all tasks of the stream, unseen ones with the loss of a uniform
guess); the networks are kept rather than their outputs on test data; no dropout (0.2), no half precision.
Constants: the release's (SGD 0.9 with Nesterov's momentum, 0.01 and a cosine by steps, decay 1e-5, batch 16; 100 epochs).
Published, read on its results pages (average accuracy, task disclosed): Split CIFAR-100 94.99, Coarse CIFAR-100 84.27,
Split CIFAR-10 98.68, Split MNIST 99.98, permuted MNIST 97.71 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.experts import Experts
from clbench.models.heads import LOWEST
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch, ImageData, shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore

LEAST, LARGEST = 1e-4, 1e3  # weight of a task


class ModelZoo:
    """State: the networks with their heads; of each experience its task and its classes."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True, stores_all_data=True)

    @staticmethod
    def capabilities_of(*, tasks_per_round: int = 5, **options: Any) -> Capabilities:
        """Without replay nothing is stored."""
        return replace(ModelZoo.capabilities, stores_all_data=tasks_per_round != 1)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        tasks_per_round: int = 5,  # that a network is trained on, the new one included; 1: isolated
        variant: Literal["paper", "official"] = "paper",
        replay_share: float = 1.0,  # of an earlier task's samples, in (0, 1]
        lr: float = 0.01,
        epochs: int | None = None,
        batch_size: int = 16,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        schedule: Schedule = cosine,
    ):
        if isinstance(tasks_per_round, bool) or not isinstance(tasks_per_round, int) or tasks_per_round < 1:
            raise UserError(f"learner.tasks_per_round must be a whole number from 1, got {tasks_per_round!r}")
        if variant not in ("paper", "official"):
            raise UserError(f"unknown learner.variant={variant}: choose paper or official")
        if not 0 < replay_share <= 1:
            raise UserError(f"learner.replay_share must lie in (0, 1], got {replay_share}")
        self.runtime, self.per_round, self.official, self.share = runtime, tasks_per_round, variant == "official", replay_share
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, nesterov=momentum > 0, weight_decay=weight_decay, schedule=schedule)
        self.experts = Experts(model)
        self.came: list[int] = []
        self.classes: list[list[int]] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Choose earlier tasks and train a network on them and the new one."""
        task, data = experience.task, self.data_of(experience)
        assert task is not None
        earlier = [old for old in dict.fromkeys(self.came) if old != task]
        chosen = self.choose(earlier, data)
        self.came.append(task)
        self.classes.append(list(experience.classes))
        expert = self.experts.add()
        expert.model.train()
        parts = [(old, self.some(data[old], old)) for old in chosen] + [(task, data[task])]
        places = [expert.heads.grow(t, self.classes_of(t), self.runtime.generator("head", t)) for t, _ in parts]
        batches = TaskBatches([part for _, part in parts], self.batch_size, self.epochs, self.runtime.key("train"))

        def loss(batch: Batch) -> Tensor:
            features, y = expert.model.features(batch), batch.y
            assert y is not None
            total = features.new_zeros(())
            for i, place in enumerate(places):
                rows = (batches.part_B == i).to(y.device)
                if rows.any():
                    z = expert.heads.at(place)(features[rows])
                    total = total + F.cross_entropy(z, expert.heads.targets(place, y[rows]), reduction="sum")
            return total / len(y)

        groups = groups_of((expert.model, self.lr), (expert.heads, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        return {**log, "tasks": float(len(parts)), "networks": float(len(self.experts))}

    def data_of(self, experience: Experience) -> dict[int, ImageData]:
        """All samples of each task so far that are at hand."""
        parts: dict[int, list[Any]] = {}
        for task, part in [*zip(self.came, experience.past, strict=False), (experience.task, experience.train)]:
            parts.setdefault(task, []).append(part)
        return {task: ImageData.join(some) for task, some in parts.items()}

    def classes_of(self, task: int) -> list[int]:
        """Classes that a task has had, in their order."""
        return list(dict.fromkeys(c for t, some in zip(self.came, self.classes, strict=True) if t == task for c in some))

    def choose(self, earlier: list[int], data: dict[int, ImageData]) -> list[int]:
        """Earlier tasks to replay."""
        count = min(self.per_round, len(earlier)) - 1 if self.official else min(self.per_round - 1, len(earlier))
        if count < 1 or count == len(earlier):
            return earlier if count > 0 else []
        weights = task_weights(torch.tensor([self.loss_of(task, data[task]) for task in earlier]))
        drawn = torch.multinomial(weights, count, generator=self.runtime.generator("tasks"))
        return [earlier[i] for i in drawn.tolist()]

    def loss_of(self, task: int, data: ImageData) -> float:
        """The ensemble's mean loss on the training samples of a task."""
        total = 0.0
        with self.runtime.phase("weigh"), torch.no_grad():
            for batch in data.test_batches(128):
                self.runtime.check_stop()
                assert batch.y is not None
                z = self.scores(batch, task)
                total += float(F.nll_loss(z, batch.y.to(z.device), reduction="sum"))
        return total / len(data)

    def some(self, data: ImageData, task: int) -> ImageData:
        """The share of an earlier task's samples that is replayed."""
        if self.share == 1:
            return data
        rows = rng.permutation(self.runtime.key("share", task), len(data))
        return data.subset(np.sort(rows[: max(1, round(self.share * len(data)))]))

    def scores(self, batch: Any, task: int) -> Tensor:
        """Log of the ensemble's mean probabilities [B, num_seen]; `LOWEST` for other tasks' classes."""
        known = self.experts.that_know(task)
        mean = torch.zeros(len(batch), 1 + max(max(some) for some in self.classes), device=self.runtime.device)
        weights = [1 / self.share, *[1.0] * (len(known) - 1)]
        for weight, expert in zip(weights, known, strict=True):
            expert.model.eval()
            place = expert.heads.place(task)
            p = expert.heads.spread(place, expert.heads.at(place)(expert.model.features(batch))).softmax(1)
            mean[:, : p.shape[1]] += weight / sum(weights) * p
        return torch.where(mean > 0, mean.log(), LOWEST)

    def predict(self, batch: Batch) -> Tensor:
        """Log probabilities [B, num_seen]; a task that is not known is answered as the newest one."""
        return self.scores(batch, batch.task if batch.task in self.came else self.came[-1])

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "experts", "came", "classes")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


class TaskBatches:
    """Shuffled samples of several data sets, the new one last; `part_B` says which each sample of the latest batch is from."""

    def __init__(self, parts: Sequence[ImageData], batch_size: int, epochs: int, key: int):
        self.batches = shuffled(ImageData.join(parts), batch_size, epochs, key)
        self.steps, self.newest = self.batches.steps, len(parts) - 1
        self.part_N = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self.part_B = torch.zeros(0, dtype=torch.int64)

    def __call__(self, step: int) -> ImageBatch:
        batch = self.batches(step)
        self.part_B = torch.as_tensor(self.part_N[self.batches.rows(step)])
        batch.replayed = int((self.part_B < self.newest).sum())
        return batch


def task_weights(losses: Tensor) -> Tensor:
    """Losses [T] -> weights [T] by which tasks are chosen: e, raised to how far a loss lies above the mean, in means."""
    mean = losses.mean().clamp_min(torch.finfo(losses.dtype).tiny)
    return ((losses - mean) / mean).exp().clamp(LEAST, LARGEST)
