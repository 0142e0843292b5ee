"""BCWI: backward compatibility during data updates by weight interpolation (Schumann, Mansimov, Lai, Pappas, Gao & Zhang,
EACL 2024, arXiv 2301.10546).

Fine-tuning, and after each experience the weights go part of the way back to those before it, so that fewer samples which the
old model answered right are answered wrong by the new one (negative flips, `clbench report flips`):
    theta <- share theta_old + (1 - share) theta_new                                                    fisher=false
    theta <- (share F theta_old + (1 - share) theta_new) / (share F + (1 - share)), entry by entry      fisher=true
for all trained weights and biases, norms included; running statistics of BatchNorm stay the new ones. Rows of new classes are
those of the new model. F is the diagonal Fisher information of the old model on its own experience: the mean over batches of
the squared gradient of the batch's cross-entropy, divided by its mean over all weights (a choice: the scale of F decides what
share means; where share F and 1 - share vanish both, the old weight stays).

share  null: the largest of 0, 0.1, ..., 1 with which the part of the experience that is held out of training is answered at
       least as well as with the new weights, up to `tolerance` (a choice; the paper chooses on a development set)
share=0 is fine-tuning, share=1 keeps everything but rows of new classes.
Deviations: SoupBCWI, which averages several new models first, is not built. The paper updates classifiers of text whose old
data come again with new ones; here an experience has its own data alone. Published number in this setting: none read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.finetune import Finetune
from clbench.models.backbone import Backbone
from clbench.streams.images.data import shuffled
from clbench.training.fisher import Weights, kept, moved, sum_per_batch, trained
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect

GRID = tuple(i / 10 for i in range(11))


def interpolated(old: Tensor, new: Tensor, share: float, fisher: Tensor | None = None) -> Tensor:
    """Part of the way from new weights back to old ones of the same shape, computed in float64."""
    weight = torch.ones_like(old, dtype=torch.float64) if fisher is None else fisher.double()
    above, below = share * weight * old.double() + (1 - share) * new.double(), share * weight + (1 - share)
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(torch.float64).tiny), old.double()).to(new.dtype)


class Bcwi(Finetune):
    """State: backbone, head, and where wanted the Fisher information of the experience before."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_random_access=True)

    @classmethod
    def capabilities_of(cls, *, share: float | None = 0.5, fisher: bool = False, **options: Any) -> Capabilities:
        """Fisher information and a held-out part are read outside the pass of training."""
        return replace(cls.capabilities, needs_random_access=fisher or share is None)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        share: float | None = 0.5,  # of the old weights; null: chosen on the held-out part
        fisher: bool = False,
        held_out: float = 0.1,  # share of an experience that is not trained on; without effect where `share` is given
        tolerance: float = 0.0,  # accuracy that the choice may cost on the held-out part, a share; without effect as above
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        for name, value, least, most in (("share", share, 0, 1), ("tolerance", tolerance, 0, 1)):
            if value is not None and not least <= value <= most:
                raise UserError(f"learner.{name} must lie between {least} and {most}, got {value}")
        if not 0 < held_out < 1:
            raise UserError(f"learner.held_out must lie between 0 and 1, got {held_out}")
        super().__init__(
            model, runtime, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, momentum=momentum,
            weight_decay=weight_decay, schedule=schedule,
        )  # fmt: skip
        self.share, self.by_fisher, self.held_out, self.tolerance = share, fisher, held_out, tolerance
        self.whole = nn.ModuleDict({"model": model, "head": self.head})
        self.fisher: Weights = {}

    def learn(self, experience: Experience) -> dict[str, float]:
        """Fine-tune, then go back part of the way."""
        old, share, log = kept(self.whole), self.share, {}
        taught, aside = experience, None
        if share is None and len(experience.train) < 2:
            share = 0.0  # one sample cannot be divided: the new weights stay
        if experience.index and share is None:
            rows = torch.randperm(len(experience.train), generator=self.runtime.generator("held out")).numpy()
            count = max(1, min(len(rows) - 1, round(self.held_out * len(rows))))
            aside = np.sort(rows[:count])
            taught = replace(experience, train=experience.train.subset(np.sort(rows[count:])))  # type: ignore[attr-defined]
        log = super().learn(taught)
        if experience.index:
            new = kept(self.whole)
            if share is None:
                share = self._chosen(experience, aside, old, new)
            self._put(old, new, share)
            log["share"] = share
        if self.by_fisher:
            self.fisher = self._information(experience)
        return log

    def _chosen(self, experience: Experience, aside: Any, old: Weights, new: Weights) -> float:
        """The largest share that costs at most the tolerance on the held-out part."""
        right = []
        for share in GRID:
            self._put(old, new, share)
            right.append(self._right(experience, aside))
        least = right[0] - self.tolerance * len(aside)
        return max(share for share, count in zip(GRID, right, strict=True) if count >= least)

    @torch.no_grad()
    def _right(self, experience: Experience, aside: Any) -> int:
        count = 0
        for part in np.array_split(aside, -(-len(aside) // self.batch_size)):
            batch = experience.train.batch(part)
            assert batch.y is not None
            count += int((self.predict(batch).argmax(1) == batch.y).sum())
        return count

    @torch.no_grad()
    def _put(self, old: Weights, new: Weights, share: float) -> None:
        """Interpolated weights, in place; rows of new classes are the new model's."""
        for name, p in trained(self.whole).items():
            p.copy_(interpolated(old[name], new[name], share, self.fisher.get(name)) if name in old else new[name])

    def _information(self, experience: Experience) -> Weights:
        """Diagonal Fisher information of network and head as they are now, of batches, with mean 1."""
        batches = shuffled(experience.train, self.batch_size, 1, self.runtime.key("fisher"))

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(self.head(self.model.features(batch)), batch.y)

        self.model.eval()
        with self.runtime.phase("fisher"), self.model.in_fp32():
            total = sum_per_batch(self.whole, loss, batches, self.runtime.check_stop)
        mean = torch.cat([value.flatten() for value in total.values()]).double().mean().clamp_min(1e-30)
        return {name: (value.double() / mean).to(value.dtype) for name, value in total.items()}

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "fisher")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "fisher": moved(state["fisher"], self.runtime.device)})
