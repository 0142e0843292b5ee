"""Checks of the sums of a record of text tasks: counts, losses, budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from clbench.evaluation import accuracy_metrics
from clbench.evaluation.setting_metrics import ANSWERS, OLD_TEXT
from clbench.records.verify_counts import budget

KIND = "text_tasks"
SLACK = 0.01  # nats per token by which a finite text may be predicted better than by its source


def is_texts(entry: Mapping[str, Any]) -> bool:
    """Whether a record is of text tasks, finished or not."""
    return entry["scenario"].get("kind") == KIND


def check(entry: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is wrong with a finished record of kind `text_tasks`."""
    steps = entry["scenario"]["num_experiences"]
    rows = {(row["evaluator"], row["experience"]): row for row in entry["rows"] if row["step"] is None}
    if len(entry["correct"] or ()) != steps:
        yield f"key 'correct' has {len(entry['correct'] or ())} rows for {steps} experiences"
        return
    for i in range(-1, steps):
        where = "before the first experience" if i < 0 else f"after experience {i}"
        if (ANSWERS, i) not in rows:
            yield f"there are no answers {where}"
            return
        yield from _answers(entry, rows[ANSWERS, i]["sums"], where)
        if i >= 0 and rows[ANSWERS, i]["sums"]["correct"] != entry["correct"][i]:
            yield f"{where} correct is {entry['correct'][i]}, answers count {rows[ANSWERS, i]['sums']['correct']}"
        if (OLD_TEXT, -1) in rows:
            yield from _old_text(entry, rows.get((OLD_TEXT, i)), where)
    bounded = [v for name, v in accuracy_metrics.summary(entry).items() if name not in accuracy_metrics.UNBOUNDED]
    if any(abs(v) > 1 + 1e-9 for v in bounded if v == v):
        yield "a derived number is outside -1..1"
    yield from budget(entry)


def _answers(entry: Mapping[str, Any], sums: Mapping[str, Any], where: str) -> Iterator[str]:
    """Every set is asked whole; counts lie within sizes and do not contradict each other."""
    for j, size in enumerate(entry["n"]):
        n, right, hits, tokens, nats = (sums[name][j] for name in ("n", "correct", "token_hits", "tokens", "nats"))
        if n != size or any(type(count) is not int for count in (right, hits, tokens)):
            yield f"{where} set {j}: {n} of {size} lines were asked, counts are {right}, {hits}, {tokens}"
        elif not 0 <= right <= n <= tokens or not right <= hits <= tokens or (right == n) != (hits == tokens):
            yield f"{where} set {j}: {right} of {n} answers are right, {hits} of {tokens} tokens"
        if not math.isfinite(nats) or nats < 0:
            yield f"{where} set {j}: nats is {nats}"


def _old_text(entry: Mapping[str, Any], row: Mapping[str, Any] | None, where: str) -> Iterator[str]:
    """A loss is not below that of the true source."""
    if row is None:
        yield f"{where} old text was not asked"
        return
    loss, floor = row["total"]["nats"] / row["total"]["tokens"], entry["scenario"].get("old_floor")
    if not math.isfinite(loss) or loss < 0 or (floor is not None and loss < floor - SLACK):
        yield f"{where} the loss on old text is {loss:.4f} nats a token, the floor is {floor}"
