"""PICLE: modular continual learning by probabilistic search (Valkov, Srivastava, Chaudhuri & Sutton, ICLR 2024, "A
Probabilistic Framework for Modular Continual Learning"). The task of a sample must be disclosed, at test time too.

The network is a path of L modules, each from a library of frozen ones or new, with a head for each task. A new task
  1. trains a path of new modules alone;
  2. chooses a prefix of the library's modules, greedily: at place l the module m of the largest
       log prior(m) + sum over samples of log N(P z | m),  prior = softmax(performance of m / `temperature`)
     z is the input of place l behind the modules chosen so far, P a fixed random projection, N(. | m) a Gaussian of P z on a
     task that uses m. Prefixes of every length l are tried: the modules behind are new and trained, with the head;
  3. keeps the path that is best on a held-out share of its own samples; its new modules join the library, and every module of
     the path gets a Gaussian of its inputs and the path's accuracy.
What a task uses is never trained again: answers for it stay the same to the last bit.

This is the search for perceptual and few-shot transfer. That for latent transfer (suffixes, by Bayesian optimisation) is left
out. `search=false` trains new modules alone: the standalone reference.
Choices: modules are groups of the network's layers or blocks, new ones start with its first weights; a module that several
tasks use has a Gaussian for each, of which the most likely counts, and the prior takes its best performance; a covariance gets
a ridge of 1e-3 of the mean variance (the release refuses fewer samples than dimensions); of equal accuracies the path with most
old modules is kept. The epochs of an experience are shared equally by its paths, since a budget counts them all. A task that
comes back is searched anew; its path and head take the place of the old ones. Its listed bytes are those with `search=false`,
where every task adds all modules: the most it holds.
Constants: the release's (projection 20, temperature 0.001, AdamW, batch 32, weight decay about 0.97; 1,200 epochs a path). The
rate, the share of held-out samples and the number of modules are choices.
Published numbers: none read.

Legend: L places, D numbers of a module's input, R its projection, N samples.
"""

from __future__ import annotations

import copy
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
    """

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True, needs_passes=4, needs_random_access=True)

    @staticmethod
    def capabilities_of(*, modules: int = 3, search: bool = True, **options: Any) -> Capabilities:
        """Each path needs a pass: one of new modules alone, and one for each length of a prefix."""
        return replace(Picle.capabilities, needs_passes=modules + 1 if search else 1)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        modules: int = 3,  # at most: places of a path
        search: bool = True,  # false: new modules alone (the standalone reference)
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
        check(model, modules, projection, temperature, validation)
        self.model, self.runtime, self.search = model, runtime, search
        self.links = chain(model, modules)
        self.projection, self.temperature, self.share = projection, temperature, validation
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe(optimizer, momentum, weight_decay=weight_decay, schedule=schedule)
        model.requires_grad_(False)
        if search and self.epochs <= len(self.links):
            raise UserError(
                f"learner picle trains {len(self.links) + 1} paths: it needs as many epochs, got {self.epochs}; "
                "fewer learner.modules need fewer"
            )
        self.heads = TaskHead(model.num_features).to(runtime.device)
        self.library: list[list[Weights]] = [[] for _ in self.links]
        self.notes: list[list[list[tuple[Tensor, Tensor, float]]]] = [[] for _ in self.links]
        self.paths: dict[str, list[int]] = {}

    def learn(self, experience: Experience) -> dict[str, float]:
        """Try paths, keep the best."""
        assert experience.task is not None
        place = self.heads.grow(experience.task, experience.classes, self.runtime.generator("head"))
        train, held = split(experience.train, self.share, self.runtime.key("validation"))
        prefixes = [list[int](), *(self.prefixes(train) if self.search else [])]
        best: tuple[float, list[int], list[Weights], LinearHead] | None = None
        log: dict[str, float] = {}
        for prefix in prefixes:
            path, head = self.start(prefix), copy.deepcopy(self.heads.at(place))
            log |= self.train(train, path, head, place, len(prefix), self.epochs // len(prefixes))
            accuracy = accuracy_of(self, held, path, head, place)
            if best is None or accuracy >= best[0]:
                best = accuracy, prefix, path, head
        assert best is not None
        accuracy, prefix, path, head = best
        self.heads.at(place).load_state_dict(head.state_dict())
        self.keep(str(experience.task), prefix, path, accuracy, train)
        sizes = {"library": float(sum(map(len, self.library))), "reused": float(len(prefix)), "paths": float(len(prefixes))}
        return {**log, **sizes, "validation": accuracy}

    def prefixes(self, data: ImageData) -> list[list[int]]:
        """The chosen modules of the library, in prefixes of length 1 to L; none before there is a library."""
        found: list[list[int]] = []
        for place, notes in enumerate(self.notes):
            if not notes:
                break
            before = found[-1] if found else []
            z = self.projected(data, place, self.start(before))
            found.append([*before, int(log_posterior(z, notes, self.temperature).argmax())])
        return found

    def start(self, prefix: list[int]) -> list[Weights]:
        """A path: modules of the library, then new ones."""
        own = dict(self.model.named_parameters())
        new = [{name: own[name].detach().clone() for name in link.names} for link in self.links[len(prefix) :]]
        return [self.library[place][module] for place, module in enumerate(prefix)] + new

    def projected(self, data: ImageData, place: int, path: list[Weights]) -> Tensor:
        """Inputs of the module at a place [N, R] float32 on the CPU, behind those of a path before it."""
        self.model.eval()
        found = []
        with self.runtime.phase("search"), torch.no_grad():
            for batch in data.test_batches(128):
                self.runtime.check_stop()
                z = inputs_of(self.links[place], lambda batch=batch: self.features(batch, path)).cpu()
                gen = torch.Generator().manual_seed(rng.key(self.runtime.seed, "projection", place) >> 1)
                size = min(self.projection, z.shape[1])
                found.append(z @ torch.randn(z.shape[1], size, generator=gen) * size**-0.5)
        return torch.cat(found)

    def train(
        self, data: ImageData, path: list[Weights], head: LinearHead, place: int, old: int, epochs: int
    ) -> dict[str, float]:
        """Train the modules of a path behind the first `old`, and a head."""
        fresh = [w.requires_grad_() for weights in path[old:] for w in weights.values()]
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(head(self.features(batch, path)), self.heads.targets(place, batch.y))

        batches = shuffled(data, self.batch_size, epochs, self.runtime.key("train", old))
        groups = [{"params": fresh, "lr": self.lr}, *groups_of((head, self.lr))]
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        for w in fresh:
            w.requires_grad_(False)
        return log

    def keep(self, task: str, prefix: list[int], path: list[Weights], accuracy: float, data: ImageData) -> None:
        """New modules join the library; all of the path get a Gaussian of their inputs and the accuracy."""
        chosen = [*prefix, *(len(modules) for modules in self.library[len(prefix) :])]
        for place, module in enumerate(chosen):
            note = (*gaussian(self.projected(data, place, path)), accuracy)
            if module == len(self.library[place]):
                self.library[place].append(path[place])
                self.notes[place].append([])
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
        return collect(self, "library", "notes", "paths", "heads")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


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


def check(model: Backbone, modules: int, projection: int, temperature: float, validation: float) -> None:
    """`UserError` for options out of range, or a network whose weights are not all that it has."""
    for name, value in (("modules", modules), ("projection", projection)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"learner.{name} must be a whole number from 1, got {value!r}")
    if not 0 < validation < 1:
        raise UserError(f"learner.validation must lie in (0, 1), got {validation}")
    if not temperature > 0:
        raise UserError(f"learner.temperature must be above 0, got {temperature}")
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        name = model.identity["name"]
        raise UserError(f"learner picle: model {name} keeps running statistics: choose model.norm=group or none")
