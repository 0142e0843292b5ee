"""Neighbouring pairs of classes in a circle, every picture turned a little further: MNIST-360."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.id_runs import encode_ids
from clbench.streams.manifest import EvalEntry, ExperienceEntry
from clbench.streams.operators.copies import whole
from clbench.streams.operators.dealing import Pool, pool, split, without_tasks
from clbench.streams.scenario import Scenario


def mnist_360(stream: Scenario, classes: int = 9, rounds: int = 3, seed: int = 0) -> Scenario:
    """Pairs of neighbouring classes, their pictures turning all the time ("MNIST-360").

    General continual learning; Buzzega et al., NeurIPS 2020, arXiv 2004.07211.

    classes  the stream's first so many, in a circle: the pairs (0, 1), (1, 2), ..., (8, 0) of nine digits
    rounds   so many times through all pairs; 3 of nine pairs are the paper's 27
    seed     of the order in which the samples of a part are shown

    A class's training samples are cut, in their order, into 2 x rounds parts. A pair shows the next part of both its classes,
    from the last part to the first, mixed in proportion. The first sample of class j is turned by (j - 1) x 60 degrees, each
    further one of the class by 360 / samples more: one full turn in the stream. Test sample k of n of a class is turned by
    k x 360 / n; every class is an evaluation set. With `{single_pass: {shuffle: false}}` and `hide_boundaries` behind it the
    stream has neither tasks nor boundaries.

    Deviations: every training and every test image comes once. Mammoth's release draws images of a part with replacement,
    goes on as soon as one part of the pair is used up, and tests on the first batch of each class again and again.
    """
    count = whole(classes, "mnist_360.classes", 2)
    whole(rounds, "mnist_360.rounds", 1)
    whole(seed, "mnist_360.seed")
    without_tasks(stream, "mnist_360")
    found = pool(stream, "mnist_360")
    if count > len(found.classes):
        raise UserError(f"mnist_360.classes={count}: the stream has {len(found.classes)} classes")
    circle = found.classes[:count]
    parts = [_parts(found, c, 2 * rounds, seed) for c in circle]
    y = stream.dataset.y if found.labels is None else found.labels
    shown = dict.fromkeys(range(count), 0)  # samples of a class so far
    steps = []
    for i in range(count * rounds):
        pair = (i % count, (i + 1) % count)
        pieces = [parts[j].pop() for j in pair]
        turns = [_turn(ids, j, shown[j], len(found.train[circle[j]])) for ids, j in zip(pieces, pair, strict=True)]
        shown |= {j: shown[j] + len(ids) for ids, j in zip(pieces, pair, strict=True)}
        ids = _mixed(pieces)
        labels = None if found.labels is None else y[ids]
        named = tuple(circle[j] for j in pair)
        steps.append(ExperienceEntry(f"pair{i}", None, named, ids, labels, transform=(*found.transform, *turns)))
    sets = []
    for j, c in enumerate(circle):
        turned = (*found.transform, _turn(found.test[c], 1, 0, len(found.test[c])))
        sets.append(EvalEntry(stream.class_name(c), None, (c,), found.test[c], max(0, j - 1), transform=turned))
    made: Any = {"class_order": circle, "experiences": tuple(steps), "evals": tuple(sets), "kind": "class_incremental"}
    return replace(stream, manifest=replace(stream.manifest, **made))


def _parts(found: Pool, c: int, number: int, seed: int) -> list[np.ndarray]:
    """The training samples of a class in `number` parts, each in an order of its own."""
    if len(found.train[c]) < number or not len(found.test[c]):
        sizes = f"{len(found.train[c])} training and {len(found.test[c])} test samples"
        raise UserError(f"operator mnist_360: class {found.stream.class_name(c)} has {sizes}, needed are {number} and 1")
    pieces = np.split(found.train[c], np.cumsum(split(len(found.train[c]), number))[:-1])
    return [ids[rng.permutation(rng.key("mnist_360", seed, c, k), len(ids))] for k, ids in enumerate(pieces)]


def _turn(ids: np.ndarray, j: int, before: int, number: int) -> dict[str, dict[str, Any]]:
    """The step that turns samples of class number j, `before` of whose `number` samples were shown already."""
    by = 360.0 / number
    return {"turn": {"first": ((j - 1) * 60.0 + before * by) % 360.0, "by": by, "ids": encode_ids(ids)}}


def _mixed(pieces: list[np.ndarray]) -> np.ndarray:
    """Samples of both, each evenly spread over the whole."""
    places = np.concatenate([(np.arange(len(ids)) + 0.5) / len(ids) for ids in pieces])
    return np.concatenate(pieces)[np.argsort(places, kind="stable")]
