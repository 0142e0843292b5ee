"""Checks of the sums of a record of edits: counts, losses, weights, and that nothing was asked before its time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from clbench.evaluation import edit_metrics

COUNTS = {"correct": "n", "same": "n", "preferred": "n", "token_hits": "tokens"}
SLACK = 0.01  # nats per token by which a finite evaluation set may be predicted better than by its source


def check(entry: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is wrong with a finished record of kind `model_editing`."""
    steps = entry["scenario"]["num_experiences"]
    rows = {(row["evaluator"], row["experience"]): row for row in entry["rows"] if row["step"] is None}
    for i in range(-1, steps):
        for name in ("edit_success", "weights"):
            if (name, i) not in rows:
                yield f"there is no {name} {'before the first experience' if i < 0 else f'after experience {i}'}"
                return
    for (evaluator, i), row in rows.items():
        if evaluator == "edit_success":
            yield from _answers(entry, i, row["sums"])
        elif evaluator == "old_text":
            yield from _old_text(entry, i, row["sums"])
        elif evaluator == "newest_edit":
            yield from _newest(entry, i, row["sums"])
        elif evaluator == "weights":
            yield from _weights(i, row["total"])
    before = rows["edit_success", -1]["sums"]
    if before["same"] != before["n"]:
        yield "before the first edit some answers are not those of the unedited model"
    shares = [v for name, v in edit_metrics.summary(entry).items() if name in edit_metrics.SHARES and name != "retention"]
    if any(not 0 <= v <= 1 + 1e-9 for v in shares):
        yield "a derived number is outside 0..1"
    for name in ("exemplar_bytes", "stored_bytes"):
        limit = entry["scenario"]["budget"].get(name)
        if limit is not None and entry[name] > limit:
            yield f"{name} = {entry[name]}, the budget allows {limit}"


def _answers(entry: Mapping[str, Any], i: int, sums: Mapping[str, Any]) -> Iterator[str]:
    """Each set is asked from its own experience on, whole; counts lie within sizes and do not contradict each other."""
    for j, (size, first, kind) in enumerate(zip(entry["n"], entry["first_seen"], entry["probe"], strict=True)):
        where = f"edit_success of set {j} after experience {i}"
        due = kind != "old_text" and (i < 0 or first <= i)
        if (sums["n"][j] == size) != due or (sums["n"][j] is None) == due:
            yield f"{where}: n is {sums['n'][j]}, {size} probes are {'' if due else 'not '}due"
            continue
        if not due:
            continue
        for name, of in COUNTS.items():
            count = (sums.get(name) or [None] * len(entry["n"]))[j]
            if count is not None and (type(count) is not int or not 0 <= count <= sums[of][j]):
                yield f"{where}: {name} is {count} of {sums[of][j]}"
        if sums["correct"][j] > sums["token_hits"][j]:
            yield f"{where}: {sums['correct'][j]} answers are right, {sums['token_hits'][j]} tokens"
        if not math.isfinite(sums["nats"][j]) or sums["nats"][j] < 0:
            yield f"{where}: nats is {sums['nats'][j]}"


def _old_text(entry: Mapping[str, Any], i: int, sums: Mapping[str, Any]) -> Iterator[str]:
    """A loss is not below that of the true source."""
    for j, (nats, tokens, kind) in enumerate(zip(sums["nats"], sums["tokens"], entry["probe"], strict=True)):
        if (nats is not None) != (kind == "old_text"):
            yield f"old_text of set {j} after experience {i}: {nats} nats of {kind}"
        elif nats is not None:
            floor = entry["floor"][j]
            if not math.isfinite(nats) or nats < 0 or (floor is not None and nats / tokens < floor - SLACK):
                yield f"old_text of set {j} after experience {i}: {nats / tokens:.4f} nats a token, the floor is {floor}"


def _newest(entry: Mapping[str, Any], i: int, sums: Mapping[str, Any]) -> Iterator[str]:
    """Every edit of the experience was asked once."""
    made = entry["scenario"]["experiences"][i]["num_train"]
    asked = [(n, c) for n, c in zip(sums["n"], sums["correct"], strict=True) if n is not None]
    if len(asked) != 1 or asked[0][0] != made or not 0 <= asked[0][1] <= made:
        yield f"newest_edit of experience {i}: {asked} (n, correct), {made} edits were made"


def _weights(i: int, total: Mapping[str, Any]) -> Iterator[str]:
    """Norms obey the triangle inequality."""
    before, now, apart = (math.sqrt(total[name]) for name in ("before", "now", "difference"))
    if abs(now - before) > apart * (1 + 1e-6) + 1e-6 or apart > (now + before) * (1 + 1e-6) + 1e-6:
        yield f"weights after experience {i}: norms {before:.4g} and {now:.4g} with a difference of norm {apart:.4g}"
