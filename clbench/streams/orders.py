"""Class orders: explicit lists with names, kept in `orders.json`; position -> original class.

icarl1993, np1996, np1997   `numpy.random.RandomState(seed).permutation(C)`: iCaRL, PyCIL and its descendants (SLCA's three)
mammoth1993                 the inverse of icarl1993: Mammoth's `--permute_classes` reads the same list as class -> position
python1, python2, ...       `random.Random(seed).shuffle(list(range(C)))`: CODA-Prompt and OVOR (their repeat 0 is `natural`)
coda_imagenet_r             the class ids in CODA-Prompt's ImageNet-R lists (commit 6417d4f), as positions among the sorted
                            folder names: its released natural order, which is not the sorted one. Read from the lists
cifar100_coarse             CIFAR-100's classes by super-class, five of each of the 20 (Krizhevsky 2009); `GROUPS` names them

A test draws the others anew. The names stand for these lists, not for a seed: other class counts are refused, not drawn.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng

GROUPS: dict[str, tuple[str, ...]] = {  # order -> names of the groups, all of one size, that its classes form
    "cifar100_coarse": (
        *("aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices"),
        *("household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things"),
        *("large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates"),
        *("people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2"),
    )
}


@cache
def published() -> dict[str, dict[int, tuple[int, ...]]]:
    """Every stored list: name -> number of classes -> order."""
    text = Path(__file__).with_name("orders.json").read_text(encoding="ascii")
    return {name: {int(k): tuple(v) for k, v in lists.items()} for name, lists in json.loads(text).items()}


def names() -> tuple[str, ...]:
    """All names that `order` understands."""
    return ("natural", "random", *published())


def order(name: str | Sequence[int], num_classes: int, seed: int = 0, keep: int | None = None) -> tuple[int, ...]:
    """The order in which original classes appear.

    Args:
        name: a name from `names()`, or the list itself (of all classes, or of the kept ones).
        num_classes: classes of the whole data set; published lists exist for some counts only.
        seed: for `random` alone.
        keep: only the classes below `keep` stay, in the same relative order.

    Raises:
        UserError: for an unknown name, a count without a list, or a list that is no permutation.
    """
    keep = num_classes if keep is None else keep
    if not isinstance(name, str):
        return _explicit(name, num_classes, keep)
    if name == "natural":
        return tuple(range(keep))
    if name == "random":
        full = tuple(rng.permutation(rng.key("class order", seed), num_classes).tolist())
    elif name in published():
        lists = published()[name]
        if num_classes not in lists:
            counts = ", ".join(str(n) for n in lists)
            raise UserError(f"order {name} exists for {counts} classes, not for {num_classes}; order=random takes any number")
        full = lists[num_classes]
    else:
        near = difflib.get_close_matches(name, names(), 1, 0.0)[0]
        raise UserError(f"unknown class order {name!r}; did you mean {near}? ({', '.join(names())}, or a list of class ids)")
    return tuple(c for c in full if c < keep)


def group_of(name: str | Sequence[int], classes: Sequence[int]) -> str | None:
    """The name of the group of an order that is made of just these classes; None where there is none."""
    if not isinstance(name, str) or name not in GROUPS:
        return None
    (full,) = published()[name].values()
    size = len(full) // len(GROUPS[name])
    group = full.index(classes[0]) // size
    return GROUPS[name][group] if set(classes) == set(full[group * size : (group + 1) * size]) else None


def _explicit(values: Sequence[int], num_classes: int, keep: int) -> tuple[int, ...]:
    ids = list(values)
    wrong = [c for c in ids if isinstance(c, bool) or not isinstance(c, int | np.integer)]
    if wrong:
        raise UserError(f"scenario.order must hold whole numbers, got {wrong[0]!r}")
    expected = num_classes if len(ids) == num_classes else keep
    if sorted(ids) != list(range(expected)):
        doubled = sorted({c for c in ids if ids.count(c) > 1})[:5] if len(ids) < 10_000 else []
        detail = f"; given twice: {doubled}" if doubled else ""
        raise UserError(f"scenario.order must name each class 0..{expected - 1} once, got {len(ids)} entries{detail}")
    return tuple(int(c) for c in ids if c < keep)
