"""Every number of a record by name, whatever its evaluators were. The formulas on accuracies are names of this module too.

Each family is made from what the record holds: accuracies of `correct` and what refines it, losses of `sum_loss` and curves,
and of any other evaluator EVALUATOR/SUM, a mean over the sets seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clbench.evaluation import accuracy_metrics, loss_metrics
from clbench.evaluation.accuracy_metrics import *  # noqa: F403

ABOUT = loss_metrics.ABOUT | accuracy_metrics.ABOUT  # min_acc and wc_acc are numbers of both
ABOUT_SUMS = "mean over the evaluation sets seen of the evaluator's sum after the last experience / n"


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number that one record allows. Parts that are absent add nothing; malformed ones raise."""
    return accuracy_metrics.summary(record) | loss_metrics.summary(record) | sums(record)


def sums(record: Mapping[str, Any]) -> dict[str, float]:
    """EVALUATOR/SUM -> mean over the sets seen of sum / n after the last experience; sums that are lists have no mean.

    Of the rows that no table shows (`records.tables`): those of plug-ins, and sums that clbench does not know.
    """
    rows = [row for row in record.get("rows") or () if row.get("step") is None and "role" not in row]
    steps = record.get("correct") or record.get("sum_loss") or ()
    last = len(steps) - 1 if steps else max((row["experience"] for row in rows), default=-1)
    found: dict[str, float] = {}
    for row in rows:
        if row["experience"] != last or last < 0:
            continue
        n = row["sums"].get("n", record["n"])
        for name, column in row["sums"].items():
            pairs = zip(column, n, record["first_seen"], strict=True)
            shares = [v / m for v, m, first in pairs if first <= last and m and isinstance(v, int | float)]
            if name != "n" and shares:
                found[f"{row['evaluator']}/{name}"] = sum(shares) / len(shares)
    return found
