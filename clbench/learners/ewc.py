"""EWC: Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796), rehearsal-free on pre-trained models as
in Smith et al. (CVPR-W 2023, arXiv 2203.17269).

    local cross-entropy + (strength / 2) sum_p F_p (theta_p - theta*_p)^2

theta* are the trained weights at the end of the previous experience, F the diagonal empirical Fisher information of the local
cross-entropy: the mean over an experience's samples of the squared gradient, summed over experiences (`decay` < 1: online EWC).

fisher  "per_sample" (default): a gradient for each sample, test transform, evaluation mode.
        "batch": PyCIL's: squared gradients of batch means in training mode, softmax over all seen classes, mean over batches,
        clipped at `clip_fisher` (1e-4), merged as share x old + (1 - share) x new, share = classes known before / seen; it
        underestimates by up to the batch size, which its strength of 1000 goes with. Where classes come back,
        share = known before / (known before + classes of the experience): the same without them.
        "true": the expectation over the model's own answers, sum_c p_c (d log p_c)^2, in place of the true label: K gradients
        a sample. "mammoth": Mammoth's online EWC, whose squares are weighted by the probability of the true label.
trainable  all | attention | qkv, as in `l2_reg.py`.
head    single | per_task, as in `finetune.py`.
Online EWC (Schwarz et al., ICML 2018, arXiv 1805.06370) is one reference and F <- decay F + F_t: what this file does. Factor:
the strength is halved, as in both papers; Mammoth's penalty has no 1/2, so its lambda is 2 lambda here (`ewc_online`).
Deviations: the head is not held; the local loss gives its old rows no gradient. Published number: none read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Capabilities, Experience, Schedule
from clbench.learners.regularised import Penalty, Regularised
from clbench.models.backbone import Backbone
from clbench.models.heads import scores
from clbench.streams.images.data import shuffled
from clbench.training.fisher import (
    Weights,
    fisher_per_sample,
    kept,
    moved,
    quadratic_penalty,
    sum_per_batch,
    sum_per_sample,
    train_only,
)
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.steps import PartOrTrainable, Project, RefreshOptions, Steps, part_of


class Ewc(Regularised):
    """State: backbone, head, the Fisher information so far (empty before the first experience)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_random_access=True, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 100.0,
        fisher: Literal["per_sample", "batch", "true", "mammoth"] = "per_sample",  # batch: PyCIL's; its strength is 1000
        clip_fisher: float = 1e-4,  # of fisher=batch
        decay: float = 1.0,  # below 1: online EWC
        trainable: PartOrTrainable = "qkv",
        lr: float = 5e-5,  # head
        backbone_lr: float = 5e-5,
        epochs: int | None = None,
        batch_size: int = 128,
        weight_decay: float = 0.0,
        schedule: Schedule = cosine,
        head: Literal["single", "per_task"] = "single",  # per_task: for streams that disclose their tasks
        refresh: RefreshOptions = None,  # {variant: official | paper, ...}, see `training/refresh.py`
        project: Project = None,  # bloop: the penalty gives way to the cross-entropy, see `training/bloop.py`
    ):
        train_only(model, part_of(trainable))
        recipe = Recipe("adam", weight_decay=weight_decay, schedule=schedule)
        rates = {"lr": lr, "backbone_lr": backbone_lr}
        steps = Steps(runtime, refresh=refresh, trainable=trainable, project=project)
        super().__init__(
            model, runtime, recipe, strength, **rates, epochs=epochs, batch_size=batch_size, head=head, steps=steps
        )
        self.kind, self.clip_fisher, self.decay = fisher, clip_fisher, decay
        self.fisher: Weights = {}

    def penalty(self, experience: Experience) -> Penalty | None:
        """Half the squared distance from the weights now, each weighted by its Fisher information so far."""
        if not experience.index:
            return None
        reference = kept(self.model)
        return lambda batch, features, z: quadratic_penalty(self.model, reference, self.fisher)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train under the penalty, then update the Fisher information."""
        log = super().learn(experience)
        with self.runtime.phase("fisher"), self.model.in_fp32():  # squares of gradients are a statistic
            new = self._per_batch(experience) if self.kind == "batch" else self._per_sample(experience)
        if self.kind != "batch":
            self.fisher = {name: self.decay * self.fisher.get(name, torch.zeros(())) + f for name, f in new.items()}
        else:
            known = experience.num_seen - len(experience.new_classes)
            share = known / (known + len(experience.classes))
            old = self.fisher or new
            self.fisher = {name: share * old[name] + (1 - share) * f for name, f in new.items()}
        return {**log, "fisher_mean": float(torch.cat([f.flatten() for f in self.fisher.values()]).mean())}

    def _per_sample(self, experience: Experience) -> Weights:
        self.model.eval()
        total: Weights = {}
        head = partial(scores, self.head, task=experience.task)
        for batch in experience.train.test_batches(self.batch_size):
            self.runtime.check_stop()
            assert batch.y is not None
            part = self._of(batch, sorted(experience.classes), head)
            total = {name: f + total[name] if total else f for name, f in part.items()}
        return {name: f / len(experience.train) for name, f in total.items()}

    def _of(self, batch: Any, classes: list[int], head: Callable[[Tensor], Tensor]) -> Weights:
        """The sum over a batch's samples."""
        if self.kind == "per_sample":
            return fisher_per_sample(self.model, head, batch.x, batch.y, classes)
        with torch.no_grad():
            p = head(self.model.features(batch.x))[:, classes].softmax(1)
        true = torch.searchsorted(torch.as_tensor(classes, device=p.device), batch.y)
        targets = [true] if self.kind == "mammoth" else [torch.full_like(true, c) for c in range(len(classes))]

        def loss(features: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(head(features)[:, classes], target[None])

        total: Weights = {}
        for y in targets:
            part = sum_per_sample(self.model, batch.x, y, loss, Tensor.square, p.gather(1, y[:, None])[:, 0])
            total = {name: f + total[name] if total else f for name, f in part.items()}
        return total

    def _per_batch(self, experience: Experience) -> Weights:
        self.model.train()
        batches = shuffled(experience.train, self.batch_size, 1, self.runtime.key("fisher"))

        def loss(batch: Any) -> Tensor:
            return F.cross_entropy(scores(self.head, self.model.features(batch), experience.task), batch.y)

        total = sum_per_batch(self.model, loss, batches, self.runtime.check_stop)
        return {name: (f / batches.steps).clamp_max(self.clip_fisher) for name, f in total.items()}

    def state_dict(self) -> dict[str, Any]:
        return self.collect("fisher")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "fisher": moved(state["fisher"], self.runtime.device)})
