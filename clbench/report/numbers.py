"""Registry of the numbers in tables: names, whether lower is better."""

from __future__ import annotations

from collections.abc import Iterable

from clbench.config.signatures import nearest
from clbench.evaluation import accuracy_metrics, loss_metrics, metrics, setting_metrics
from clbench.interfaces import UserError
from clbench.report.runs import Run

_LOWER = frozenset(
    ("forgetting", "forgetting_diagonal", "ece", "nll", "brier", "within_task", "between_task", "old_to_new", "new_to_old")
) | {"stability_gap", "performance_drop", "plasticity_loss", "mean_error", "clean_forgetting", "intransigence"}


def lower(metric: str) -> bool:
    """Whether less is better."""
    if metric in loss_metrics.ABOUT:
        return metric not in loss_metrics.HIGHER
    return metric.removeprefix("last_").removeprefix("step_") in _LOWER


def said(metric: str | None, runs: Iterable[Run]) -> str:
    """What a title calls the number: the one asked for, else the headlines of the runs."""
    return metric or ", ".join(sorted({run.leaderboard.headline for run in runs}, reverse=True))


def check_metric(metric: str, losses: bool = True) -> None:
    """Raise `UserError` for a number that no record can have; without `losses` those of pre-training are none."""
    known = list(metrics.ABOUT if losses else accuracy_metrics.ABOUT | setting_metrics.ABOUT)
    if metric not in known and "/" not in metric:  # EVALUATOR/SUM is known to records alone
        raise UserError(f"no metric {metric!r}{nearest(metric, known)} (clbench report explain names them)")
