"""LAFTR: a penalty on the distance in function space, from one number a unit (Dhawan, Huang, Bae & Grosse, ICML 2023).

arXiv 2302.03519, "Efficient Parametric Approximations of Neural Network Function Space Distance". For an MLP of ReLUs:

    local cross-entropy + strength x sum over earlier experiences s of E |f(x, theta) - f(x, theta_s)|^2

The expectation over the images of s is taken without them. ReLUs are linearised around theta_s, the weights at its end, and the
gate of each unit is replaced by an independent Bernoulli variable g with the unit's share p of images that open it. With h the
activations under theta_s and d what the new weights add to them,

    a = W_s h,  da = (W - W_s) h + W d            h' = g a,  d' = g da          (h ends with a 1, for the biases; d with a 0)

and the moments A = E h h^T, C = E d h^T, D = E d d^T follow layer by layer: a product with W_s or W on each side, then times
p_i p_j, on the diagonal p_i. The distance is the trace of E da da^T of the classifier, over the classes known at the end of s.

inputs     "full": the second moment of the pixels, [P + 1, P + 1] numbers an experience; "diagonal": mean and variances
reference  "own": theta_s, a copy of the weights an experience; "latest": the weights at the start of the current experience for
           all s, so that one copy does. The gates are still those of theta_s
head       single | per_task, as in `finetune.py`

With open gates (p = 1) and inputs full the network is linear and the distance exact. Choices: local cross-entropy (as `ewc`
here), Adam, rates, strength, and second moments in full between the layers. Left out: the paper's stochastic variant, which
samples the gates, statistics by class, and convolutions. Published number: none read.

Legend: P pixels, n units of a layer, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.learners.regularised import Penalty, Regularised
from clbench.models.backbone import Backbone
from clbench.models.heads import TaskHead
from clbench.models.small_networks import Mlp
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, detached

Layers = Sequence[Tensor]  # weights and biases [n, m + 1] of each layer, the classifier last


def second_moment(x: Tensor) -> Tensor:
    """The sum of x~ x~^T, x~ = (x, 1): x [B, P] -> [P + 1, P + 1] float64."""
    x = F.pad(x.double(), (0, 1), value=1.0)
    return x.T @ x


def without_covariances(moment: Tensor) -> Tensor:
    """E x~ x~^T as if the pixels were independent: means and variances stay."""
    mean = moment[-1]
    return torch.outer(mean, mean) + torch.diag(moment.diagonal() - mean.square())


def gated(moment: Tensor, mean: Tensor, p: Tensor, last: float) -> Tensor:
    """E [g u; last] [g v; 1]^T from E u v^T [n, n], E u [n] and P(g = 1) [n] -> [n + 1, n + 1]; `last` 1 for u = v, else 0."""
    pairs = torch.outer(p, p)
    pairs = pairs + torch.diag(p - p.square())  # g g = g
    column = torch.cat([p * mean, p.new_tensor([last])])
    row = column[:-1] if last else torch.zeros_like(mean)
    return torch.cat([torch.cat([pairs * moment, row[None]]), column[:, None]], dim=1)


def distance(new: Layers, old: Layers, moment: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """E |f(x, new) - f(x, old)|^2 of the linearised network -> scalar; `moment` [P + 1, P + 1] is E x~ x~^T."""
    a_hh, a_dh, a_dd = moment, moment, moment
    for i, (w, w_old) in enumerate(zip(new, old, strict=True)):
        gap = w - w_old
        left = gap @ a_hh  # E da h^T; the images are the same, so that d is 0 at first
        dd = left @ gap.T
        if i:
            cross = gap @ a_dh.T @ w.T
            left, dd = left + w @ a_dh, dd + cross + cross.T + w @ a_dd @ w.T
        if i == len(gates):
            return dd.trace()
        p = gates[i]
        a_dd = F.pad(dd * (torch.outer(p, p) + torch.diag(p - p.square())), (0, 1, 0, 1))
        a_dh = gated(left @ w_old.T, left[:, -1], p, 0.0)
        a_hh = gated(w_old @ a_hh @ w_old.T, w_old @ a_hh[:, -1], p, 1.0)
    raise AssertionError("a layer more than gates")


class Laftr(Regularised):
    """State: backbone, head; of each experience its input moments, gates, number of classes, task and weights."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_random_access=True, anytime=True)

    @staticmethod
    def capabilities_of(*, head: str = "single", **options: Any) -> Capabilities:
        """A head for every task needs the task."""
        return replace(Laftr.capabilities, needs_task_id=head == "per_task")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 1.0,
        inputs: Literal["full", "diagonal"] = "full",
        reference: Literal["own", "latest"] = "own",
        lr: float = 1e-3,  # head
        backbone_lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 32,
        weight_decay: float = 0.0,
        schedule: Schedule = constant,
        head: Literal["single", "per_task"] = "single",  # per_task: for streams that disclose their tasks
    ):
        net, name = model.net, model.identity["name"]
        if not isinstance(net, Mlp) or not all(isinstance(layer[1], nn.Identity) for layer in net.layers):  # type: ignore[index]
            raise UserError(f"learner laftr: model {name} is no MLP of ReLUs without norm; choose model=mlp model.norm=none")
        if inputs not in ("full", "diagonal"):
            raise UserError(f"unknown learner.inputs={inputs}: choose full or diagonal")
        if reference not in ("own", "latest"):
            raise UserError(f"unknown learner.reference={reference}: choose own or latest")
        recipe = Recipe("adam", weight_decay=weight_decay, schedule=schedule)
        super().__init__(
            model, runtime, recipe, strength, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, head=head
        )
        self.mlp, self.inputs, self.own = net, inputs, reference == "own"
        self.sites: list[dict[str, Any]] = []

    def layers(self, classes: int, task: int | None) -> list[Tensor]:
        """Weights and biases of the network, and of the classifier's first `classes` rows, or of a task's head."""
        head = self.head.at(self.head.place(task)) if isinstance(self.head, TaskHead) else self.head
        found = [layer[0] for layer in self.mlp.layers]  # type: ignore[index]
        parts = [torch.cat([part.weight, part.bias[:, None]], dim=1) for part in (*found, *head.blocks)]  # type: ignore[union-attr]
        return [*parts[: len(found)], torch.cat(parts[len(found) :])[:classes]]

    def penalty(self, experience: Experience) -> Penalty | None:
        """The distances to what every earlier experience has left."""
        if not self.sites:
            return None
        latest = [site["weights"] if self.own else self.kept(site) for site in self.sites]

        def penalty(batch: Any, features: Tensor, z: Tensor) -> Tensor:
            total = features.new_zeros(())
            for site, old in zip(self.sites, latest, strict=True):
                new = self.layers(site["classes"], site["task"])
                total = total + distance(new, old, site["moment"], site["gates"])
            return total

        return penalty

    def kept(self, site: dict[str, Any]) -> list[Tensor]:
        """A copy of the layers that answer for an experience."""
        return detached(self.layers(site["classes"], site["task"]))

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train under the penalty, then take the experience's statistics."""
        log = super().learn(experience)
        with self.runtime.phase("moments"):
            self.sites.append(self._site(experience))
        return log

    @torch.no_grad()
    def _site(self, experience: Experience) -> dict[str, Any]:
        moment, opened, n = torch.zeros(()), [], len(experience.train)
        for batch in experience.train.test_batches(self.batch_size):
            self.runtime.check_stop()
            x = (batch.x.mean(1) if self.mlp.channels == 1 else batch.x).flatten(1)
            moment = moment.to(x.device) + second_moment(x)
            counts = []
            for layer in self.mlp.layers:
                x = layer[0](x)  # type: ignore[index]
                counts.append((x > 0).double().sum(0))
                x = x.relu()
            opened = [a + b for a, b in zip(opened, counts, strict=True)] if opened else counts
            self.model.passes["eval"] += len(batch)
        moment = moment / n if self.inputs == "full" else without_covariances(moment / n)
        head_classes = self.head.num_classes
        site = {"moment": moment.float(), "gates": [(c / n).float() for c in opened]}
        site |= {"classes": head_classes, "task": experience.task if isinstance(self.head, TaskHead) else None}
        return site | {"weights": self.kept(site) if self.own else None}

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "sites")
