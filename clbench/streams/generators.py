"""Generators write manifests: class-, task- and domain-incremental streams, or a stored manifest. Targets of conf/scenario.

Every generator does the same three things: `select` the samples of each class (of each domain), deal them to `Step`s, and
`_build` the scenario. A new kind of stream is a new way to deal.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import Budget, UserError
from clbench.streams import datasets, orders
from clbench.streams.manifest import EvalEntry, ExperienceEntry, Manifest
from clbench.streams.manifest_rules import budget_of
from clbench.streams.operators.registry import apply
from clbench.streams.pools import concatenated
from clbench.streams.scenario import Dataset, Scenario
from clbench.streams.selection import Cells, appearance, kept_classes, select, whole


@dataclass(frozen=True)
class Step:
    """One experience and its evaluation set: sample ids [N]; `classes` in order of appearance (original ids)."""

    name: str
    classes: Sequence[int]
    train: np.ndarray
    evaluate: np.ndarray


def class_incremental(
    name: str,
    dataset: str,
    data_root: str | None = None,
    download: bool = False,
    sha256: str | None = None,
    base: int = 0,
    increment: int | None = None,
    sizes: Sequence[int] | None = None,
    order: str | Sequence[int] = "natural",
    order_seed: int = 0,
    num_classes: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    validation: float = 0.0,
    validation_seed: int = 0,
    evaluate_on: str = "test",
    augment: str = "profile",
    budget: Mapping[str, int | None] | None = None,
    classes: Sequence[int | str] | None = None,
    operators: Sequence[Any] = (),
    test_share: float | None = None,
    test_seed: int = 0,
) -> Scenario:
    """New classes in every experience, tasks undisclosed: "B0 IncN" (base=0), "Bm IncN" (base=m), or explicit `sizes`.

    name                     name of the scenario in records
    dataset                  see `datasets.load`; also data_root, download, sha256 (expected identity, or None)
    base, increment          classes of the first experience (0: as many as in the others) and of each later one but the last
    sizes                    classes of each experience, instead of base and increment
    order                    a name from `orders.names()` or a list of class ids; order_seed is for order=random alone. An
                             experience of one group of `orders.GROUPS` has its name
    num_classes              keep only the data set's first classes (by original id, whatever the order)
    limit_train, limit_test  samples kept of each class (of each domain), from the front
    validation               share of each class's (kept) training samples set aside, drawn by validation_seed
    evaluate_on              "test", or "validation" for tuning
    augment                  "profile" (the model's training transform), "none", or "shift"
    budget                   fields of `interfaces.Budget`
    classes                  keep only these, by original id (a number) or by name (text), instead of num_classes
    operators                functions of `streams.operators` that change the stream, left to right: names, or {name: options}
    test_share, test_seed    share of each class (of each domain) drawn as test samples, where the data has none of its own
    """
    rules = budget_of(budget, "predict")
    data = datasets.load(dataset, data_root, download, sha256, test_share, test_seed)
    kept = kept_classes(data, num_classes, classes)
    ordered = appearance(order, order_seed, data.num_classes, kept, classes is not None)
    train, evaluate = select(data, kept, limit_train, limit_test, validation, validation_seed, evaluate_on)
    steps = _dealt(order, ordered, _sizes(len(kept), base, increment, sizes), train, evaluate)
    made = _build("class_incremental", name, data, steps, rules, augment)
    return apply(made, operators, data_root, download)


def _dealt(
    order: str | Sequence[int], ordered: Sequence[int], sizes: Sequence[int], train: Cells, evaluate: Cells
) -> list[Step]:
    """Classes in their order of appearance, `sizes` of them in each step; `order` may have names for them."""
    steps, start = [], 0
    for i, size in enumerate(sizes):
        present = ordered[start : start + size]
        chosen = [cell for cell in sorted(train) if cell[1] in present]
        tested = [cell for cell in sorted(evaluate) if cell[1] in present] if _apart(train, evaluate) else chosen
        name = orders.group_of(order, present) or f"exp{i}"
        steps.append(Step(name, present, _join(train, chosen), _join(evaluate, tested)))
        start += size
    return steps


def _apart(train: Cells, evaluate: Cells) -> bool:
    """Whether the test samples come from domains of their own."""
    return not {d for d, _ in train} & {d for d, _ in evaluate}


def task_incremental(
    name: str,
    dataset: str,
    data_root: str | None = None,
    download: bool = False,
    sha256: str | None = None,
    base: int = 0,
    increment: int | None = None,
    sizes: Sequence[int] | None = None,
    order: str | Sequence[int] = "natural",
    order_seed: int = 0,
    num_classes: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    validation: float = 0.0,
    validation_seed: int = 0,
    evaluate_on: str = "test",
    augment: str = "profile",
    budget: Mapping[str, int | None] | None = None,
    classes: Sequence[int | str] | None = None,
    operators: Sequence[Any] = (),
    test_share: float | None = None,
    test_seed: int = 0,
) -> Scenario:
    """`class_incremental` with the task of every sample disclosed, in training and at test time: task i = experience i."""
    scenario = class_incremental(**{**locals(), "operators": ()})
    manifest = replace(
        scenario.manifest,
        kind="task_incremental",
        discloses_task=True,
        experiences=tuple(replace(entry, task=i) for i, entry in enumerate(scenario.manifest.experiences)),
        evals=tuple(replace(entry, task=j) for j, entry in enumerate(scenario.manifest.evals)),
    )
    return apply(replace(scenario, manifest=manifest), operators, data_root, download)


def domain_incremental(
    name: str,
    dataset: str,
    data_root: str | None = None,
    download: bool = False,
    sha256: str | None = None,
    domains: Sequence[str] | None = None,
    num_classes: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    validation: float = 0.0,
    validation_seed: int = 0,
    evaluate_on: str = "test",
    augment: str = "profile",
    budget: Mapping[str, int | None] | None = None,
    classes: Sequence[int | str] | None = None,
    operators: Sequence[Any] = (),
    test_share: float | None = None,
    test_seed: int = 0,
) -> Scenario:
    """The same classes in every experience, from another domain each time; one evaluation set per domain.

    `domains` names the domains in order (None: all that have training samples, in the data set's order); other arguments as in
    `class_incremental`. Where no domain has test samples of its own (CORe50), those of the others are one common set.
    """
    rules = budget_of(budget, "predict")
    data = datasets.load(dataset, data_root, download, sha256, test_share, test_seed, True)
    kept = kept_classes(data, num_classes, classes)
    train, evaluate = select(data, kept, limit_train, limit_test, validation, validation_seed, evaluate_on)
    apart = _apart(train, evaluate)
    steps = []
    for d in _domains(data, domains, sorted({d for d, _ in train})):
        chosen = [cell for cell in sorted(train) if cell[0] == d]
        present = [c for _, c in chosen]
        tested = sorted(evaluate) if apart else chosen
        steps.append(Step(data.domain_names[d], present, _join(train, chosen), _join(evaluate, tested)))
    made = _build("domain_incremental", name, data, steps, rules, augment)
    if apart:
        manifest = made.manifest
        made = replace(made, manifest=replace(manifest, evals=(replace(manifest.evals[0], name="test"),)))
    return apply(made, operators, data_root, download)


def from_manifest(
    path: str,
    name: str | None = None,
    dataset: str | Sequence[str] | None = None,
    data_root: str | None = None,
    download: bool = False,
    augment: str = "profile",
    operators: Sequence[Any] = (),
) -> Scenario:
    """Run a saved manifest. `dataset` (default: the names in the manifest) must have the content it was made for.

    A stream of several data sets takes a list of them. `operators` change the stream further.
    """
    manifest = Manifest.load(path)
    if manifest.form != "ids":
        raise UserError(f"manifest {path} is of {manifest.unit} for {manifest.kind}: run the scenario that made it")
    parts = manifest.dataset.get("parts")
    found = dataset or ([part["name"] for part in parts] if parts else manifest.dataset["name"])
    if isinstance(found, str):
        by_domain = manifest.kind == "domain_incremental"
        data = datasets.load(found, data_root, download, None, *_drawn(manifest.dataset), by_domain)
    elif parts and len(found) == len(parts):
        loaded = [datasets.load(one, data_root, download, None, *_drawn(p)) for one, p in zip(found, parts, strict=True)]
        data = concatenated(loaded, manifest.dataset["classes"])
    else:
        raise UserError(f"scenario.dataset names {len(found)} data sets, manifest {path} was made of {len(parts or '1')}")
    scenario = Scenario(name or Path(path).stem, manifest, data, Budget(**manifest.budget), augment)
    return apply(scenario, operators, data_root, download)


def _drawn(dataset: Mapping[str, Any]) -> tuple[float | None, int]:
    """How the test samples of a manifest's data set were drawn: test_share and test_seed of `datasets.load`."""
    return dataset.get("test_share"), dataset.get("test_seed", 0)


def _build(kind: str, name: str, data: Dataset, steps: Sequence[Step], budget: Budget, augment: str) -> Scenario:
    for step in steps:
        if len(step.evaluate) == 0:
            raise UserError(f"scenario {name}: experience {step.name} has no samples to evaluate on")
    manifest = Manifest(
        kind=kind,
        dataset={"name": data.name, "sha256": data.sha256, "num_samples": len(data), **data.drawn},
        class_order=tuple(dict.fromkeys(int(c) for step in steps for c in step.classes)),
        experiences=tuple(ExperienceEntry(step.name, None, tuple(step.classes), step.train) for step in steps),
        evals=tuple(
            EvalEntry(step.name, None, _present(data, step), step.evaluate, first_seen=i) for i, step in enumerate(steps)
        ),
        discloses_task=False,
        has_boundaries=True,
        budget=budget.rules(),
    )
    return Scenario(name, manifest, data, budget, augment)


def _present(data: Dataset, step: Step) -> tuple[int, ...]:
    found = set(np.unique(data.y[step.evaluate]).tolist())
    return tuple(c for c in step.classes if c in found)


def _join(cells: Cells, chosen: Sequence[tuple[int, int]]) -> np.ndarray:
    parts = [cells[cell] for cell in chosen if cell in cells]
    return np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def _sizes(total: int, base: int, increment: int | None, sizes: Sequence[int] | None) -> list[int]:
    """Number of classes of every experience."""
    base = whole("base", base, 0, total)
    if sizes is not None:
        if base or increment is not None:
            raise UserError("scenario.sizes excludes base and increment: set scenario.base=0 scenario.increment=null")
        listed = [whole("sizes", size, 1) for size in sizes]
        if sum(listed) != total:
            raise UserError(f"scenario.sizes {listed} must sum to the {total} classes, not to {sum(listed)}")
        return listed
    if increment is None:
        raise UserError("scenario.increment is missing: classes per experience (or give scenario.sizes)")
    increment = whole("increment", increment, 1)
    if increment > total:
        raise UserError(f"scenario.increment={increment} is above the {total} classes: write {total} or less")
    first = [base] if base else []
    full, rest = divmod(total - base, increment)
    return first + [increment] * full + ([rest] if rest else [])


def _domains(data: Dataset, chosen: Sequence[str] | None, trained: Sequence[int]) -> list[int]:
    if data.domain is None or not data.domain_names:
        raise UserError(f"data set {data.name} has no domains, so no domain-incremental stream can be made of it")
    if chosen is None:
        return list(trained)
    positions = []
    for domain in chosen:
        if domain not in data.domain_names:
            near = difflib.get_close_matches(str(domain), data.domain_names, 1, 0.0)[0]
            raise UserError(f"unknown domain {domain!r} of {data.name}; did you mean {near}? ({', '.join(data.domain_names)})")
        positions.append(data.domain_names.index(domain))
        if positions[-1] not in trained:
            raise UserError(f"domain {domain} of {data.name} has no training samples")
    if not positions or len(set(positions)) != len(positions):
        raise UserError(f"scenario.domains must name each domain at most once, and at least one; got {list(chosen)}")
    return positions
