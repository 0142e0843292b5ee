"""The contract: only its own data is within a learner's reach. See `contract`.

The *walk* goes through all that hangs on the experience, its batches, the model, the runtime, the learner and the local
variables of `learn`, while it runs and after the experience has ended, and looks for samples of others: pixels, orders of
labels, remembered features, texts. The *adversary* tries the ways of `adversary` one by one.
"""

from __future__ import annotations

import contextvars
import dataclasses
import gc
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from clbench.config.compose import build
from clbench.streams.eval_sets import open_eval
from clbench.streams.handles import opened
from clbench.streams.images.data import open_experience
from clbench.streams.scenario import Scenario
from clbench.streams.stored import Stored
from clbench.streams.tokens.scenario import TokenScenario
from clbench.testing import adversary, anytime
from clbench.testing.reach import Marks, first_found, found_in, numbers_in
from clbench.testing.trial import old_set_aside
from clbench.training import looks
from clbench.training.pretraining.data_mixture import Mixture, Replay

CALLS = (0, 2)  # calls of the runtime inside one `learn` at which everything is walked through


def pixels(scenario: Scenario, pipeline: Any, ids: Iterable[int]) -> dict[str, np.ndarray]:
    """Stored pixels in both layouts and the model's input under the test view, by name, of samples by id."""
    chosen = np.array(sorted(ids), np.int64)
    if not len(chosen):
        return {}
    source = scenario.dataset.images
    x = Stored.issue(source, chosen, chosen, "marks").pixels(pipeline, chosen, None).cpu().numpy()
    made: dict[str, np.ndarray] = {}
    for i, image, view in zip(chosen.tolist(), source.raw(chosen), x, strict=True):
        made |= {f"pixels of sample {i}": image, f"pixels of sample {i}, by channel": image.transpose(2, 0, 1)}
        made[f"model input of sample {i}"] = view
    return made


def labels(scenario: Scenario, besides: Iterable[int]) -> dict[str, np.ndarray]:
    """Orders of labels that cannot be guessed: of the data set, of evaluation sets, of experiences other than `besides`."""
    manifest, y = scenario.manifest, scenario.dataset.y
    parts = {f"labels of {e.name}": y[e.train] for i, e in enumerate(manifest.experiences) if i not in set(besides)}
    parts |= {f"labels of evaluation set {e.name}": y[e.ids] for e in manifest.evals} | {"labels of the data set": y}
    renumbered = {f"{name}, renumbered": _renumbered(scenario, part) for name, part in parts.items()}
    return {name: part for name, part in (parts | renumbered).items() if (np.diff(part) < 0).any()}


def _renumbered(scenario: Scenario, y: np.ndarray) -> np.ndarray:
    table = np.full(scenario.dataset.num_classes, -1, np.int64)
    table[list(scenario.manifest.renumber)] = list(scenario.manifest.renumber.values())
    return table[y]


def samples(scenario: TokenScenario, index: int, past: bool) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """(what is not experience `index`'s, by name; what is) of a stream of texts or of images; `past`: earlier ones are too."""
    numbers = range(len(scenario.manifest.experiences))
    own_ones = [i for i in numbers if i == index or (past and i < index)]
    datas: list[Any] = [scenario.data(i) for i in numbers]
    end = -8 if scenario.manifest.unit == "images" else None  # behind an image stands the key of its mask
    parts = {i: [row[:end] for row in data.read(np.arange(len(data)))] for i, data in enumerate(datas)}
    foreign = {f"sample {k} of experience {i}": row for i in numbers if i not in own_ones for k, row in enumerate(parts[i])}
    for j in range(len(scenario.manifest.evals)):
        foreign |= {f"sample {k} of evaluation set {j}": row[:end] for k, row in enumerate(scenario.evaluation(j))}
    return foreign, [row for i in own_ones for row in parts[i]]


def remembered(model: Any, besides: set[int]) -> dict[str, np.ndarray]:
    """Features that the model remembers of samples other than `besides`, by name."""
    if not hasattr(model, "memory"):
        return {}
    rows = opened(model.memory._table).rows
    return {f"features of sample {name[1]}": row.numpy() for name, row in rows.items() if name[1] not in besides}


def frames(trial: Any) -> dict[str, Any]:
    """Local variables of every function between the caller and the trial's `learn`, by name."""
    found: dict[str, Any] = {}
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not type(trial).learn.__code__:
        found[f"local variables of {frame.f_code.co_name}"] = dict(frame.f_locals)
        frame = frame.f_back
    return found


class _Images:
    """What is known of a stream of images when a learner learns experience `index`, and how to look for samples of others."""

    where = "check_stop"  # of the runtime: what is called inside `learn`

    def __init__(self, trial: Any, learner: Any, runtime: Any, pipeline: Any, index: int):
        self.trial, self.learner, self.runtime, self.pipeline, self.index = trial, learner, runtime, pipeline, index
        manifest = trial.scenario.manifest
        self.train = [set(map(int, e.train)) for e in manifest.experiences]
        self.tests = {int(i) for e in manifest.evals for i in e.ids}

    def observed(self) -> AbstractContextManager[None]:
        """Nobody looks while it learns."""
        return nullcontext()

    def given(self) -> dict[str, Any]:
        """An experience with what can be made of it, before anything is learned."""
        experience = open_experience(self.trial.scenario, self.index, self.pipeline)
        held = adversary.hold(experience)
        more = {"decoded": experience.train.batch([0]).x, "issued": held["shuffled batches"](0)}
        return {"experience": experience, **held, **more}

    def allowed(self, running: bool) -> set[int]:
        """Samples that may be held: the experience's own while it runs, and what the learner declares that it stores."""
        can, past = self.trial.capabilities, set[int]().union(*self.train[: self.index + 1])
        own = self.train[self.index] if running else set()
        if can.stores_all_data:
            return past
        if can.stores_exemplars:
            held = getattr(getattr(self.learner, "memory", None), "ids", None)
            asked = self.tests if can.adapts_at_test else set[int]()  # images of `predict`, which has no labels
            return (past if held is None else own | set(map(int, held))) | asked
        return own

    def look(self, more: dict[str, Any], running: bool) -> str | None:
        """Where a foreign sample can be reached from the learner, its model and runtime, and `more`."""
        scenario, can, allowed = self.trial.scenario, self.trial.capabilities, self.allowed(running)
        model, skip = getattr(self.learner, "model", None), (self, self.trial)
        everything = self.tests.union(*self.train)
        own = list(pixels(scenario, self.pipeline, allowed).values())
        foreign = pixels(scenario, self.pipeline, everything - allowed) | remembered(model, everything - self.tests)
        roots = {"learner": self.learner, "runtime": self.runtime, "model": model} | more
        within = numbers_in(roots, skip)
        if found := first_found(within, Marks(foreign, own)):
            return found
        given = {name: root for name, root in roots.items() if name != "learner" and not name.startswith("local variables")}
        features = Marks(remembered(model, allowed))
        if len(features) and (found := found_in(given, features, (*skip, self.learner))):
            return found
        if can.stores_all_data or can.stores_exemplars:
            return None
        y = scenario.dataset.y[scenario.manifest.experiences[self.index].train]
        return first_found(within, Marks(labels(scenario, [self.index]), [y, _renumbered(scenario, y)], least=2))


class _Texts:
    """The same of a stream of texts or of groups of images, whose learners answer with losses."""

    where = "progress"

    def __init__(self, trial: Any, learner: Any, runtime: Any, pipeline: Any, index: int):
        self.trial, self.learner, self.runtime, self.index = trial, learner, runtime, index
        self.foreign, self.own = samples(trial.scenario, index, trial.keeps_past)
        assert len(Marks(self.foreign, self.own)), "no sample of this stream can be told from the others"

    def observed(self) -> AbstractContextManager[None]:
        """An observer with evaluation data looks while it learns, as the runner's does."""
        return looks.observed_by(_holder(self.trial.scenario))

    def given(self) -> dict[str, Any]:
        """An experience, and its first sequences."""
        experience: Any = self.trial.open(self.index, None)
        return {"experience": experience, "read": experience.train.read(np.arange(4))}

    def look(self, more: dict[str, Any], running: bool) -> str | None:
        """Where a foreign sample, or one of an ended experience, can be reached from the learner, its runtime, and `more`."""
        roots = {"learner": self.learner, "runtime": self.runtime, "context": list(contextvars.copy_context().values())} | more
        keeps = self.trial.keeps_past
        ended = {} if keeps or running else {f"sample {k} of the ended experience": row for k, row in enumerate(self.own)}
        return found_in(roots, Marks(self.foreign | ended, self.own if keeps or running else []), (self, self.trial))


class _Edits(_Texts):
    """The same of a stream of edits: requests of others, and what is asked."""

    def __init__(self, trial: Any, learner: Any, runtime: Any, pipeline: Any, index: int):
        self.trial, self.learner, self.runtime, self.index = trial, learner, runtime, index
        made, m = trial.scenario.questions, trial.scenario.manifest
        prompts = {i: [made.requests[r].prompt for r in e.train] for i, e in enumerate(m.experiences)}
        keeps = trial.capabilities.stores_exemplars or trial.capabilities.stores_all_data
        mine = [i for i in prompts if i == index or (keeps and i < index)]
        self.own = [row for i in mine for row in prompts[i]]
        foreign = {f"request {k} of experience {i}": row for i in prompts if i not in mine for k, row in enumerate(prompts[i])}
        foreign |= {f"probe {k}": probe.prompt for k, probe in enumerate(made.probes)}
        self.foreign = foreign | {f"row {k} of old text that is asked": row for k, row in enumerate(made.old)}

    def observed(self) -> AbstractContextManager[None]:
        """Nobody looks while it learns."""
        return nullcontext()

    def given(self) -> dict[str, Any]:
        """An experience, and its first request."""
        experience: Any = self.trial.open(self.index, None)
        return {"experience": experience, "request": experience.train.request(0)}

    def look(self, more: dict[str, Any], running: bool) -> str | None:
        """Where a foreign request or probe, or a request of an ended experience, can be reached."""
        roots = {"learner": self.learner, "runtime": self.runtime} | more
        keeps = self.trial.capabilities.stores_exemplars or self.trial.capabilities.stores_all_data
        ended = {} if keeps or running else {f"request {k} of the ended experience": row for k, row in enumerate(self.own)}
        return found_in(roots, Marks(self.foreign | ended, self.own if keeps or running else []), (self, self.trial))


class _Lines(_Edits):
    """The same of a stream of text tasks: lines of other tasks, and those that are asked."""

    def __init__(self, trial: Any, learner: Any, runtime: Any, pipeline: Any, index: int):
        self.trial, self.learner, self.runtime, self.index = trial, learner, runtime, index
        lines, m = trial.scenario.lines, trial.scenario.manifest
        parts = {i: [lines.line(k) for k in e.train] for i, e in enumerate(m.experiences)}
        keeps = trial.capabilities.stores_exemplars or trial.capabilities.stores_all_data
        mine = [i for i in parts if i == index or (keeps and i < index)]
        self.own = [row for i in mine for row in parts[i]]
        self.foreign = {f"line {k} of experience {i}": row for i in parts if i not in mine for k, row in enumerate(parts[i])}
        self.foreign |= {f"line {i} that is asked": lines.line(i) for e in m.evals for i in e.ids}
        self.foreign |= {f"row {k} of old text": row for k, row in enumerate(trial.scenario.old)}

    def given(self) -> dict[str, Any]:
        """An experience, and its first lines."""
        experience: Any = self.trial.open(self.index, None)
        return {"experience": experience, "batch": experience.train.batch(np.arange(4))}


class _Walk:
    """Stands for a method of the runtime while a learner learns, and looks around there. `found` says what should not be."""

    def __init__(self, at: _Images | _Texts):
        self.at, self.plain, self.calls, self.found = at, getattr(at.runtime, at.where), 0, None

    def __call__(self, *args: Any) -> None:
        if self.calls in CALLS and self.found is None:
            self.found = self.at.look(frames(self.at.trial), True)
        self.calls += 1
        if self.plain is not None:
            self.plain(*args)


def check_only_own_data_is_reachable(trial: Any) -> None:
    """Nothing that hangs on experience, batches, model, runtime or learner is another's image, nor of what has ended."""
    _check_reach(trial, _Images)


def check_only_own_text_is_reachable(trial: Any) -> None:
    """The same of sequences."""
    _check_reach(trial, _Texts)


def check_only_own_requests_are_reachable(trial: Any) -> None:
    """The same of requests and probes."""
    _check_reach(trial, _Edits)


def check_only_own_lines_are_reachable(trial: Any) -> None:
    """The same of lines of text tasks."""
    _check_reach(trial, _Lines)


def _check_reach(trial: Any, kind: Any) -> None:
    with old_set_aside():
        _walk_at_every_place(trial, kind)


def _walk_at_every_place(trial: Any, kind: Any) -> None:
    learner, runtime, pipeline = trial.start()
    for index in range(2):
        at = kind(trial, learner, runtime, pipeline, index)
        found = at.look(at.given(), True)
        assert found is None, f"before learn, a sample of somebody else can be reached at {found}"
        walk = _Walk(at)
        setattr(runtime, at.where, walk)
        try:
            with at.observed():
                experience = trial.learn(learner, runtime, pipeline, index)
        finally:
            delattr(runtime, at.where)
        assert walk.found is None, f"inside learn, a sample of somebody else can be reached at {walk.found}"
        trial.answers(learner, pipeline)
        if not trial.capabilities.stores_all_data:
            close(experience)
        gc.collect()
        found = at.look({"experience": experience}, False)
        assert found is None, f"after experience {index}, a sample of it or of somebody else can be reached at {found}"


def check_adversary(trial: Any) -> None:
    """None of the known ways leads from an experience, its batches, the model or the runtime to somebody else's samples."""
    learner, runtime, pipeline = trial.start()
    model, scenario = build(trial.config["model"]), trial.scenario
    model.freeze()
    model.memory.attach(None, scenario.dataset.images)
    ended, test = open_experience(scenario, 0, pipeline), list[Any]()
    with torch.no_grad():
        for batch in ended.train.test_batches(5):
            model.features(batch)
        for again in (False, True):
            for batch, _ in open_eval(scenario, 0, pipeline).batches(5):
                model.features(batch)
                test += [batch] * again
    assert all(batch._x is None for batch in test), "remembered features need no pixels"
    held = adversary.hold(ended)
    trial.learn(learner, runtime, pipeline, 0)
    close(ended)
    live = open_experience(scenario, 1, pipeline)
    own = set(live.train.ids.tolist())
    everything = {int(i) for e in scenario.manifest.experiences for i in e.train}
    everything |= {int(i) for e in scenario.manifest.evals for i in e.ids}
    known = remembered(model, own)
    assert known, "a frozen model remembered nothing: the ways to its features were not tried"
    marks = Marks(pixels(scenario, pipeline, everything - own) | known, list(pixels(scenario, pipeline, own).values()))
    ids = np.array(sorted(everything - own), np.int64)
    with torch.no_grad():
        attempt(adversary.IMAGES, adversary.Given(live, held, test, model, runtime, learner, ids), marks)


def check_text_adversary(trial: Any) -> None:
    """None of the known ways leads from an experience, its batches or the runtime to somebody else's samples."""
    learner, runtime, pipeline = trial.start()
    ended, live = trial.open(0, pipeline), trial.open(1, pipeline)
    old: Any = ended.train
    held: dict[str, Any] = {"data": old, "replaced": dataclasses.replace(old, first=0)}
    held["mixture"] = Mixture(old, [], Replay(), np.ones((2, 1)))
    close(ended)
    ids = np.arange(len(live.train), 2 * len(live.train) + 40)
    given = adversary.Given(live, held, [], None, runtime, learner, ids)
    late = {name: way for name, way in adversary.TEXTS.items() if name.endswith("after the experience")}
    early = {name: way for name, way in adversary.TEXTS.items() if name not in late}
    with looks.observed_by(_holder(trial.scenario)):
        attempt(late, given, Marks(*samples(trial.scenario, 1, False)))
        attempt(early, given, Marks(*samples(trial.scenario, 1, trial.keeps_past)))


def close(experience: Any) -> None:
    """It is over: its data, and that of earlier experiences that came with it, cannot be read any more."""
    for data in (experience.train, *experience.past):
        data.close()


def _holder(scenario: TokenScenario) -> anytime.Idle:
    return anytime.Idle([scenario.evaluation(j) for j in range(len(scenario.manifest.evals))])


def attempt(ways: dict[str, Callable[[Any], Any]], given: Any, marks: Marks) -> None:
    """Try every way; AssertionError where one gets hold of a marked sample."""
    for name, way in ways.items():
        try:
            got = way(given)
        except Exception:  # refused: whatever is raised, nothing came back
            continue
        found = found_in({"it": got}, marks)
        assert found is None, f"{name}: {found}"
