"""AdaNPC: a non-parametric classifier for test-time adaptation (Zhang, Wang, Jin, Yuan, Zhang, Wang, Jin & Tan, ICML 2023,
arXiv 2304.12566).

The backbone is trained on the source; then the classifier is a memory M of the features f / |f| and labels of all its samples.
With the `neighbours` rows of M that are nearest to a sample, the score of a class is
  s_c = sum over them of softmax(cos / temperature) [label = c].
A test batch is answered, and those of its features whose confidence is at least `threshold` go into M with the answers as
labels. Nothing leaves M, no weight changes.

training  "cross_entropy" (default): backbone and a linear head as in `finetune`, so that the source is that of other learners;
          "knn" (the paper): -log s_y under the other samples of the batch as memory, without a head
variant   "paper" (default): the confidence is max_c s_c. "official": the largest softmax of s, which cannot exceed
          e / (e + K - 1), 0.31 for 7 classes, so that most thresholds append everything or nothing
reset     "never" (default); "set", "batch": M is the source's again before each set, or batch

Where a class comes back, its samples join M. M grows with source and stream: 4 D bytes a sample. Deviations: training=knn
takes its memory from the batch (the release: from a queue over batches); statistics of BatchNorm stay the source's (the release
has a variant that refreshes them). neighbours, temperature and threshold lie in the release's grids. Published: none read.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.finetune import Finetune
from clbench.models.backbone import Backbone
from clbench.streams.images.data import shuffled
from clbench.training.adaptation import Reset, begins_anew, checked_reset
from clbench.training.features import extract
from clbench.training.fit import fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of

LEAST = 1e-5  # added to every score, so that its logarithm is finite


class AdaNpc(Finetune):
    """State: backbone and head, the memory by class [N_c, D] and how many of each class are the source's, which come first."""

    capabilities: ClassVar[Capabilities] = Capabilities(adapts_at_test=True, needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",
        training: Literal["cross_entropy", "knn"] = "cross_entropy",
        neighbours: int = 10,
        temperature: float = 0.1,
        threshold: float = 0.75,  # confidence from which a test feature joins the memory; above 1: none does
        reset: Reset = "never",  # when the memory is the source's again
        lr: float = 0.01,  # without effect where training=knn
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        if variant not in ("paper", "official"):
            raise UserError(f"unknown learner.variant={variant}: choose paper or official")
        if training not in ("cross_entropy", "knn"):
            raise UserError(f"unknown learner.training={training}: choose cross_entropy or knn")
        if neighbours < 1:
            raise UserError(f"learner.neighbours must be at least 1, got {neighbours}")
        if not 0 < temperature < math.inf:
            raise UserError(f"learner.temperature must be a finite number above 0, got {temperature}")
        if not 0 <= threshold < math.inf:
            raise UserError(f"learner.threshold must be a finite number from 0, got {threshold}")
        super().__init__(
            model, runtime, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, momentum=momentum,
            weight_decay=weight_decay, schedule=schedule,
        )  # fmt: skip
        self.official, self.by_neighbours = variant == "official", training == "knn"
        self.neighbours, self.temperature, self.threshold = neighbours, temperature, threshold
        self.reset: Reset = checked_reset(reset)
        self.memory: list[Tensor] = []
        self.num_source: list[int] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the source, then remember all of it."""
        self.begin()
        log = self._train(experience) if self.by_neighbours else super().learn(experience)
        features_ND, y_N = extract(self.runtime, self.model, experience.train, self.batch_size)
        fresh = experience.num_seen - len(self.memory)
        self.memory += [features_ND.new_zeros(0, features_ND.shape[1]) for _ in range(fresh)]
        self._remember(F.normalize(features_ND, dim=1), y_N)
        self.num_source = [len(rows) for rows in self.memory]
        return log

    def _train(self, experience: Experience) -> dict[str, float]:
        """The backbone alone, every batch with its own samples as memory."""
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            f_BD = F.normalize(self.model.features(batch), dim=1)
            cos_BB = (f_BD @ f_BD.T).fill_diagonal_(-math.inf)
            s_BK = votes(cos_BB, batch.y, experience.num_seen, min(self.neighbours, len(f_BD) - 1), self.temperature)
            return -(s_BK.gather(1, batch.y[:, None]) + LEAST).log().mean()

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        return fit(self.runtime, "train", self, groups_of((self.model, self.backbone_lr)), loss, batches, self.recipe)

    def begin(self) -> None:
        """The memory is the source's."""
        self.memory = [rows[:n].clone() for rows, n in zip(self.memory, self.num_source, strict=True)]

    def _remember(self, f_ND: Tensor, y_N: Tensor) -> None:
        for c in y_N.unique().tolist():
            self.memory[c] = torch.cat([self.memory[c], f_ND[y_N == c]])

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logarithms of the scores [B, num_seen]; changes the state."""
        self.model.eval()
        if begins_anew(self.reset, batch):
            self.begin()
        f_BD = F.normalize(self.model.features(batch), dim=1)
        cos_BM = f_BD @ torch.cat(self.memory).T
        label_M = torch.cat([torch.full((len(rows),), c, device=f_BD.device) for c, rows in enumerate(self.memory)])
        s_BK = votes(cos_BM, label_M, len(self.memory), min(self.neighbours, len(label_M)), self.temperature)
        confidence_B = (s_BK.softmax(1) if self.official else s_BK).amax(1)
        sure = confidence_B >= self.threshold
        self._remember(f_BD[sure], s_BK.argmax(1)[sure])
        return (s_BK + LEAST).log()

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory", "num_source")


def votes(cos_BM: Tensor, label_M: Tensor, num_classes: int, neighbours: int, temperature: float) -> Tensor:
    """Scores of classes by the nearest rows of a memory: cosines [B, M], labels [M] -> [B, K]."""
    near = cos_BM.topk(neighbours)
    weight_BN = (near.values / temperature).softmax(1)
    return cos_BM.new_zeros(len(cos_BM), num_classes).scatter_add(1, label_M[near.indices], weight_BN)
