"""The contract: only its own text is within a learner's reach. For streams of texts and their counterparts of images.

The counterpart of `data_reach`, whose walk and adversary are used here.
"""

from __future__ import annotations

import contextvars
import dataclasses
import gc
from typing import Any

import numpy as np

from clbench.run.token_stream import close
from clbench.streams.tokens.image_scenario import ImageScenario
from clbench.streams.tokens.scenario import TokenScenario
from clbench.testing import adversary
from clbench.testing.data_reach import CALLS, attempt, frames
from clbench.testing.reach import Marks, found_in
from clbench.training import looks
from clbench.training.pretraining.data_mixture import Mixture, Replay


class _Holder(looks.Observer):
    """An observer with evaluation data, as the runner's has it; it looks at nothing."""

    def __init__(self, sets: list[np.ndarray]):
        self.sets = sets


def samples(scenario: TokenScenario | ImageScenario, index: int, past: bool) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """(what is not experience `index`'s, by name; what is) of a stream of texts or of images; `past`: earlier ones are too."""
    numbers = range(len(scenario.manifest.experiences))
    own_ones = [i for i in numbers if i == index or (past and i < index)]
    datas: list[Any] = [scenario.data(i) for i in numbers]
    end = -8 if isinstance(scenario, ImageScenario) else None  # behind an image stands the key of its mask
    parts = {i: [row[:end] for row in data.read(np.arange(len(data)))] for i, data in enumerate(datas)}
    foreign = {f"sample {k} of experience {i}": row for i in numbers if i not in own_ones for k, row in enumerate(parts[i])}
    for j in range(len(scenario.manifest.evals)):
        foreign |= {f"sample {k} of evaluation set {j}": row[:end] for k, row in enumerate(scenario.evaluation(j))}
    return foreign, [row for i in own_ones for row in parts[i]]


class _Walk:
    """Stands for `runtime.progress` while a learner learns, and looks around from there. `found` says what should not be."""

    def __init__(self, trial: Any, learner: Any, marks: Marks):
        self.trial, self.learner, self.marks, self.calls, self.found = trial, learner, marks, 0, None

    def __call__(self, name: str, step: int, steps: int, loss: float) -> None:
        if self.calls in CALLS and self.found is None:
            context = {"context": list(contextvars.copy_context().values())}
            roots = {"learner": self.learner, "runtime": self.learner.runtime, **context, **frames(self.trial)}
            self.found = found_in(roots, self.marks, (self, self.trial))
        self.calls += 1


def check_only_own_text_is_reachable(trial: Any) -> None:
    """Nothing that hangs on experience, model, runtime or learner is a sample of somebody else, nor of an ended experience."""
    learner, can = trial.start(), trial.capabilities
    past = can.stores_all_data or can.stores_exemplars
    observer = _Holder([trial.scenario.evaluation(j) for j in range(len(trial.scenario.manifest.evals))])
    for index in range(2):
        foreign, own = samples(trial.scenario, index, past)
        marks, experience = Marks(foreign, own), trial.experience(index)
        assert len(marks), "no sample of this stream can be told from the others"
        found = found_in({"experience": experience, "read": experience.train.read(np.arange(4))}, marks)
        assert found is None, f"before learn, a sample of somebody else can be reached at {found}"
        learner.runtime.progress = walk = _Walk(trial, learner, marks)
        with looks.observed_by(observer):
            trial.learn(learner, index)
        learner.runtime.progress = None
        assert walk.found is None, f"inside learn, a sample of somebody else can be reached at {walk.found}"
        if not can.stores_all_data:
            close(experience)
        gc.collect()
        ended = {} if past else {f"sample {k} of the ended experience": row for k, row in enumerate(own)}
        found = found_in({"learner": learner, "experience": experience}, Marks(foreign | ended, own if past else []))
        assert found is None, f"after experience {index}, a sample of it or of somebody else can be reached at {found}"


def check_text_adversary(trial: Any) -> None:
    """None of the known ways leads from an experience, its batches or the runtime to somebody else's samples."""
    learner, can = trial.start(), trial.capabilities
    past = can.stores_all_data or can.stores_exemplars
    ended, live = trial.experience(0), trial.experience(1)
    old: Any = ended.train
    held: dict[str, Any] = {"data": old, "replaced": dataclasses.replace(old, first=0)}
    held["mixture"] = Mixture(old, [], Replay(), np.ones((2, 1)))
    close(ended)
    ids = np.arange(len(live.train), 2 * len(live.train) + 40)
    observer = _Holder([trial.scenario.evaluation(j) for j in range(len(trial.scenario.manifest.evals))])
    given = adversary.Given(live, held, [], None, learner.runtime, learner, ids)
    late = {name: way for name, way in adversary.TEXTS.items() if name.endswith("after the experience")}
    with looks.observed_by(observer):
        attempt(late, given, Marks(*samples(trial.scenario, 1, False)))
        attempt(
            {n: way for n, way in adversary.TEXTS.items() if n not in late}, given, Marks(*samples(trial.scenario, 1, past))
        )
