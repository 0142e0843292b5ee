"""AIR: analytic imbalance rectifier (Fang, Zhu, Fang, Chen, Zeng & Zhuang 2024, arXiv 2408.10349): ACIL with class weights.

ACIL's ridge regression on a fixed random layer (acil.py), in which every class counts alike, whatever its number n_c of
samples:

    W = (gamma I + sum_c w_c A_c)^-1 (w_1 q_1, ..., w_K q_K),    A_c = sum h h^T and q_c = sum h over the samples of class c
    w_c = (1 / n_c) / mean of 1 / n over the classes that have come

Equal counts give ACIL. The sums are kept by class, so that weights may change when a class comes back (the paper's generalised
form): M^2 numbers a class, or n_c M while a class has fewer than M samples (a root of A_c, training/ridge.py).

The scale of the weights (mean 1) is the release's and decides what gamma means. Deviations: sums in place of a recursion, and
the network is taken as it is, see acil.py; M = 2048 because of the memory. Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Capabilities
from clbench.learners.acil import Acil
from clbench.models.backbone import Backbone
from clbench.training.cholesky import check_finite
from clbench.training.ridge import RidgeRoot, solve
from clbench.training.runtime import Runtime


class Air(Acil):
    """State: counts [K], and of each class A_c [M, M] and q_c [M, 1], or a root of them (R comes from the seed)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True, trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        projection: int = 2048,  # M
        ridge: float = 0.1,  # gamma
        batch_size: int = 128,
    ):
        super().__init__(model, runtime, projection=projection, ridge=ridge, batch_size=batch_size)
        self.counts_K = torch.zeros(0, dtype=torch.float64, device=runtime.device)
        self.classes: list[RidgeRoot] = []

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples: features [N, D], y [N] below `num_classes`."""
        check_finite(features, "features")
        self._grow(num_classes)
        for c in y.unique().tolist():
            own = features[y == c]
            self.classes[c].update(own, torch.ones(len(own), 1), 1, self.expand)
            self.counts_K[c] += len(own)
        self._readout = None

    def _grow(self, num_classes: int) -> None:
        width, device = self.layer_DM.shape[1], self.runtime.device
        self.classes += [RidgeRoot(width, device) for _ in range(num_classes - len(self.classes))]
        self.counts_K = F.pad(self.counts_K, (0, num_classes - len(self.counts_K)))

    def class_weights(self) -> Tensor:
        """Weights w [K]; 0 for a class that has not come."""
        inverse = torch.where(self.counts_K > 0, 1 / self.counts_K.clamp_min(1), 0)
        return inverse * (self.counts_K > 0).sum() / inverse.sum()

    def readout(self) -> Tensor:
        """W [M, K] float64; by the stacked roots where they have fewer rows than M."""
        if self._readout is None:
            scale, k = self.class_weights(), len(self.classes)
            roots, crosses = [], []
            for c, own in enumerate(self.classes):
                root, cross = own.root_RM, own.cross_RK
                if own.sums is None:
                    roots.append(scale[c].sqrt() * root)
                    crosses.append(F.pad(scale[c].sqrt() * cross[:, :1], (c, k - c - 1)) if len(root) else root.new_zeros(0, k))
            root_RM, cross_RK = torch.cat([self.layer_DM[:0], *roots]), torch.cat([self.layer_DM.new_zeros(0, k), *crosses])
            sums = [(c, own.sums) for c, own in enumerate(self.classes) if own.sums is not None]
            if not sums and len(root_RM) < root_RM.shape[1]:
                self._readout = root_RM.T @ solve(root_RM @ root_RM.T, cross_RK, self.ridge)
                return self._readout
            gram_MM, cross_MK = root_RM.T @ root_RM, root_RM.T @ cross_RK
            for c, own in sums:
                gram_MM += scale[c] * own.gram_MM
                cross_MK[:, c] += scale[c] * own.cross_MK[:, 0]
            self._readout = solve(gram_MM, cross_MK, self.ridge)
        return self._readout

    def state_dict(self) -> dict[str, Any]:
        return {"counts_K": self.counts_K, "classes": [own.state_dict() for own in self.classes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts_K, self.classes = state["counts_K"].to(self.layer_DM.device, copy=True), []
        self._grow(len(state["classes"]))
        for own, given in zip(self.classes, state["classes"], strict=True):
            own.load_state_dict(given)
        self._readout = None
