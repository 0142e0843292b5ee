"""NCM and SimpleCIL, FeCAM, RanPAC, APER as published code computes them (see `naive.py`)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.bench.naive import Stage, groups_of
from clbench.interfaces import Experience, UserError
from clbench.learners.fecam import correlation, shrink
from clbench.models.backbone import Backbone
from clbench.models.heads import CosineHead
from clbench.streams import rng
from clbench.training.ridge import CANDIDATES


def cosines(f: Tensor, means: list[Tensor]) -> Tensor:
    """[B, K]."""
    return F.normalize(f, dim=1) @ F.normalize(torch.stack(means), dim=1).T


def ncm(stage: Stage) -> None:
    """Class means; all test images again after every experience."""
    stage.model.freeze()
    means: list[Tensor] = []

    def scores(x: Tensor) -> Tensor:
        f = stage.model.features(x)
        return cosines(f, means) if stage.options["metric"] == "cosine" else -torch.cdist(f, torch.stack(means))

    for experience in stage.experiences():
        with stage.phase("statistics"):
            f, y = stage.extract(stage.loader(experience, stage.options["batch_size"], False))
            means += [f[y == c].mean(0) for c in experience.new_classes]
        stage.judge(experience, scores)


def fecam(stage: Stage) -> None:
    """Normalised covariances, inverted anew at every evaluation; all test images again."""
    o = stage.options
    if o["variant"] != "official" or o["form"] != "vit" or o["train_first"]:
        raise UserError("the naive version of fecam is the official one for ViTs on a frozen network")
    stage.model.freeze()
    means: list[Tensor] = []
    covs: list[Tensor] = []
    gamma1, gamma2 = (1.0 if o["gamma1"] is None else o["gamma1"]), o["gamma2"] or 0.0
    for experience in stage.experiences():
        with stage.phase("statistics"):
            f, y = stage.extract(stage.loader(experience, o["batch_size"], False))
            f = F.normalize(f, dim=1)
            for c in experience.new_classes:
                means.append(f[y == c].mean(0))
                covs.append(correlation(shrink(torch.cov(f[y == c].T), gamma1, gamma2)))
        with stage.phase("evaluate"):
            f, y = stage.extract(stage.tests(experience))
            f, distance = F.normalize(f, dim=1), []
            for mean, cov in zip(means, covs, strict=True):
                gap = f - F.normalize(mean, dim=0)
                distance.append((gap @ torch.linalg.pinv(cov) @ gap.T).diagonal())
            answer = torch.stack(distance, 1).argmin(1)
            stage.accuracy.append((answer == y).float().mean().item())


def first_session(stage: Stage, experience: Experience, tuned: torch.nn.Module, model: Backbone) -> None:
    """Train `tuned` with a cosine classifier on the first experience; test accuracy after every epoch."""
    o = stage.options
    head = CosineHead(stage.model.num_features).to(stage.runtime.device)
    head.grow(len(experience.new_classes), stage.runtime.generator("head"))
    batches, tests = stage.loader(experience, o["batch_size"], True), stage.tests(experience)

    def log(epoch: int) -> None:
        tuned.eval()
        stage.right(tests, lambda x: head(model.features(x)))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(model.features(x)), y)

    stage.train(batches, groups_of((tuned, o["lr"]), (head, o["lr"])), loss, log, mode=tuned.train)
    tuned.eval()


def aper(stage: Stage) -> None:
    """Both networks on every image, whenever it is needed."""
    pet = stage.pet()
    adapted = copy.deepcopy(stage.model) if pet is None else stage.model
    stage.model.freeze()
    means: list[Tensor] = []

    def both(x: Tensor) -> Tensor:
        if pet is None:
            return torch.cat([stage.model.features(x), adapted.features(x)], 1)
        with pet.off():
            bare = stage.model.features(x)
        return torch.cat([bare, stage.model.features(x)], 1)

    for experience in stage.experiences():
        if experience.index == 0:
            first_session(stage, experience, adapted if pet is None else pet, adapted)
        adapted.eval()
        with stage.phase("statistics"), torch.no_grad():
            pairs = [(both(x.to(stage.runtime.device)), y) for _, x, y in stage.loader(experience, 48, False)]
            f, y = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
            means.extend(f[y == c].mean(0) for c in experience.new_classes)
        stage.judge(experience, lambda x: cosines(both(x), means))


def ranpac(stage: Stage) -> None:
    """Sums of projected features in fp32, an LU solution for each candidate of the ridge in every experience."""
    o = stage.options
    pet = stage.pet()
    stage.model.freeze()
    generator = torch.Generator().manual_seed(rng.key(stage.runtime.seed, "projection") >> 1)
    width = o["projection"] or stage.model.num_features
    device = stage.runtime.device
    w = torch.randn(stage.model.num_features, width, generator=generator).to(device) if o["projection"] else None
    gram, cross = torch.zeros(width, width, device=device), torch.zeros(width, 0, device=device)
    readout = cross

    def expand(f: Tensor) -> Tensor:
        return f if w is None else torch.relu(f @ w)

    for experience in stage.experiences():
        if experience.index == 0 and pet is not None:
            first_session(stage, experience, pet, stage.model)
        with stage.phase("statistics"):
            f, y = stage.extract(stage.loader(experience, o["batch_size"], False))
        with stage.phase("ridge"):
            h, target = expand(f), F.one_hot(y, experience.num_seen).to(f)
            cross = F.pad(cross, (0, experience.num_seen - cross.shape[1])) + h.T @ target
            gram = gram + h.T @ h
            ridge = o["ridge"] or best_ridge(h[torch.randperm(len(h))], target, width)
            readout = torch.linalg.solve(gram + ridge * torch.eye(width, device=device), cross)
        stage.judge(experience, lambda x, readout=readout: expand(stage.model.features(x)) @ readout)


def best_ridge(h: Tensor, target: Tensor, width: int) -> float:
    """The candidate with the least error on the last fifth: one solution of size M for each of them."""
    fitted = int(0.8 * len(h))
    gram, cross = h[:fitted].T @ h[:fitted], h[:fitted].T @ target[:fitted]
    errors = []
    for ridge in CANDIDATES:
        solved = torch.linalg.solve(gram + ridge * torch.eye(width, device=h.device), cross)
        errors.append(F.mse_loss(h[fitted:] @ solved, target[fitted:]).item())
    return CANDIDATES[errors.index(min(errors))]
