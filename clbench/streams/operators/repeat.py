"""Classes that come back: class-incremental streams with repetition (CIR), and long streams of small tasks (SCoLe)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import datasets, rng
from clbench.streams.operators.copies import chosen, share, whole
from clbench.streams.operators.dealing import Pool, dealt, pool, split, without_tasks
from clbench.streams.scenario import Scenario

HOW = ("slots", "sampling", "tasks")
FIRST = ("uniform", "uniform_alpha", "poisson", "zipf", "geometric")


def repeat(
    stream: Scenario,
    how: Literal["slots", "sampling", "tasks"] = "slots",
    experiences: int = 10,
    classes: int | None = None,
    samples: int | None = None,
    first: Mapping[str, float] | None = None,
    again: float = 0.2,
    skew: float = 0.0,
    seed: int = 0,
) -> Scenario:
    """Classes that come back, by slots or by sampling (CIR), or in long streams of small tasks (SCoLe).

    experiences  so many
    how          slots: CIR's G(N, K). sampling: CIR's G(n_e, s_e, P_f, P_r) (Hemati et al., CoLLAs 2023, arXiv 2301.11396).
                 tasks: SCoLe (Lesort et al., CoLLAs 2023, arXiv 2207.04543)
    classes      slots: K slots of an experience, each a part of a class (default 2); every sample comes once. N K = number of
                 classes: disjoint; K = number of classes: domain-incremental. tasks: classes of each, drawn anew (default 2)
    samples      sampling: of an experience, split equally among its classes (default 100). tasks: of each class at most; null:
                 all of them in every task
    first        sampling: where a class first comes, {name: parameter}: {uniform: 0}, {uniform_alpha: share of experiences},
                 {poisson: mean}, {zipf: exponent}, {geometric: p} (the default, p = 0.2), each renormalised
    again        sampling: with which probability a class that came before comes again, in each later experience
    skew         tasks: classes are drawn in proportion to 1 / place ^ skew, places being seeded; 0: uniformly
    seed         of all draws. Samples come in a seeded order

    slots: numbers of slots of classes differ by one at most; samples that do not fill their class's slots equally are dropped.
    sampling: without replacement within an experience; a class with too few samples gives all it has, and an experience without
    samples is left out. An evaluation set holds the classes that appear first in its experience: together all test samples.
    """
    chosen(how, "repeat.how", HOW)
    whole(experiences, "repeat.experiences", 2)
    whole(seed, "repeat.seed")
    rate, bend = share(again, "repeat.again"), share(skew, "repeat.skew", 0, 10)
    _without_effect(how, {"classes": classes, "samples": samples, "first": first, "again": again, "skew": skew})
    wanted = 2 if classes is None else whole(classes, "repeat.classes", 1)
    size = None if samples is None else whole(samples, "repeat.samples", 1)
    arrival = _arrival(first, experiences)
    without_tasks(stream, "repeat")
    found = pool(stream, "repeat")
    if how != "sampling" and wanted > len(found.classes):
        raise UserError(f"repeat.classes={wanted}: the stream has {len(found.classes)} classes")
    if how == "slots":
        parts = _slots(found, experiences, wanted, seed)
    elif how == "sampling":
        parts = _sampled(found, arrival, rate, size or 100, seed)
    else:
        parts = _tasks(found, experiences, wanted, size, bend, seed)
    shown = [ids[rng.permutation(rng.key("repeat order", seed, i), len(ids))] for i, ids in enumerate(parts)]
    return dealt(found, shown, [f"repeat{i}" for i in range(experiences)], "repeat")


def _without_effect(how: str, given: Mapping[str, Any]) -> None:
    """Options of another way of repeating are errors."""
    default = {"classes": None, "samples": None, "first": None, "again": 0.2, "skew": 0.0}
    used = {"slots": ("classes",), "sampling": ("samples", "first", "again"), "tasks": ("classes", "samples", "skew")}[how]
    for name, value in given.items():
        if name not in used and value != default[name]:
            raise UserError(f"repeat.{name} has no effect with repeat.how={how}, which takes {', '.join(used)}")


def _arrival(first: Any, number: int) -> np.ndarray:
    """Probabilities [number] of the experience in which a class first comes."""
    if first is None:
        first = {"geometric": 0.2}
    if not isinstance(first, Mapping) or len(first) != 1:
        raise UserError(f"repeat.first must be {{name: parameter}} with one of {', '.join(FIRST)}, got {first!r}")
    ((name, value),) = first.items()
    chosen(name, "repeat.first", FIRST)
    most = {"uniform": 0.0, "uniform_alpha": 1.0, "geometric": 1.0, "poisson": float(number), "zipf": 10.0}[name]
    value = share(value, f"repeat.first.{name}", 0, most)
    if value == 0 and name not in ("uniform", "zipf"):
        raise UserError(f"repeat.first.{name} must be above 0")
    k = np.arange(number)
    if name.startswith("uniform"):
        weights = (k < (number if name == "uniform" else np.ceil(value * number - 1e-9))).astype(np.float64)
    elif name == "poisson":
        powers = k * np.log(value) - np.cumsum(np.log(np.maximum(k, 1)))
        weights = np.exp(powers - powers.max())
    else:
        weights = (k + 1.0) ** -value if name == "zipf" else (1 - value) ** k * value
    return weights / weights.sum()


def _slots(found: Pool, number: int, each: int, seed: int) -> list[np.ndarray]:
    """Slot-based: every class has its share of the number * each slots, an experience takes one of each of `each` classes."""
    count = len(found.classes)
    order = rng.permutation(rng.key("repeat remainder", seed), count).tolist()
    if number * each < count:
        raise UserError(f"operator repeat: {number} experiences of {each} slots are fewer than the {count} classes")
    left = {found.classes[c]: n for c, n in zip(order, split(number * each, count), strict=True)}
    sizes = {c: len(found.train[c]) // n for c, n in left.items()}
    if (poor := next((c for c, size in sizes.items() if size == 0), None)) is not None:
        name, has = found.stream.class_name(poor), len(found.train[poor])
        raise UserError(f"operator repeat: class {name} has {has} samples for {left[poor]} slots")
    shown = {c: found.shuffled(c, "repeat slots", seed) for c in found.classes}
    parts: list[np.ndarray] = []
    for i in range(number - 1, -1, -1):
        ids = []
        for c in _slots_of(left, each, rng.key("repeat slot", seed, i)):
            left[c] -= 1
            ids.append(shown[c][left[c] * sizes[c] : (left[c] + 1) * sizes[c]])
        parts.insert(0, np.concatenate(ids))
    return parts


def _slots_of(left: Mapping[int, int], each: int, key: int) -> list[int]:
    """Distinct classes that have slots left, at random; a class twice only where there are fewer such classes than slots."""
    have = [c for c, n in left.items() if n > 0]
    taken = [have[k] for k in rng.permutation(key, len(have))[:each].tolist()]
    rest = {c: n - (c in taken) for c, n in left.items()}
    while len(taken) < each:
        more = max((c for c in rest if rest[c] > 0), key=lambda c: rest[c])
        rest[more] -= 1
        taken.append(more)
    return taken


def _sampled(found: Pool, arrival: np.ndarray, again: float, samples: int, seed: int) -> list[np.ndarray]:
    """Sampling-based: classes come first by `arrival`, then with probability `again`."""
    number, count = len(arrival), len(found.classes)
    come = np.searchsorted(np.cumsum(arrival), rng.uniform(rng.key("repeat first", seed), np.arange(count)), side="right")
    come = np.minimum(come, number - 1)
    draws = rng.uniform(rng.key("repeat again", seed), np.arange(number * count)).reshape(number, count)
    parts = []
    for i in range(number):
        present = [c for k, c in enumerate(found.classes) if come[k] == i or (come[k] < i and draws[i, k] < again)]
        sizes = split(samples, len(present)) if present else []
        ids = [found.shuffled(c, "repeat sample", seed, i)[:n] for c, n in zip(present, sizes, strict=True)]
        parts.append(np.concatenate(ids) if ids else np.zeros(0, np.int64))
    if empty := sum(not len(ids) for ids in parts):
        datasets.say(f"operator repeat: no class came in {empty} of the {number} experiences, which are left out")
    _say_short(parts, samples)
    return parts


def _say_short(parts: Sequence[np.ndarray], samples: int) -> None:
    """A line where classes have not enough samples for their experiences."""
    if short := [len(ids) for ids in parts if 0 < len(ids) < samples]:
        least = f"the least has {min(short)}, all that its classes have"
        datasets.say(f"operator repeat: {len(short)} experiences have fewer than {samples} samples; {least}")


def _tasks(found: Pool, number: int, each: int, samples: int | None, skew: float, seed: int) -> list[np.ndarray]:
    """Classes of each task drawn without replacement, one after another in proportion to their weights."""
    places = rng.permutation(rng.key("repeat places", seed), len(found.classes))
    weights = (places + 1.0) ** -skew
    keys = -np.log1p(-rng.uniform(rng.key("repeat tasks", seed), np.arange(number * len(places)))).reshape(number, -1) / weights
    parts = []
    for i, row in enumerate(np.argsort(keys, axis=1, kind="stable")[:, :each].tolist()):  # the least of exponential numbers
        every = [found.classes[k] for k in sorted(row)]
        ids = [found.train[c] if samples is None else found.shuffled(c, "repeat sample", seed, i)[:samples] for c in every]
        parts.append(np.concatenate(ids))
    if samples is not None:
        _say_short(parts, each * samples)
    return parts
