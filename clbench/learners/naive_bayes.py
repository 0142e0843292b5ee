"""Gaussian naive Bayes on frozen features, exact in one pass ("Revisiting Discriminative vs. Generative Classifiers: Theory and
Implications", ICML 2023, compares it with logistic regression on pre-trained networks).

Counts n_c, means mu_cd and squared gaps m_cd = sum (x_d - mu_cd)^2 of every class are updated with every batch (Welford, in the
form of Chan, Golub & LeVeque): a batch of class c with size g, mean u and gaps w adds

    m += w + n g / (n + g) (u - mu)^2,   mu += g / (n + g) (u - mu),   n += g

so they do not depend on the order of samples, on batches and on experiences. Answers are the log of

    p(c | x) ~ pi_c prod_d N(x_d; mu_cd, v_cd),   v_cd = (m_cd + pseudo s_d) / (n_c + pseudo) + smoothing max_d t_d

s is the variance within classes, all of them pooled, t that of all samples.

prior      pi: "counts" n_c / n, or "uniform"
variance   "class", or "shared": v = s + smoothing max t for every class, a linear classifier
pseudo     samples that s stands for in a class's own variance: a class of one sample then has s / 2 (0: maximum likelihood)
smoothing  as in scikit-learn, which takes t of its first batch; here it is that of all samples so far
features   "backbone", or "pixels": the model's input images (no network is run)

`pseudo` and `features` are choices of this file; pseudo=0 prior=counts is scikit-learn's GaussianNB where it is fitted at once.
A class that has not come has the lowest score. Published number: none read.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST
from clbench.training.cholesky import check_finite
from clbench.training.features import streamed_features
from clbench.training.runtime import Runtime
from clbench.training.state import collect

CHOICES = {"prior": ("counts", "uniform"), "variance": ("class", "shared"), "features": ("backbone", "pixels")}


class Pixels:
    """Stands for a network whose features are the images themselves."""

    def eval(self) -> None:
        """There is no mode."""

    def features(self, batch: Any) -> Tensor:
        """[B, C S S]."""
        return batch.x.flatten(1)


class NaiveBayes:
    """State: counts [K], means [K, D], squared gaps [K, D], all float64 (the backbone never changes)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True, trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        prior: Literal["counts", "uniform"] = "counts",
        variance: Literal["class", "shared"] = "class",
        pseudo: float = 1.0,  # samples; of variance=class
        smoothing: float = 1e-9,  # share of the largest variance of a feature
        features: Literal["backbone", "pixels"] = "backbone",
        batch_size: int = 128,
    ):
        for name, value in (("prior", prior), ("variance", variance), ("features", features)):
            if value not in CHOICES[name]:
                raise UserError(f"unknown learner.{name}={value}: choose {' or '.join(CHOICES[name])}")
        if not 0 <= pseudo < math.inf or not 0 < smoothing < math.inf:
            raise UserError(f"learner.pseudo={pseudo} must be at least 0, learner.smoothing={smoothing} above 0")
        self.model, self.runtime, self.batch_size = model, runtime, batch_size
        self.prior, self.shared, self.pseudo, self.smoothing = prior, variance == "shared", pseudo, smoothing
        model.freeze()
        self.source: Any = model if features == "backbone" else Pixels()
        self.counts_K = torch.zeros(0).double()
        self.means_KD, self.gaps_KD = torch.zeros(0, 0).double(), torch.zeros(0, 0).double()

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass, valid after every batch."""
        for features, y in streamed_features(self.runtime, self.source, experience.train, self.batch_size):
            self.update(features, y, experience.num_seen)
        return {"train_samples": float(self.counts_K.sum())}

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [B, D], y [B] below `num_classes`."""
        x, y = features.detach().cpu().double(), y.cpu()
        check_finite(x, "features")
        more = num_classes - len(self.counts_K)
        self.counts_K = torch.cat([self.counts_K, self.counts_K.new_zeros(more)])
        self.means_KD, self.gaps_KD = (
            torch.cat([old.reshape(-1, x.shape[1]), old.new_zeros(more, x.shape[1])]) for old in (self.means_KD, self.gaps_KD)
        )
        for c in y.unique().tolist():
            rows, n = x[y == c], self.counts_K[c].clone()
            size, mean = len(rows), rows.mean(0)
            gap = mean - self.means_KD[c]
            self.gaps_KD[c] += (rows - mean).square().sum(0) + n * size / (n + size) * gap.square()
            self.means_KD[c] += size / (n + size) * gap
            self.counts_K[c] += size

    def variances(self) -> Tensor:
        """Of every class and feature, v [K, D]."""
        n_K1, total = self.counts_K[:, None], self.counts_K.sum()
        within = self.gaps_KD.sum(0) / total
        centre = (n_K1 * self.means_KD).sum(0) / total
        largest = (within + (n_K1 * (self.means_KD - centre).square()).sum(0) / total).max()
        least = self.smoothing * (float(largest) or 1.0)  # 1: all samples are the same
        if self.shared:
            return (within + least).expand_as(self.means_KD)
        return (self.gaps_KD + self.pseudo * within) / (n_K1 + self.pseudo).clamp_min(1e-300) + least

    def predict(self, batch: Batch) -> Tensor:
        """Log posteriors [B, num_seen]."""
        self.model.eval()
        features = self.source.features(batch)
        x, v_KD = features.detach().cpu().double(), self.variances()
        squares = [((x - mean).square() / v).sum(1) for mean, v in zip(self.means_KD, v_KD, strict=True)]
        z = -0.5 * (torch.stack(squares, dim=1) + (2 * math.pi * v_KD).log().sum(1))
        if self.prior == "counts":
            z = z + (self.counts_K.clamp_min(1) / self.counts_K.sum()).log()
        z = z.masked_fill(self.counts_K == 0, -torch.inf).log_softmax(1)
        return z.masked_fill(self.counts_K == 0, LOWEST).float().to(features.device)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "counts_K", "means_KD", "gaps_KD")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():  # on the CPU, where they are summed up, whatever the network runs on
            setattr(self, name, value.detach().to("cpu", copy=True))
