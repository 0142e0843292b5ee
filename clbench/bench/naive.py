"""Naive versions of learners: the same methods, computed as published code computes them.

What that means, and nothing beyond it: fp32 with torch's defaults (MKL or cuBLAS products, fused attention), PIL and
torchvision for each image, a loader for each purpose (for class statistics one a class, where the released code has it), the
test images of all classes seen passed again after every experience, features of frozen networks computed whenever they are
needed, accuracy logged as often as the released code logs it, MOS's retrieval one sample after another over all adapters. The
modules, heads and losses are clbench's own, so a ratio says what is gained by passes, arithmetic and data path alone. The
loaders have no worker processes on a CPU: there, starting them costs more than they bring, and that would flatter clbench.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench.bench import naive_data
from clbench.config.compose import build
from clbench.interfaces import Experience, Place, UserError
from clbench.run.runner import Job
from clbench.streams.images.data import open_experience
from clbench.training.runtime import Runtime

Scores = Callable[[Tensor], Tensor]
EVAL_BATCH = 128


@dataclass
class Stage:
    """What a naive learner stands on: the job's scenario and network, loaders, a clock, and the counts of its answers."""

    job: Job
    runtime: Runtime
    workers: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    accuracy: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model, self.options = self.job.model, dict(self.job.config["learner"])
        self.views = {train: naive_data.transform(self._profile(train), train) for train in (True, False)}

    def _profile(self, train: bool) -> Any:
        return self.job.pipeline.train if train else self.job.pipeline.profile

    def experiences(self) -> Iterator[Experience]:
        """All of them, one after another."""
        for index in range(len(self.job.scenario.manifest.experiences)):
            experience = open_experience(self.job.scenario, index, self.job.pipeline)
            self.runtime.begin(index, len(experience.train))
            yield experience

    @property
    def epochs(self) -> int:
        """Passes over an experience's data."""
        return self.runtime.epochs(self.options.get("epochs"))

    def pet(self) -> Any:
        """The learner's module, attached."""
        return build(self.options["pet"])(self.model, self.runtime)

    def loader(self, experience: Experience, batch: int, train: bool, drop_last: bool = False, only: int | None = None) -> Any:
        """Of the experience's images, or those of the class `only`; shuffled and augmented for training."""
        data: Any = experience.train
        rows = np.arange(len(data)) if only is None else np.flatnonzero(data.y == only)
        key = self.runtime.key("train") if train else None
        view = self.views[train]
        images = self.job.scenario.dataset.images
        return naive_data.loader(images, data.ids[rows], data.y[rows], view, batch, self.workers, key, drop_last)

    def tests(self, experience: Experience, batch: int = EVAL_BATCH) -> Any:
        """All test images of the classes seen so far."""
        scenario = self.job.scenario
        seen = [e for e in scenario.manifest.evals if e.first_seen <= experience.index]
        ids = np.concatenate([np.asarray(e.ids, np.int64) for e in seen])
        y = np.array([scenario.manifest.renumber[int(c)] for c in scenario.dataset.y[ids]])
        return naive_data.loader(scenario.dataset.images, ids, y, self.views[False], batch, self.workers, None)

    def extract(self, batches: Any) -> tuple[Tensor, Tensor]:
        """Features [N, D] under what is in use now, labels [N]."""
        self.model.eval()
        features, labels = [], []
        with torch.no_grad():
            for _, x, y in batches:
                features.append(self.model.features(x.to(self.runtime.device)))
                labels.append(y)
        return torch.cat(features), torch.cat(labels).to(features[0].device)

    def right(self, batches: Any, scores: Scores) -> float:
        """Accuracy, one pass over the images."""
        self.model.eval()
        hits = total = 0
        with torch.no_grad():
            for _, x, y in batches:
                answer = scores(x.to(self.runtime.device)).argmax(dim=1).cpu()
                hits, total = hits + int((answer == y).sum()), total + len(y)
        return hits / total

    def judge(self, experience: Experience, scores: Scores) -> None:
        """The accuracy after an experience."""
        with self.phase("evaluate"):
            self.accuracy.append(self.right(self.tests(experience), scores))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a piece of work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def train(
        self,
        batches: Any,
        groups: list[dict[str, Any]],
        loss: Callable[[Tensor, Tensor], Tensor],
        each_epoch: Callable[[int], None] = lambda epoch: None,
        each_step: Callable[[], None] = lambda: None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        mode: Callable[[], Any] = lambda: None,
    ) -> None:
        """All epochs: `loss(x, y)`, step, schedule; `each_epoch` is where published code logs. `mode` sets training mode."""
        o, epochs, done = self.options, self.epochs, 0
        make = optimizer or (lambda g: torch.optim.SGD(g, momentum=o["momentum"], weight_decay=float(o["weight_decay"])))
        groups = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
        stepper, rates, steps = make(groups), [g["lr"] for g in groups], epochs * len(batches)
        schedule = build(o["schedule"])
        for epoch in range(epochs):
            mode()
            batches.sampler.epoch = epoch
            with self.phase("train"):
                for _, x, y in batches:
                    place = Place(self.runtime.experience, done, steps, done)
                    for group, rate in zip(stepper.param_groups, rates, strict=True):
                        group["lr"] = rate * schedule(place)
                    self.runtime.count_visits(len(y), 0)
                    value = loss(x.to(self.runtime.device), y.to(self.runtime.device))
                    stepper.zero_grad()
                    value.backward()
                    stepper.step()
                    each_step()
                    value.item()  # as published code does to show the loss
                    done += 1
            with self.phase("log"):
                each_epoch(epoch)


def groups_of(*parts: tuple[nn.Module, float]) -> list[dict[str, Any]]:
    """Parameter groups with their rates."""
    return [{"params": list(module.parameters()), "lr": rate} for module, rate in parts]


def known() -> dict[str, Callable[[Stage], None]]:
    """Learners by name that have a naive version."""
    from clbench.bench import naive_ease, naive_frozen, naive_mos, naive_trained

    return {
        "ncm": naive_frozen.ncm,
        "fecam": naive_frozen.fecam,
        "ranpac": naive_frozen.ranpac,
        "aper": naive_frozen.aper,
        "finetune": naive_trained.finetune,
        "slca": naive_trained.slca,
        "lae": naive_trained.lae,
        "ease": naive_ease.ease,
        "mos": naive_mos.mos,
    }


def run(job: Job, workers: int) -> Stage:
    """Run the naive version of the job's learner -> its stage with seconds, accuracies and the network's passes.

    `UserError` where there is none: other learners, and streams in which classes come back or tasks are disclosed.
    """
    name = job.config.get("names", {}).get("learner")
    facts = job.scenario.facts()
    if name not in known():
        raise UserError(f"learner {name} has no naive version to compare with (those that have: {', '.join(known())})")
    if facts.discloses_task or not (facts.every_experience_has_new_classes and facts.every_class_comes_once):
        raise UserError(f"naive versions are of class-incremental streams, {job.scenario.name} is none")
    runtime = Runtime(seed=job.config["seed"], device=job.device, budget=job.scenario.budget)
    stage = Stage(job, runtime, workers)
    start = time.perf_counter()
    known()[name](stage)
    stage.seconds["total"] = time.perf_counter() - start
    return stage
