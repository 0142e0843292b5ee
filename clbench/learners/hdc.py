"""Hyperdimensional class and domain prototypes, the router of EAR ("Efficient Model Adaptation for Continual Learning at the
Edge", arXiv 2308.02084).

The network is frozen. Its features x become bipolar vectors h = sign(R x) of `width` numbers, R random signs, sign(0) = 1. A
bundle is the sum of the vectors of a class, whole numbers that do not depend on the order of the samples, and what is added
to one class changes no other: nothing is forgotten. A class scores cos(h, bundle).

one_bit  true: a class scores h . sign(bundle) / width: a bit a number is all that answering needs
route    "none" (default): one bundle a class. "domain": every experience is a domain with bundles of its own classes; an image
         goes to the domain whose bundle, the sum of its classes', has the largest cosine, and that domain's classes answer,
         the others score the lowest.
quantile with route=domain: an image is outside where its cosine lies below this quantile of the training images of its domain;
         then the bundles of all domains, added by class, answer. null: no image is outside.

Choices, because there is no code and the rest of EAR (adaptors found by a search) is left out: the width, and what answers for
an image that is outside. Published numbers: none read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST
from clbench.streams import rng
from clbench.training.features import extract, streamed_features
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class Hdc:
    """State: of each domain its classes, their bundles [C, W] and the limit of its cosines; classes seen. R is of the seed."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True, trains=False)

    @classmethod
    def capabilities_of(cls, *, route: str = "none", **options: Any) -> Capabilities:
        """Domains must be told apart, and their images are seen twice."""
        told = route != "none"
        return replace(cls.capabilities, needs_boundaries=told, needs_random_access=told, anytime=not told)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        width: int = 8192,  # of the bipolar vectors
        one_bit: bool = False,
        route: Literal["none", "domain"] = "none",
        quantile: float | None = None,  # of route=domain; null: no image is outside
        batch_size: int = 128,
    ):
        if width < 1:
            raise UserError(f"learner.width must be at least 1, got {width}")
        if route not in ("none", "domain"):
            raise UserError(f"unknown learner.route={route}: choose none or domain")
        if quantile is not None and route == "none":
            raise UserError(f"learner.quantile={quantile} has no effect without domains: choose learner.route=domain")
        if quantile is not None and not 0 <= quantile <= 1:
            raise UserError(f"learner.quantile must lie between 0 and 1, got {quantile}")
        self.model, self.runtime = model, runtime
        self.one_bit, self.routed, self.quantile, self.batch_size = one_bit, route == "domain", quantile, batch_size
        model.freeze()
        generator = torch.Generator().manual_seed(rng.key(runtime.seed, "hdc") >> 1)
        signs_DW = 2 * torch.randint(0, 2, (model.num_features, width), generator=generator) - 1
        self.signs_DW = signs_DW.double().to(runtime.device)
        self.classes: list[list[int]] = []
        self.bundles: list[Tensor] = []
        self.limits: list[float] = []
        self.num_seen = 0

    def learn(self, experience: Experience) -> dict[str, float]:
        """Add every image to its class; then, with domains, find the limit of this one."""
        self.num_seen = experience.num_seen
        if not self.routed:
            for features, y in streamed_features(self.runtime, self.model, experience.train, self.batch_size):
                self.add(0, self.encode(features), y)
            return {"domains": 1.0}
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        parts = features.split(self.batch_size)
        for part, labels in zip(parts, y.split(self.batch_size), strict=True):
            self.add(experience.index, self.encode(part), labels)
        if self.quantile is not None:
            domain_1W = self.bundles[-1].sum(0, keepdim=True)
            likeness = torch.cat([cosines(self.encode(part), domain_1W)[:, 0] for part in parts])
            self.limits.append(float(likeness.quantile(self.quantile)))
        return {"domains": float(len(self.bundles))}

    def encode(self, features: Tensor) -> Tensor:
        """Features [N, D] -> bipolar vectors [N, W] int32."""
        return 2 * (features.to(self.signs_DW) @ self.signs_DW >= 0).int() - 1

    def add(self, place: int, h_NW: Tensor, y: Tensor) -> None:
        """Bundle vectors with the classes of a domain."""
        if place == len(self.bundles):
            self.classes.append([])
            self.bundles.append(h_NW[:0])
        known = self.classes[place]
        new = [c for c in y.unique().tolist() if c not in known]
        known += new
        self.bundles[place] = F.pad(self.bundles[place], (0, 0, 0, len(new)))
        rows = torch.tensor([known.index(c) for c in y.tolist()], device=h_NW.device)
        self.bundles[place].index_add_(0, rows, h_NW)

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]; what cannot be answered has the lowest."""
        self.model.eval()
        h_BW = self.encode(self.model.features(batch))
        if not self.routed:
            return self.scores(h_BW, self.classes[0], self.bundles[0])
        domains_TW = torch.stack([bundles.sum(0) for bundles in self.bundles])
        likeness, chosen = cosines(h_BW, domains_TW).max(1)
        if self.limits:
            chosen = torch.where(likeness < torch.tensor(self.limits).to(likeness)[chosen], -1, chosen)
        z = torch.empty(len(h_BW), self.num_seen, device=h_BW.device)
        for place in chosen.unique().tolist():
            rows = chosen == place
            z[rows] = self.scores(h_BW[rows], *(self.joint() if place < 0 else (self.classes[place], self.bundles[place])))
        return z

    def joint(self) -> tuple[list[int], Tensor]:
        """Classes of all domains, and their bundles over all of them."""
        total = self.bundles[0].new_zeros(self.num_seen, self.bundles[0].shape[1])
        for classes, bundles in zip(self.classes, self.bundles, strict=True):
            total[classes] += bundles
        return list(range(self.num_seen)), total

    def scores(self, h_BW: Tensor, classes: list[int], bundles: Tensor) -> Tensor:
        """Likeness of vectors to some classes [B, num_seen] float32, the lowest elsewhere."""
        if self.one_bit:
            bundles = 2 * (bundles >= 0).int() - 1
        z = torch.full((len(h_BW), self.num_seen), LOWEST, device=h_BW.device)
        z[:, classes] = cosines(h_BW, bundles).float()
        return z

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "classes", "bundles", "limits", "num_seen")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def cosines(h_BW: Tensor, bundles_KW: Tensor) -> Tensor:
    """Of bipolar vectors and bundles [B, K] float64; products of whole numbers are exact."""
    h, s = h_BW.double(), bundles_KW.double()
    return h @ s.T / (h.shape[1] ** 0.5 * s.square().sum(1).sqrt().clamp_min(1))
