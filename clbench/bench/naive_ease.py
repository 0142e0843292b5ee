"""EASE as published code computes it (see `naive.py`)."""

# ruff: noqa: B023 functions made in the loop over experiences are called within their own iteration

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.bench.naive import Stage, groups_of
from clbench.interfaces import UserError
from clbench.models.heads import CosineHead


def completed(means: list[list[Tensor | None]], owner: list[int], width: int) -> list[list[Tensor]]:
    """The means [K][S] that classes lack in later subspaces, by loops over experiences and classes."""
    full = [list(row) for row in means]
    for j in range(1, width):
        later = [c for c in range(len(owner)) if owner[c] >= j]
        for c in range(len(owner)):
            if owner[c] < j:
                i = owner[c]
                alike = torch.stack([F.cosine_similarity(means[c][i], means[d][i], dim=0) for d in later])  # type: ignore[arg-type]
                full[c][j] = sum(s * means[d][j] for s, d in zip(alike.softmax(0), later, strict=True))  # type: ignore[assignment]
    return full  # type: ignore[return-value]


def ease(stage: Stage) -> None:
    """New classes in all subspaces, one loader after another; at a test every image through every adapter."""
    o, model = stage.options, stage.model
    if o["pretrained_weight"]:
        raise UserError("the naive version of ease has no subspace of the bare network: leave learner.pretrained_weight at 0")
    pet = stage.pet()
    bank: list[dict[str, Tensor]] = []
    means: list[list[Tensor | None]] = []
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
        owner += [t] * len(experience.new_classes)
        means = [[*row, None] for row in means] + [[] for _ in experience.new_classes]
        with stage.phase("statistics"):
            for state in bank:
                with pet.use(state):
                    f, y = stage.extract(stage.loader(experience, o["batch_size"], False))
                for c in experience.new_classes:
                    means[c].append(f[y == c].mean(0))
            full = completed(means, owner, t + 1)

        def scores(x: Tensor, full: list[list[Tensor]] = full, t: int = t) -> Tensor:
            z: list[Tensor] = [torch.zeros(len(x), device=x.device) for _ in owner]
            for j, state in enumerate(bank):
                with pet.use(state):
                    f = model.features(x)
                for c in range(len(owner)):
                    weight = 1.0 if owner[c] == j else o["alpha"] / max(1, t)
                    z[c] = z[c] + weight * F.cosine_similarity(f, full[c][j][None], dim=1)
            return torch.stack(z, 1)

        stage.judge(experience, scores)
