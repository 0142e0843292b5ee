"""CoFiMA: Continual Fisher-weighted Model Averaging (Marouf, Roy, Tartaglione & Lathuilière, ECCV 2024, arXiv 2312.08977).

SLCA (`slca.py`), and between its slow learning and its class statistics, from the second experience on, an average of weights:
  theta <- [(1 - a) F_old theta_old + a F theta] / [(1 - a) F_old + a F],   entry by entry
theta_old  what was deployed after the experience before, backbone and aligned heads; theta what slow learning made of it
F          diagonal Fisher information at theta (F_old: as it was taken then, before that average): the mean over batches of the
           squared gradient of the batch's mean cross-entropy over all seen classes, at most 1e-4 each, on augmented images
The averaged heads are aligned and deployed; training goes on from heads as they were trained, as in SLCA, and from the averaged
backbone. With `fisher=false` all F are 1 (CoMA). Logged: the share of entries at the cap, whose ratio says nothing.

official_new_head  rows of new classes are F theta instead of theta, so that alignment starts them near 0 (as released)
Deviation: where both F are 0 (0 / 0 in the release) the weights are (1 - a) theta_old + a theta.
Published (as the specification read it in the repository's logs, seed 1993, a = 0.5): CIFAR-100 B0 Inc10 last 91.98 %, average
95.20 %; ImageNet-R B0 Inc20 79.32 / 83.64 %. 20 epochs and SLCA's settings, 5 epochs of alignment, batch 128.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.slca import Slca
from clbench.models.backbone import Backbone
from clbench.streams.images.data import shuffled
from clbench.training.fisher import Weights, kept, sum_per_batch, trained
from clbench.training.runtime import Runtime
from clbench.training.schedules import multistep
from clbench.training.state import restore

CAP = 1e-4


def weighted(old: Tensor, new: Tensor, fisher_old: Tensor, fisher_new: Tensor, share: float) -> Tensor:
    """The average of two weights of one shape, `share` for the new one before Fisher information has its say."""
    a, b = (1 - share) * fisher_old.double(), share * fisher_new.double()
    weight = torch.where(a + b > 0, b / (a + b), share)
    return torch.lerp(old.double(), new.double(), weight).to(new.dtype)


class Cofima(Slca):
    """State: SLCA's, and the Fisher information of the experience before."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_new_classes=True, needs_disjoint_classes=True, needs_random_access=True
    )

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        share: float = 0.5,  # of the new weights (PILOT: 0.4)
        fisher: bool = True,
        official_new_head: bool = False,
        lr: float = 0.01,  # head
        slow: float = 0.01,  # backbone rate / head rate
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = multistep,
        align_epochs: int = 5,
        align_lr: float = 0.01,
        align_samples: int = 256,
        ridge: float = 1e-4,
        logit_norm: float | None = 0.1,
        mean_rescale: bool = True,
        fresh_norm: bool = True,
    ):
        if not 0 <= share <= 1:
            raise UserError(f"learner.share must lie between 0 and 1, got {share}")
        if official_new_head and not fisher:
            raise UserError("learner.official_new_head=true has no effect with learner.fisher=false")
        training: dict[str, Any] = {"lr": lr, "slow": slow, "epochs": epochs, "batch_size": batch_size, "momentum": momentum}
        training |= {"weight_decay": weight_decay, "schedule": schedule, "fresh_norm": fresh_norm}
        aligning: dict[str, Any] = {"align_epochs": align_epochs, "align_lr": align_lr, "align_samples": align_samples}
        aligning |= {"ridge": ridge, "logit_norm": logit_norm, "mean_rescale": mean_rescale}
        super().__init__(model, runtime, **training, **aligning)
        self.share, self.by_fisher, self.official_new_head = share, fisher, official_new_head
        self.deployed = nn.ModuleDict({"model": self.model, "heads": self.aligned})
        self.fisher: Weights = {}

    def _slow_learning(self, experience: Experience, first: int) -> dict[str, float]:
        """SLCA's, then the average of what it leaves to be deployed with what was deployed before."""
        before = kept(self.deployed)
        log = super()._slow_learning(experience, first)
        fisher = self.information(experience) if self.by_fisher else {}
        if first:
            self._average(before, fisher)
        self.fisher = fisher
        if fisher:
            capped = sum(int((f >= CAP).sum()) for f in fisher.values())
            log["capped"] = capped / sum(f.numel() for f in fisher.values())
        return log

    def information(self, experience: Experience) -> Weights:
        """Diagonal Fisher information of backbone and heads, as released: of batches, not of samples."""
        batches = shuffled(experience.train, self.batch_size, 1, self.runtime.key("fisher"))

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(self.aligned(self.model.features(batch)), batch.y)

        self.model.train()
        with self.runtime.phase("fisher"), self.model.in_fp32():
            total = sum_per_batch(self.deployed, loss, batches, self.runtime.check_stop)
        return {name: (value / batches.steps).clamp_max(CAP) for name, value in total.items()}

    @torch.no_grad()
    def _average(self, before: Weights, fisher: Weights) -> None:
        """Into the weights to be deployed, in place."""
        one = torch.ones((), device=self.runtime.device)
        for name, p in trained(self.deployed).items():
            new = fisher.get(name, one)
            if name in before:
                p.copy_(weighted(before[name], p, self.fisher.get(name, one), new, self.share))
            elif self.official_new_head:
                p.mul_(new)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "fisher": self.fisher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
