"""Which classes and samples of a data set a stream is made of, and in which order its classes appear. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import orders
from clbench.streams.scenario import Dataset
from clbench.streams.splits import drawn

Cells = dict[tuple[int, int], np.ndarray]


def kept_classes(data: Dataset, num_classes: int | None, classes: Sequence[int | str] | None) -> tuple[int, ...]:
    """The original ids of the classes that stay, ascending; `classes` may name them."""
    if classes is None:
        return tuple(range(whole("num_classes", data.num_classes if num_classes is None else num_classes, 1, data.num_classes)))
    if num_classes is not None:
        raise UserError("scenario.classes excludes scenario.num_classes: leave one of them null")
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        raise UserError(f"scenario.classes must be a list of class ids or names, got {classes!r}")
    kept = [class_id(data, one) for one in classes]
    if twice := sorted({c for c in kept if kept.count(c) > 1}):
        raise UserError(f"scenario.classes names class {twice[0]} ({data.class_names[twice[0]]}) twice")
    return tuple(sorted(kept))


def class_id(data: Dataset, one: Any) -> int:
    """The id of a class that is given by id or by name."""
    if isinstance(one, str):
        if one not in data.class_names:
            near = difflib.get_close_matches(one, data.class_names, 1, 0.0)[0]
            raise UserError(f"scenario.classes: {data.name} has no class named {one!r}; did you mean {near}?")
        return data.class_names.index(one)
    return whole("classes", one, 0, data.num_classes - 1)


def select(
    data: Dataset,
    kept: Sequence[int],
    limit_train: int | None,
    limit_test: int | None,
    validation: float,
    validation_seed: int,
    evaluate_on: str,
) -> tuple[Cells, Cells]:
    """Sample ids to train and to evaluate on, by (domain, class). Limits first, then the validation share."""
    limits = [None if n is None else whole(key, n, 1) for key, n in (("limit_train", limit_train), ("limit_test", limit_test))]
    seed = whole("validation_seed", validation_seed, 0)
    if isinstance(validation, bool) or not isinstance(validation, int | float) or not 0 <= validation < 1:
        raise UserError(f"scenario.validation must be a share in 0..1 (1 excluded), got {validation!r}")
    share = round(validation * 10_000)
    if evaluate_on not in ("test", "validation"):
        raise UserError(f"scenario.evaluate_on must be test or validation, got {evaluate_on!r}")
    if share == 0 and (validation or seed or evaluate_on == "validation"):
        what = f"validation={validation}" if validation else "evaluate_on=validation" if seed == 0 else "validation_seed"
        raise UserError(f"scenario.{what} has no effect without a validation share of at least 0.0001")
    domain = np.zeros(len(data), np.int64) if data.domain is None else data.domain
    cells: list[Cells] = [{}, {}]
    width = data.num_classes
    for part in (0, 1):
        ids = np.flatnonzero((data.split == part) & np.isin(data.y, kept))
        keys = domain[ids] * width + data.y[ids]
        for cell in np.unique(keys).tolist():
            cells[part][divmod(cell, width)] = ids[keys == cell][: limits[part]]
    train, evaluate = cells
    if share:
        aside = {cell: drawn(ids, share, "validation", seed, *cell) for cell, ids in train.items()}
        train = {cell: np.setdiff1d(ids, aside[cell]) for cell, ids in train.items()}
        if evaluate_on == "validation":
            evaluate = {cell: ids[: limits[1]] for cell, ids in aside.items()}
    return train, evaluate


def appearance(order: str | Sequence[int], seed: int, num_classes: int, kept: Sequence[int], listed: bool) -> tuple[int, ...]:
    """The kept classes in their order of appearance; where they are `listed`, an order by ids names these or all."""
    if whole("order_seed", seed, 0) and order != "random":
        raise UserError(f"scenario.order_seed={seed} has no effect with order={order}; it is for order=random")
    if not listed:
        return orders.order(order if isinstance(order, str) else list(order), num_classes, seed, len(kept))
    if not isinstance(order, str) and sorted(order) == list(kept):
        return tuple(order)
    full = orders.order(order if isinstance(order, str) else list(order), num_classes, seed)
    return tuple(c for c in full if c in kept)


def whole(key: str, value: Any, least: int, most: int | None = None) -> int:
    """The value of `scenario.<key>` where it is a whole number in least..most, else `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"scenario.{key} must be a whole number, got {value!r}")
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"in {least}..{most}"
        raise UserError(f"scenario.{key} must be {limit}, got {value}")
    return value
