"""GPM: "Gradient Projection Memory for Continual Learning" (Saha, Garg & Roy, ICLR 2021, arXiv 2103.09762). The task of a
sample must be disclosed, at test time too, unless `head` is single.

For every linear or convolutional layer a basis M [D, M] is kept of what its inputs x have been: a convolution's are its patches
(channels x kernel), a token or a feature vector otherwise. A weight W [O, D] is stepped along
  G - G M M^T,   so that W x stays for every x in the span of M
After a task, R = inputs of `samples` of its training images at each layer, under the test transform and the weights of now:
  R' = R - M M^T R; left singular vectors of R' join M, the largest first, until M holds the share
  energy + rise x (number of the experience) of |R|^2
They are found as eigenvectors of P R R^T P in float64, which are the same. Steps are those of plain SGD: momentum and weight
decay would leave the free directions.

head      "per_task": each task has a head of its own, which nothing constrains. "single": one head over all classes seen (the
          release has one for permuted MNIST), which is a layer like the others, and features are its inputs
Biases, normalisation, tokens and layers of another kind (grouped convolutions) are trained in the first task alone, and
BatchNorm keeps that task's statistics; the release has no biases, and BatchNorm without running statistics. With one head the
biases of new classes are trained.

Deviations: constant rate, last weights (released: the rate falls when validation stands still, the best weights are taken; the
number of steps of a `fit` is known before it begins); all layers see the same `samples` (released: fewer at early layers, whose
inputs are many); after the first task M holds the share as in the paper (released: one direction fewer). A task that comes back
trains what is free, and its head.
Published: CIFAR-100 in 10 tasks, AlexNet, last 72.48 % (the paper), 73.94 % (a library). There: energy 0.97, rise 0.003, 200
epochs, rate 0.01, batch 64, 125 samples; permuted MNIST, MLP 100-100, energy 0.95 and 0.99, 5 epochs, batch 10, 300 samples.

Legend: D inputs and O outputs of a layer, M directions that are held.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead, grow, linear_head, scores
from clbench.models.units import keep_statistics
from clbench.streams import rng
from clbench.streams.images.data import shuffled
from clbench.training.cholesky import check_finite
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore

ZERO = 1e-12  # shares of energy below this are rounding


def layers_of(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Layers by name whose outputs are W x for each of their inputs x alone."""
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            found[name] = module
        elif type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros":
            found[name] = module
    return found


def inputs(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What the rows of a layer's weight are multiplied with [N, D]."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    x = F.pad(x, layer._reversed_padding_repeated_twice)
    return F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2).flatten(0, 1)  # type: ignore[arg-type]


def grown(basis_DM: Tensor, energy_DD: Tensor, share: float) -> Tensor:
    """The basis with as few more directions as it takes to hold `share` of the energy R R^T [D, D]; all in float64."""
    free = energy_DD - basis_DM @ (basis_DM.T @ energy_DD)
    free = free - (free @ basis_DM) @ basis_DM.T
    values, vectors = torch.linalg.eigh((free + free.T) / 2)
    parts = values.flip(0).clamp_min(0) / energy_DD.trace()
    held = 1 - parts.sum() + parts.cumsum(0) - parts  # before each direction joins
    count = min(int(((held < share) & (parts > ZERO)).sum()), basis_DM.shape[0] - basis_DM.shape[1])
    return torch.linalg.qr(torch.cat([basis_DM, vectors.flip(1)[:, :count]], dim=1)).Q


class Gpm:
    """State: backbone, heads, by layer the directions that are held."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True, needs_random_access=True)

    @staticmethod
    def capabilities_of(*, head: str = "per_task", **options: Any) -> Capabilities:
        """A head for every task needs the task."""
        return replace(Gpm.capabilities, needs_task_id=head == "per_task")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        head: Literal["per_task", "single"] = "per_task",
        energy: float = 0.97,  # share of the inputs' energy that is held after the first experience
        rise: float = 0.003,  # of that share with each experience, up to 1
        samples: int = 125,  # training images whose inputs are looked at
        lr: float = 0.01,  # heads
        backbone_lr: float = 0.01,
        epochs: int | None = None,
        batch_size: int = 64,
        schedule: Schedule = constant,
    ):
        if not 0 < energy <= 1 or rise < 0:
            raise UserError(f"learner.energy must lie in (0, 1] and learner.rise be at least 0, got {energy} and {rise}")
        if samples < 1:
            raise UserError(f"learner.samples must be at least 1, got {samples}")
        self.model, self.runtime, self.layers = model, runtime, layers_of(model)
        if not self.layers:
            raise UserError(f"learner gpm: model {model.identity['name']} has no linear or convolutional layer")
        self.energy, self.rise, self.samples = energy, rise, samples
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", 0.0, schedule=schedule)
        self.head = linear_head(head, model.num_features).to(runtime.device)
        self.bases: dict[str, Tensor] = {}

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train in the free directions, then hold those of the new inputs."""
        grow(self.head, experience, lambda: self.runtime.generator("head"))
        self._choose_trained(experience)

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(scores(self.head, self.model.features(batch), experience.task), batch.y)

        def project(params: list[Tensor], grads: list[Tensor | None]) -> None:
            self.project()

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe, before_step=project)
        share = min(1.0, self.energy + self.rise * experience.index)
        for name, energy_DD in self.energies(experience).items():
            held = self.bases.get(name, energy_DD.new_zeros(len(energy_DD), 0))
            self.bases[name] = grown(held.to(energy_DD), energy_DD, share).float().to(self.runtime.device)
        free = [1 - basis.shape[1] / len(basis) for basis in self.bases.values()]
        return {**log, "free_directions": sum(free) / len(free)}

    def _choose_trained(self, experience: Experience) -> None:
        """From the second experience on the layers' weights alone, beside what the head has for this one."""
        later = bool(self.bases)
        projected = {f"{name}.weight" for name in self.layers}
        for name, p in self.model.named_parameters():
            p.requires_grad_(not later or name in projected)
        if isinstance(self.head, LinearHead):
            for i, block in enumerate(self.head.blocks):
                is_new = bool(experience.new_classes) and i == len(self.head.blocks) - 1
                block.bias.requires_grad_(not later or is_new)  # type: ignore[union-attr]
        self.model.train()
        if later:
            keep_statistics(self.model)

    def project(self) -> None:
        """Take the directions that are held out of every gradient."""
        weights: dict[str, list[Any]] = {name: [layer.weight] for name, layer in self.layers.items()}
        if isinstance(self.head, LinearHead):
            weights["head"] = [block.weight for block in self.head.blocks]
        for name, basis_DM in self.bases.items():
            grads = [weight.grad for weight in weights[name] if weight.grad is not None]
            if grads:
                g_OD = torch.cat([g.flatten(1) for g in grads])
                g_OD = g_OD - (g_OD @ basis_DM) @ basis_DM.T
                for g, part in zip(grads, g_OD.split([len(g) for g in grads]), strict=True):
                    g.copy_(part.view_as(g))

    def energies(self, experience: Experience) -> dict[str, Tensor]:
        """R R^T [D, D] float64 of each layer, of some training images at random."""
        found: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(layer: Any, args: tuple[Tensor, ...]) -> None:
                with torch.autocast(args[0].device.type, enabled=False):
                    x = inputs(layer, args[0].float())
                    x = x.cpu().double() if x.device.type == "mps" else x.double()
                    found[name] = found[name] + x.T @ x if name in found else x.T @ x

            return add

        chosen = rng.permutation(self.runtime.key("inputs"), len(experience.train))[: self.samples]
        self.model.eval()
        with ExitStack() as stack, self.runtime.phase("inputs"), torch.no_grad():
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_pre_hook(watch(name)).remove)
            for first in range(0, len(chosen), self.batch_size):
                self.runtime.check_stop()
                features = self.model.features(experience.train.batch(chosen[first : first + self.batch_size]))
                if isinstance(self.head, LinearHead):
                    watch("head")(self.head.blocks[0], (features,))
        for name, energy_DD in found.items():
            check_finite(energy_DD, f"inputs of layer {name}")
        return found

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]; with a head for every task only those of the task's classes say something."""
        self.model.eval()
        return scores(self.head, self.model.features(batch), batch.task)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "bases")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
