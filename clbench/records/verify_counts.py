"""Checks of the counts of right answers of a record: sizes, counts, calibration, confusion, budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from clbench.evaluation import accuracy_metrics

SURE = 87.4  # -log of the least probability that counts: the largest nll of a sample


def check(entry: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is wrong with the counts of a finished record."""
    for part in (_sizes, _counts, _calibration, _confusion, budget):
        yield from part(entry)


def _sizes(entry: Mapping[str, Any]) -> Iterator[str]:
    """Every part of the record speaks of the same experiences, sets and classes."""
    steps, scenario = entry["scenario"]["num_experiences"], entry["scenario"]
    for key in ("correct", "correct_masked", "correct_top5", "class_correct"):
        if len(entry[key]) != steps:
            yield f"key {key!r} has {len(entry[key])} rows for {steps} experiences"
    if len(scenario["experiences"]) != steps:
        yield f"{len(scenario['experiences'])} experiences are described, num_experiences is {steps}"
    order = dict.fromkeys(c for e in scenario["experiences"] for c in e["classes"])
    if list(order) != scenario["class_order"]:
        yield "class_order is not the order in which the experiences bring classes"
    for j, (sizes, classes) in enumerate(zip(entry["class_n"], entry["eval_classes"], strict=True)):
        if len(sizes) != len(classes) or len(set(classes)) != len(classes) or any(type(c) is not int for c in classes):
            yield f"set {j} must have a size for each of its classes, got classes {classes} and sizes {sizes}"
        if sum(sizes) != entry["n"][j] or any(type(size) is not int or size < 0 for size in sizes):
            yield f"class_n of set {j} sums to {sum(sizes)}, n is {entry['n'][j]}"


def _counts(entry: Mapping[str, Any]) -> Iterator[str]:
    """Counts lie within sizes and do not contradict each other; sets are evaluated from the moment their classes are known."""
    seen: set[int] = set()
    for i, (row, experience) in enumerate(zip(entry["correct"], entry["scenario"]["experiences"], strict=False)):
        seen |= set(experience["classes"])
        for j, count in enumerate(row):
            known = set(entry["eval_classes"][j]) <= seen
            if (count is not None) != known:
                yield f"correct[{i}][{j}] is {count}, and the classes of set {j} are {'' if known else 'not '}all seen"
            if entry["first_seen"][j] <= i and not known:
                yield f"first_seen of set {j} is {entry['first_seen'][j]}, before its classes are all seen"
            others = [entry[key][i][j] for key in ("correct_masked", "correct_top5", "class_correct")]
            others += [table[i][j] for table in entry.get("heads", {}).values()]
            if count is not None:
                yield from _cell(entry, i, j)
            elif any(other is not None for other in others):
                yield f"correct[{i}][{j}] is null, the other counts of this cell are not"
    bounded = [v for name, v in accuracy_metrics.summary(entry).items() if name not in accuracy_metrics.UNBOUNDED]
    if any(abs(v) > 1 + 1e-9 for v in bounded if v == v):
        yield "a derived number is outside -1..1"


def _cell(entry: Mapping[str, Any], i: int, j: int) -> Iterator[str]:
    """One evaluated cell. Masking cannot hurt: who is right among all classes is right among the set's own."""
    count, n, sizes = entry["correct"][i][j], entry["n"][j], entry["class_n"][j]
    masked, top5, classes = entry["correct_masked"][i][j], entry["correct_top5"][i][j], entry["class_correct"][i][j]
    disclosed = entry["scenario"].get("kind") == "task_incremental"
    if not 0 <= count <= n:
        yield f"correct[{i}][{j}] = {count} is outside 0..{n}"
    if sum(classes) != count or len(classes) != len(sizes):
        yield f"class_correct[{i}][{j}] sums to {sum(classes)}, correct is {count}"
    if any(type(c) is not int or not 0 <= c <= m for c, m in zip(classes, sizes, strict=False)):
        yield f"class_correct[{i}][{j}] is outside the class sizes"
    if not count <= masked <= n or (disclosed and masked != count):
        yield f"correct_masked[{i}][{j}] = {masked} does not fit correct = {count}"
    if not (0 if disclosed else count) <= top5 <= n:
        yield f"correct_top5[{i}][{j}] = {top5} does not fit correct = {count}"
    heads = {name: table[i][j] for name, table in entry.get("heads", {}).items()}
    for name, value in heads.items():
        if type(value) is not int or not 0 <= value <= n:
            yield f"heads.{name}[{i}][{j}] = {value} is outside 0..{n}"
    if heads and count not in heads.values():
        yield f"correct[{i}][{j}] = {count} is the count of no head"


def budget(entry: Mapping[str, Any]) -> Iterator[str]:
    """What was held, and visits, within the budget."""
    rules = entry["scenario"]["budget"]
    for name in ("exemplars", "exemplar_bytes", "stored_bytes"):
        limit, used = rules.get(name), entry[name]
        if limit is not None and used > limit:
            yield f"{name} = {used}, the budget allows {limit}"
    if "reference" in entry.get("marks", ()):
        return
    sizes = [e["num_train"] for e in entry["scenario"]["experiences"]]
    if entry["visits"]["new"] > rules["epochs"] * sum(sizes):
        yield f"{entry['visits']['new']} visits to new samples, the budget allows {rules['epochs'] * sum(sizes)}"
    limit = rules.get("sample_visits")
    if limit is not None and sum(entry["visits"].values()) > limit * len(sizes):
        yield f"{sum(entry['visits'].values())} sample visits, the budget allows {limit} in each experience"


def _seen(entry: Mapping[str, Any], i: int) -> list[int]:
    """Sets that belong to experience i or to the past, and were evaluated."""
    return [j for j, first in enumerate(entry["first_seen"]) if first <= i and entry["correct"][i][j] is not None]


def _calibration(entry: Mapping[str, Any]) -> Iterator[str]:
    """Bins hold the samples of the sets seen, with the right answers that `correct` counts, at confidences of the bin."""
    for i, row in enumerate((entry.get("calibration") or {}).get("table", ())):
        if row is None:
            continue
        seen, where = _seen(entry, i), f"calibration.table[{i}]"
        size, right = sum(entry["n"][j] for j in seen), sum(entry["correct"][i][j] for j in seen)
        if not row["n"] == sum(row["bin_n"]) == size:
            yield f"{where} holds {row['n']} samples, {sum(row['bin_n'])} in bins, the sets seen have {size}"
        if sum(row["bin_correct"]) != right:
            yield f"{where} has {sum(row['bin_correct'])} right answers, correct has {right}"
        if row["nll"] > SURE * row["n"] or row["brier"] > (2 + 1e-9) * row["n"]:
            yield f"{where}: nll {row['nll']:.4g} or brier {row['brier']:.4g} is more than {row['n']} samples can give"
        for b, (n, sure, correct) in enumerate(zip(row["bin_n"], row["bin_conf"], row["bin_correct"], strict=True)):
            if correct > n or not n * b / 15 - 1e-6 <= sure <= n * (b + 1) / 15 + 1e-6:
                yield f"{where}: bin {b} holds {n} samples, {correct} right, confidence {sure:.4f} in all"


def _confusion(entry: Mapping[str, Any]) -> Iterator[str]:
    """Rows sum to the sets' sizes; nobody is right without predicting into the own experiences; no class before its time."""
    bring: dict[int, int] = {}
    for k, experience in enumerate(entry["scenario"]["experiences"]):
        bring |= {c: k for c in experience["classes"] if c not in bring}
    own = [{bring[c] for c in classes} for classes in entry["eval_classes"]]
    for i, table in enumerate(entry.get("task_confusion") or ()):
        for j, row in enumerate(table or ()):
            count, where = entry["correct"][i][j], f"task_confusion[{i}][{j}]"
            if (row is None) != (count is None):
                yield f"{where} is {'null' if row is None else 'there'}, correct[{i}][{j}] is {count}"
            elif row is not None:
                inside = sum(row[k] for k in own[j])
                if sum(row) != entry["n"][j]:
                    yield f"{where} sums to {sum(row)}, n is {entry['n'][j]}"
                if inside < count:
                    yield f"{where} has {inside} predictions into the set's own experiences, {count} are right"
                if any(row[i + 1 :]):
                    yield f"{where} predicts classes of experiences to come"


def notes(entry: Mapping[str, Any]) -> Iterator[str]:
    """A note where the last accuracy over all samples lies more than three standard errors below guessing."""
    seen = _seen(entry, len(entry["correct"]) - 1)
    disclosed = entry["scenario"].get("kind") == "task_incremental"
    ways = [len(entry["eval_classes"][j]) if disclosed else len(entry["scenario"]["class_order"]) for j in seen]
    sizes = [entry["n"][j] for j in seen]
    if not sizes:
        return
    right = sum(entry["correct"][-1][j] for j in seen)
    chance = sum(n / k for n, k in zip(sizes, ways, strict=True))
    error = math.sqrt(sum(n / k * (1 - 1 / k) for n, k in zip(sizes, ways, strict=True)))
    if right < chance - 3 * error:
        total = sum(sizes)
        yield f"last accuracy {right / total:.4f} is far below chance ({chance / total:.4f} ± {error / total:.4f})"
