"""CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning (Smith, Karlinsky, Gutta,
Cascante-Bonilla, Kim, Arbelle, Panda, Feris & Kira, CVPR 2023, arXiv 2211.13218).

In each of blocks 0 to 4 of a frozen ViT a prefix is summed up from components P_m with attention vectors a_m and keys k_m:
  p = sum_m alpha_m P_m,   alpha_m = cos(q * a_m, k_m)   (no softmax; q the bare network's class token, * element by element)
The first half of p [length, D] stands before the keys, the second before the values. The head is linear and reads the class
token; loss = CE over the experience's classes + ortho sum over blocks and X in {P, K, A} of mean((X X^T - I)^2).

Each experience adds `components_per_experience` components. They start as N(0, I) draws made orthogonal (Gram-Schmidt) to
all earlier ones of their block and to each other, of length 1 (P as one vector a component). Earlier components stand still but
take part. Rate: a quarter cosine moved once an epoch and one epoch late, as released: 1, 1, cos(99 pi / (200 (E - 1))), ...;
`schedule` replaces it. An epoch's last incomplete batch is left out, as in the release; an experience smaller than a batch is
one batch.

ortho      weight of the penalty: 0.1 in the paper, 0 in the released scripts and here
Deviations: the pool grows (the release divides 100 components by the number of experiences, which it must know: the same for
10); new components are orthogonal to the *span* of earlier ones (the release subtracts the projection on each earlier one,
the same only where training left them orthogonal). Where no room is left they are orthogonal to each other only. The head
starts as normal(0, 0.02) with bias 0 (the release: torch's default for `Linear`).
The released scripts: ViT-B/16 augreg_in21k_ft_in1k, Adam 1e-3, batch 128, natural class order, 20 epochs (ImageNet-R: 50).
Published (as read in the MOS table, a re-run, ViT-B/16 augreg_in21k, one order): CIFAR-100 B0 Inc5 last 81.96 %, average
89.11 %; ImageNet-R B0 Inc20 72.27 / 77.97 %. The paper's own tables were not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.models.pet_modules import prefix
from clbench.models.prompt_pool import GrownPool, as_prefixes, attended, orthonormal, prefix_blocks, query
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.prompts import epoch_cosine
from clbench.training.runtime import Runtime
from clbench.training.state import collect, groups_of, restore
from clbench.training.steps import made
from clbench.training.virtual_outliers import VirtualOutliers, with_outliers


class CodaPrompt:
    """State: components [M, blocks, length, D], keys and attention vectors [M, blocks, D], head."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_pretrained=True)

    @staticmethod
    def capabilities_of(*, ovor: Any = None, **options: Any) -> Capabilities:
        """A second stage needs features of all samples again."""
        return replace(CodaPrompt.capabilities, needs_random_access=ovor is not None)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        components_per_experience: int = 10,
        length: int = 8,  # 4 keys and 4 values
        blocks: Sequence[int] | str = "0:5",
        ortho: float = 0.0,  # paper 0.1, released scripts 0
        lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,  # null: the paper's quarter cosine, moved once an epoch
        ovor: Mapping[str, Any] | None = None,  # {variant: paper | official, epochs, ...}: `training/virtual_outliers.py`
    ):
        if not 1 <= components_per_experience <= model.num_features:
            raise UserError(
                f"learner.components_per_experience must lie between 1 and the model's {model.num_features} features, "
                f"got {components_per_experience}"
            )
        if length < 2 or length % 2:
            raise UserError(f"learner.length must be even, half keys and half values, got {length}")
        self.model, self.runtime = model, runtime
        self.count, self.ortho = components_per_experience, ortho
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.ovor: VirtualOutliers | None = None if ovor is None else made(VirtualOutliers, "ovor", ovor, runtime)
        schedule = schedule or partial(epoch_cosine, epochs=self.epochs + (self.ovor.epochs if self.ovor else 0))
        self.recipe = Recipe("adam", weight_decay=weight_decay, schedule=schedule)
        self.pet = prefix(model, runtime, length=length // 2, blocks=blocks)
        width, depth = next(iter(self.pet.values.values())).shape[-1], len(prefix_blocks(self.pet))
        self.components = GrownPool((depth, length, width)).to(runtime.device)
        self.keys = GrownPool((depth, model.num_features)).to(runtime.device)
        self.attention = GrownPool((depth, model.num_features)).to(runtime.device)
        self.head = LinearHead(model.num_features).to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Add components, then train them and the head."""
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.pet.train()
        self.grow()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            z = self.head(self.features(batch))
            total = masked_cross_entropy(z, batch.y, "local", experience.classes)
            return total + self.ortho * self.penalty() if self.ortho else total

        pools = (self.components, self.keys, self.attention)
        groups = groups_of(*((pool, self.lr) for pool in pools), (self.head, self.lr))
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"), drop_last=True)
        net = SimpleNamespace(eval=self.pet.eval, features=self.features)

        def train(recipe: Recipe) -> dict[str, float]:
            return fit(self.runtime, "train", self, groups, loss, batches, recipe)

        return with_outliers(self, net, experience, batches.steps, train)

    def grow(self) -> None:
        """New components, block by block orthogonal to the earlier ones; those stand still from now on."""
        rng = self.runtime.generator("components")
        for pool in (self.components, self.keys, self.attention):
            old = pool.rows().flatten(2)  # [M, blocks, length * D]
            fresh = torch.stack([orthonormal(old[:, i], self.count, rng) for i in range(pool.shape[0])], dim=1)
            pool.add(fresh.reshape(self.count, *pool.shape))

    def prefixes(self, queries: Tensor) -> Tensor:
        """The weighted sums of all components for queries [B, D] -> [B, blocks, 2, length / 2, D] float32."""
        alpha = attended(queries, self.attention.rows(), self.keys.rows())
        summed = torch.einsum("bnm,mnld->bnld", alpha, self.components.rows())
        return summed.unflatten(2, (2, -1))

    def features(self, batch: Batch) -> Tensor:
        """Features of the prompted network [B, D]: the second pass."""
        values = as_prefixes(self.pet, self.prefixes(query(self.model, batch)))
        with self.pet.use(values, torch.arange(len(batch), device=self.runtime.device)):
            return self.model.features(batch)

    def penalty(self) -> Tensor:
        """Sum over blocks and pools of the mean squared entry of X X^T - I."""
        total = torch.zeros((), device=self.runtime.device)
        for pool in (self.components, self.keys, self.attention):
            x = pool.rows().flatten(2).transpose(0, 1)  # [blocks, M, length * D]
            gap = x @ x.transpose(1, 2) - torch.eye(x.shape[1], device=x.device)
            total = total + gap.square().mean(dim=(1, 2)).sum()
        return total

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.pet.eval()
        return self.head(self.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "components", "keys", "attention", "head")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
