"""Small regions of weights: FISH masks, which choose before training (Sung, Nair & Raffel, NeurIPS 2021, arXiv 2111.09839,
"Training Neural Networks with Fixed Sparse Masks"), and grafts, which choose after it (Panigrahi, Saunshi, Zhao & Arora, ICML
2023, arXiv 2302.06600, "Task-Specific Skill Localization in Fine-tuned Language Models").

A region is the share `share` of the backbone's weights, counted over all tensors together. theta_0 are the weights before an
experience.
how    "fish": the weights with the largest empirical Fisher information
         F = 1/N sum over N samples of (d log p(y | x; theta_0) / d theta)^2
       are trained, the others keep their values to the last bit
       "graft": all weights are trained, to theta_1. A mask over them starts from the region B of largest |theta_1 - theta_0|,
         gamma(s) = B (1 - sigmoid(s - bias)) + (1 - B) sigmoid(s - bias),   s = 0 at the start
       and s is trained for the cross-entropy of theta_0 + gamma (theta_1 - theta_0), the head fixed. Then
         theta <- theta_1 where gamma >= 1/2, theta_0 elsewhere
       no weight of the region is trained again
The head is trained in full and belongs to no region.

Regions of experiences are kept, a bit a weight: `overlap` is the largest share of a region that an earlier one holds too.
Where tasks lie apart it is near `share`, for alike ones it is near 1 (the second paper).
Constants: share 0.005 and at most 1,024 samples (FISH); bias 10, SGD at 1e7 for the mask, whose gradients carry the factor
sigmoid'(-10) = 4.5e-5 (the grafts' release, which measured regions of 0.0001 of a language model's weights).
Choices: both are applied to each experience in turn, on what the one before has left. Running statistics of BatchNorm stay as
training leaves them. `mask_epochs` of the budget's passes train the mask; the mask is the last one (the release keeps the one
that answers best). The release begins with |theta_1 - theta_0| above a threshold, which may be fewer weights than the share.
Published numbers in this setting: none read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import grow, linear_head, scores
from clbench.streams.images.data import shuffled
from clbench.training.fisher import Weights, kept, sum_per_sample, trained
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.sparse_masks import TaskMasks, top
from clbench.training.state import collect, groups_of, restore

BIAS = 10.0
SAMPLES, MASK_LR = 1024, 1e7


def region(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Where the largest values are: masks of a share of all of them, of one at least; of equal values the first go."""
    flat = torch.cat([value.flatten() for value in values.values()])
    count = max(1, round(share * len(flat)))
    chosen = top(flat, torch.ones_like(flat, dtype=torch.bool), count).split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for part, (name, value) in zip(chosen, values.items(), strict=True)}


def relaxed(base: Tensor, s: Tensor) -> Tensor:
    """The mask gamma in (0, 1) of scores s over a region `base`."""
    part = torch.sigmoid(s - BIAS)
    return torch.where(base, 1 - part, part)


class SparseMask:
    """State: backbone, head, the regions of the experiences."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_random_access=True)

    @staticmethod
    def capabilities_of(*, how: str = "fish", head: str = "single", mask_epochs: int = 1, **options: Any) -> Capabilities:
        """A graft has passes for its mask beside those of training; a head for every task needs the task."""
        passes = 1 + mask_epochs if how == "graft" else 1
        return replace(SparseMask.capabilities, needs_task_id=head == "per_task", needs_passes=passes)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        how: Literal["fish", "graft"] = "fish",
        share: float = 0.005,  # of the backbone's weights
        samples: int = 1024,  # that the Fisher information is taken over, at most
        mask_lr: float = 1e7,
        mask_epochs: int = 1,  # of a graft, out of `epochs`
        masking: Literal["local", "seen", "batch"] = "seen",
        head: Literal["single", "per_task"] = "single",
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: Schedule = constant,
    ):
        check(how, share, samples, mask_lr, mask_epochs)
        self.model, self.runtime, self.how, self.share, self.samples = model, runtime, how, share, samples
        self.masking: Literal["local", "seen", "batch"] = masking
        self.lr, self.backbone_lr, self.mask_lr = lr, backbone_lr, mask_lr
        self.epochs, self.batch_size, self.mask_epochs = runtime.epochs(epochs), batch_size, mask_epochs
        if how == "graft" and self.epochs <= mask_epochs:
            raise UserError(f"learner.mask_epochs={mask_epochs} leave no pass to train in: the epochs are {self.epochs}")
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = linear_head(head, model.num_features).to(runtime.device)
        self.regions = TaskMasks(trained(model))

    def learn(self, experience: Experience) -> dict[str, float]:
        """Choose a region and train it, or train all and choose one."""
        grow(self.head, experience, lambda: self.runtime.generator("head"))
        before = kept(self.model)
        if self.how == "fish":
            chosen = region(self.information(experience), self.share)
            log = self.train(experience, before, chosen, self.epochs)
        else:
            log = self.train(experience, before, None, self.epochs - self.mask_epochs)
            after = kept(self.model)
            more, chosen = self.trained_mask(experience, before, after)
            log |= more
            put(self.model, before, after, chosen)
        log["overlap"] = self.overlap(chosen)
        for name, mask in chosen.items():
            self.regions.put(name, experience.index, mask)
        inside = sum(int(mask.sum()) for mask in chosen.values())
        return {**log, "region": inside / sum(mask.numel() for mask in chosen.values())}

    def information(self, experience: Experience) -> Weights:
        """Mean over samples of the squared gradient of each one's log-likelihood."""
        rows = np.sort(
            torch.randperm(len(experience.train), generator=self.runtime.generator("fisher")).numpy()[: self.samples]
        )
        total: Weights = {name: torch.zeros_like(p) for name, p in trained(self.model).items()}

        def loss(features: Tensor, target: Tensor) -> Tensor:
            return self.loss_of(features, target[None], experience)

        self.model.eval()
        with self.runtime.phase("fisher"), self.model.in_fp32():
            for part in np.array_split(rows, -(-len(rows) // self.batch_size)):
                self.runtime.check_stop()
                batch = experience.train.batch(part)
                assert batch.y is not None
                for name, value in sum_per_sample(self.model, batch.x, batch.y, loss, Tensor.square).items():
                    total[name] += value
        return {name: value / len(rows) for name, value in total.items()}

    def loss_of(self, features: Tensor, y: Tensor, experience: Experience) -> Tensor:
        """Cross-entropy under the head."""
        return masked_cross_entropy(scores(self.head, features, experience.task), y, self.masking, experience.classes)

    def train(
        self, experience: Experience, before: Weights, chosen: Mapping[str, Tensor] | None, epochs: int
    ) -> dict[str, float]:
        """Train the head and a region, or all weights."""
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return self.loss_of(self.model.features(batch), batch.y, experience)

        def put_back(place: Place, batch: Batch) -> None:
            if chosen is not None:
                put(self.model, before, trained(self.model), chosen)

        batches = shuffled(experience.train, self.batch_size, epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe, after_step=put_back)

    def trained_mask(
        self, experience: Experience, before: Weights, after: Weights
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The region that answers best in place of all that was trained -> the log, and masks."""
        change = {name: after[name] - before[name] for name in before}
        base = region({name: value.abs() for name, value in change.items()}, self.share)
        s = {name: torch.zeros_like(value).requires_grad_() for name, value in change.items()}
        self.model.eval()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            grafted = {name: before[name] + relaxed(base[name], s[name]) * change[name] for name in change}
            return self.loss_of(functional_call(self.model, grafted, (batch.x,)), batch.y, experience)

        batches = shuffled(experience.train, self.batch_size, self.mask_epochs, self.runtime.key("mask"))
        groups = [{"params": list(s.values()), "lr": self.mask_lr}]
        log = fit(self.runtime, "mask", self, groups, loss, batches, Recipe("sgd", 0.0))
        return log, {name: relaxed(base[name], value.detach()) >= 0.5 for name, value in s.items()}

    def overlap(self, chosen: Mapping[str, Tensor]) -> float:
        """The largest share of a region that is in the region of an earlier experience."""
        size = max(1, sum(int(mask.sum()) for mask in chosen.values()))
        shared = [
            sum(int((mask & self.regions.get(name, i)).sum()) for name, mask in chosen.items())
            for i in range(self.regions.tasks)
        ]
        return max(shared, default=0) / size

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]."""
        self.model.eval()
        return scores(self.head, self.model.features(batch), batch.task)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "regions")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


@torch.no_grad()
def put(model: Backbone, outside: Weights, inside: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> None:
    """Weights of a region from `inside`, all others from `outside`, in place."""
    for name, p in trained(model).items():
        p.copy_(torch.where(chosen[name], inside[name], outside[name]))


def check(how: str, share: float, samples: int, mask_lr: float, mask_epochs: int) -> None:
    """`UserError` for options out of range or without effect."""
    if how not in ("fish", "graft"):
        raise UserError(f"unknown learner.how={how}: choose fish or graft")
    if not 0 < share <= 1:
        raise UserError(f"learner.share must lie in (0, 1], got {share}")
    for name, value in (("samples", samples), ("mask_epochs", mask_epochs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"learner.{name} must be a whole number from 1, got {value!r}")
    for name, value, default, used in (
        ("samples", samples, SAMPLES, "fish"),
        ("mask_lr", mask_lr, MASK_LR, "graft"),
        ("mask_epochs", mask_epochs, 1, "graft"),
    ):
        if how != used and value != default:
            raise UserError(f"learner.{name}={value} has no effect with learner.how={how}")
