"""The leaderboards of accuracies, of losses and of edits: their columns in order, each with what it means, and the number they
rank by.

`clbench report explain --part columns` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clbench.evaluation import edit_metrics, loss_metrics, metrics, row_metrics, setting_metrics
from clbench.records.loss_facts import LEDGER
from clbench.report import costs

SHOWN = ("step_macro", "step_micro", "last_macro", "last_micro", "forgetting", "bwt", "plasticity")
DETAILS = (
    *(f"last_{name}" for name in ("ece", "nll", "brier")),
    *(f"last_{name}" for name in ("task_identity", "within_task", "between_task", "old_to_new", "new_to_old")),
    *("a_auc", "stability_gap", "min_acc", "wc_acc"),
)
EXTRA = "..."  # where numbers that only some records have stand among the columns that people read


def _spread(numbers: Mapping[str, str]) -> dict[str, str]:
    """Columns of the mean and the standard deviation of numbers."""
    words = {"mean": "mean over seeds", "std": "unbiased standard deviation over seeds"}
    return {f"{name}_{part}": f"{said}: {text}" for name, text in numbers.items() for part, said in words.items()}


_NAMED = {"scenario": "chosen name", "learner": "chosen name", "model": "chosen name"}
_MANIFEST = {"manifest": "first 8 digits of the manifest's SHA-256"}
_SEEDS = {"n_seeds": "runs with a result", "seeds": "their seeds"}
_COSTS = {"seconds_mean": "mean of a run's wall seconds", "peak_memory_mb_mean": "mean of a run's peak memory"}
_LOST = {
    "failed": "runs without a result: raised",
    "dead": "runs without a result: process gone (the same command goes on)",
    "running": "runs without a result: at work",
}
_P = {"vs_best_p": "p of the paired t-test on shared seeds, adjusted by Holm over the rows that were compared"}


def _interval(headline: str) -> dict[str, str]:
    low = f"lower end of the 95 % bootstrap interval of the mean of `{headline}` (too narrow below 5 seeds)"
    return {f"{headline}_low": low, f"{headline}_high": "its upper end"}


ABOUT: dict[str, str] = {
    **_NAMED,
    "variant": "short hash of everything but the seed: rows with other settings, streams or weights never mix",
    **_MANIFEST,
    "marks": (
        "`reference`: keeps all data, no contender; `transductive`, `adapts_at_test`: predictions depend on other test "
        "samples; `test_tuned`: options chosen on the test data, no contender; `classes_tuned`: options chosen on other "
        "samples of the same classes; `legacy`: numbers of another `numbers_version`, never averaged, tested or ranked with "
        "the others"
    ),
    **_SEEDS,
    **_spread({name: metrics.FORMULAS[name].text for name in SHOWN}),
    **_COSTS,
    "stored_bytes": "what the learner held at the end besides exemplars, largest over the runs",
    "exemplars": "kept samples, largest over the runs",
    **_LOST,
    "last_macro_iqm": "interquartile mean of `last_macro` over seeds: floor(n / 4) runs left out at each end",
    **_interval("last_macro"),
    "vs_best": (
        "`last_macro` against the best row of the same scenario and manifest that is neither `reference` nor `legacy`: `best`, "
        "`worse`, `not distinguishable` (p >= 0.05), `too few seeds` (fewer than 2 shared), "
        "`no spread` (the same difference on every shared seed: identical runs count once); empty: not compared"
    ),
    **_P,
    **costs.COLUMNS,
    "pareto_bytes": "`yes`: no contender on this manifest has a higher `last_macro` with as few bytes, stored and exemplars'",
    "pareto_seconds": "the same for `seconds_mean`",
    **{f"{name}_mean": f"mean over seeds: {metrics.DETAILS[name.removeprefix('last_')]}" for name in DETAILS},
}
LOSS_ABOUT: dict[str, str] = {
    **_NAMED,
    "variant": "short hash of everything but the seed",
    **_MANIFEST,
    "marks": "`reference`: joint training, no contender; the others as in leaderboard.csv",
    "replay": "share of each batch that is old text, where the learner has the option",
    "branch": "share of the steps that are an annealed branch",
    "accounting": "`equal_compute`: the branch takes its steps from the experience; `equal_data`: it comes on top",
    "boundary": "the optimiser at a new experience: keep, reset, reset_moments, restore",
    **_SEEDS,
    **_spread(loss_metrics.ABOUT),
    **_interval("final_loss"),
    "vs_best": "`final_loss` against the lowest of the same scenario and manifest that is no reference; see leaderboard.csv",
    **_P,
    "tokens_trunk_new": "tokens trained on: new text in trunks, largest over the runs, as all of the ledger",
    "tokens_trunk_replay": "old text in trunks",
    "tokens_branch_new": "new text in branches",
    "tokens_branch_replay": "old text in branches",
    "tokens_unique": "tokens that were read once at least",
    "tokens_repeated": "tokens that had been read before",
    "tokens_probe": "tokens looked at while training, for the curves",
    "replay_bytes": "bytes of old text that replay needed at hand",
    "flops": "floating-point operations of training, evaluation and probes",
    **_COSTS,
    "stored_bytes": "what the learner held at the end, weights included",
    **_LOST,
}
EDIT_ABOUT: dict[str, str] = {
    **_NAMED,
    "variant": "short hash of everything but the seed",
    **_MANIFEST,
    "marks": "as in leaderboard.csv",
    **_SEEDS,
    **_spread(edit_metrics.ABOUT),
    **_interval("edit_score"),
    "vs_best": "`edit_score` against the highest of the same scenario and manifest; see leaderboard.csv",
    **_P,
    **_COSTS,
    "stored_bytes": "what the learner held at the end besides kept requests, weights included, largest over the runs",
    "exemplars": "kept requests and sequences of old text, largest over the runs",
    **_LOST,
}
COLUMNS = tuple(ABOUT)


@dataclass(frozen=True, eq=False)
class Leaderboard:
    """What a leaderboard is made of.

    part, file, folder  its name on the command line, its CSV file, and the folder with a CSV for each scenario
    panel     the numbers in the files of the folder, each with its interval; none: they hold all columns
    about     its columns in their order, each with what it means
    headline  the number that stands for a run and ranks the rows; `lower`: less is better
    spread    numbers with a mean and a standard deviation over seeds; `means`: those with a mean alone
    ledger    column -> name in the ledger of a record
    text      columns in a terminal of `width` characters; `page`: columns in Markdown, LaTeX and HTML, under `note`
    per_cent  whether its numbers are fractions, which people read in per cent
    """

    part: str
    file: str
    folder: str
    about: Mapping[str, str]
    headline: str
    lower: bool
    spread: tuple[str, ...]
    text: tuple[str, ...]
    page: tuple[str, ...]
    note: str
    means: tuple[str, ...] = ()
    panel: tuple[str, ...] = ()
    ledger: Mapping[str, str] = field(default_factory=dict)
    width: int | None = None
    per_cent: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Its columns without those of other evaluators."""
        return tuple(self.about)


_LOSSES = ("learned_loss", "forgetting_after", "regret", "gap_depth")
ACCURACY = Leaderboard(
    part="leaderboard",
    file="leaderboard.csv",
    folder="leaderboards",
    about=ABOUT,
    headline="last_macro",
    lower=False,
    spread=SHOWN,
    means=DETAILS,
    text=(
        *("learner", "model", "variant", "seeds", "step_macro", "last_macro", "95 %", "?", "forgetting"),
        *(EXTRA, "seconds", "marks"),
    ),
    page=(
        *("learner", "model", "variant", "seeds", "step_macro", "last_macro", "95 %", "vs best", "forgetting"),
        *("seconds", "MB", "marks", EXTRA),
    ),
    note=(
        "Accuracies in per cent, mean ± unbiased standard deviation over seeds; 95 %: bootstrap interval of the mean of "
        "last_macro; vs best: paired t-test on shared seeds, Holm-adjusted."
    ),
    width=120,
    per_cent=True,
)
LOSS = Leaderboard(
    part="losses",
    file="leaderboard_loss.csv",
    folder="losses",
    about=LOSS_ABOUT,
    headline="final_loss",
    lower=True,
    spread=tuple(loss_metrics.ABOUT),
    panel=(
        *("final_loss", "retained_loss", "newest_loss", "learned_loss", "forgetting_after", "regret", "recovery_ratio"),
        *("gap_depth", "rate_share", "anneal_gain_new", "anneal_gain_old", "final_bpb"),
    ),
    ledger={
        **{f"tokens_{name}": name for name in LEDGER if name != "replay_bytes"},
        "replay_bytes": "replay_bytes",
        "flops": "flops",
    },
    text=(
        *("learner", "model", "replay", "variant", "seeds", "final_loss", "?", *_LOSSES),
        *(EXTRA, "Mtokens", "seconds", "marks"),
    ),
    page=(
        *("learner", "replay", "model", "variant", "seeds", "final_loss", *_LOSSES, "95 %", "vs best"),
        *("Mtokens", "seconds", "marks", EXTRA),
    ),
    note="Nats per token, mean ± unbiased standard deviation over seeds; 95 %: bootstrap interval of the mean of final_loss.",
)
EDITS = Leaderboard(
    part="edits",
    file="leaderboard_edit.csv",
    folder="edits",
    about=EDIT_ABOUT,
    headline="edit_score",
    lower=False,
    spread=tuple(edit_metrics.ABOUT),
    text=(
        *("learner", "variant", "seeds", "edit_score", "?", "reliability", "generalisation", "locality"),
        *("old_loss_rise", "weight_growth", EXTRA, "seconds", "marks"),
    ),
    page=(
        *("learner", "model", "variant", "seeds", "edit_score", "reliability", "generalisation", "locality", "same_subject"),
        *("reliability_newest", "old_loss_rise", "weight_growth", "95 %", "vs best", "seconds", "MB", "marks", EXTRA),
    ),
    note=(
        "Shares after the last edit of the stream, losses in nats per token, mean ± unbiased standard deviation over seeds; "
        "95 %: bootstrap interval of the mean of edit_score."
    ),
)
LEADERBOARDS = (ACCURACY, LOSS, EDITS)


def numbers_of(values: Iterable[str]) -> list[str]:
    """Numbers that only some records have, among names: of their setting, then of other evaluators (EVALUATOR/SUM)."""
    found = set(values)
    return [*(name for name in setting_metrics.ABOUT if name in found), *sorted(name for name in found if "/" in name)]


def extra_numbers(made: Iterable[Mapping[str, Any]]) -> list[str]:
    """The numbers of settings and of other evaluators that any row of a leaderboard has."""
    return numbers_of(name.removesuffix("_mean") for row in made for name in row if name.endswith("_mean"))


def extra(made: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of settings and other evaluators that any row of a leaderboard has, each with what it means."""
    return _spread({name: setting_metrics.ABOUT.get(name, row_metrics.ABOUT) for name in extra_numbers(made)})
