"""The order in which classes, or experiences, come: by name, at random, or extreme by their similarity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import orders, rng
from clbench.streams.operators import similarity
from clbench.streams.operators.copies import chosen, whole
from clbench.streams.operators.dealing import dealt, pool
from clbench.streams.scenario import Scenario

BY_SIMILARITY = ("easy_first", "hard_first", "edge_easy", "edge_hard", "designer_best", "designer_worst")


def order(
    stream: Scenario,
    by: str | Sequence[int] = "random",
    of: Literal["classes", "experiences"] = "classes",
    seed: int = 0,
    candidates: int = 1000,
) -> Scenario:
    """Classes or whole experiences in another order: named, random, or extreme by their similarity.

    by          a list of class ids (of experiences: their places, from 0); natural, random, or a published name (those of
                `scenario.order`); or by the Euclidean distance of mean pictures (`similarity.distances`):
                easy_first, hard_first           by the distance to the nearest other class, far ones first or last
                edge_easy, edge_hard             which classes share an experience: near ones apart, so that experiences are
                                                 alike, or together (EDGE; Lai et al., ICLR 2026, arXiv 2509.22580: accuracy
                                                 rises with the similarity of experiences). A local search by swaps
                designer_best, designer_worst    highest and lowest score of the Curriculum Designer ("How to Continuously Teach
                                                 Humans and Machines", ICCV 2023) of all orders, or of `candidates` drawn ones
    of          classes: experiences keep their numbers of classes, and classes are dealt anew. experiences: whole ones move
    seed        of random, and of candidates and starts of a search
    candidates  orders that the designer scores where there are more than 5,040

    Mean pictures are those of the training samples. A named model as embedder is not offered: operators know no models.
    """
    chosen(of, "order.of", ("classes", "experiences"))
    whole(seed, "order.seed")
    whole(candidates, "order.candidates", 1)
    named = ("natural", "random", *BY_SIMILARITY) if of == "experiences" else (*orders.names(), *BY_SIMILARITY)
    if isinstance(by, str):
        chosen(by, "order.by", named)
    elif not isinstance(by, Sequence) or not all(type(i) is int for i in by):
        raise UserError(f"order.by must be a name or a list of whole numbers, got {by!r}")
    if seed and (not isinstance(by, str) or by not in ("random", *BY_SIMILARITY[2:])):
        raise UserError(f"order.seed={seed} has no effect with order.by={by if isinstance(by, str) else 'a list'}")
    if candidates != 1000 and by not in ("designer_best", "designer_worst"):
        raise UserError("order.candidates has no effect: it is for order.by=designer_best and designer_worst")
    if of == "experiences" and by in ("edge_easy", "edge_hard"):
        raise UserError(f"order.by={by} says which classes share an experience: it is for order.of=classes")
    return _experiences(stream, by, seed, candidates) if of == "experiences" else _classes(stream, by, seed, candidates)


def _classes(stream: Scenario, by: Any, seed: int, candidates: int) -> Scenario:
    manifest = stream.manifest
    if sum(len(e.classes) for e in manifest.experiences) != len(manifest.class_order):
        raise UserError("operator order: experiences share classes; say order.of=experiences")
    found, sizes = pool(stream, "order"), [len(e.classes) for e in manifest.experiences]
    kept, number = sorted(found.classes), stream.dataset.num_classes
    if not isinstance(by, str):
        if sorted(by) != kept:
            raise UserError(f"order.by must name each of the {len(kept)} classes once, by id, got {list(by)[:20]}")
        listed = list(by)
    elif by in BY_SIMILARITY:
        ids = [found.train[c] for c in kept]
        d = similarity.distances(stream.dataset, ids, found.transform)
        listed = [kept[k] for k in _by_similarity(by, d, sizes, seed, candidates)]
    else:
        listed = [c for c in orders.order(by, number, seed) if c in set(kept)]
    ends = np.cumsum([0, *sizes]).tolist()
    parts = [np.sort(np.concatenate([found.train[c] for c in listed[a:b]])) for a, b in itertools.pairwise(ends)]
    return dealt(found, parts, [e.name for e in manifest.experiences], "order", listed, manifest.kind)


def _by_similarity(by: str, d: np.ndarray, sizes: Sequence[int], seed: int, candidates: int) -> list[int]:
    if by in ("easy_first", "hard_first"):
        nearest = (d + np.where(np.eye(len(d), dtype=bool), d.max() + 1, 0)).min(1)
        return np.argsort(-nearest if by == "easy_first" else nearest, kind="stable").tolist()
    if by in ("edge_easy", "edge_hard"):
        return similarity.grouped(d, sizes, rng.key("order edge", seed), near=by == "edge_hard")
    return similarity.designed(d, rng.key("order designer", seed), candidates, best=by == "designer_best")


def _experiences(stream: Scenario, by: Any, seed: int, candidates: int) -> Scenario:
    manifest = stream.manifest
    entries, number = manifest.experiences, len(manifest.experiences)
    if not isinstance(by, str):
        listed = list(by)
        if sorted(listed) != list(range(number)):
            raise UserError(f"order.by must name each of the {number} experiences once, from 0, got {listed[:20]}")
    elif by in BY_SIMILARITY:
        d = similarity.distances(stream.dataset, [e.train for e in entries], [e.transform for e in entries])
        listed = _by_similarity(by, d, [1] * number, seed, candidates)
    else:
        listed = rng.permutation(rng.key("order experiences", seed), number).tolist() if by == "random" else list(range(number))
    steps = tuple(entries[i] for i in listed)
    place = {old: new for new, old in enumerate(listed)}
    known = {c: next(i for i, e in enumerate(steps) if c in e.classes) for c in manifest.class_order}
    sets = [replace(e, first_seen=max(place[e.first_seen], *(known[c] for c in e.classes))) for e in manifest.evals]
    made = replace(
        manifest,
        class_order=tuple(dict.fromkeys(c for e in steps for c in e.classes)),
        experiences=steps,
        evals=tuple(sorted(sets, key=lambda e: e.first_seen)),
        looks=tuple(manifest.looks[i] for i in listed) if manifest.looks else (),
    )
    return replace(stream, manifest=made)
