"""Ways in which a learner could get at samples that are not its own: none may work. Used by `data_reach`.

Each is a function of what a learner holds, written as somebody would who knows the inside of clbench. What it returns is looked
through for samples of others; an exception is a refusal.
"""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clbench.interfaces import Experience
from clbench.streams.handles import Handle
from clbench.streams.images.data import ImageBatch, ImageData, ShuffledBatches, shuffled
from clbench.streams.scenario import ArrayImages
from clbench.streams.stored import Stored


@dataclass
class Given:
    """What a learner holds in an experience: `live`, what it kept of one that has ended (`held`) and of test batches (`test`).

    model  frozen, and has seen the samples with these `ids` [N], which are not its own
    """

    live: Any  # Experience; Any, because these are no ways that a type checker would let through
    held: dict[str, Any]
    test: list[Any]
    model: Any
    runtime: Any
    learner: Any
    ids: np.ndarray


def hold(experience: Experience) -> dict[str, Any]:
    """What a learner may keep of an experience of images, whose data will be closed."""
    train: Any = experience.train
    every = np.arange(len(train))
    started = train.test_batches(4)
    next(started)
    return {
        "data": train,
        "subset": train.subset(every),
        "join": ImageData.join([train, train.subset(every[:2])]),
        "cut": train.cut(),
        "copy": copy.copy(train),
        "deep copy": copy.deepcopy(train),
        "batch": train.batch(every),
        "selected": train.batch(every).select(torch.arange(2)),
        "augmented batch": train.batch(every, 3),
        "batch of a join": ImageBatch.cat([train.batch(every[:2]), train.batch(every[2:])]),
        "generator": started,
        "shuffled batches": shuffled(train, 4, 1, 0),
        "copied batch": copy.deepcopy(train.batch(every)),
    }


def _everything_of(held: Any) -> Any:
    """All pixels of data, of a batch, of a generator, of batches by step."""
    if isinstance(held, ImageData):
        return held.raw(np.arange(len(held)))
    if isinstance(held, ImageBatch):
        return held.x
    return held(0).x if isinstance(held, ShuffledBatches) else [batch.x for batch in held]


def _by_hand(ids: np.ndarray, model: Any) -> ImageBatch:
    """A batch of bare ids, whose pixels are zeros."""
    size = model.profile.size
    return ImageBatch(torch.from_numpy(ids), None, None, lambda: torch.zeros(len(ids), 3, size, size), True)


def _blank(given: Given) -> np.ndarray:
    return np.zeros((int(given.ids.max()) + 1, 8, 8, 3), np.uint8)


def _changed(stored: Stored, **values: Any) -> Stored:
    made = copy.copy(stored)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def _moved(given: Given) -> Any:
    """An own batch that says it has other ids."""
    batch = given.live.train.batch([0] * len(given.ids))
    batch.ids = torch.from_numpy(given.ids)
    return given.model.features(batch)


def _two_sources(given: Given) -> Any:
    """Positions of blank images together with the own handle, so that they might be looked up in its source."""
    data = given.live.train
    blank = Stored.issue(ArrayImages(_blank(given)), given.ids, given.ids, "blank")
    joined = Stored.join([data.stored.take(np.zeros(1, np.int64)), blank])
    return joined.pixels(data.pipeline, np.append(given.ids[:1], given.ids), None), joined.raw(), joined.cut("both").raw()


def _blank_data(given: Given) -> Any:
    data = given.live.train
    made = ImageData(ArrayImages(_blank(given)), given.ids, given.ids, given.ids, data.pipeline, None, "blank")
    listed = ImageData.of_arrays(list(_blank(given)[: len(given.ids)]), given.ids, given.ids, data.pipeline)
    return [given.model.features(one.batch(np.arange(len(given.ids)))) for one in (made, listed)]


def _still(name: str) -> Callable[[Given], Any]:
    return lambda given: _everything_of(given.held[name])


def _features(name: str) -> Callable[[Given], Any]:
    return lambda given: given.model.features(given.held[name])


_KEPT = ("data", "subset", "join", "cut", "copy", "deep copy", "batch", "selected", "augmented batch", "batch of a join",
         "generator", "shuffled batches", "copied batch")  # fmt: skip

IMAGES: dict[str, Callable[[Given], Any]] = {
    "the source of the data": lambda g: g.live.train.source.raw(g.ids),
    "rows of others": lambda g: [g.live.train.raw([int(i)]) for i in g.ids],
    "a batch of rows of others": lambda g: [g.live.train.batch([int(i)]).x for i in g.ids],
    "rows below zero": lambda g: g.live.train.raw(-1 - g.ids),
    "a subset of others": lambda g: g.live.train.subset(g.ids).raw([0]),
    "stored rows of others": lambda g: _changed(g.live.train.stored, row=g.ids, part=g.ids * 0).raw(),
    "another handle": lambda g: _changed(g.live.train.stored, handles=(Handle.__new__(Handle),)).raw(),
    "a pickled handle": lambda g: pickle.loads(pickle.dumps(g.live.train)).raw([0]),
    "a handle's weak reference": lambda g: [h.__weakref__ for h in g.held["data"].stored.handles],
    "two sources in one": _two_sources,
    "the past": lambda g: [data.raw(np.arange(len(data))) for data in g.live.past],
    "resident images": lambda g: list(g.live.train.pipeline._resident.values()),
    "the pipeline": lambda g: vars(g.live.train.pipeline),
    **{f"{name}, after the experience": _still(name) for name in _KEPT},
    **{f"features of a {name}, after the experience": _features(name) for name in ("batch", "selected", "batch of a join")},
    "a test batch, after the evaluation": lambda g: [batch.x for batch in g.test if batch._x is None],
    "features of a test batch": lambda g: [g.model.features(batch) for batch in g.test if batch._x is None],
    "features by ids": lambda g: g.model.features(_by_hand(g.ids, g.model)),
    "features by ids, of a copy": lambda g: copy.deepcopy(g.model).features(_by_hand(g.ids, g.model)),
    "features by ids, the learner's model": lambda g: g.learner.model.features(_by_hand(g.ids, g.learner.model)),
    "features by changed ids": _moved,
    "features of blank images with these ids": _blank_data,
    "the rows of the memory": lambda g: g.model.memory.rows,
    "the memory by names": lambda g: g.model.memory.find([(o, int(i), False) for o in range(99) for i in g.ids], [], None),
    "the memory by ids": lambda g: g.model.memory.find(g.ids, [(False,)] * len(g.ids), lambda tags: None),
    "the memory's attributes": lambda g: [g.model.memory, copy.deepcopy(g.model.memory), vars(g.model.memory)],
    "the store": lambda g: g.model.memory.store.take(next(iter(g.model.memory.store._found)), g.ids.tolist()),
    "the runtime": lambda g: vars(g.runtime),
    "the observer": lambda g: g.runtime.observer.sets,
    "the context": lambda g: list(contextvars.copy_context().values()),
}

TEXTS: dict[str, Callable[[Given], Any]] = {
    "the tokens": lambda g: g.live.train.tokens,
    "the pictures": lambda g: g.live.train.pictures.source.array,
    "every attribute": lambda g: vars(g.live.train),
    "numbers of others": lambda g: [g.live.train.take(np.array([i]), "new", np.array([i])) for i in g.ids],
    "numbers below zero": lambda g: g.live.train.take(-1 - np.arange(9), "new", np.arange(9)),
    "one number among own ones": lambda g: g.live.train.take(np.append(np.arange(3), g.ids[-1]), "new", np.arange(4)),
    "a larger size": lambda g: g.live.train.read(np.arange(9), 1 << 20),
    "other fields": lambda g: [
        dataclasses.replace(g.live.train, **new).read(np.arange(40))
        for new in ({"first": 0, "size": 40}, {"first": 7}, {"key": 5}, {"context": 3})
    ],
    "a larger field": lambda g: dataclasses.replace(g.live.train, size=1 << 16).read(np.arange(1000)),
    "the past": lambda g: [data.read(np.arange(len(data))) for data in g.live.past],
    "the data, after the experience": lambda g: g.held["data"].read(np.arange(9)),
    "a copy, after the experience": lambda g: copy.deepcopy(g.held["data"]).read(np.arange(9)),
    "a replaced copy, after the experience": lambda g: g.held["replaced"].read(np.arange(9)),
    "batches, after the experience": lambda g: g.held["mixture"](0),
    "another handle": lambda g: dataclasses.replace(g.live.train, text=Handle.__new__(Handle)).read(np.arange(9)),
    "the observer": lambda g: [g.runtime.observer, g.runtime.observer.sets, g.runtime.observer.job],
    "the runtime": lambda g: vars(g.runtime),
    "the context": lambda g: list(contextvars.copy_context().values()),
}
