"""PICLE: modular continual learning by probabilistic search (Valkov, Srivastava, Chaudhuri & Sutton, ICLR 2024, "A
Probabilistic Framework for Modular Continual Learning"). The task of a sample must be disclosed, at test time too.

The network is a path of L modules, each from a library of frozen ones or new, with a head for each task. A new task
  1. trains a path of new modules alone;
  2. chooses a prefix of the library's modules, greedily: at place l the module m of the largest
       log prior(m) + sum over samples of log N(P z | m),  prior = softmax(performance of m / `temperature`)
     z is the input of place l behind the modules chosen so far, P a fixed random projection, N(. | m) a Gaussian of P z on a
     task that uses m. Prefixes of every length l are tried: the modules behind are new and trained, with the head;
  3. with `latent` > 0: reuses a suffix, the last `suffix` modules of an earlier task's path with its head, behind new modules
     that are trained under it (latent transfer: new inputs, an old task). Bayesian optimisation says which are tried: a
     Gaussian process gives the held-out accuracy f of a suffix a, with the kernel
       k(a, b) = exp(-d(a, b)^2 / 2 s^2),  d(a, b) = |a(Z) - b(Z)|,  Z the inputs stored with the modules at the suffixes' start
     It begins with the two suffixes of least mean distance to the others, goes on with the largest expected improvement
     E max(0, f - best), and ends where that is below 0.001. Longer suffixes of the best one's path follow.
  4. keeps the path that is best on a held-out share of its own samples; its new modules join the library, and every module of
     the path gets a Gaussian of its inputs and the path's accuracy.
What a task uses is never trained again: answers for it stay the same to the last bit.

2 is the search for perceptual and few-shot transfer, 3 that for latent transfer. `search=false` trains new modules alone: the
standalone reference.
Choices: modules are groups of the network's layers or blocks, new ones start with its first weights; a module that several
tasks use has a Gaussian for each, of which the most likely counts, and the prior takes its best performance; a covariance gets
a ridge of 1e-3 of the mean variance (the release refuses fewer samples than dimensions); of equal accuracies the path with most
old modules is kept. Of suffixes: d is between class probabilities, s the median distance, the Gaussian process has no noise;
a suffix fits where its head has as many classes as the new task, and answers for them in their order; a module keeps inputs of
the task that it was trained on; that longer suffixes follow the best short one. The epochs of an experience are shared equally
by its paths, since a budget counts them all; those of latent paths that are not tried are left. A task that comes back is
searched anew; its path and head take the place of the old ones. Its listed bytes are those with `search=false`, where every
task adds all modules: the most it holds.
Constants: the release's (projection 20, temperature 0.001, 40 stored inputs of a module, AdamW, batch 32, weight decay about
0.97; 1,200 epochs a path; suffixes of 3 modules of a deeper network at least). The rate, the share of held-out samples, the
numbers of modules and of latent paths are choices.
Published numbers: none read.

Legend: L places, D numbers of a module's input, R its projection, N samples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.chain import chain, inputs_of
from clbench.models.heads import LinearHead, TaskHead
from clbench.streams import rng
from clbench.streams.images.data import ImageData, shuffled
from clbench.training.cholesky import repaired
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore
from clbench.training.suffix_search import Candidate, donors, search_suffix, some_inputs

RIDGE = 1e-3  # share of the mean variance
Weights = dict[str, Tensor]


def gaussian(z_NR: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [R] and Cholesky factor [R, R] of the unbiased covariance, float64, with a ridge."""
    z = z_NR.double()
    centred = z - z.mean(0)
    cov = centred.T @ centred / max(1, len(z) - 1)
    ridge = max(RIDGE * float(cov.diagonal().mean()), 1e-12)
    return z.mean(0), repaired(cov, "the covariance of a module's inputs", ridge=ridge, always=True)[0]


def log_posterior(z_NR: Tensor, modules: list[list[tuple[Tensor, Tensor, float]]], temperature: float) -> Tensor:
    """Of modules, each with (mean, factor, performance) of every task that uses it, given projected inputs -> [modules].

    But for a constant, which is the same for all.
    """
    best = torch.tensor([max(score for *_, score in notes) for notes in modules], dtype=torch.float64)
    prior = (best / temperature).log_softmax(0)
    likely = [
        max(float(MultivariateNormal(mean, scale_tril=chol).log_prob(z_NR.double()).sum()) for mean, chol, _ in notes)
        for notes in modules
    ]
    return prior + torch.tensor(likely, dtype=torch.float64)


class Picle:
    """State: the library (weights of modules by place, with their Gaussians and performances), and for each task path and head.

    notes  by place and module: (mean [R], factor [R, R], performance) of each task that uses it
    paths  by task: the module at each place
    inputs of each module at the place where suffixes start [at most STORED, ...], where there is a latent search
    """

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True, needs_passes=4, needs_random_access=True)

    @staticmethod
    def capabilities_of(*, modules: int = 3, search: bool = True, latent: int = 0, **options: Any) -> Capabilities:
        """Each path needs a pass: one of new modules alone, one for each length of a prefix, those of the latent search."""
        return replace(Picle.capabilities, needs_passes=modules + 1 + latent if search else 1)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        modules: int = 3,  # at most: places of a path
        search: bool = True,  # false: new modules alone (the standalone reference)
        latent: int = 0,  # paths of the latent search at most; 0: none
        suffix: int = 2,  # modules of a suffix, at least
        projection: int = 20,  # numbers of a projected input
        temperature: float = 1e-3,
        validation: float = 0.2,  # share of the experience's samples that chooses the path
        optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        momentum: float = 0.9,  # of sgd
        lr: float = 1e-3,
        weight_decay: float = 0.97,
        epochs: int | None = None,  # of all paths together
        batch_size: int = 32,
        schedule: Schedule = constant,
    ):
        check(model, {"modules": modules, "projection": projection, "suffix": suffix}, latent, temperature, validation)
        self.model, self.runtime, self.search = model, runtime, search
        self.links = chain(model, modules)
        self.projection, self.temperature, self.share = projection, temperature, validation
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe(optimizer, momentum, weight_decay=weight_decay, schedule=schedule)
        model.requires_grad_(False)
        check_search(search, latent, suffix, len(self.links), self.epochs)
        self.latent, self.begins = latent, len(self.links) - suffix
        self.heads = TaskHead(model.num_features).to(runtime.device)
        self.library: list[list[Weights]] = [[] for _ in self.links]
        self.notes: list[list[list[tuple[Tensor, Tensor, float]]]] = [[] for _ in self.links]
        self.paths: dict[str, list[int]] = {}
        self.inputs: list[Tensor] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Try paths, keep the best."""
        assert experience.task is not None
        place = self.heads.grow(experience.task, experience.classes, self.runtime.generator("head"))
        train, held = split(experience.train, self.share, self.runtime.key("validation"))
        prefixes = [list[int](), *(self.prefixes(train) if self.search else [])]
        fitting = donors(self, place) if self.latent else []
        paths = len(prefixes) + (min(self.latent, len(fitting) + self.begins - 1) if fitting else 0)
        best: tuple[float, Candidate, list[Weights], LinearHead] | None = None
        log: dict[str, float] = {}

        def tried(candidate: Candidate, key: int) -> float:
            nonlocal best, log
            first = place if candidate.head_of is None else self.heads.place(candidate.head_of)
            path, head = self.start(candidate.modules), copy.deepcopy(self.heads.at(first))
            log |= self.train(train, path, head, place, candidate, self.epochs // paths, key)
            accuracy = accuracy_of(self, held, path, head, place)
            if best is None or (accuracy, candidate.old) > (best[0], best[1].old):
                best = accuracy, candidate, path, head
            return accuracy

        for prefix in prefixes:
            news = len(self.links) - len(prefix)
            tried(Candidate((*prefix, *[None] * news)), self.runtime.key("train", len(prefix)))
        number = len(prefixes) + (search_suffix(self, fitting, tried) if fitting else 0)
        assert best is not None
        accuracy, candidate, path, head = best
        self.heads.at(place).load_state_dict(head.state_dict())
        self.keep(str(experience.task), candidate.modules, path, accuracy, train)
        sizes = {"library": sum(map(len, self.library)), "reused": candidate.old, "paths": number}
        return {**log, **{name: float(value) for name, value in sizes.items()}, "validation": accuracy}

    def prefixes(self, data: ImageData) -> list[list[int]]:
        """The chosen modules of the library, in prefixes of length 1 to L; none before there is a library."""
        found: list[list[int]] = []
        for place, notes in enumerate(self.notes):
            if not notes:
                break
            before = found[-1] if found else []
            z = projected(self, data, place, self.start(before))
            found.append([*before, int(log_posterior(z, notes, self.temperature).argmax())])
        return found

    def start(self, modules: Sequence[int | None]) -> list[Weights]:
        """A path of modules of the library, and new ones where there is None or nothing more."""
        own = dict(self.model.named_parameters())
        every = (*modules, *[None] * (len(self.links) - len(modules)))
        return [
            {name: own[name].detach().clone() for name in link.names} if module is None else self.library[place][module]
            for place, (link, module) in enumerate(zip(self.links, every, strict=True))
        ]

    def train(
        self, data: ImageData, path: list[Weights], head: LinearHead, place: int, candidate: Candidate, epochs: int, key: int
    ) -> dict[str, float]:
        """Train the new modules of a path, and its head where that is its own."""
        new = [weights for weights, module in zip(path, candidate.modules, strict=True) if module is None]
        fresh = [w.requires_grad_() for weights in new for w in weights.values()]
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(head(self.features(batch, path)), self.heads.targets(place, batch.y))

        batches = shuffled(data, self.batch_size, epochs, key)
        own_head = groups_of((head, self.lr)) if candidate.head_of is None else []
        log = fit(self.runtime, "train", self, [{"params": fresh, "lr": self.lr}, *own_head], loss, batches, self.recipe)
        for w in fresh:
            w.requires_grad_(False)
        return log

    def keep(self, task: str, modules: Sequence[int | None], path: list[Weights], accuracy: float, data: ImageData) -> None:
        """New modules join the library; all of the path get a Gaussian of their inputs and the accuracy."""
        chosen = [len(self.library[place]) if module is None else module for place, module in enumerate(modules)]
        for place, module in enumerate(chosen):
            note = (*gaussian(projected(self, data, place, path)), accuracy)
            if module == len(self.library[place]):
                self.library[place].append(path[place])
                self.notes[place].append([])
                if self.latent and place == self.begins:
                    self.inputs = [*self.inputs, some_inputs(self, data, place, path)]
            self.notes[place][module].append(note)
        self.paths = {**self.paths, task: chosen}

    def features(self, batch: Any, path: list[Weights]) -> Tensor:
        """Features [B, D] of the network with a path's weights."""
        return functional_call(self.model, {name: w for weights in path for name, w in weights.items()}, (batch.x,))

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen], `LOWEST` for other tasks' classes; an unknown task is answered as the newest."""
        self.model.eval()
        task = self.heads.tasks[self.heads.place(batch.task)]
        path = [self.library[place][module] for place, module in enumerate(self.paths[str(task)])]
        return self.heads(self.features(batch, path), task)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "library", "notes", "paths", "heads", *(["inputs"] if self.latent else []))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def projected(learner: Picle, data: ImageData, place: int, path: list[Weights]) -> Tensor:
    """Inputs of the module at a place [N, R] float32 on the CPU, behind those of a path before it."""
    learner.model.eval()
    found = []
    with learner.runtime.phase("search"), torch.no_grad():
        for batch in data.test_batches(128):
            learner.runtime.check_stop()
            z = inputs_of(learner.links[place], lambda batch=batch: learner.features(batch, path)).cpu()
            gen = torch.Generator().manual_seed(rng.key(learner.runtime.seed, "projection", place) >> 1)
            size = min(learner.projection, z.shape[1])
            found.append(z @ torch.randn(z.shape[1], size, generator=gen) * size**-0.5)
    return torch.cat(found)


def split(data: Any, share: float, key: int) -> tuple[ImageData, ImageData]:
    """Samples that are trained on, and the share that is held out; a single sample is both."""
    rows = rng.permutation(key, len(data))
    count = min(len(data) - 1, max(1, round(share * len(data))))
    return (data.subset(np.sort(rows[count:])), data.subset(np.sort(rows[:count]))) if count else (data, data)


def accuracy_of(learner: Picle, data: ImageData, path: list[Weights], head: LinearHead, place: int) -> float:
    """Share of right answers on held-out samples."""
    learner.model.eval()
    right = 0
    with learner.runtime.phase("validate"), torch.no_grad():
        for batch in data.test_batches(128):
            learner.runtime.check_stop()
            assert batch.y is not None
            answers = head(learner.features(batch, path)).argmax(1)
            right += int((answers == learner.heads.targets(place, batch.y.to(answers.device))).sum())
    return right / len(data)


def check(model: Backbone, counts: dict[str, Any], latent: int, temperature: float, validation: float) -> None:
    """`UserError` for options out of range, or a network whose weights are not all that it has."""
    for name, value, least in (*((name, value, 1) for name, value in counts.items()), ("latent", latent, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"learner.{name} must be a whole number from {least}, got {value!r}")
    if not 0 < validation < 1:
        raise UserError(f"learner.validation must lie in (0, 1), got {validation}")
    if not temperature > 0:
        raise UserError(f"learner.temperature must be above 0, got {temperature}")
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        name = model.identity["name"]
        raise UserError(f"learner picle: model {name} keeps running statistics: choose model.norm=group or none")


def check_search(search: bool, latent: int, suffix: int, modules: int, epochs: int) -> None:
    """`UserError` for a search without effect, or with more paths than epochs."""
    if latent and not search:
        raise UserError(f"learner.latent={latent} has no effect with learner.search=false")
    if latent and suffix >= modules:
        raise UserError(f"learner.suffix={suffix} must be below the modules of the network, which are {modules}")
    if search and epochs <= modules + latent:
        raise UserError(
            f"learner picle trains {modules + 1 + latent} paths: it needs as many epochs, got {epochs}; "
            f"fewer learner.modules need fewer{' and so does a smaller learner.latent' if latent else ''}"
        )
