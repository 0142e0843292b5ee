"""BN-adapt: BatchNorm statistics of the test batch (Schneider, Rusak, Eck, Bringmann, Brendel & Bethge, NeurIPS 2020,
arXiv 2006.16971, "Improving robustness against common corruptions by covariate shift adaptation"; also the `norm` baseline of
the TENT release).

Network and head are trained on the source as in `finetune`. At test time nothing is trained: every BatchNorm normalises a
batch of n samples by
  mean = (N mean_source + n mean_batch) / (N + n),  variance likewise

prior  N. 0 (default): the batch's statistics alone, as TENT, EATA and CoTTA have them; large: the source's, which is finetune.

The learner's state never changes while it is tested, yet an answer depends on the other samples of its batch (`transductive`).
Deviation: the release of TENT lets stored statistics drift and never reads them; here they stay. A network without BatchNorm
is refused.
Published, read in TENT's README: CIFAR-10-C at severity 5, WRN-28-10, batch 200: error 43.5 % (source) to 20.4 %.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from clbench.interfaces import Batch, Capabilities, Schedule, UserError
from clbench.learners.finetune import Finetune
from clbench.models.backbone import Backbone
from clbench.training.adaptation import batch_statistics
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant


class BnAdapt(Finetune):
    """State: backbone and head."""

    capabilities: ClassVar[Capabilities] = Capabilities(transductive=True, needs_boundaries=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        prior: float = 0.0,  # samples that the source's statistics count for
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        if not 0 <= prior < float("inf"):
            raise UserError(f"learner.prior must be a number of samples from 0, got {prior}")
        if not any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise UserError(f"learner bn_adapt: model {model.identity['name']} has no BatchNorm, nothing would change")
        super().__init__(
            model, runtime, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, momentum=momentum,
            weight_decay=weight_decay, schedule=schedule,
        )  # fmt: skip
        self.prior = prior

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen] under the statistics of this batch."""
        self.model.eval()
        with batch_statistics(self.model, self.prior):
            return self.head(self.model.features(batch.x))
