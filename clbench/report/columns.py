"""The columns of the leaderboard, in their order, each with what it means: `clbench report explain --part columns`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clbench.evaluation import metrics, row_metrics
from clbench.report import costs

SHOWN = ("step_macro", "step_micro", "last_macro", "last_micro", "forgetting", "bwt", "plasticity")
DETAILS = (
    *(f"last_{name}" for name in ("ece", "nll", "brier")),
    *(f"last_{name}" for name in ("task_identity", "within_task", "between_task", "old_to_new", "new_to_old")),
    *("a_auc", "stability_gap", "min_acc", "wc_acc"),
)
ABOUT: dict[str, str] = {
    "scenario": "chosen name",
    "learner": "chosen name",
    "model": "chosen name",
    "variant": "short hash of everything but the seed: rows with other settings, streams or weights never mix",
    "manifest": "first 8 digits of the manifest's SHA-256",
    "marks": (
        "`reference`: keeps all data, no contender; `transductive`, `adapts_at_test`: predictions depend on other test "
        "samples; `test_tuned`: options chosen on the test data, no contender; `classes_tuned`: options chosen on other "
        "samples of the same classes; `legacy`: numbers of another `numbers_version`, never averaged, tested or ranked with "
        "the others"
    ),
    "n_seeds": "runs with a result",
    "seeds": "their seeds",
    **{
        f"{name}_{part}": f"{words}: {metrics.FORMULAS[name].text}"
        for name in SHOWN
        for part, words in (("mean", "mean over seeds"), ("std", "unbiased standard deviation over seeds"))
    },
    "seconds_mean": "mean of a run's wall seconds",
    "peak_memory_mb_mean": "mean of a run's peak memory",
    "stored_bytes": "what the learner held at the end besides exemplars, largest over the runs",
    "exemplars": "kept samples, largest over the runs",
    "failed": "runs without a result: raised",
    "dead": "runs without a result: process gone (the same command goes on)",
    "running": "runs without a result: at work",
    "last_macro_iqm": "interquartile mean of `last_macro` over seeds: floor(n / 4) runs left out at each end",
    "last_macro_low": "lower end of the 95 % bootstrap interval of the mean of `last_macro` (too narrow below 5 seeds)",
    "last_macro_high": "its upper end",
    "vs_best": (
        "`last_macro` against the best row of the same scenario and manifest that is neither `reference` nor `legacy`: `best`, "
        "`worse`, `not distinguishable` (p >= 0.05), `too few seeds` (fewer than 2 shared), "
        "`no spread` (the same difference on every shared seed: identical runs count once); empty: not compared"
    ),
    "vs_best_p": "p of the paired t-test on shared seeds, adjusted by Holm over the rows that were compared",
    **costs.COLUMNS,
    "pareto_bytes": "`yes`: no contender on this manifest has a higher `last_macro` with as few bytes, stored and exemplars'",
    "pareto_seconds": "the same for `seconds_mean`",
    **{f"{name}_mean": f"mean over seeds: {metrics.DETAILS[name.removeprefix('last_')]}" for name in DETAILS},
}
COLUMNS = tuple(ABOUT)


def numbers_of(values: Iterable[str]) -> list[str]:
    """The numbers of other evaluators, EVALUATOR/SUM, among names of numbers."""
    return sorted({name for name in values if "/" in name})


def extra(made: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns of other evaluators that any row of a leaderboard has: mean and standard deviation of each number."""
    return tuple(f"{name}_{part}" for name in extra_numbers(made) for part in ("mean", "std"))


def extra_numbers(made: Iterable[Mapping[str, Any]]) -> list[str]:
    """The numbers of other evaluators that any row of a leaderboard has."""
    return [name.removesuffix("_mean") for name in numbers_of(name for row in made for name in row if name.endswith("_mean"))]


def about(names: Iterable[str]) -> dict[str, str]:
    """What columns of other evaluators mean."""
    words = {"mean": "mean over seeds", "std": "unbiased standard deviation over seeds"}
    return {name: f"{words[name.rpartition('_')[2]]}: {row_metrics.ABOUT}" for name in names}
