"""LAME: Laplacian adjusted maximum-likelihood estimation (Boudiaf, Mueller, Ben Ayed & Bertinetto, CVPR 2022, arXiv 2201.05718,
"Parameter-free online test-time adaptation").

Network and head are trained on the source as in `finetune`, and nothing changes them again: the answers of a test batch are
drawn together where its features are near. With p the source's answers [B, K] and W the affinity of features f / |f| [B, B],
  Z <- p, then  Z <- softmax(log p + strength W Z), row by row,
up to 100 times, until the energy sum_ik Z_ik (log Z_ik - log p_ik - strength (W Z)_ik) changes by less than 1e-8 of itself. The
answer is log Z.

affinity   "knn" (default, the paper): W_ij = 1 for the `neighbours` nearest j != i, which need not have i among theirs;
           "rbf" (what the release's configuration runs): W_ij = exp(-d_ij^2 / (2 s^2)), with W_ii = 1, where s is the mean
           distance to the `neighbours`-th nearest, itself counted; "linear": W_ij = f_i . f_j, with W_ii
symmetric  (W + W^T) / 2; the release has it, switched off

The learner's state never changes while it is tested, yet an answer depends on the other samples of its batch (`transductive`).
BatchNorm uses the source's statistics. It helps where the samples of a batch share their classes, and harms where a class has
fewer of them than `neighbours`: on ctta_digits (40 images a class, 2 epochs, batches of 20, one seed) 83.0 % of the clean set
without edges are 32.0 % in random order and 100 % sorted by class. A control for `test_time: {order: sorted}`.
Deviation: distances and the iteration are in float64. Published numbers: none read.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Schedule, UserError
from clbench.learners.finetune import Finetune
from clbench.models.backbone import Backbone
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant

STEPS = 100
CHANGE = 1e-8  # of the energy, relative, below which it stops


class Lame(Finetune):
    """State: backbone and head."""

    capabilities: ClassVar[Capabilities] = Capabilities(transductive=True, needs_boundaries=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        affinity: Literal["knn", "rbf", "linear"] = "knn",
        neighbours: int = 5,  # without effect where affinity=linear
        symmetric: bool = False,
        strength: float = 1.0,  # of the edges; 0: the source's answers
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        if affinity not in ("knn", "rbf", "linear"):
            raise UserError(f"unknown learner.affinity={affinity}: choose knn, rbf, linear")
        if neighbours < 1:
            raise UserError(f"learner.neighbours must be at least 1, got {neighbours}")
        if not 0 <= strength < math.inf:
            raise UserError(f"learner.strength must be a finite number from 0, got {strength}")
        super().__init__(
            model, runtime, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, momentum=momentum,
            weight_decay=weight_decay, schedule=schedule,
        )  # fmt: skip
        self.affinity, self.neighbours, self.symmetric, self.strength = affinity, neighbours, symmetric, strength

    def predict(self, batch: Batch) -> Tensor:
        """Logarithms of the adjusted answers [B, num_seen]."""
        self.model.eval()
        features_BD = self.model.features(batch)
        affinity_BB = affinity(features_BD, self.affinity, self.neighbours, self.symmetric)
        return adjusted(self.head(features_BD).double(), self.strength * affinity_BB).float()


def affinity(features_BD: Tensor, kind: str, neighbours: int, symmetric: bool) -> Tensor:
    """W of the features of a batch, in float64 [B, B]."""
    f_BD = F.normalize(features_BD.double(), dim=1)
    distance_BB = torch.cdist(f_BD, f_BD, compute_mode="donot_use_mm_for_euclid_dist")
    if kind == "knn":
        distance_BB.fill_diagonal_(math.inf)
        nearest = distance_BB.topk(min(neighbours, len(f_BD) - 1), largest=False).indices
        w_BB = torch.zeros_like(distance_BB).scatter_(1, nearest, 1.0)
    elif kind == "rbf":
        width = distance_BB.topk(min(neighbours, len(f_BD)), largest=False).values[:, -1].mean()
        w_BB = (-(distance_BB.square()) / (2 * width.square()).clamp_min(1e-30)).exp()
    else:
        w_BB = f_BD @ f_BD.T
    return (w_BB + w_BB.T) / 2 if symmetric else w_BB


def adjusted(z_BK: Tensor, w_BB: Tensor) -> Tensor:
    """Log Z of logits under edges [B, K]."""
    log_p_BK = z_BK.log_softmax(1)
    log_z_BK, near_BK, before = log_p_BK, w_BB @ log_p_BK.exp(), math.inf
    for _ in range(STEPS):
        log_z_BK = (log_p_BK + near_BK).log_softmax(1)
        z = log_z_BK.exp()
        near_BK = w_BB @ z
        energy = float((z * (log_z_BK - log_p_BK - near_BK)).sum())
        if abs(energy - before) <= CHANGE * abs(before) < math.inf:
            break
        before = energy
    return log_z_BK
