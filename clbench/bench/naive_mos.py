"""MOS as published code computes it (see `naive.py`): all adapters on every test image, then a walk for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.bench.naive import Stage, groups_of
from clbench.bench.naive_trained import align, class_statistics
from clbench.interfaces import Experience, UserError
from clbench.learners.mos import ROUNDS, orthogonality, pulled
from clbench.models.heads import LinearHead
from clbench.models.pet import State, average
from clbench.training.losses import masked_cross_entropy


def mos(stage: Stage) -> None:
    """The `official_effective` variant or the paper's."""
    o, model = stage.options, stage.model
    if o["variant"] == "official_raw" or o["covariance"] != "full":
        raise UserError("the naive version of mos has variants paper and official_effective, with full covariances")
    pet = stage.pet()
    head = LinearHead(model.num_features).to(stage.runtime.device)
    bank: list[State] = []
    deployed: list[State] = []
    owner: list[int] = []
    stats: list[tuple[Tensor, Tensor]] = []
    prototypes: list[Tensor] = []
    for experience in stage.experiences():
        head.grow(len(experience.new_classes), stage.runtime.generator("head"))
        mean = average(bank) if bank else None
        _train(stage, experience, pet, head, mean, stats)
        bank.append(pet.state())
        if mean is not None and o["variant"] != "paper":
            pet.insert(mean)
        deployed.append(pet.state())
        owner.extend([experience.index] * len(experience.new_classes))
        stats += class_statistics(stage, experience, o["batch_size"])
        if experience.index and o["align_epochs"]:
            align(stage, head, stats, [1.0] * len(stats), o["align_samples"] or 5 * o["batch_size"])
        with stage.phase("statistics"), pet.use(bank[0]):
            f, y = stage.extract(stage.loader(experience, o["batch_size"], False))
            prototypes.extend(f[y == c].mean(0) for c in experience.new_classes)
        stage.judge(experience, lambda x: retrieved(model, pet, head, deployed, owner, prototypes, x))


def _train(stage: Stage, experience: Experience, pet: Any, head: LinearHead, mean: State | None, stats: list) -> None:
    """Stage 1 with merging in every forward pass and after every step; the means of old classes stacked anew in each step."""
    o, model, keep = stage.options, stage.model, 1 - stage.options["merge"]
    inside = mean is not None and o["variant"] != "paper"
    blocks = len({name.split("/")[0] for name in pet.values})

    def loss(x: Tensor, y: Tensor) -> Tensor:
        used = None
        if inside and mean is not None:
            seen = pulled(pet.state(), mean, keep, per_block=True)
            used = {name: value + (seen[name] - value).detach() for name, value in pet.values.items()}
        with pet.use(used):
            f = model.features(x)
        if inside and mean is not None:
            pet.approach(mean, 1 - keep**blocks)  # every block has merged once by now
        old = torch.stack([m.float() for m, _ in stats]) if stats else f.new_zeros(0, f.shape[1])
        return masked_cross_entropy(head(f), y, "local", experience.classes) + o["orth"] * orthogonality(old, f)

    def merge() -> None:
        if mean is not None:
            pet.approach(mean, 1 - keep)

    batches = stage.loader(experience, o["batch_size"], True)
    groups = groups_of((pet, o["lr"]), (head, o["lr"] * o["head_lr"]))
    stage.train(batches, groups, loss, each_step=merge, mode=pet.train)
    pet.eval()


def retrieved(
    model: Any, pet: Any, head: LinearHead, bank: list[State], owner: list[int], prototypes: list[Tensor], x: Tensor
) -> Tensor:
    """Scores [B, K]: A_0 for the first guess, every adapter on the whole batch, then sample after sample."""
    with pet.use(bank[0]):
        q = F.normalize(model.features(x), dim=1) @ F.normalize(torch.stack(prototypes), dim=1).T
    logits = []
    for state in bank:
        with pet.use(state):
            logits.append(head(model.features(x)))
    rows = []
    for i in range(len(x)):
        now = owner[int(q[i].argmax().cpu())]
        for _ in range(ROUNDS):
            z = logits[now][i]
            then = owner[int(z.argmax().cpu())]
            if then == now:
                break
            now = then
        rows.append(z.softmax(0) + (len(bank) * q[i]).softmax(0))
    return torch.stack(rows)
