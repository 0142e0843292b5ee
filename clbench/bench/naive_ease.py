"""EASE as published code computes it (see `naive.py`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.bench.naive import Stage, groups_of
from clbench.interfaces import UserError
from clbench.models.heads import CosineHead

Means = dict[tuple[int, int], Tensor]  # (class, subspace) -> mean [D]


def completed(means: Means, owner: list[int], width: int) -> Means:
    """With the means that classes lack in later subspaces, by loops over classes; experience `owner[c]` brought class c."""
    full = dict(means)
    for j in range(1, width):
        later = [d for d, t in enumerate(owner) if t >= j]
        for c, i in enumerate(owner):
            if i < j:
                alike = torch.stack([F.cosine_similarity(means[c, i], means[d, i], dim=0) for d in later])
                full[c, j] = (alike.softmax(0)[:, None] * torch.stack([means[d, j] for d in later])).sum(0)
    return full


def ease(stage: Stage) -> None:
    """New classes in all subspaces, one loader after another; at a test every image through every adapter."""
    o, model = stage.options, stage.model
    if o["pretrained_weight"]:
        raise UserError("the naive version of ease has no subspace of the bare network: leave learner.pretrained_weight at 0")
    pet = stage.pet()
    bank: list[dict[str, Tensor]] = []
    means: Means = {}
    full: Means = {}
    owner: list[int] = []
    for experience in stage.experiences():
        t, first = len(bank), len(owner)
        if t:
            pet.reset(stage.runtime.generator("pet"))
        head = CosineHead(model.num_features).to(stage.runtime.device)
        head.grow(len(experience.new_classes), stage.runtime.generator("head"))

        def loss(x: Tensor, y: Tensor, head: CosineHead = head, first: int = first) -> Tensor:
            return F.cross_entropy(head(model.features(x)), y - first)

        batches = stage.loader(experience, o["batch_size"], True)
        stage.train(batches, groups_of((pet, o["lr"]), (head, o["lr"])), loss, mode=pet.train)
        pet.eval()
        bank.append(pet.state())
        owner.extend([t] * len(experience.new_classes))
        with stage.phase("statistics"):
            for j, state in enumerate(bank):
                with pet.use(state):
                    f, y = stage.extract(stage.loader(experience, o["batch_size"], False))
                for c in experience.new_classes:
                    means[c, j] = f[y == c].mean(0)
            full.update(completed(means, owner, t + 1))

        def scores(x: Tensor, t: int = t) -> Tensor:
            z: list[Tensor] = [torch.zeros(len(x), device=x.device) for _ in owner]
            for j, state in enumerate(bank):
                with pet.use(state):
                    f = model.features(x)
                for c in range(len(owner)):
                    weight = 1.0 if owner[c] == j else o["alpha"] / max(1, t)
                    z[c] = z[c] + weight * F.cosine_similarity(f, full[c, j][None], dim=1)
            return torch.stack(z, 1)

        stage.judge(experience, scores)
