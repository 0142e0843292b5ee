"""LwF for masked autoencoders, a baseline of Singh et al. 2025 (arXiv 2503.02844), after Li & Hoiem (arXiv 1606.09282).

    error of the hidden patches + strength (1 - mean cos(f_old(x), f(x)))

f(x) are the tokens that the encoder makes of the patches that are seen, f_old those of the network with which the experience
began (with a branch: the trunk). The cosine is taken over the width of each token, the mean over tokens and images. The
released strengths are 0.25, 0.5, 0.75.

variant  "paper" (default): both networks see the same patches. "official": as released, where old and new draw masks of their
         own, so that their tokens are of different patches, and the cosine runs over the images of the batch

The teacher costs one more pass through the encoder, which the ledger's FLOPs do not count. Published number: none read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.learners.pretrain import Pretrain
from clbench.models.mae import MaskedAutoencoder, split_rows
from clbench.training.pretraining.segments import Objective, PretrainRuntime, Segment
from clbench.training.schedules import constant
from clbench.training.state import detached

OTHER_MASK = 0x5851F42D4C957F2D  # turns the key of a mask into that of another


def require_autoencoder(model: nn.Module, learner: str) -> MaskedAutoencoder:
    """The model, or `UserError` where it is no masked autoencoder."""
    if not isinstance(model, MaskedAutoencoder):
        name = getattr(model, "identity", {}).get("name", type(model).__name__)
        raise UserError(f"learner {learner} holds the features of a masked autoencoder, model {name} is none: model=mae_nano")
    return model


class CptLwf:
    """`Pretrain` under distillation of features. State: that of `Pretrain`, the teacher's weights inside an experience."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="loss")

    def __init__(
        self,
        model: nn.Module,
        runtime: PretrainRuntime,
        *,
        strength: float = 0.5,
        variant: Literal["paper", "official"] = "paper",
        lr: float = 3e-3,
        schedule: Schedule = constant,
        branch: float = 0.0,  # share of the steps that are an annealed branch, as in `pretrain.py`
        boundary: Literal["keep", "reset", "reset_moments", "restore"] = "reset",
        betas: Sequence[float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
    ):
        if not strength >= 0:
            raise UserError(f"learner.strength must be at least 0, got {strength}")
        if variant not in ("paper", "official"):
            raise UserError(f"learner.variant must be paper or official, got {variant!r}")
        self.model = require_autoencoder(model, "cpt_lwf")
        self.strength, self.variant, self.runtime = strength, variant, runtime
        rest: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay, "clip": clip}
        self.inner = Pretrain(model, runtime, lr=lr, schedule=schedule, branch=branch, boundary=boundary, **rest)
        self.teacher: MaskedAutoencoder | None = None
        self.objective: Objective | None = None

    def plan(self, experience: Experience) -> list[Segment]:
        """The segments of one experience."""
        return self.inner.plan(experience)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train; from the second experience on near what the network was."""
        self.objective = self.distilled if experience.index else None
        result = self.inner.run(experience, self.plan(experience), owner=self)
        self.teacher = None
        return result

    def distilled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [B, 1] and the penalty of a batch of rows."""
        tokens = self.model.encoded(rows)
        if self.teacher is None:  # before the first step of an experience
            self.teacher = self._frozen(self.model.state_dict())
        keys = split_rows(rows, self.model.shape.image)[1] ^ OTHER_MASK if self.variant == "official" else None
        with torch.no_grad():
            old = self.teacher.encoded(rows, keys)
        cosine = F.cosine_similarity(tokens, old, dim=0 if self.variant == "official" else 2)
        return self.model.loss(rows, tokens), self.strength * (1 - cosine.mean())

    def _frozen(self, weights: dict[str, Tensor]) -> MaskedAutoencoder:
        made = copy.deepcopy(self.model).eval().requires_grad_(False)
        made.load_state_dict(weights)
        return made

    def loss(self, tokens: Tensor) -> Tensor:
        """Error of every image: rows [B, S * S * 3 + 8] uint8 -> [B, 1]."""
        return self.inner.loss(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, data cursor; the teacher's weights."""
        return {"inner": self.inner.state_dict(), "teacher": None if self.teacher is None else self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.teacher = None if state["teacher"] is None else self._frozen(detached(state["teacher"], self.runtime.device))
