"""MAS for masked autoencoders, a baseline of Singh et al. 2025 (arXiv 2503.02844), after Aljundi et al. (arXiv 1711.09601).

    error of the hidden patches + strength sum_p Omega_p (theta_p - theta*_p)^2
    after an experience:  Omega <- decay Omega + (1 - decay) Omega_t,   Omega = 0 before the first

theta* are the weights with which the experience began (with a branch: the trunk's). Omega_t says how much the features depend
on a weight: with f_1 .. f_m the tokens that the encoder makes of the patches of image x that are seen, l(x) = mean_j |f_j|^2
and Omega_t = mean over images of |d l / d theta|. The decoder has no part in the features, and is free. The encoder ends in a
LayerNorm, which makes all tokens equally long while its gains are 1 and its biases 0: Omega is small where they have not moved
far from there. strength and decay are 0.1, the defaults of the released code. No 1/2, as there.

variant  "paper" (default): the magnitude of each image's gradient. "official": as released, where |.|^2 runs over the images of
         a batch instead of the width: the gradient of sum_i mean_jd f_ijd^2 for each batch, whose magnitudes are averaged

Deviations: the images are those of the experience, each once, in the order of training and with its masks there; released, the
loader's, replayed ones included. Computed in fp32. One backward pass an image, counted in the ledger as looked at.
Published number: none read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.learners.cpt_lwf import require_autoencoder
from clbench.learners.pretrain import Pretrain
from clbench.models.mae import MaskedAutoencoder, split_rows
from clbench.training.fisher import Weights, kept, moved, quadratic_penalty, trained
from clbench.training.pretraining.segments import Objective, PretrainRuntime, Segment
from clbench.training.schedules import constant

CHUNK = 16  # images whose gradients are held at once


class _Encoder(nn.Module):
    """`encode` as a forward pass."""

    def __init__(self, model: MaskedAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, seen: Tensor) -> Tensor:
        return self.model.encode(images, seen)


class CptMas:
    """`Pretrain` with weights held by importance. State: that of `Pretrain`, importance, reference inside an experience."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="loss")

    def __init__(
        self,
        model: nn.Module,
        runtime: PretrainRuntime,
        *,
        strength: float = 0.1,
        decay: float = 0.1,
        variant: Literal["paper", "official"] = "paper",
        images: int | None = None,  # of an experience on which importance is measured; null: all
        lr: float = 3e-3,
        schedule: Schedule = constant,
        branch: float = 0.0,  # share of the steps that are an annealed branch, as in `pretrain.py`
        boundary: Literal["keep", "reset", "reset_moments", "restore"] = "reset",
        betas: Sequence[float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
    ):
        if not strength >= 0 or not 0 <= decay < 1 or (images is not None and images < 1):
            what = (
                f"strength={strength} must be at least 0, decay={decay} in 0..1 (below 1), images={images} at least 1 or null"
            )
            raise UserError(f"learner.{what}")
        if variant not in ("paper", "official"):
            raise UserError(f"learner.variant must be paper or official, got {variant!r}")
        self.model, self.runtime = require_autoencoder(model, "cpt_mas"), runtime
        self.strength, self.decay, self.variant, self.images = strength, decay, variant, images
        rest: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay, "clip": clip}
        self.inner = Pretrain(model, runtime, lr=lr, schedule=schedule, branch=branch, boundary=boundary, **rest)
        self.importance: Weights = {}
        self.reference: Weights | None = None
        self.objective: Objective | None = None

    def plan(self, experience: Experience) -> list[Segment]:
        """The segments of one experience."""
        return self.inner.plan(experience)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train under the penalty, then add this experience's importance."""
        self.objective = self.held if experience.index else None
        result = self.inner.run(experience, self.plan(experience), owner=self)
        self.reference = None
        with self.runtime.phase("importance"), self.model.in_fp32():
            new = self.importance_of(experience.train)
        old, share = self.importance, self.decay
        self.importance = {n: (1 - share) * v + (share * old[n] if old else 0.0) for n, v in new.items()}
        return {**result, "importance_mean": float(torch.cat([v.flatten() for v in self.importance.values()]).mean())}

    def held(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [B, 1] and the penalty of a batch of rows."""
        if self.reference is None:  # before the first step of an experience
            self.reference = kept(self.model)
        penalty = 2 * quadratic_penalty(self.model, self.reference, self.importance)
        return self.model.loss(rows), self.strength * penalty

    def importance_of(self, data: Any) -> Weights:
        """Omega_t of an experience's images, by the name of the weight."""
        self.model.eval()
        number = min(len(data), self.images or len(data))
        size = CHUNK if self.variant == "paper" else data.batch
        total: Weights = {}
        for images, seen in self._batches(data, number, size):
            part = self._of_each(images, seen) if self.variant == "paper" else self._of_batch(images, seen)
            total = {name: value + total[name] if total else value for name, value in part.items()}
        self.runtime.ledger.look("probe", number, 3 * self.runtime.flops_per_token)
        count = number if self.variant == "paper" else -(-number // size)
        return {name: value / count for name, value in total.items()}

    def _batches(self, data: Any, number: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B, 3, S, S] and the places of the patches that are seen [B, K]."""
        for start in range(0, number, size):
            self.runtime.check_stop()
            rows = torch.from_numpy(data.read(np.arange(start, min(start + size, number)))).to(self.runtime.device)
            images, keys = split_rows(rows, self.model.shape.image)
            yield images, self.model.masks(keys)[0]

    def _of_each(self, images: Tensor, seen: Tensor) -> Weights:
        """Sum over images of the magnitude of each one's gradient."""
        encoder = _Encoder(self.model)
        weights = {f"model.{name}": p.detach().contiguous() for name, p in trained(self.model).items()}

        def length(theta: Weights, image: Tensor, places: Tensor) -> Tensor:
            tokens: Any = functional_call(encoder, theta, (image[None], places[None]))
            return tokens.square().sum(-1).mean()

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no rule for vmap
            found = vmap(grad(length), in_dims=(None, 0, 0))(weights, images, seen)
        return {name.removeprefix("model."): g.abs().sum(0) for name, g in found.items()}

    def _of_batch(self, images: Tensor, seen: Tensor) -> Weights:
        """The magnitude of the gradient of a batch, whose images cancel."""
        weights = trained(self.model)
        length = self.model.encode(images, seen).square().sum(0).mean()
        found = torch.autograd.grad(length, list(weights.values()), allow_unused=True)
        pairs = zip(weights.items(), found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g.abs() for (name, p), g in pairs}

    def loss(self, tokens: Tensor) -> Tensor:
        """Error of every image: rows [B, S * S * 3 + 8] uint8 -> [B, 1]."""
        return self.inner.loss(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, data cursor; importance and reference."""
        return {"inner": self.inner.state_dict(), "importance": self.importance, "reference": self.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.importance = moved(state["importance"], self.runtime.device) or {}
        self.reference = moved(state["reference"], self.runtime.device)
