"""Every number of a record by name, whatever its evaluators were. The formulas on accuracies are names of this module too.

Each family is made of what the record holds: accuracies of `correct` and what refines it, numbers of the setting that its
stream has, losses of `sum_loss` and curves, answers of edited models, and of any other evaluator EVALUATOR/SUM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clbench.evaluation import accuracy_metrics, edit_metrics, loss_metrics, row_metrics, setting_metrics
from clbench.evaluation.accuracy_metrics import *  # noqa: F403

ABOUT = (
    edit_metrics.ABOUT | loss_metrics.ABOUT | accuracy_metrics.ABOUT | setting_metrics.ABOUT
)  # min_acc and wc_acc are numbers of both


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number that one record allows. Parts that are absent add nothing; malformed ones raise."""
    of_accuracies = accuracy_metrics.summary(record) | setting_metrics.summary(record)
    return of_accuracies | loss_metrics.summary(record) | edit_metrics.summary(record) | row_metrics.summary(record)
