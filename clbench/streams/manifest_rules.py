"""What a manifest may say: a stream that contradicts itself is refused in one line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench.interfaces import RULES, Asks, Budget, UserError
from clbench.streams import transforms
from clbench.streams.entries import EvalEntry, ExperienceEntry, Form, differing
from clbench.streams.splits import Share
from clbench.streams.tokens import sequences

if TYPE_CHECKING:
    from clbench.streams.manifest import Manifest

MAX_CLASSES = 1 << 20
PROBES = ("edits", "paraphrases", "neighbours", "same_subject", "old_text")
DATASET_KEYS = (("name", "sha256", "num_samples"), "dataset", ("parts", "classes", "test_share", "test_seed"))


def checked_keys(body: Any, expected: Iterable[str], where: str, optional: Iterable[str] = ()) -> dict[str, Any]:
    """`body` as a mapping with these keys and none but the optional ones besides; else `UserError`."""
    expected = set(expected)
    if not isinstance(body, dict):
        raise UserError(f"{where} must be a mapping, got {type(body).__name__}")
    missing, unknown = expected - set(body), set(body) - expected - set(optional)
    if missing or unknown:
        raise UserError(f"{where}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
    return body


def of_form(body: Any, kind: Any, form: Form, where: str) -> dict[str, Any]:
    """A mapping with the fields that a manifest or an entry of this form has; those that have a default may be missing."""
    always, optional = kind.FIELDS[form]
    return checked_keys(body, always, where, optional)


def budget_of(options: Mapping[str, Any] | None, asks: Asks) -> Budget:
    """`scenario.budget` of a stream that asks for classes, losses or logits; the nearest name for an unknown one."""
    known = RULES[asks]
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"scenario.budget must be a mapping with {', '.join(known)}, got {options!r}")
    for key in options or {}:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.0)[0]
            raise UserError(f"unknown budget.{key}; did you mean budget.{near}?")
    return Budget(**dict(options or {}))


def kept_rules(budget: Any, asks: Asks) -> Any:
    """A manifest's budget without rules of other streams that have their default; what is no mapping is left for `check`."""
    default = asdict(Budget())
    if not isinstance(budget, Mapping):
        return budget
    return {k: v for k, v in budget.items() if k in RULES[asks] or k not in default or v is not default[k]}


def _check_entry(where: str, entry: ExperienceEntry | EvalEntry, ids: np.ndarray, total: int) -> None:
    transforms.checked(entry.transform, where)
    if entry.labels is not None and len(entry.labels) != len(ids):
        raise UserError(f"{where} has {len(entry.labels)} labels for {len(ids)} samples")
    if entry.labels is not None and np.unique(entry.labels).tolist() != sorted(set(entry.classes)):
        raise UserError(f"{where}: its own labels are not those of its classes")
    if not isinstance(entry.name, str) or not (entry.task is None or type(entry.task) is int):
        raise UserError(f"{where}: the name must be text and the task a whole number or null")
    if len(ids) == 0 or not entry.classes:
        raise UserError(f"{where} has no samples or no classes")
    if len(np.unique(ids)) != len(ids) or ids.min() < 0 or ids.max() >= total:
        raise UserError(f"{where} names a sample twice, or one outside the data set of {total} samples")


def check(manifest: Manifest) -> None:
    """Refuse a stream that contradicts itself."""
    if not isinstance(manifest.kind, str) or type(manifest.discloses_task) is not bool:
        raise UserError("manifest: kind must be text, discloses_task and has_boundaries true or false")
    if type(manifest.has_boundaries) is not bool or not isinstance(manifest.budget, Mapping):
        raise UserError("manifest: has_boundaries must be true or false, budget a mapping")
    checked_keys(dict(manifest.budget), RULES[manifest.asks], "budget", ("in_order",) if manifest.form == "ids" else ())
    Budget(**manifest.budget)
    if not manifest.experiences or not manifest.evals:
        raise UserError("manifest has no experiences or no evaluation sets")
    parts = {f"experience {i}": e for i, e in enumerate(manifest.experiences)} | {"manifest": manifest}
    for where, part in (parts | {f"evaluation set {j}": e for j, e in enumerate(manifest.evals)}).items():
        if foreign := set(differing(part)).difference(*part.FIELDS[manifest.form]):
            raise UserError(f"{where}: {', '.join(sorted(foreign))} have no place where samples are {manifest.form}")
    {"ids": _check_ids, "spans": _check_spans, "edits": _check_edits, "texts": _check_texts}[manifest.form](manifest)
    _check_looks(manifest)


def _check_ids(manifest: Manifest) -> None:
    """Samples that are ids of a data set."""
    dataset = checked_keys(manifest.dataset, *DATASET_KEYS)
    if not all(isinstance(dataset[key], str) for key in ("name", "sha256")):
        raise UserError("manifest: dataset.name and dataset.sha256 must be text")
    _check_parts(dataset)
    Share.of(dataset.get("test_share"), dataset.get("test_seed", 0))
    if not all(0 <= c < MAX_CLASSES for c in manifest.class_order):
        raise UserError(f"manifest: class ids must be in 0..{MAX_CLASSES - 1}")
    total = dataset["num_samples"]
    trained = np.zeros(total, bool)
    for i, entry in enumerate(manifest.experiences):
        _check_entry(f"experience {i}", entry, entry.train, total)
        trained[entry.train] = True
        _check_rules(f"experience {i}", entry, manifest.budget)
    if tuple(dict.fromkeys(c for e in manifest.experiences for c in e.classes)) != manifest.class_order:
        raise UserError("manifest: class_order is not the order in which the classes first appear")
    for j, entry in enumerate(manifest.evals):
        _check_entry(f"evaluation set {j}", entry, entry.ids, total)
        _check_first_seen(manifest, j)
        if entry.order not in ("any", "given") or not (entry.batch_size is None or _whole(entry.batch_size)):
            raise UserError(f"evaluation set {j}: order must be any or given, batch_size a whole number from 1 or null")
        if entry.batch_size is not None and entry.order == "any":
            raise UserError(f"evaluation set {j}: batch_size has no effect with order=any")
        if not set(entry.classes) <= set(manifest.class_order):
            raise UserError(f"evaluation set {j} holds classes that no experience teaches")
        if trained[entry.ids].any():
            raise UserError(f"evaluation set {j}: sample {entry.ids[trained[entry.ids]][0]} is also a training sample")


def _check_spans(m: Manifest) -> None:
    """Samples that are spans of domains."""
    for name in ("vocab", "context", "batch"):
        if not _whole(getattr(m, name)):
            raise UserError(f"manifest: {name} must be a whole number from 1")
    needed = {"name": str, "sha256": str, "train_tokens": int, "validation_tokens": int}
    if not all(isinstance(d, dict) and all(type(d.get(k)) is t for k, t in needed.items()) for d in m.domains):
        raise UserError(f"manifest: every domain must have {', '.join(needed)}")
    if not m.domains or (m.unit == "images" and not all(_whole(d.get("side")) for d in m.domains)):
        raise UserError("manifest has no domains, or images without a side")
    for where, entry in [("experience", e) for e in m.experiences] + [("evaluation set", e) for e in m.evals]:
        if not isinstance(entry.name, str) or type(entry.domain) is not int or not 0 <= entry.domain < len(m.domains):
            raise UserError(f"manifest: {where} {entry.name!r} is of domain {entry.domain!r}, there are {len(m.domains)}")
    for i, entry in enumerate(m.experiences):
        if type(entry.first) is not int or entry.first < 0 or not _whole(entry.sequences) or not _whole(entry.steps):
            raise UserError(f"manifest: experience {i} has no sequences or no steps")
        tokens = m.domains[entry.domain]["train_tokens"]
        if entry.first + entry.sequences > (tokens if m.unit == "images" else sequences.count(tokens, m.context)):
            raise UserError(f"manifest: experience {i} reads past the end of domain {m.domains[entry.domain]['name']}")
    for j, entry in enumerate(m.evals):
        _check_first_seen(m, j)
        if not _whole(entry.sequences) or entry.tokens != entry.sequences * m.context:
            raise UserError(f"manifest: evaluation set {j} has {entry.tokens} tokens for {entry.sequences} sequences")
        if m.experiences[entry.first_seen].domain != entry.domain:
            raise UserError(f"manifest: evaluation set {j} is of another domain than experience {entry.first_seen}")
        known = [n for n in (entry.floor, entry.bytes_per_token) if n is not None]
        if not all(isinstance(n, int | float) and type(n) is not bool and math.isfinite(n) for n in known):
            raise UserError(f"manifest: evaluation set {j}: floor and bytes_per_token must be numbers or null")


def _check_lines(m: Manifest) -> None:
    """Samples that are texts of a decoder: names, sizes, ids that there are."""
    dataset = checked_keys(m.dataset, DATASET_KEYS[0], "dataset")
    if not all(isinstance(dataset[key], str) for key in ("name", "sha256")):
        raise UserError("manifest: dataset.name and dataset.sha256 must be text")
    for name in ("vocab", "context"):
        if not _whole(getattr(m, name)):
            raise UserError(f"manifest: {name} must be a whole number from 1")
    parts = {f"experience {i}": (e, e.train) for i, e in enumerate(m.experiences)}
    parts |= {f"evaluation set {j}": (e, e.ids) for j, e in enumerate(m.evals)}
    for where, (entry, ids) in parts.items():
        if not isinstance(entry.name, str) or not len(ids):
            raise UserError(f"manifest: {where} has no samples, or a name that is no text")
        if len(np.unique(ids)) != len(ids) or ids.min() < 0 or ids.max() >= dataset["num_samples"]:
            raise UserError(f"manifest: {where} names a sample twice, or one that there is not")
    for j in range(len(m.evals)):
        _check_first_seen(m, j)


def _check_texts(m: Manifest) -> None:
    """Samples that are lines of tasks: no line is trained on and asked."""
    _check_lines(m)
    tasks = max(len(m.experiences), len(m.evals))
    for where, entry in [("experience", e) for e in m.experiences] + [("evaluation set", e) for e in m.evals]:
        if type(entry.task) is not int or not 0 <= entry.task < tasks:
            raise UserError(f"manifest: {where} {entry.name} is of task {entry.task!r}, there are {tasks}")
    for i, entry in enumerate(m.experiences):
        _check_rules(f"experience {i}", entry, m.budget)
    trained = np.concatenate([e.train for e in m.experiences])
    for j, entry in enumerate(m.evals):
        if len(both := np.intersect1d(entry.ids, trained)):
            raise UserError(f"evaluation set {j}: sample {both[0]} is also a training sample")


def _check_edits(m: Manifest) -> None:
    """Samples that are requests and probes: no request comes twice, every probe is of a known kind."""
    _check_lines(m)
    requests = np.concatenate([e.train for e in m.experiences])
    if len(np.unique(requests)) != len(requests):
        raise UserError("manifest: an edit is requested twice")
    for j, entry in enumerate(m.evals):
        if entry.probe not in PROBES:
            raise UserError(f"manifest: evaluation set {j} is of {entry.probe!r}, known are {', '.join(PROBES)}")
        if entry.floor is not None and not (isinstance(entry.floor, int | float) and math.isfinite(entry.floor)):
            raise UserError(f"manifest: evaluation set {j}: floor must be a number or null")


def _check_first_seen(manifest: Manifest, j: int) -> None:
    first = manifest.evals[j].first_seen
    if type(first) is not int or not 0 <= first < len(manifest.experiences):
        raise UserError(f"evaluation set {j}: first_seen {first!r} is no experience")


def _check_parts(dataset: Mapping[str, Any]) -> None:
    """The parts of several data sets in one."""
    if ("parts" in dataset) != ("classes" in dataset):
        raise UserError("manifest: dataset.parts and dataset.classes go together")
    if "parts" not in dataset:
        return
    parts, classes = dataset["parts"], dataset["classes"]
    if not isinstance(parts, list | tuple) or classes not in ("disjoint", "named", "same"):
        raise UserError("manifest: dataset.parts must be a list, dataset.classes disjoint, named or same")
    for i, part in enumerate(parts):
        checked_keys(part, DATASET_KEYS[0], f"dataset part {i}", ("test_share", "test_seed"))
    if not all(_whole(p["num_samples"]) and isinstance(p["name"], str) for p in parts):
        raise UserError("manifest: dataset.parts must have names and numbers of samples")
    if sum(p["num_samples"] for p in parts) != dataset["num_samples"]:
        raise UserError("manifest: the parts of the data set do not add up to its samples")


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _check_rules(where: str, entry: ExperienceEntry, budget: Mapping[str, Any]) -> None:
    """What one experience may say of labels, boundary and budget."""
    if type(entry.labelled) is not bool or type(entry.boundary) is not bool:
        raise UserError(f"{where}: labelled and boundary must be true or false")
    if entry.budget is not None:
        if not isinstance(entry.budget, dict) or not entry.budget:
            raise UserError(f"{where}: budget must be a mapping of what differs, got {entry.budget!r}")
        checked_keys(entry.budget, (), f"{where}: budget", (*RULES["predict"], "in_order"))
        Budget(**{**budget, **entry.budget})


def _check_looks(manifest: Manifest) -> None:
    """Looks, evaluations, evaluators and operators: their form."""
    if not _whole(manifest.evaluate_every) or (manifest.evaluate_every > 1 and manifest.looks):
        raise UserError("manifest: evaluate_every must be a whole number from 1, and 1 where a stream has looks")
    if manifest.evaluate_every > len(manifest.experiences):
        raise UserError(f"evaluate_every={manifest.evaluate_every}, the stream has {len(manifest.experiences)} experiences")
    if manifest.looks and len(manifest.looks) != len(manifest.experiences):
        raise UserError(f"manifest: looks of {len(manifest.looks)} experiences, there are {len(manifest.experiences)}")
    for i, (looks, entry) in enumerate(zip(manifest.looks, manifest.experiences, strict=False)):
        rising = all(a < b for a, b in pairwise(looks))
        visits = len(entry.train) * int((entry.budget or manifest.budget).get("epochs", manifest.budget.get("epochs", 1)))
        if not all(_whole(look) for look in looks) or not rising or (looks and looks[-1] > visits):
            raise UserError(f"experience {i}: looks must be rising whole numbers in 1..{visits}")
    if not all(isinstance(name, str) and name for name in manifest.evaluators):
        raise UserError("manifest: evaluators must be names")
    if len(set(manifest.evaluators)) != len(manifest.evaluators):
        raise UserError("manifest: an evaluator is named twice")
    if not all(isinstance(one, dict) and len(one) == 1 for one in manifest.operators):
        raise UserError("manifest: operators must be {name: options}")
