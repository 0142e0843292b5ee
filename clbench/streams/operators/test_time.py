"""Test-time adaptation: a source experience, then sets without labels in a fixed order, in batches of a fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.manifest import EvalEntry, ExperienceEntry
from clbench.streams.operators.copies import chosen, whole
from clbench.streams.pools import JoinedPools
from clbench.streams.scenario import Scenario
from clbench.streams.transforms import Steps

ORDERS = ("random", "sorted", "given")
SOURCES = ("first", "plain")
CLEAN = ("both", "after", "none")


def test_time(
    stream: Scenario,
    batch_size: int = 64,
    order: Literal["random", "sorted", "given"] = "random",
    source: Literal["first", "plain"] = "first",
    clean: Literal["both", "after", "none"] = "both",
    rounds: int = 1,
    seed: int = 0,
) -> Scenario:
    """One source experience, then every evaluation set in turn: what a learner that adapts while it is tested is shown.

    The source is all that the stream teaches in the pictures of its first experience. Neighbouring sets of the same
    pictures are one (a domain); where all have the same pictures they stay apart, and the classes shift between them. So
    [{rotate: {experiences: 5}}, test_time] trains on upright images and tests four angles in a row.

    batch_size  samples that are answered, and adapted to, at a time; the last batch of a set may be smaller
    order       of the samples of every set, clean ones too: random, drawn from `seed`; sorted by class; given, as listed
    source      first: the pictures of the first experience; plain: its samples under the changes alone that all share
    clean       the source's own test samples as the first and the last set ("both": forgetting is their difference), as the
                last set alone (nothing is adapted to before the first shift, as published), or not at all
    rounds      how often the shifted sets come in turn
    """
    for name, value, names in (("order", order, ORDERS), ("source", source, SOURCES), ("clean", clean, CLEAN)):
        chosen(value, f"test_time.{name}", names)
    for name, value, least in (("batch_size", batch_size, 1), ("rounds", rounds, 1), ("seed", seed, 0)):
        whole(value, f"test_time.{name}", least)
    if seed and order != "random":
        raise UserError(f"test_time.seed={seed} has no effect with test_time.order={order}")
    manifest = stream.manifest
    if not all(e.labelled for e in manifest.experiences):
        raise UserError("operator test_time: the source needs labels, and some experience has none")
    shown = [_pictures(stream, e) for e in (*manifest.experiences, *manifest.evals)]
    taught = shown[0]
    pictures = taught if source == "first" else (_plain(stream), None)
    train, y = _merged(stream, [e for e, one in zip(manifest.experiences, shown, strict=False) if one == taught])
    classes = tuple(c for c in manifest.class_order if c in set(_labels(stream, train, y).tolist()))
    first = ExperienceEntry("source", None, classes, train, y, transform=pictures[0])
    of_sets = list(zip(manifest.evals, shown[len(manifest.experiences) :], strict=True))
    same = [e for e, one in of_sets if one == pictures] or [e for e, one in of_sets if one == taught]
    sets = _domains(stream, pictures)
    sets = [(name if k == 0 else f"{name} ({k + 1})", one) for k in range(rounds) for name, one in sets]
    if clean != "none":
        own = (*_merged(stream, same), pictures[0])
        sets = [*([("clean", own)] if clean == "both" else []), *sets, ("clean after", own)]
    evals = []
    for j, (name, picked) in enumerate(sets):
        entry = _entry(stream, name, picked, classes, order, rng.key("test_time", seed, j))
        evals.append(replace(entry, batch_size=batch_size))
    kept = replace(manifest, kind="test_time", discloses_task=False, looks=())
    return replace(stream, manifest=replace(kept, class_order=classes, experiences=(first,), evals=tuple(evals)))


def _plain(stream: Scenario) -> Steps:
    """The changes that all pictures of the stream share; `UserError` where the first experience has no others."""
    pictures = _shared([e.transform for e in (*stream.manifest.experiences, *stream.manifest.evals)])
    if pictures == stream.manifest.experiences[0].transform:
        raise UserError("test_time.source=plain has no effect: the first experience has no changes of its own")
    return pictures


def _shared(transforms: Sequence[Steps]) -> Steps:
    """The steps with which all begin."""
    shortest = min(map(len, transforms))
    equal = [all(one[i] == transforms[0][i] for one in transforms) for i in range(shortest)]
    return transforms[0][: equal.index(False) if False in equal else shortest]


Picked = tuple[np.ndarray, np.ndarray | None, Steps]
Pictures = tuple[Steps, int | None]


def _pictures(stream: Scenario, entry: ExperienceEntry | EvalEntry) -> Pictures:
    """What sets the pictures of an entry apart: their changes, and the part of the data that holds nothing but test images."""
    images, ids = stream.dataset.images, entry.train if isinstance(entry, ExperienceEntry) else entry.ids
    if not isinstance(images, JoinedPools):
        return entry.transform, None
    part = int(np.searchsorted(images.first, ids[0], side="right")) - 1
    published = bool(stream.dataset.split[images.first[part] : images.first[part + 1]].all())
    return entry.transform, part if published else None


def _domains(stream: Scenario, pictures: Pictures) -> list[tuple[str, Picked]]:
    """The sets to adapt to, by name: those of other pictures than the source's, or all sets where there are no others.

    Neighbours of the same pictures and different samples are one; pictures that come again later are a set of their own.
    """
    shifted: list[list[EvalEntry]] = []
    for entry in stream.manifest.evals:
        if (own := _pictures(stream, entry)) == pictures:
            continue
        last = shifted[-1] if shifted and _pictures(stream, shifted[-1][0]) == own else []
        if last and not np.isin(entry.ids, np.concatenate([one.ids for one in last])).any():
            last.append(entry)
        else:
            shifted.append([entry])
    shifted = shifted or [[entry] for entry in stream.manifest.evals]
    return [(group[0].name, (*_merged(stream, group), group[0].transform)) for group in shifted]


def _merged(stream: Scenario, entries: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples of several entries, each once, and their labels where these are not the data set's own."""
    ids = np.concatenate([e.train if isinstance(e, ExperienceEntry) else e.ids for e in entries])
    _, rows = np.unique(ids, return_index=True)
    rows.sort()
    changed = any(e.labels is not None for e in entries)
    return ids[rows], np.concatenate([stream.labels(e) for e in entries])[rows] if changed else None


def _labels(stream: Scenario, ids: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    return stream.dataset.y[ids] if labels is None else labels


def _rows(y: np.ndarray, order: str, key: int) -> np.ndarray:
    """In which order the samples of a set come."""
    if order == "random":
        return rng.permutation(key, len(y))
    return np.argsort(y, kind="stable") if order == "sorted" else np.arange(len(y))


def _entry(stream: Scenario, name: str, picked: Picked, classes: Sequence[int], order: str, key: int) -> EvalEntry:
    """A set with its samples in order; `UserError` where it holds classes that the source does not teach."""
    ids, labels, steps = picked
    found = _labels(stream, ids, labels)
    if missing := sorted(set(found.tolist()) - set(classes)):
        hint = "operators before it must keep all classes in the first experience, as {rotate: {experiences: 5}} does"
        raise UserError(f"operator test_time: set {name} holds classes {missing[:5]} that the source does not teach: {hint}")
    rows, present = _rows(found, order, key), set(found.tolist())
    known = tuple(c for c in classes if c in present)
    return EvalEntry(name, None, known, ids[rows], 0, None if labels is None else labels[rows], steps, "given")
