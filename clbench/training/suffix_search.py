"""The search for latent transfer of PICLE (`learners/picle.py`): which suffixes of earlier paths are tried behind new modules.

A learner has links, a library, paths and heads of tasks; its suffixes start at place `begins` with the stored `inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from torch import Tensor
from torch.func import functional_call

from clbench.models.chain import inputs_of, run_from
from clbench.streams import rng

STORED = 40  # inputs of a module that suffixes are compared on
IMPROVEMENT = 1e-3  # expected of a suffix that is still tried


def next_suffix(outputs_SO: np.ndarray, tried: dict[int, float]) -> int | None:
    """Which suffix to try next, given the outputs of each on the stored inputs and the accuracies of those tried.

    The distance of suffixes is that of their outputs. None where all are tried or too little is expected of the rest.
    """
    gaps = np.linalg.norm(outputs_SO[:, None] - outputs_SO[None], axis=2)
    rest = [i for i in range(len(gaps)) if i not in tried]
    if len(tried) < 2 or not rest:
        return min(rest, key=lambda i: gaps[i].mean(), default=None)
    scale = float(np.median(gaps[np.triu_indices(len(gaps), 1)])) or 1.0
    fixed: Any = {"alpha": 1e-6, "optimizer": None, "normalize_y": True}
    fitted = GaussianProcessRegressor(RBF(scale), **fixed)
    fitted.fit(outputs_SO[list(tried)], np.array(list(tried.values())))
    mean, std = fitted.predict(outputs_SO[rest], return_std=True)
    gain, std = mean - max(tried.values()), np.maximum(std, 1e-12)
    expected = gain * norm.cdf(gain / std) + std * norm.pdf(gain / std)
    return rest[int(expected.argmax())] if expected.max() >= IMPROVEMENT else None


@dataclass(frozen=True)
class Candidate:
    """A path to train: the library's module at each place (None: a new one), and the task whose head it takes unchanged."""

    modules: tuple[int | None, ...]
    head_of: int | None = None

    @property
    def old(self) -> int:
        """Modules of the library."""
        return sum(module is not None for module in self.modules)


def donors(learner: Any, place: int) -> list[int]:
    """Earlier tasks whose suffix and head fit the task at a place of the heads."""
    size = learner.heads.at(place).num_classes
    others = [i for i in range(len(learner.heads.tasks)) if i != place]
    return [learner.heads.tasks[i] for i in others if learner.heads.at(i).num_classes == size]


def search_suffix(learner: Any, fitting: Sequence[int], tried: Callable[[Candidate, int], float]) -> int:
    """Try suffixes of paths of fitting tasks, then longer ones of the best -> how many."""

    def behind(task: int, start: int) -> Candidate:
        return Candidate((*[None] * start, *learner.paths[str(task)][start:]), task)

    answers, found = np.stack([outputs(learner, task) for task in fitting]), dict[int, float]()
    while len(found) < learner.latent and (i := next_suffix(answers, found)) is not None:
        found[i] = tried(behind(fitting[i], learner.begins), learner.runtime.key("train", "suffix", len(found)))
    best = fitting[max(found, key=found.__getitem__)]
    longer = range(learner.begins - 1, 0, -1)[: learner.latent - len(found)]
    for start in longer:
        tried(behind(best, start), learner.runtime.key("train", "longer suffix", start))
    return len(found) + len(longer)


@torch.no_grad()
def outputs(learner: Any, task: int) -> np.ndarray:
    """Probabilities that the suffix of a task's path and its head give for all stored inputs, in one row."""
    learner.model.eval()
    z = torch.cat(learner.inputs).to(learner.runtime.device)
    path = [learner.library[place][module] for place, module in enumerate(learner.paths[str(task)])]
    weights = {name: w for part in path for name, w in part.items()}
    start, model = learner.links[learner.begins], learner.model
    features = run_from(start, z, model, lambda x: functional_call(model, weights, (x,)))
    logits = learner.heads.at(learner.heads.place(task))(features)
    return logits.double().softmax(1).flatten().cpu().numpy()


@torch.no_grad()
def some_inputs(learner: Any, data: Any, place: int, path: Any) -> Tensor:
    """Inputs of the module at a place for a few samples [at most STORED, ...]."""
    learner.model.eval()
    rows = np.sort(rng.permutation(learner.runtime.key("inputs"), len(data))[:STORED])
    batch = next(iter(data.subset(rows).test_batches(STORED)))
    return inputs_of(learner.links[place], lambda: learner.features(batch, path), flat=False)
