"""SFR: a sparse function-space representation as a regulariser (Scannell, Mereu, Chang, Tamir, Pajarinen & Solin, ICLR 2024).

arXiv 2403.10929. A trained network is seen as a Gaussian process with the kernel of its Jacobians, summed up at M inducing
points Z_s of each experience s: stored images, with the logits f_s that they had at its end. Later experiences minimise

    CE + delta / 2 |theta|^2 + tau / 2 sum_s 1 / M_s sum_c (f_c(Z_s) - f_sc)^T A_sc (f_c(Z_s) - f_sc)
    k_c(x, x') = J_c(x).J_c(x') / (delta N)                  J_c: gradient of logit c by all weights, N samples of experience s
    A_c = K^-1 (sum_i k_c(Z, x_i) b_ic k_c(x_i, Z) + jitter I) K^-1,  K = k_c(Z, Z) + jitter I,  b_ic = p_c(x_i)(1 - p_c(x_i))

so that the points weigh what the whole experience says about them; b, the curvature of the loss, is at least 1e-7. CE runs over
all classes seen; the points are seen under the test transform, all of them at every step. A is solved in float64.

covariance  "full"; "none": A = I, matching of logits, the control

Z_s are images in the exemplar memory, equally many of every class, drawn without replacement. As classes come, the memory gives
each fewer: A_s then becomes the least that the penalty can be over the values at the points that went (a Schur complement; I
stays I), a choice: the paper keeps M a task. Logits of classes that were not known at the end of s are held with A = I, as in
the release, at the values that they have when the class comes (there: at the end of s, of a head for all classes). Other
deviations: the release draws points with replacement and scales N by the number of tasks. A is never updated, as there.
Settings of the release: split MNIST, M 40, rate 3e-4, batch 32, tau 1, delta 1e-4; M 200, rate 1e-4, 5 epochs, tau 0.5, delta
1e-5; permuted MNIST, M 200, rate 3e-4, 10 epochs, batch 64. Published number: none read.

Cost: a gradient for every sample and class at the end of an experience, M of them held at a time: for small networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams.images.data import ImageBatch, ImageData, shuffled
from clbench.training.fit import Batches, Recipe, fit
from clbench.training.memory import allowed_memory
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, parameters_of, restore

MOST = 5_000_000  # weights of a network whose Jacobians are taken
CURVATURE = 1e-7  # the least b
CHUNK = 16  # samples whose gradients are taken at once


@dataclass
class PointsBatch:
    """New samples, and all inducing points (None: there are none)."""

    new: ImageBatch
    points: ImageBatch | None

    @property
    def ids(self) -> Tensor:
        return torch.cat([part.ids for part in (self.new, self.points) if part is not None])

    @property
    def replayed(self) -> int:
        return len(self) - len(self.new)

    def __len__(self) -> int:
        return len(self.ids)


class WithPoints:
    """New batches, each with all inducing points under the test transform; a pure function of the step."""

    def __init__(self, new: Batches, points: ImageData | None):
        self.new, self.points, self.steps = new, points, new.steps

    def __call__(self, step: int) -> PointsBatch:
        points = None if self.points is None else self.points.batch(np.arange(len(self.points)))
        return PointsBatch(self.new(step), points)


def jacobian(model: Backbone, head: nn.Module, x: Tensor, c: int) -> Tensor:
    """Gradients of logit c by all weights that train, of each sample: images x [B, C, H, W] -> [B, P]."""
    parts = [{n: p.detach() for n, p in module.named_parameters() if p.requires_grad} for module in (model, head)]

    def logit(theta: list[dict[str, Tensor]], image: Tensor) -> Tensor:
        return functional_call(head, theta[1], (functional_call(model, theta[0], (image[None],)),))[0, c]

    rows = []
    for images in x.split(CHUNK):
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no rule for vmap
            found = vmap(grad(logit), in_dims=(None, 0))(parts, images)
        rows.append(torch.cat([g.detach().flatten(1) for part in found for g in part.values()], dim=1))
        model.passes["eval"] += len(images) - 1  # vmap shows the network one image for all of them
    return torch.cat(rows)


def precision(k_zz: Tensor, b_zz: Tensor, jitter: float) -> Tensor:
    """A = K^-1 (B + jitter I) K^-1, K = k + jitter I: both [M, M] float64 -> [M, M], symmetric."""
    eye = torch.eye(len(k_zz)).to(k_zz)
    inner = torch.linalg.solve(k_zz + jitter * eye, b_zz + jitter * eye)
    found = torch.linalg.solve(k_zz + jitter * eye, inner.T)
    return (found + found.T) / 2


def reduced(a_CMM: Tensor, keep: Tensor) -> Tensor:
    """What the quadratic forms A [C, M, M] are at least, over the values at points that go: keep [M] bool -> [C, m, m]."""
    if keep.all():
        return a_CMM
    own, cross, gone = a_CMM[:, keep][:, :, keep], a_CMM[:, keep][:, :, ~keep], a_CMM[:, ~keep][:, :, ~keep]
    return own - cross @ torch.linalg.pinv(gone, hermitian=True) @ cross.mT


class Sfr:
    """State: backbone, head, memory; of each experience the ids of its points [M], their logits [M, C], A [C, M, M] float64."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_random_access=True, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        tau: float = 1.0,  # of the penalty
        delta: float = 1e-4,  # prior precision of the weights
        covariance: Literal["full", "none"] = "full",
        jitter: float = 1e-6,
        memory: int | None = None,  # inducing points; null: what the scenario's budget allows
        lr: float = 3e-4,  # head
        backbone_lr: float = 3e-4,
        epochs: int | None = None,
        batch_size: int = 32,
        schedule: Schedule = constant,
    ):
        if covariance not in ("full", "none"):
            raise UserError(f"unknown learner.covariance={covariance}: choose full or none")
        if not (0 < delta < math.inf and 0 < jitter < math.inf and 0 <= tau < math.inf):
            raise UserError(f"learner.delta={delta} and learner.jitter={jitter} must be above 0, learner.tau={tau} at least 0")
        weights = sum(p.numel() for p in parameters_of(model))
        if covariance == "full" and weights > MOST:
            raise UserError(
                f"learner sfr takes Jacobians by {weights} weights, more than {MOST}: choose a small network (model=mlp), or "
                "learner.covariance=none"
            )
        self.model, self.runtime, self.tau, self.delta, self.jitter = model, runtime, tau, delta, jitter
        self.full, self.lr, self.backbone_lr = covariance == "full", lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("adam", weight_decay=delta, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.memory = allowed_memory(runtime, "balanced", memory)
        self.sites: list[dict[str, Tensor]] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train under the penalty, then choose the points again and take the experience's representation."""
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        place = {int(i): row for row, i in enumerate(self.memory.ids)}
        rows = [torch.tensor([place[i] for i in site["ids"].tolist()]).to(self.runtime.device) for site in self.sites]
        points = self.memory.data(experience.train)
        if experience.new_classes and points is not None:
            self._widen(points, rows)
        self.model.train()

        def loss(batch: PointsBatch) -> Tensor:
            assert batch.new.y is not None
            total = F.cross_entropy(self.head(self.model.features(batch.new)), batch.new.y)
            if batch.points is None:
                return total
            z = self.head(self.model.features(batch.points))
            return total + self.tau * sum(self.distance(z[r], site) for r, site in zip(rows, self.sites, strict=True))

        new = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        batches = WithPoints(new, points)
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        with self.runtime.phase("points"), self.model.in_fp32():  # products of gradients are a statistic
            self._store(experience)
        return {**log, "exemplars": float(len(self.memory))}

    @torch.no_grad()
    def _widen(self, points: ImageData, rows: list[Tensor]) -> None:
        """Hold the logits of classes that are new at the points as they are before training, A = I."""
        self.model.eval()
        z = self.head(self.model.features(points.batch(np.arange(len(points)))))
        for site, r in zip(self.sites, rows, strict=True):
            known, eye = site["logits"].shape[1], torch.eye(len(r)).to(site["precision"])
            site["logits"] = torch.cat([site["logits"], z[r, known:]], dim=1)
            site["precision"] = torch.cat([site["precision"], eye.repeat(z.shape[1] - known, 1, 1)])

    def distance(self, z: Tensor, site: dict[str, Tensor]) -> Tensor:
        """The penalty of an experience from the logits of its points now, z [M, K] -> scalar."""
        gap_CM = (z[:, : site["logits"].shape[1]] - site["logits"]).T
        return 0.5 * torch.einsum("cm,cmn,cn->", gap_CM, site["precision"].to(gap_CM), gap_CM) / len(z)

    def _store(self, experience: Experience) -> None:
        """Points of earlier experiences that stay keep their logits; the new ones get those of now."""
        self.model.eval()
        self.memory.update(experience.train)
        kept, sites, known = set(self.memory.ids.tolist()), [], set()
        for site in self.sites:
            keep = torch.tensor([i in kept for i in site["ids"].tolist()], dtype=torch.bool)
            known |= set(site["ids"].tolist())
            if keep.any():
                here = keep.to(site["logits"].device)
                parts = {"ids": site["ids"][here], "logits": site["logits"][here]}
                sites.append(parts | {"precision": reduced(site["precision"], here)})
        data = self.memory.data(experience.train)
        rows = [m for m, i in enumerate(self.memory.ids.tolist()) if i not in known]
        if data is not None and rows:
            sites.append(self._site(data.batch(np.array(rows)), experience))
        self.sites = sites

    def _site(self, points: ImageBatch, experience: Experience) -> dict[str, Tensor]:
        """Ids, logits and A of an experience's points."""
        with torch.no_grad():
            logits = self.head(self.model.features(points))
        m, k = logits.shape
        device = logits.device
        found = torch.eye(m, dtype=torch.float64, device=device).repeat(k, 1, 1)
        scale = 1 / (self.delta * len(experience.train))
        for c in range(k if self.full else 0):
            own = jacobian(self.model, self.head, points.x, c).double()
            b_MM = torch.zeros(m, m, dtype=torch.float64, device=device)
            for batch in experience.train.test_batches(self.batch_size):
                self.runtime.check_stop()
                with torch.no_grad():
                    p = self.head(self.model.features(batch)).double().softmax(1)[:, c]
                k_MB = scale * own @ jacobian(self.model, self.head, batch.x, c).double().T
                b_MM += k_MB * (p * (1 - p)).clamp_min(CURVATURE) @ k_MB.T
            found[c] = precision(scale * own @ own.T, b_MM, self.jitter)
        return {"ids": points.ids.to(device), "logits": logits, "precision": found}

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory", "sites")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
