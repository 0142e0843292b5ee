"""SD-LoRA: Scalable Decoupled Low-Rank Adaptation (Wu et al., ICLR 2025, arXiv 2501.13198).

A frozen ViT gets low-rank terms at queries and values of every block. In experience t a layer computes
  W x + s_t B_t A_t x + sum over i < t of s_i D_i x,      D_i = B_i A_i / (|B_i| |A_i|), Frobenius norms
Directions D_i of earlier experiences stand still. A_t (Kaiming), B_t (0), all magnitudes s_0 .. s_t (0.8 at the start of every
experience; one each, for all blocks and layers) and the head are trained with the cross-entropy over the experience's classes.
All terms are one term of a higher rank, so that one pass answers, with the softmax's argmax over all classes.

variant  "official" (default): D_i as above. "paper": D_i = B_i A_i / |B_i A_i|.
redundant   SD-LoRA-KD: least squares gives D_t = sum of a_i D_i and a rest. Where |rest|^2 is below this (9e-4), layer by
            layer, D_t is dropped and a_i s_t joins the magnitude of D_i there
reduce_at, reduce_to   SD-LoRA-RR: from experience 4 on rank 8, from 8 on rank 6 is `reduce_at=[4,8] reduce_to=[8,6]`
As released, s is drawn back to 0.8 in every experience and the newest term loses its norm when the next experience begins: the
function jumps there. Deviations: what takes the place of a dropped direction keeps that direction's magnitude s_t, layer by
layer (the released code adds a_i to magnitudes of all layers, which are drawn back to 0.8); more than 20 experiences.
Published (as the specification read it in LibContinual's README, ViT-B/16 augreg2_in21k_ft_in1k, CIFAR-100 in 10 experiences):
last 88.01 %, average 92.54 % (its re-run: 87.16, 92.21). 20 epochs, batch 128, SGD 0.9, rate 0.008 (ImageNet-R: 0.01), rank 10.

Legend: I inputs and O outputs of a layer, r rank, R sum of the ranks of earlier directions, T their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.models.pet import Factory, State
from clbench.models.pet_modules import lora
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, parameters_of, restore

Directions = dict[str, Tensor]  # a [R, I], b [O, R] divided by the norm, owner [R], share [T, T]: of D_j in what stands for it


def no_directions(a: Tensor, b: Tensor) -> Directions:
    """Of a layer whose first term is [r, I] and [O, r]."""
    owner = torch.zeros(0, dtype=torch.int64, device=a.device)
    return {"a": a.new_zeros(0, a.shape[1]), "b": b.new_zeros(len(b), 0), "owner": owner, "share": a.new_zeros(0, 0)}


def size_of(a: Tensor, b: Tensor, product: bool) -> Tensor:
    """|B A| or |B| |A|."""
    return ((b.T @ b) * (a @ a.T)).sum().sqrt() if product else a.norm() * b.norm()


def explained(old: Directions, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """Least squares of the direction b a on the earlier ones -> (a_i [T], |rest|^2), from inner products of factors alone."""
    count = len(old["share"])
    rows, columns = torch.cat([old["a"], a]).double(), torch.cat([old["b"], b], dim=1).double()
    owner = torch.cat([old["owner"], old["owner"].new_full((len(a),), count)])
    member = (owner == torch.arange(count + 1, device=owner.device)[:, None]).double()
    gram = member @ ((columns.T @ columns) * (rows @ rows.T)) @ member.T  # <D_i, D_j>
    alpha = torch.linalg.pinv(gram[:count, :count], hermitian=True) @ gram[:count, count]
    return alpha.to(a.dtype), float(gram[count, count] - alpha @ gram[:count, count])


def with_direction(old: Directions, a: Tensor, b: Tensor, product: bool, redundant: float | None) -> Directions:
    """The directions of a layer and one more, unless the others explain it."""
    count = len(old["share"])
    b = b / size_of(a, b, product).clamp_min(1e-12)
    share = nn.functional.pad(old["share"], (0, 1, 0, 1))
    if count and redundant is not None:
        alpha, rest = explained(old, a, b)
        if rest < redundant:
            share[:count, count] = alpha
            return {**old, "share": share}
    share[count, count] = 1
    owner = torch.cat([old["owner"], old["owner"].new_full((len(a),), count)])
    return {"a": torch.cat([old["a"], a]), "b": torch.cat([old["b"], b], dim=1), "owner": owner, "share": share}


def joined(old: Directions, a: Tensor, b: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """All terms of a layer as one: A [R + r, I] and B [O, R + r], magnitudes [T + 1] inside."""
    scale_R = (old["share"] @ magnitudes[:-1])[old["owner"]]
    return torch.cat([old["a"], a]), torch.cat([old["b"] * scale_R, magnitudes[-1] * b], dim=1)


class SdLora:
    """State: the newest term, earlier directions by layer, magnitudes, the head, experiences learned."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_pretrained=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        pet: Factory = lora,
        variant: Literal["official", "paper"] = "official",
        magnitude: float = 0.8,  # of all directions at the start of an experience (LibContinual: 1)
        reduce_at: Sequence[int] = (),  # experiences from which on the rank is
        reduce_to: Sequence[int] = (),  # these
        redundant: float | None = None,  # a direction that the others explain up to this is dropped; null: none is
        lr: float = 0.008,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: Schedule = constant,
    ):
        newest = pet(model, runtime)
        if newest is None or newest.kind != "lora" or any(name.endswith("/scale") for name in newest.values):
            raise UserError("sd_lora learns low-rank terms and has magnitudes of its own: choose pet=lora")
        if variant not in ("official", "paper"):
            raise UserError(f"unknown learner.variant={variant}: choose official or paper")
        self.rank = min(value.shape[0] for name, value in newest.values.items() if name.endswith("/a"))
        at, to = list(reduce_at), list(reduce_to)
        if len(at) != len(to) or at != sorted(set(at)) or any(not 1 <= rank <= self.rank for rank in to):
            raise UserError(
                f"learner.reduce_at={at} must rise, and learner.reduce_to={to} give as many ranks from 1 to {self.rank}"
            )
        if redundant is not None and redundant <= 0:
            raise UserError(f"learner.redundant must be above 0, got {redundant}; null drops no direction")
        self.model, self.runtime, self.pet, self.product = model, runtime, newest, variant == "paper"
        self.magnitude, self.reduced, self.redundant = magnitude, dict(zip(at, to, strict=True)), redundant
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.magnitudes = torch.zeros(0, device=runtime.device)
        self.layers = [name[:-2] for name in newest.values if name.endswith("/b")]
        self.directions = {name: no_directions(*self._term(name, self.rank)) for name in self.layers}
        self.learned = 0

    def rank_of(self, t: int) -> int:
        """The rank of the term of experience t."""
        return next((rank for at, rank in sorted(self.reduced.items(), reverse=True) if t >= at), self.rank)

    def _term(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """The newest term of a layer: A [r, I], B [O, r]."""
        return self.pet.values[f"{name}/a"][:rank], self.pet.values[f"{name}/b"][:, :rank]

    def terms(self) -> State:
        """What a pass computes with: all terms of every layer as one."""
        found: State = {}
        rank = self.rank_of(self.learned - 1)
        for name in self.layers:
            found[f"{name}/a"], found[f"{name}/b"] = joined(self.directions[name], *self._term(name, rank), self.magnitudes)
        return found

    def learn(self, experience: Experience) -> dict[str, float]:
        """The last term joins the directions; a fresh one, all magnitudes and the head are trained."""
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        if self.learned:
            self._keep_direction()
            self.pet.reset(self.runtime.generator("pet"))
        self.learned += 1
        self.magnitudes = nn.Parameter(torch.full((self.learned,), self.magnitude, device=self.runtime.device))
        self.pet.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            with self.pet.use(self.terms()):
                features = self.model.features(batch)
            return masked_cross_entropy(self.head(features), batch.y, "local", experience.classes)

        trained = [*parameters_of(self.pet, self.head), self.magnitudes]
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "train", self, [{"params": trained, "lr": self.lr}], loss, batches, self.recipe)
        self.pet.eval()
        self.model.forget()
        ranks = [len(found["owner"]) for found in self.directions.values()]
        return {**log, "rank": self.rank_of(self.learned - 1) + sum(ranks) / len(ranks)}

    @torch.no_grad()
    def _keep_direction(self) -> None:
        """The term of the experience before joins the directions."""
        for name in self.layers:
            a, b = self._term(name, self.rank_of(self.learned - 1))
            self.directions[name] = with_direction(self.directions[name], a, b, self.product, self.redundant)

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        with torch.no_grad(), self.pet.use(self.terms(), tag=self.learned):
            return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "pet", "directions", "magnitudes", "head", "learned")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
