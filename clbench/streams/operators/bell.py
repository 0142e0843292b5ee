"""Streams of problems, each an input domain and a task, that ask for one kind of transfer: the sequences of BELL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.id_runs import encode_ids
from clbench.streams.manifest import EvalEntry, ExperienceEntry
from clbench.streams.operators.copies import chosen, whole
from clbench.streams.operators.dealing import Pool, pool
from clbench.streams.scenario import Scenario

TURNS = 4  # quarter turns of a picture
LABELS = 2  # of every task
LONG = 100  # problems of the long sequence
Problem = tuple[int, int, str]  # input domain, task (0: the class alone), size


def _six(first: str, middle: str, last: Problem) -> list[Problem]:
    return [(1, 1, first), *((i, i, middle) for i in (2, 3, 4, 5)), last]


_BETTER: list[Problem] = [(1, 1, "images"), (1, 2, "all"), *((i, i, "images") for i in (3, 4, 5))]
SEQUENCES: dict[str, list[Problem]] = {
    "pl": _six("all", "all", (6, 6, "all")),
    "minus": _six("all", "images", (1, 1, "images")),
    "plus": _six("images", "images", (1, 1, "all")),
    "in": _six("all", "all", (6, 1, "patterns")),
    "out": _six("all", "images", (1, 6, "images")),
    "out_star": [*_BETTER, (1, 6, "images")],
    "out_star2": [*_BETTER, (1, 1, "images")],
    "few": [(1, 0, "all"), (2, 0, "all"), (3, 1, "images"), (1, 2, "images"), (4, 3, "images"), (2, 2, "points")],
}


def bell(
    stream: Scenario,
    sequence: Literal["pl", "minus", "plus", "in", "out", "out_star", "out_star2", "few", "long"] = "in",
    images: int = 100,
    patterns: int = 15,
    points: int = 10,
    seed: int = 0,
) -> Scenario:
    """Problems (input domain, task), the last of which asks for one kind of transfer, tasks disclosed ("BELL").

    Valkov, Srivastava, Chaudhuri & Sutton, ICLR 2024, "A Probabilistic Framework for Modular Continual Learning".

    sequence  S1 ... S5 are problems (D1, T1) ... (D5, T5) of domain and task; all: with all samples
                pl         S1 ... S6, all                              plasticity
                minus      S1 all, S2 ... S5 images, S1 images         an old problem with less data
                plus       S1 ... S5 images, S1 all                    an old problem with more data
                in         S1 ... S5 all, (D6, T1) patterns            latent transfer: new inputs, old task
                out        S1 all, S2 ... S5 images, (D1, T6) images   perceptual transfer: old inputs, new task
                out_star   S1 images, (D1, T2) all, S3 ... S5 images, (D1, T6) images   the better of two old perceptions
                out_star2  as out_star, the last is S1 images
                few        D1 all, D2 all (the class alone), then (D3, T1), (D1, T2), (D4, T3) images, (D2, T2) points
                long       100 problems, domains and tasks drawn; sizes all, images, patterns (0.5, 0.25, 0.25) in the first
                           half, images, patterns, points (0.4, 0.4, 0.2) in the second
    images    so many distinct training images: perception is starved
    patterns  training images of so many distinct patterns alone: the task is starved
    points    so many training images
    seed      of domains, tasks and draws

    A pattern is a class of the stream and a quarter turn: a sample has one of four turns, the same in all problems. D_i is a
    fixed order of the turned picture's pixels; T_i gives every pattern one of two labels, at random, to as many patterns each.
    Starved patterns are spread over classes and turns, starved images over patterns. Every problem is tested on all test
    samples. Label l of task T_i is class i K + l, K the classes of the data set: the same in every problem of that task.
    Deviations: BELL's patterns are pairs of images from several data sets, its full size 30,000 items. That domains and tasks
    of `long` are drawn from six each is a choice. S_sp, whose last inputs are vectors of another shape, is left out: all
    samples of a stream are images for one network.
    """
    chosen(sequence, "bell.sequence", (*SEQUENCES, "long"))
    sizes = {"images": images, "patterns": patterns, "points": points}
    for name, value in sizes.items():
        whole(value, f"bell.{name}", 2)
    whole(seed, "bell.seed")
    problems = _long(seed) if sequence == "long" else SEQUENCES[sequence]
    for name, default in (("images", 100), ("patterns", 15), ("points", 10)):
        if sizes[name] != default and all(size != name for *_, size in problems):
            raise UserError(f"bell.{name} has no effect with bell.sequence={sequence}")
    found = _checked(stream, patterns if any(size == "patterns" for *_, size in problems) else 0)
    steps, sets = _entries(found, problems, sizes, seed)
    order = tuple(dict.fromkeys(c for e in steps for c in e.classes))
    made: Any = {"kind": "task_incremental", "discloses_task": True, "class_order": order}
    return replace(stream, manifest=replace(stream.manifest, **made, experiences=steps, evals=sets))


def _entries(
    found: Pool, problems: Sequence[Problem], sizes: Mapping[str, int], seed: int
) -> tuple[tuple[ExperienceEntry, ...], tuple[EvalEntry, ...]]:
    """An experience and an evaluation set of every problem."""
    train, test = _patterns(found, found.train, seed), _patterns(found, found.test, seed)
    steps: list[ExperienceEntry] = []
    sets: list[EvalEntry] = []
    for i, (domain, task, size) in enumerate(problems):
        name, table = f"problem{i}_D{domain}_T{task}_{size}", _task(found, task, found.stream.dataset.num_classes, seed)
        kept = train if size == "all" else _kept(found, train, size, sizes[size], seed)
        ids, labels = _labelled(kept, table)
        present = tuple(np.unique(labels).tolist())
        if len(present) < len(set(table.values())):
            has = f"samples of {len(present)} of its {len(set(table.values()))} labels"
            raise UserError(f"bell.{size}={sizes[size]}: problem {i} has {has}; choose another seed, or more")
        seen = (*found.transform, *_seen(kept, domain, seed))
        steps.append(ExperienceEntry(name, i, present, ids, labels, transform=seen))
        ids, labels = _labelled(test, table)
        seen = (*found.transform, *_seen(test, domain, seed))
        sets.append(EvalEntry(name, i, tuple(np.unique(labels).tolist()), ids, i, labels, seen))
    return tuple(steps), tuple(sets)


def _long(seed: int) -> list[Problem]:
    draws = rng.uniform(rng.key("bell long", seed), np.arange(3 * LONG)).reshape(LONG, 3)
    halves = ((("all", "images", "patterns"), (0.5, 0.75)), (("images", "patterns", "points"), (0.4, 0.8)))
    found: list[Problem] = []
    for i, (domain, task, size) in enumerate(draws):
        names, bounds = halves[2 * i // LONG]
        found.append((1 + int(6 * domain), 1 + int(6 * task), names[int(np.searchsorted(bounds, size, side="right"))]))
    return found


def _checked(stream: Scenario, patterns: int) -> Pool:
    """The stream's samples by class; `UserError` for a stream that has too few, or classes of its own."""
    found = pool(stream, "bell")
    if found.labels is not None or max(found.classes) >= stream.dataset.num_classes:
        raise UserError("operator bell gives samples labels of its own: put what changes labels behind it")
    for c in found.classes:
        if len(found.train[c]) < TURNS or not len(found.test[c]):
            has = f"{len(found.train[c])} training and {len(found.test[c])} test samples"
            raise UserError(f"operator bell: class {stream.class_name(c)} has {has}, needed are {TURNS} and 1")
    if len(found.classes) < LABELS:
        raise UserError("operator bell needs two classes, the stream has one")
    if patterns > TURNS * len(found.classes):
        raise UserError(f"bell.patterns={patterns}: {len(found.classes)} classes have {TURNS} patterns each")
    return found


Patterns = Mapping[tuple[int, int], np.ndarray]  # (class, quarter turns) -> sample ids, in a seeded order


def _patterns(found: Pool, ids: Mapping[int, np.ndarray], seed: int) -> Patterns:
    """Every sample under its turn: those of a class are dealt to the four in a seeded order."""
    shuffled = {c: ids[c][rng.permutation(rng.key("bell turns", seed, c), len(ids[c]))] for c in found.classes}
    return {(c, turn): shuffled[c][turn::TURNS] for c in found.classes for turn in range(TURNS)}


def _spread(found: Pool, seed: int) -> list[tuple[int, int]]:
    """All patterns in an order whose every beginning holds classes, and turns, equally often (by one at most)."""
    places = rng.permutation(rng.key("bell spread", seed), len(found.classes)).tolist()
    turns = rng.permutation(rng.key("bell spread of turns", seed), TURNS).tolist()
    return [(found.classes[k], turns[(i + again) % TURNS]) for again in range(TURNS) for i, k in enumerate(places)]


def _kept(found: Pool, train: Patterns, size: str, number: int, seed: int) -> Patterns:
    """The samples of some patterns, or some samples of all."""
    order = _spread(found, seed)
    if size == "patterns":
        return {pattern: train[pattern] for pattern in order[:number]}
    rounds = max(len(ids) for ids in train.values())
    dealt = [(pattern, k) for k in range(rounds) for pattern in order if k < len(train[pattern])][:number]
    if len(dealt) < number:
        raise UserError(f"bell.{size}={number}: the stream has {len(dealt)} training samples")
    return {pattern: train[pattern][:k] for pattern, k in Counter(pattern for pattern, _ in dealt).items()}


def _task(found: Pool, task: int, number: int, seed: int) -> dict[tuple[int, int], int]:
    """Pattern -> class; task 0 is the class alone."""
    every = [(c, turn) for c in found.classes for turn in range(TURNS)]
    if task == 0:
        return {pattern: pattern[0] for pattern in every}
    places = rng.permutation(rng.key("bell task", seed, task), len(every)).tolist()
    return {every[k]: task * number + i % LABELS for i, k in enumerate(places)}


def _labelled(part: Patterns, table: Mapping[tuple[int, int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids in ascending order, with their labels."""
    ids = np.concatenate(list(part.values()))
    labels = np.repeat([table[pattern] for pattern in part], [len(one) for one in part.values()])
    order = np.argsort(ids)
    return ids[order], labels[order]


def _seen(part: Patterns, domain: int, seed: int) -> list[dict[str, dict[str, Any]]]:
    """The steps that turn samples, and bring their pixels in a domain's order."""
    steps: list[dict[str, dict[str, Any]]] = []
    for turn in range(1, TURNS):
        ids = [one for (_, own), one in part.items() if own == turn and len(one)]
        if ids:
            steps.append({"turn": {"first": 90.0 * turn, "by": 0.0, "ids": encode_ids(np.sort(np.concatenate(ids)))}})
    return [*steps, {"permute": {"seed": seed, "number": domain}}]
