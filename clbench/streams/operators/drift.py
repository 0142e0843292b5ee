"""Gradual drift: around every boundary, samples of both neighbours are mixed, ever more of the later one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.operators.copies import whole
from clbench.streams.operators.dealing import without_tasks
from clbench.streams.scenario import Scenario


def drift(stream: Scenario, width: float = 0.5, seed: int = 0) -> Scenario:
    """Gradual drift: boundaries become ramps; experiences keep their sizes, and every sample comes once.

    width  of a ramp as a share of an experience, in (0, 1]: its half on either side. Along the ramp the share of the later
           experience rises from 0 to 1 in proportion; of equal experiences a quarter of a ramp changes sides on average
    seed   of the order of samples

    The order within an experience is that of the drift: with `{single_pass: {shuffle: false}}` after it a learner sees it
    sample by sample. Evaluation sets stay with their experiences.
    """
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 1:
        raise UserError(f"drift.width must be in (0, 1], got {width!r}")
    whole(seed, "drift.seed")
    without_tasks(stream, "drift")
    manifest = stream.manifest
    entries = manifest.experiences
    if len(entries) < 2:
        raise UserError("operator drift needs two experiences, the stream has one")
    if any(e.transform != entries[0].transform for e in entries):
        raise UserError("operator drift: the experiences differ in their pictures, which one experience cannot mix")
    if any(not e.labelled or e.budget or not e.boundary for e in entries) or manifest.looks:
        raise UserError("operator drift: the experiences have rules of their own; put drift before what made them")
    labels = [np.asarray(stream.labels(e)) for e in entries]
    orders = [rng.permutation(rng.key("drift order", seed, i), len(e.train)) for i, e in enumerate(entries)]
    shown = [np.stack([e.train, y])[:, rows] for e, y, rows in zip(entries, labels, orders, strict=True)]  # [2, N]: ids, labels
    own = any(e.labels is not None for e in entries)
    steps = []
    for entry, part in zip(entries, _ramps(shown, float(width), seed), strict=True):
        if len(np.unique(part[0])) < part.shape[1]:
            raise UserError("operator drift: neighbouring experiences show the same samples, which one experience cannot twice")
        present = set(part[1].tolist())
        classes = tuple(c for c in manifest.class_order if c in present)
        steps.append(replace(entry, classes=classes, train=part[0], labels=part[1] if own else None))
    return _settled(stream, tuple(steps))


def _ramps(shown: Sequence[np.ndarray], width: float, seed: int) -> list[np.ndarray]:
    """Columns of neighbours exchanged: the later half of a ramp goes to the later experience."""
    half = [int(part.shape[1] * width / 2) for part in shown]
    starts = [part[:, :h] if i else part[:, :0] for i, (part, h) in enumerate(zip(shown, half, strict=True))]
    ends = [part[:, part.shape[1] - h :] for part, h in zip(shown[:-1], half, strict=False)]
    middles = [
        part[:, (h if i else 0) : (part.shape[1] - h if i < len(shown) - 1 else None)]
        for i, (part, h) in enumerate(zip(shown, half, strict=True))
    ]
    found = [[middle] for middle in middles]
    for i, (old, new) in enumerate(zip(ends, starts[1:], strict=True)):
        u = rng.uniform(rng.key("drift", seed, i), np.arange(old.shape[1] + new.shape[1]))
        places = np.r_[1 - np.sqrt(1 - u[: old.shape[1]]), np.sqrt(u[old.shape[1] :])]  # densities 2 (1 - x) and 2 x
        ramp = np.concatenate([old, new], axis=1)[:, np.argsort(places, kind="stable")]
        found[i].append(ramp[:, : old.shape[1]])
        found[i + 1].insert(0, ramp[:, old.shape[1] :])
    return [np.concatenate(parts, axis=1) for parts in found]


def _settled(stream: Scenario, steps: tuple[Any, ...]) -> Scenario:
    """Classes may appear earlier or later than before: their order, and when sets are seen."""
    order = tuple(dict.fromkeys(c for e in steps for c in e.classes))
    place = {c: next(i for i, e in enumerate(steps) if c in e.classes) for c in order}
    sets = tuple(replace(e, first_seen=max(e.first_seen, *(place[c] for c in e.classes))) for e in stream.manifest.evals)
    return replace(stream, manifest=replace(stream.manifest, experiences=steps, class_order=order, evals=sets))
