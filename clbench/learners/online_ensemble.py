"""Online ensembles on a frozen network: E&E (Encoders and Ensembles for Task-Free Continual Learning, 2021, arXiv 2105.13327),
and DE&E, its differentiable form (Neural Architecture for Online Ensemble Continual Learning, ICCS 2023).

Each of n linear classifiers W_j has a key; q are unit features, cos_j their cosine to key j. The k nearest keys are chosen,
with shares s_j of about 1, and the answer is

    z = sum_j s_j cos_j o_j / sum_j s_j cos_j,   o_j = bound tanh(W_j q / bound)
    loss = -z_y, linear in the answer and without a softmax;   trained keys: + sum_j s_j (1 - cos_j)

so a sample moves nothing but the rows of its own class in the members that it chooses, by what it adds to them.

keys  "trained" (DE&E), by Adam at key_lr, or "fixed" (E&E): random directions
top   "soft" (DE&E): entropic optimal transport of the n cosines x to the anchors 0 and 1, with masses n - k and k, costs
      (x - anchor)^2 and regularisation epsilon; shares below `cut` are 0. Sinkhorn's fixed point is s_j = sigmoid((2 x_j - 1) /
      epsilon + t) with sum s = k, so t is bisected here (released: 400 iterations); its derivative is that of the fixed point
      "hard" (E&E): 1 for the k nearest, else 0

Choices and deviations: members start at 0 (released: at random), so that before the bound and the decay of weights matter no
rate does; no biases; a key behind q (a cosine below 0) has no vote; the released heads that are trained beside the ensemble for
comparison are left out, as are pseudo-features. A class that has not come has the lowest score. Published numbers: none read.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST, LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, parameters_of, restore

BETAS = (0.9, 0.999)  # of the keys' Adam


def hard_top(x: Tensor, k: int) -> Tensor:
    """1 for the k largest of each row of x [B, n], else 0."""
    return torch.zeros_like(x).scatter(1, x.topk(k, dim=1).indices, 1.0)


def soft_top(x: Tensor, k: int, epsilon: float) -> Tensor:
    """Shares [B, n] that sum to k: the plan of entropic optimal transport (see the module); differentiable."""
    a = (2 * x.to(torch.float32 if x.device.type == "mps" else torch.float64) - 1) / epsilon
    with torch.no_grad():
        low, high = -a.amax(1, keepdim=True) - 50, -a.amin(1, keepdim=True) + 50
        for _ in range(80):
            t = (low + high) / 2
            above = (a + t).sigmoid().sum(1, keepdim=True) > k
            low, high = torch.where(above, low, t), torch.where(above, t, high)
        s = (a + t).sigmoid()
        slope = (s * (1 - s)).sum(1, keepdim=True).clamp_min(1e-12)
    rest = (a + t).sigmoid().sum(1, keepdim=True) - k
    return (a + t - (rest - rest.detach()) / slope).sigmoid().to(x)  # dt/da is that of sum s = k


class OnlineEnsemble:
    """State: members, keys [n, D] and their moments, which classes have come [K] (the backbone never changes)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        members: int = 128,  # n
        chosen: int = 16,  # k
        keys: Literal["trained", "fixed"] = "trained",
        top: Literal["soft", "hard"] = "soft",
        epsilon: float = 5e-4,  # of top=soft
        cut: float = 0.3,  # of top=soft
        bound: float = 250.0,  # largest magnitude of a member's answer
        lr: float = 1e-4,  # members
        key_lr: float = 5e-5,
        epochs: int | None = None,
        batch_size: int = 10,
        weight_decay: float = 1e-4,  # of members
        schedule: Schedule = constant,
    ):
        for name, value, known in (("keys", keys, ("trained", "fixed")), ("top", top, ("soft", "hard"))):
            if value not in known:
                raise UserError(f"unknown learner.{name}={value}: choose {' or '.join(known)}")
        if not 1 <= chosen <= members:
            raise UserError(f"learner.chosen={chosen} must be at least 1 and at most learner.members={members}")
        if not 0 < epsilon < math.inf or not 0 <= cut < 1 or not 0 < bound < math.inf:
            raise UserError(
                f"learner.epsilon={epsilon} and learner.bound={bound} must be above 0, learner.cut={cut} at least 0 and below 1"
            )
        self.model, self.runtime, self.members, self.chosen = model, runtime, members, chosen
        self.soft, self.epsilon, self.cut, self.bound = top == "soft", epsilon, cut, bound
        self.lr, self.key_lr, self.epochs, self.batch_size = lr, key_lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum=0.0, weight_decay=weight_decay, schedule=schedule)
        model.freeze()
        self.head = LinearHead(model.num_features, bias=False).to(runtime.device)  # blocks of n rows for each new class
        drawn = torch.randn(members, model.num_features, generator=runtime.generator("keys"))
        self.keys_ND = torch.nn.Parameter(F.normalize(drawn, dim=1).to(runtime.device), requires_grad=keys == "trained")
        self.mean_ND, self.square_ND, self.steps = torch.zeros_like(drawn), torch.zeros_like(drawn), 0
        self.mean_ND, self.square_ND = self.mean_ND.to(runtime.device), self.square_ND.to(runtime.device)
        self.seen_K = torch.zeros(0, dtype=torch.bool, device=runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass (or what the budget allows)."""
        if new := len(experience.new_classes):
            self.head.grow(self.members * new, self.runtime.generator("head"))
            torch.nn.init.zeros_(self.head.blocks[-1].weight)  # type: ignore[arg-type]
            self.seen_K = F.pad(self.seen_K, (0, new))

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            self.seen_K[batch.y] = True
            with torch.no_grad():
                features = self.model.features(batch)
            z, shares, cosines = self.answers(features)
            linear = -z.gather(1, batch.y[:, None]).mean()
            return linear + (shares * (1 - cosines)).sum(1).mean() if self.keys_ND.requires_grad else linear

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups: list[dict[str, Any]] = [{"params": parameters_of(self.head), "lr": self.lr}]
        if not self.keys_ND.requires_grad:
            return fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        groups.append({"params": [self.keys_ND], "lr": self.key_lr, "weight_decay": 0.0})
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe, before_step=self.adam)

    def adam(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Turn the keys' gradient into Adam's direction, whose step is that of plain descent."""
        g = grads[-1]
        assert g is not None
        self.steps += 1
        self.mean_ND.lerp_(g, 1 - BETAS[0])
        self.square_ND.lerp_(g.square(), 1 - BETAS[1])
        root = (self.square_ND / (1 - BETAS[1] ** self.steps)).sqrt() + 1e-8
        g.copy_(self.mean_ND / (1 - BETAS[0] ** self.steps) / root)

    def answers(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, D] -> the ensemble's answer [B, K], shares and cosines of its members [B, n]."""
        q = F.normalize(features.float(), dim=1)
        cosines = q @ F.normalize(self.keys_ND, dim=1).T
        shares = soft_top(cosines, self.chosen, self.epsilon) if self.soft else hard_top(cosines, self.chosen)
        shares = torch.where(shares < self.cut, 0.0, shares)
        blocks = self.head(q).split(self.head.widths, dim=1)
        z = torch.cat([block.reshape(len(q), self.members, -1) for block in blocks], dim=2)
        votes = shares * cosines.clamp_min(0)
        votes = votes / votes.sum(1, keepdim=True).clamp_min(1e-12)
        return torch.einsum("bn,bnk->bk", votes, self.bound * torch.tanh(z / self.bound)), shares, cosines

    def predict(self, batch: Batch) -> Tensor:
        """Answers [B, num_seen]; a class that has not come has the lowest."""
        self.model.eval()
        with torch.no_grad():
            return self.answers(self.model.features(batch))[0].masked_fill(~self.seen_K, LOWEST)

    def state_dict(self) -> dict[str, Any]:
        moments = ["mean_ND", "square_ND", "steps"] if self.keys_ND.requires_grad else []
        return collect(self, "head", "keys_ND", "seen_K", *moments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
