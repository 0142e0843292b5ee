"""Fine-tuning, SLCA and LAE as published code computes them (see `naive.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from clbench.bench.naive import Stage, groups_of
from clbench.models.heads import LinearHead
from clbench.training.losses import masked_cross_entropy, normalised_cross_entropy

LOG_EVERY = 5  # epochs between two looks at the test images in the released code


def class_statistics(stage: Stage, experience: Any, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Mean and covariance of each new class, from a loader of its own."""
    found = []
    with stage.phase("statistics"):
        for c in experience.new_classes:
            f, _ = stage.extract(stage.loader(experience, batch, False, only=c))
            f = f.double()
            eye = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
            found.append((f.mean(0), torch.cov(f.T) + float(stage.options["ridge"]) * eye))
    return found


def align(
    stage: Stage,
    head: LinearHead,
    stats: list[tuple[Tensor, Tensor]],
    scales: list[float],
    samples: int,
    each_epoch: Any = lambda: None,
    temperature: float | None = None,
) -> None:
    """Train a head on Gaussian samples, the distributions made anew for every class and epoch."""
    o, k = stage.options, len(stats)
    optimizer = torch.optim.SGD(head.parameters(), lr=o["align_lr"], momentum=0.9, weight_decay=float(o["weight_decay"]))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=o["align_epochs"])
    for _ in range(o["align_epochs"]):
        with stage.phase("align"):
            parts = []
            for (mean, cov), scale in zip(stats, scales, strict=True):
                parts.append(MultivariateNormal((mean * scale).float(), cov.float()).sample((samples,)))
            order = torch.randperm(k * samples)
            x, y = torch.cat(parts)[order], torch.arange(k).repeat_interleave(samples)[order].to(parts[0].device)
            for i in range(k):
                rows = slice(i * samples, (i + 1) * samples)
                z = head(x[rows])
                if temperature is None:
                    loss = F.cross_entropy(z, y[rows])
                else:
                    loss = normalised_cross_entropy(z, y[rows], head.widths, temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()
            schedule.step()
        with stage.phase("log"):
            each_epoch()


def finetune(stage: Stage) -> None:
    """Everything on the newest data, softmax over the classes seen; nothing is logged but the loss."""
    o, model = stage.options, stage.model
    head = LinearHead(model.num_features).to(stage.runtime.device)
    for experience in stage.experiences():
        head.grow(len(experience.new_classes), stage.runtime.generator("head"))
        groups = groups_of((model, o["backbone_lr"]), (head, o["lr"]))
        batches = stage.loader(experience, o["batch_size"], True)
        stage.train(batches, groups, lambda x, y: F.cross_entropy(head(model.features(x)), y), mode=model.train)
        stage.judge(experience, lambda x: head(model.features(x)))


def slca(stage: Stage) -> None:
    """Training accuracy after every epoch, test accuracy after every fifth and after every epoch of alignment."""
    o, model = stage.options, stage.model
    if o["fresh_norm"]:
        model.fresh_norm()
    head, stats, owner = LinearHead(model.num_features).to(stage.runtime.device), [], []
    for experience in stage.experiences():
        first = len(stats)
        head.grow(len(experience.new_classes), stage.runtime.generator("head"))
        batches, tests = stage.loader(experience, o["batch_size"], True), stage.tests(experience)

        def log(epoch: int, batches: Any = batches, tests: Any = tests) -> None:
            stage.right(batches, lambda x: head(model.features(x)))
            if (epoch + 1) % LOG_EVERY == 0:
                stage.right(tests, lambda x: head(model.features(x)))

        def loss(x: Tensor, y: Tensor, first: int = first) -> Tensor:
            return F.cross_entropy(head.blocks[-1](model.features(x)), y - first)

        groups = groups_of((model, o["lr"] * o["slow"]), (head.blocks[-1], o["lr"]))
        stage.train(batches, groups, loss, log, mode=model.train)
        stats += class_statistics(stage, experience, o["batch_size"])
        owner += [experience.index] * len(experience.new_classes)
        kept = {name: value.clone() for name, value in head.state_dict().items()}
        if first and o["align_epochs"]:
            scales = [0.9 + 0.1 * (tau + 1) / (experience.index + 1) if o["mean_rescale"] else 1.0 for tau in owner]
            look = partial(stage.right, tests, lambda x: head(model.features(x)))
            align(stage, head, stats, scales, o["align_samples"], look, o["logit_norm"])
        stage.judge(experience, lambda x: head(model.features(x)))
        if o["restore_heads"]:
            head.load_state_dict(kept)


def lae(stage: Stage) -> None:
    """Two passes an image, online and offline; the ensemble also looks at the test images after every fifth epoch."""
    o, model = stage.options, stage.model
    pet = stage.pet()
    head = LinearHead(model.num_features, std=0.001).to(stage.runtime.device)
    offline: dict[str, Tensor] = {}

    def scores(x: Tensor) -> Tensor:
        online = head(model.features(x)).softmax(1)
        with pet.use(offline or None):
            return torch.maximum(online, head(model.features(x)).softmax(1))

    for experience in stage.experiences():
        head.grow(len(experience.new_classes), stage.runtime.generator("head"))
        if experience.index == 1:
            offline.update(pet.state())
        batches = stage.loader(experience, o["batch_size"], True, drop_last=True)
        visits = len(batches) * o["batch_size"] if batches.drop_last else len(experience.train)
        frozen = round(o["freeze"] * stage.epochs * visits) if experience.index else 0
        tests = stage.tests(experience)

        def loss(x: Tensor, y: Tensor, frozen: int = frozen, classes: Any = experience.classes) -> Tensor:
            with torch.set_grad_enabled(stage.runtime.used_new > frozen):
                f = model.features(x)
            return masked_cross_entropy(head(f), y, "local", classes)

        def follow() -> None:
            for name in offline:
                offline[name] = offline[name] * o["decay"] + pet.values[name].detach() * (1 - o["decay"])

        def log(epoch: int, tests: Any = tests) -> None:
            if (epoch + 1) % LOG_EVERY == 0:
                pet.eval()
                stage.right(tests, scores)

        adam = partial(torch.optim.Adam, weight_decay=float(o["weight_decay"]))
        stage.train(batches, groups_of((head, o["lr"]), (pet, o["lr"])), loss, log, follow, adam, pet.train)
        pet.eval()
        stage.judge(experience, scores)
