"""TAG: Task-based Accumulated Gradients for Lifelong Learning (Malviya, Ravindran & Chandar, 2021, arXiv 2105.05155). An
optimiser that knows the tasks: steps are long where a task's gradients agree with those of earlier tasks, and short where they
are opposed. The task of a sample must be disclosed, at test time too.

Every tensor of weights has, for each task t, a first moment m_t and a second moment V_t of its gradients g, 0 at the start:
  m_t <- beta1 m_t + (1 - beta1) g,    V_t <- beta2 V_t + (1 - beta2) g^2    (Adagrad: V_t + g^2)
  alpha_tau = exp(-b cos(m_t, m_tau)),  alpha_t = exp(-b);  while there is one task alone, alpha = 1
  theta <- theta - lr g / (sqrt(sum_tau alpha_tau V_tau) + eps)
  Adam: m_t / (1 - beta1^n) in place of g, the root divided by sqrt(1 - beta2^n)
The sum runs over all tasks seen; those of the others stay as their task has left them. Each task has a head of its own, whose
weights see gradients of that task alone: there the others' V are 0. (The release has one head whose columns are masked. Its
steps are the same: rows of another task are orthogonal to the task's own.)

variant  what n counts: "official" (default): steps inside the epoch, so the correction begins anew with each; "paper": steps of
         the task.

A tensor whose first moment is 0 has the cosine 0 (the release divides 0 by 0). A task that comes back goes on with its moments;
the release does not say. BatchNorm's statistics are left to the newest task. State: 2 x weights x tasks.
Constants: the release's for Split-CIFAR100 (RMSProp, b 5, batches of 10, one epoch a task).
Published, read from the authors' data of the figures (20 tasks of Split-CIFAR100, average accuracy): TAG-RMSProp 62.79 against
RMSProp 48.91, TAG-Adagrad 63.22 against 50.98, TAG-Adam 62.09 against 48.69.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import TaskHead
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


class Tag:
    """State: backbone, a head for each task, m and V [tasks, ...] of every tensor by name, steps of each task."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        optimizer: Literal["rmsprop", "adagrad", "adam"] = "rmsprop",
        variant: Literal["official", "paper"] = "official",  # of adam's bias correction
        sensitivity: float = 5.0,  # b
        beta1: float = 0.9,
        beta2: float | None = None,  # null: 0.99 (rmsprop) or 0.999 (adam); adagrad has none
        eps: float = 1e-8,
        lr: float = 2.5e-4,  # the release: 5e-3 (adagrad), 5e-4 (adam)
        epochs: int | None = None,
        batch_size: int = 10,
        schedule: Schedule = constant,
    ):
        if optimizer not in ("rmsprop", "adagrad", "adam"):
            raise UserError(f"unknown learner.optimizer={optimizer}: choose rmsprop, adagrad or adam")
        if variant not in ("official", "paper"):
            raise UserError(f"unknown learner.variant={variant}: choose official or paper")
        if beta2 is not None and optimizer == "adagrad":
            raise UserError(f"learner.beta2={beta2} has no effect on learner.optimizer=adagrad: choose null")
        beta2 = {"rmsprop": 0.99, "adagrad": 0.0, "adam": 0.999}[optimizer] if beta2 is None else beta2
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise UserError(f"learner.{name} must lie in [0, 1), got {value}")
        if sensitivity < 0:
            raise UserError(f"learner.sensitivity must be at least 0, got {sensitivity}")
        if eps <= 0:
            raise UserError(f"learner.eps must be above 0, got {eps}")
        self.model, self.runtime, self.optimizer, self.by_epoch = model, runtime, optimizer, variant == "official"
        self.sensitivity, self.betas, self.eps, self.lr = sensitivity, (beta1, beta2), eps, lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", 0.0, schedule=schedule)
        self.heads = TaskHead(model.num_features).to(runtime.device)
        self.moments: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.counts: list[int] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train backbone and head by steps that are scaled by the tasks' moments."""
        assert experience.task is not None
        place = self.heads.grow(experience.task, experience.classes, self.runtime.generator("head"))
        head = self.heads.at(place)
        shared = {f"model.{name}": p for name, p in self.model.named_parameters() if p.requires_grad}
        own = {f"heads.{experience.task}.{name}": p for name, p in head.named_parameters()}
        self.make_room(shared, len(self.heads.tasks))
        self.make_room(own, 1)
        self.counts += [0] * (len(self.heads.tasks) - len(self.counts))
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(head(self.model.features(batch)), self.heads.targets(place, batch.y))

        def at_place(at: Place) -> None:
            if self.by_epoch and at.step % batches.per_epoch == 0:
                self.counts[place] = 0

        def before(params: list[Tensor], grads: list[Tensor | None]) -> None:
            self.counts[place] += 1
            for name, p in (shared | own).items():
                if p.grad is not None:
                    p.grad.copy_(self.direction(name, p.grad, place))

        self.model.train()
        groups = groups_of((self.model, self.lr), (head, self.lr))
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe, at_place=at_place, before_step=before)

    def make_room(self, tensors: Mapping[str, Tensor], tasks: int) -> None:
        """Rows of zeros for tasks that some tensors have no moments of."""
        for kept in (self.moments, self.squares):
            for name, p in tensors.items():
                old = kept.get(name, p.new_zeros(0, *p.shape))
                kept[name] = torch.cat([old, p.new_zeros(tasks - len(old), *p.shape)]).detach()

    @torch.no_grad()
    def direction(self, name: str, g: Tensor, place: int) -> Tensor:
        """Take a gradient into the moments of the task at `place` -> what the rate is multiplied by."""
        m, v, (beta1, beta2) = self.moments[name], self.squares[name], self.betas
        row = min(place, len(m) - 1)  # a head has moments of its own task alone
        m[row].lerp_(g, 1 - beta1)
        v[row].mul_(1 if self.optimizer == "adagrad" else beta2).addcmul_(g, g, value=1 - beta2)
        total = v[row]
        if len(self.heads.tasks) > 1:
            total = torch.tensordot(weights(m, row, self.sensitivity), v, dims=1)
        if self.optimizer != "adam":
            return g / (total.sqrt() + self.eps)
        n = self.counts[place]
        return m[row] / (1 - beta1**n) / (total.sqrt() / (1 - beta2**n) ** 0.5 + self.eps)

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]; only those of the task's classes say something."""
        self.model.eval()
        return self.heads(self.model.features(batch), batch.task)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "heads", "moments", "squares", "counts")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def weights(m: Tensor, row: int, b: float) -> Tensor:
    """First moments m [T, ...] -> exp(-b cos) of each with that in `row` [T]; one of 0 has the cosine 0, `row` itself 1."""
    flat = m.flatten(1)
    norms = flat.norm(dim=1)
    cosines = (flat @ flat[row]) / (norms * norms[row]).clamp_min(torch.finfo(m.dtype).tiny)
    cosines[row] = 1.0
    return torch.exp(-b * cosines)
