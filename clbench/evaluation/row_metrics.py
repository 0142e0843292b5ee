"""Numbers of evaluators that have no formulas of their own: EVALUATOR/SUM, a mean over the sets seen.

Made of the rows of a record (`records.tables`) that no table shows: those of plug-ins, and sums that clbench does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clbench.evaluation import edit_metrics, setting_metrics

ABOUT = "mean over the evaluation sets seen of the evaluator's sum after the last experience / n"


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """EVALUATOR/SUM -> mean over the sets seen of sum / n after the last experience; sums that are lists have no mean."""
    rows = [row for row in record.get("rows") or () if row.get("step") is None and "role" not in row]
    steps = record.get("correct") or record.get("sum_loss") or ()
    last = len(steps) - 1 if steps else max((row["experience"] for row in rows), default=-1)
    found: dict[str, float] = {}
    own = edit_metrics.EVALUATORS if edit_metrics.is_edits(record) else ()
    if (record.get("scenario") or {}).get("kind") == "text_tasks":
        own = (setting_metrics.ANSWERS, setting_metrics.OLD_TEXT)
    for row in rows:
        if row["experience"] != last or last < 0 or row["evaluator"] in own:
            continue
        n = row["sums"].get("n", record["n"])
        for name, column in row["sums"].items():
            pairs = zip(column, n, record["first_seen"], strict=True)
            shares = [v / m for v, m, first in pairs if first <= last and m and isinstance(v, int | float)]
            if name != "n" and shares:
                found[f"{row['evaluator']}/{name}"] = sum(shares) / len(shares)
    return found
