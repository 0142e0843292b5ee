"""Losse-FTL: Locality Sensitive Sparse Encoding for Learning World Models Online (Liu, Du, Lee & Lin, ICLR 2024, arXiv
2401.13034), as a classifier on a frozen network: regression of one-hot targets on sparse random features, learned online.

Encoding of unit features x. Each of `grids` grids has `dims` random directions; the coordinates x.p, p of N(0, 1) entries, are
cut off at +-`reach` and divided into `bins` bins. Soft binning: the position between the two edges of its bin shares 1 among
them, and a grid has the product of its directions' edges: (bins + 1)^dims features, of which 2^dims are not 0 and sum to 1.
Near samples share active features, distant ones share none, so that learning of one leaves the other alone.

Follow the leader: W = argmin sum |y - W^T phi|^2 + ridge |W|^2 over all samples so far, by A = sum phi phi^T, B = sum phi y^T.

update  "sparse" (the paper's): a sample moves the rows S of W that it activates, to the minimum given all others:
            W_S = (A_SS + ridge I)^-1 (B_S - A_S,rest W_rest),  |S| = grids 2^dims
        each step lowers the objective, whose minimum is the leader; later samples of a region bring it nearer
        "exact": the leader itself, solved when an answer is asked for; any order and any batches

Choices of this file, as no code was read: unit features, the cut-off (`reach`, in standard deviations of a coordinate of
features in all directions), one-hot targets, the sizes. The paper regresses the next state of an environment. A has
(grids (bins + 1)^dims)^2 numbers in float64: 8 MB by default. A class that has not come has the lowest score. Published
number: none read.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST
from clbench.streams import rng
from clbench.training.cholesky import check_finite
from clbench.training.features import streamed_features
from clbench.training.ridge import RidgeSums, solve
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore

MOST = 20_000  # features: A would take 3.2 GB


class Losse:
    """The encoding: a function of the key. [D] -> G grids of `dims` directions, (bins + 1)^dims features each."""

    def __init__(self, num_features: int, grids: int, bins: int, dims: int, reach: float, key: int):
        generator = torch.Generator().manual_seed(key >> 1)
        self.weight_DR = torch.randn(num_features, grids * dims, generator=generator, dtype=torch.float64)
        self.grids, self.bins, self.dims, self.reach = grids, bins, dims, reach
        self.size = (bins + 1) ** dims
        self.width = grids * self.size

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] -> active places [N, G 2^dims] int64, their values [N, G 2^dims] float64."""
        at = F.normalize(x.detach().cpu().double(), dim=1) @ self.weight_DR
        at = ((at / self.reach).clamp(-1, 1) + 1) * self.bins / 2
        low = at.floor().clamp_max(self.bins - 1)
        share = (at - low).view(len(x), self.grids, self.dims)
        low = low.long().view(len(x), self.grids, self.dims)
        places, values = [], []
        for corner in itertools.product((0, 1), repeat=self.dims):
            up = torch.tensor(corner)
            index = torch.zeros(len(x), self.grids, dtype=torch.int64)
            for d in range(self.dims):
                index = index * (self.bins + 1) + low[..., d] + up[d]
            places.append(index + self.size * torch.arange(self.grids))
            values.append(torch.where(up.bool(), share, 1 - share).prod(2))
        return torch.stack(places, 2).flatten(1), torch.stack(values, 2).flatten(1)


class LosseFtl:
    """State: the sums A [M, M] and B [M, K], the weights [M, K], which classes have come [K] (the encoding is the seed's)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True, trains=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        update: Literal["sparse", "exact"] = "sparse",
        grids: int = 16,
        bins: int = 7,  # of each direction
        dims: int = 2,  # directions of a grid
        reach: float = 2.0,
        ridge: float = 0.1,
        batch_size: int = 128,  # of the network's passes: samples are learned one by one
    ):
        if update not in ("sparse", "exact"):
            raise UserError(f"unknown learner.update={update}: choose sparse or exact")
        if min(grids, bins, dims) < 1 or grids * (bins + 1) ** dims > MOST:
            raise UserError(
                f"learner.grids={grids}, learner.bins={bins} and learner.dims={dims} must be at least 1 and give "
                f"at most {MOST} features, grids (bins + 1)^dims"
            )
        if not 0 < reach < math.inf or not 0 < ridge < math.inf:
            raise UserError(f"learner.reach={reach} and learner.ridge={ridge} must be above 0")
        self.model, self.runtime, self.sparse = model, runtime, update == "sparse"
        self.ridge, self.batch_size = ridge, batch_size
        model.freeze()
        self.encode = Losse(model.num_features, grids, bins, dims, reach, rng.key(runtime.seed, "projection"))
        self.sums = RidgeSums(self.encode.width)
        self.weight_MK, self.seen_K = self.sums.cross_MK.clone(), torch.zeros(0, dtype=torch.bool)
        self._fresh = True  # whether the exact weights are those of the sums of now

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass, valid after every batch."""
        for features, y in streamed_features(self.runtime, self.model, experience.train, self.batch_size):
            self.update(features, y, experience.num_seen)
        return {"active_features": float((self.sums.gram_MM.diagonal() > 0).sum())}

    def update(self, features: Tensor, y: Tensor, num_classes: int) -> None:
        """Add samples one by one: features [B, D], y [B] below `num_classes`."""
        check_finite(features, "features")
        more = num_classes - len(self.seen_K)
        self.weight_MK, self.sums.cross_MK = F.pad(self.weight_MK, (0, more)), F.pad(self.sums.cross_MK, (0, more))
        self.seen_K = F.pad(self.seen_K, (0, more))
        self.seen_K[y.cpu()] = True
        for active, phi, c in zip(*self.encode(features), y.tolist(), strict=True):
            self.sums.gram_MM[active[:, None], active] += torch.outer(phi, phi)
            self.sums.cross_MK[active, c] += phi
            if self.sparse:
                rows, own = self.sums.gram_MM[active], self.weight_MK[active]
                block = rows[:, active]
                rest = rows @ self.weight_MK - block @ own
                self.weight_MK[active] = solve(block, self.sums.cross_MK[active] - rest, self.ridge)
        self._fresh = False

    def readout(self) -> Tensor:
        """W [M, K] float64."""
        if not self.sparse and not self._fresh:
            self.weight_MK = self.sums.solve(self.ridge)
        self._fresh = True
        return self.weight_MK

    def predict(self, batch: Batch) -> Tensor:
        """Regressed one-hot targets [B, num_seen]; a class that has not come has the lowest."""
        self.model.eval()
        features = self.model.features(batch)
        places, phi = self.encode(features)
        z = (self.readout()[places] * phi[:, :, None]).sum(1)
        return z.masked_fill(~self.seen_K, LOWEST).float().to(features.device)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "sums", "seen_K", *(["weight_MK"] if self.sparse else []))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
        self.weight_MK, self.seen_K, self._fresh = self.weight_MK.cpu(), self.seen_K.cpu(), False
