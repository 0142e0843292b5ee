"""GEM: gradient episodic memory (Lopez-Paz & Ranzato, NeurIPS 2017, arXiv 1706.08840).

The gradient g of the new batch may not raise the loss on the memory of any earlier task. G [T, P] holds the gradients of the
mean cross-entropy on each task's whole memory; where some G_k.g < 0, g becomes g + G^T v with the dual variables v of (eq. 11)

    min_v  1/2 v^T (G G^T + eps I) v + (G g)^T v,   v >= 0

variant  "official": v >= gamma (`strength`, 0.5) in the programme, so that constraints which hold are pushed as well once one
         is violated; "paper": v >= 0 in the programme, then gamma is added to every v, as the text says
The published numbers come from the released code, so official is the default. eps = 1e-3 in both, as there.

The programme is solved as nonnegative least squares: with L L^T = G G^T + eps I and u = v - gamma, u = argmin |L^T u + L^-1 (G
g + gamma (G G^T + eps I) 1)|. It is exact, in float64, and needs no solver of quadratic programmes.
The memory holds the newest samples of every task: `per_task` (released: 256), or an even share of `memory`. Each step costs a
pass over the whole memory of earlier tasks: for some 20 tasks at most. Augmentation is off, as released.
columns  "seen" (default): the softmax runs over all classes that have appeared (released for MNIST, where the head is shared);
         "task": over those of the sample's task, in training, memory and test (released for CIFAR). Tasks must be disclosed

Deviation: the ring keeps the newest samples of every task. In the release the place of the next sample is not set back where a
task begins, and what a batch brings beyond the end of the ring is dropped; a task of fewer samples leaves slots unwritten.
Published: Permuted MNIST 83 %, CIFAR-100 task-incremental 63 % (as a reproduction quotes them, not checked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as changed
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import OnlineHead
from clbench.streams.images.data import ImageBatch
from clbench.training.fit import Recipe, fit
from clbench.training.online import Augment, OnlineBatch, OnlineStream, flat, give, gradients, grow, labels, scores
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore
from clbench.training.stream_memory import allowed_stream_memory
from clbench.training.task_columns import Columns, TaskColumns

VARIANTS = ("official", "paper")
EPS = 1e-3


def dual_variables(gram: np.ndarray, products: np.ndarray, strength: float, variant: str, eps: float = EPS) -> np.ndarray:
    """The v [T] of the module's programme: gram G G^T [T, T], products G g [T], float64."""
    matrix = gram + eps * np.eye(len(gram))
    root = np.linalg.cholesky(matrix)
    floor = strength if variant == "official" else 0.0
    target = -np.linalg.solve(root, products + floor * matrix.sum(1))
    return nnls(root.T, target)[0] + strength


class Gem:
    """State: backbone, head with the classes that have appeared, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, anytime=True)

    @staticmethod
    def capabilities_of(*, columns: str = "seen", **options: Any) -> Capabilities:
        """Columns of a task need the task."""
        return changed(Gem.capabilities, needs_task_id=columns == "task")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["official", "paper"] = "official",  # where gamma stands
        strength: float = 0.5,  # gamma
        columns: Columns = "seen",  # that a softmax runs over; task: in streams that disclose tasks
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        per_task: int | None = None,  # null: an even share
        updates: float = 1.0,  # on each batch of the stream; below 1: some batches have none
        head: Literal["linear", "cosine10"] = "linear",
        augment: Augment = "none",
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 10,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        schedule: Schedule = constant,
    ):
        if variant not in VARIANTS:
            raise UserError(f"unknown learner.variant={variant}: choose {' or '.join(VARIANTS)}")
        if strength < 0 or (per_task is not None and per_task < 1):
            raise UserError(f"learner.strength={strength} must be at least 0, learner.per_task={per_task} at least 1")
        self.model, self.runtime, self.variant, self.strength = model, runtime, variant, strength
        self.epochs, self.batch_size, self.updates, self.augment = runtime.epochs(epochs), batch_size, updates, augment
        self.lr, self.backbone_lr = lr, backbone_lr
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head, self.columns = OnlineHead(model.num_features, head).to(runtime.device), TaskColumns(columns)
        self.memory = allowed_stream_memory(runtime, "task_ring", memory, per_task)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on new samples under the constraints of all earlier tasks."""
        grow(self, experience)
        self.columns.see(experience)
        self.model.train()
        at_hand: list[OnlineBatch] = []

        def loss(batch: OnlineBatch) -> Tensor:
            at_hand[:] = [batch]
            return self.loss(batch.new, experience.index)

        def project(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
            batch = at_hand.pop()
            if batch.old is not None:
                self._project(batch, params, flat(grads, params))

        stream = OnlineStream(self, experience, replay=None, past=True)
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        options: Any = {"before_step": project, "after_step": stream.store}
        log = fit(self.runtime, "train", self, groups, loss, stream, self.recipe, **options)
        return {**log, "exemplars": float(len(self.memory))}

    def loss(self, batch: ImageBatch, index: int) -> Tensor:
        """Mean cross-entropy of samples of one experience."""
        return F.cross_entropy(self.columns.of_experiences(scores(self, batch), np.full(len(batch), index)), labels(batch))

    def _project(self, batch: OnlineBatch, params: Sequence[Tensor], g: Tensor) -> None:
        """Replace the gradient g [P] where it is against some earlier task."""
        assert batch.old is not None
        tasks, rows = self.memory.experience[batch.rows], []
        for task in np.unique(tasks):
            part = batch.old.select(torch.from_numpy(np.flatnonzero(tasks == task)))
            rows.append(flat(gradients(self.loss(part, int(task)), params), params))
        past = torch.stack(rows)
        products = (past @ g).cpu().double().numpy()
        if (products < 0).any():
            v = dual_variables((past @ past.T).cpu().double().numpy(), products, self.strength, self.variant)
            give(params, g + torch.from_numpy(v).to(past) @ past)

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]; a class that has not appeared, or is none of the task's columns, has the lowest."""
        self.model.eval()
        return self.columns.of_task(scores(self, batch), batch.task)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory", *(["columns"] if self.columns.by_task else []))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
