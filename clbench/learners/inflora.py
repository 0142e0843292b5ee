"""InfLoRA: Interference-Free Low-Rank Adaptation (Liang & Li, CVPR 2024, arXiv 2404.00228).

A frozen ViT gets W x + B A x at keys and values of every block. A is designed before an experience and stands still, B (0 at
the start) and a head of the experience's own are trained; afterwards B A is added to W. What an experience must leave alone is
a subspace of each block's attention inputs x, of which C = mean of x x^T over all tokens of the training images:
  design   A = first `rank` left singular vectors of P C, as rows, / sqrt(3);  P projects on the directions that are still free,
           so B A x = 0 for every x that lies in the others. Keys and values have one A
  DualGPM  after the training, with C as it is now: left singular vectors u_i of P C leave the free directions one by one until
           the directions in use hold the share eps_t of C's energy; eps_t rises from `energy` to `energy_end` in a line,
           t / `experiences`. The smaller of the two subspaces is what is kept: the one in use, or, from D / 2 on, the free one
Local cross-entropy on the newest head; Adam; the rate in epoch e of E is lr cos(0.495 pi e / (E - 1)).

variant  "official" (default, as released): a direction's energy is the square of its singular value in C, a fourth power of the
    data. "paper": the singular value itself, the data's energy as in GPM, which keeps more directions at the same share.
Deviations: a learner does not know the number of experiences, so it is an option; where the first experience uses more than
half of the directions the free ones are kept (the release keeps those in use and calls them free); where no direction is free
the rows of A are 0 and only the head is trained; experiences may have different numbers of classes.
Published (as the specification read it: the paper, ViT-B/16 augreg_in21k, CIFAR-100 in 10 experiences): last 86.51 %, average
91.70 %. 20 epochs, batch 128, rate 5e-4, rank 10, energy 0.95 (ImageNet-R: 50 epochs, 0.98).

Legend: D inputs of a block's attention, r rank, M directions that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.models.pet import Factory, Pet
from clbench.models.pet_modules import lora
from clbench.models.pet_sites import blocks_of, linear_of, rows_of
from clbench.streams.images.data import shuffled
from clbench.training.cholesky import check_finite
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore

ZERO = 1e-12  # singular values below this share of the largest are rounding
Kept = tuple[Tensor, bool]  # orthonormal columns [D, M], and whether they span what is still free


def free_part(cov_DD: Tensor, kept: Kept) -> Tensor:
    """P C [D, D]: what of C lies in the free directions."""
    inside = kept[0] @ (kept[0].T @ cov_DD)
    return inside if kept[1] else cov_DD - inside


def design(cov_DD: Tensor, kept: Kept, rank: int) -> Tensor:
    """A [r, D]: the free directions with most of the inputs' energy; 0 where there are no more."""
    u, s, _ = torch.linalg.svd(free_part(cov_DD, kept))
    return (u * (s > ZERO * cov_DD.norm()))[:, :rank].T / math.sqrt(3)


def dual_gpm(cov_DD: Tensor, kept: Kept, share: float, power: int) -> Kept:
    """What is kept after inputs with C: the directions in use hold `share` of its energy (singular values to `power`)."""
    basis_DM, is_free = kept
    u, s, _ = torch.linalg.svd(free_part(cov_DD, kept))
    parts = s.pow(power) / torch.linalg.svdvals(cov_DD).pow(power).sum()
    real = s > ZERO * cov_DD.norm()
    if basis_DM.shape[1] == 0 and not is_free:  # the first experience
        count = max(1, int(((parts.cumsum(0) < share) & real).sum()))
    else:
        held = 1 - parts.sum() + parts.cumsum(0) - parts  # before each direction joins
        count = int(((held < share) & real).sum())
    joining = u[:, :count]
    if is_free:
        left = basis_DM - joining @ (joining.T @ basis_DM)
        return torch.linalg.svd(left).U[:, : max(0, basis_DM.shape[1] - count)].contiguous(), True
    used = torch.linalg.qr(torch.cat([basis_DM, joining], dim=1)).Q
    if used.shape[1] > len(used) / 2:
        return torch.linalg.svd(used).U[:, used.shape[1] :].contiguous(), True
    return used, False


def falling(place: Place, epochs: int) -> float:
    """The released schedule: cos(99 pi e / (200 (E - 1))) in epoch e of E, 0.016 in the last."""
    return math.cos(99 * math.pi * (place.step * epochs // place.steps) / (200 * max(1, epochs - 1)))


def checked(pet: Pet | None) -> Pet:
    """The terms, if all of them have the input of the attention."""
    names = set() if pet is None or pet.kind != "lora" else {tuple(name.split("/")[1:]) for name in pet.values}
    wanted = {(target, part) for target in ("q", "k", "v", "qkv") for part in ("a", "b")}
    if pet is None or not names or not names <= wanted:
        raise UserError("inflora designs low-rank terms of q, k and v without a scale to learn: choose pet=lora")
    return pet


class InfLora:
    """State: the terms in training, what has been added to the network, the heads, by block the directions that are kept."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_pretrained=True, needs_new_classes=True, needs_disjoint_classes=True, needs_random_access=True
    )

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        pet: Factory = lora,
        variant: Literal["official", "paper"] = "official",
        lr: float = 5e-4,
        epochs: int | None = None,
        batch_size: int = 128,
        weight_decay: float = 0.0,
        energy: float = 0.95,  # share that is held after the first experience (ImageNet-R: 0.98)
        energy_end: float = 1.0,  # where it rises to
        experiences: int = 10,  # and in how many it gets there
    ):
        if variant not in ("official", "paper"):
            raise UserError(f"unknown learner.variant={variant}: choose official or paper")
        if not 0 < energy <= energy_end <= 1:
            raise UserError(f"learner.energy and energy_end must rise from above 0 to at most 1, got {energy} and {energy_end}")
        if experiences < 1:
            raise UserError(f"learner.experiences must be at least 1, got {experiences}")
        self.model, self.runtime, self.pet = model, runtime, checked(pet(model, runtime))
        self.power = 2 if variant == "official" else 1
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("adam", weight_decay=weight_decay, schedule=lambda place: falling(place, self.epochs))
        self.energy, self.energy_end, self.experiences = energy, energy_end, experiences
        self.head = LinearHead(model.num_features).to(runtime.device)
        blocks, names = blocks_of(model.net, "lora"), [name[:-2] for name in self.pet.values if name.endswith("/b")]
        self.weights = {name: rows_of(blocks[int(name.split("/")[0])], name.split("/")[1]) for name in names}
        self.layers = {name.split("/")[0]: linear_of(blocks[int(name.split("/")[0])], "qkv")[0] for name in names}
        self.kept: dict[str, Kept] = {}
        for i, layer in self.layers.items():
            self.kept[i] = (torch.zeros(layer.in_features, 0, dtype=torch.float64, device=runtime.device), False)
        if self.rank > (width := min(layer.in_features for layer in self.layers.values())):
            raise UserError(f"learner.pet.rank={self.rank} is above the width of the attention, {width}")

    @property
    def rank(self) -> int:
        return min(value.shape[0] for name, value in self.pet.values.items() if name.endswith("/a"))

    def learn(self, experience: Experience) -> dict[str, float]:
        """Design A, train B and a head, take note of the inputs, add B A to the weights."""
        first = self.head.num_classes
        self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        with self.pet.off():
            before = self.covariances(experience, "before")
        with torch.no_grad():
            for name in self.weights:
                i = name.split("/")[0]
                self.pet.values[f"{name}/a"].copy_(design(before[i], self.kept[i], self.rank))
        log = self._train(experience, first)
        share = self.energy + (self.energy_end - self.energy) * min(1.0, experience.index / self.experiences)
        for i, cov_DD in self.covariances(experience, "after").items():
            self.kept[i] = dual_gpm(cov_DD, self.kept[i], share, self.power)
        self.pet.merge()
        with torch.no_grad():
            for name in self.weights:
                self.pet.values[f"{name}/b"].zero_()
        self.pet.unmerge()  # of B = 0: what was added stays
        free = [m.shape[1] / len(m) if is_free else 1 - m.shape[1] / len(m) for m, is_free in self.kept.values()]
        return {**log, "free_directions": sum(free) / len(free)}

    def _train(self, experience: Experience, first: int) -> dict[str, float]:
        """Local cross-entropy; B and the newest head."""
        newest = self.head.blocks[-1]
        self.pet.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(newest(self.model.features(batch)), batch.y - first)

        trained = [self.pet.values[f"{name}/b"] for name in self.weights] + list(newest.parameters())
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "train", self, [{"params": trained, "lr": self.lr}], loss, batches, self.recipe)
        self.pet.eval()
        return log

    def covariances(self, experience: Experience, when: str) -> dict[str, Tensor]:
        """C [D, D] float64 of each block, from one pass of the training images as they are augmented."""
        sums = {i: torch.zeros(len(m), len(m), dtype=m.dtype, device=m.device) for i, (m, _) in self.kept.items()}
        counts = dict.fromkeys(sums, 0)

        def watch(i: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
                with torch.autocast(args[0].device.type, enabled=False):
                    x = args[0].float().flatten(0, -2)
                    sums[i] += x.T @ x
                    counts[i] += len(x)

            return add

        batches = shuffled(experience.train, self.batch_size, 1, self.runtime.key("inputs", when))
        self.model.eval()
        with ExitStack() as stack, self.runtime.phase("inputs"), torch.no_grad():
            for i, layer in self.layers.items():
                stack.callback(layer.register_forward_pre_hook(watch(i)).remove)
            for step in range(batches.steps):
                self.runtime.check_stop()
                self.model.features(batches(step))
        for i in sums:
            check_finite(sums[i], f"inputs of the attention in block {i}")
        return {i: total / counts[i] for i, total in sums.items()}

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen] of one pass: nothing hangs on the network any more."""
        self.model.eval()
        with self.pet.off():
            return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "pet", "head", "kept", "weights")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, {name: value for name, value in state.items() if name != "weights"})
        for name, weight in state["weights"].items():
            self.weights[name].copy_(weight)
        self.model.forget()
