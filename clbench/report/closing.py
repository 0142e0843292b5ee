"""What a finished run says: its matrix, its headline numbers, its record."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from clbench.evaluation import edit_metrics, loss_metrics, metrics, setting_metrics
from clbench.records.loss_facts import LEDGER
from clbench.report.formats import plain

_NUMBERS = ("step_macro", "last_macro", "forgetting")
_LOSSES = (
    "final_loss",
    "learned_loss",
    "forgetting_after",
    "regret",
    "gap_depth",
    "anneal_gain_new",
    "probe_own",
    "probe_seen",
    "answer/correct",
    "cloze/correct",
    "completion/correct",
)

_COURSE = ("reliability", "reliability_newest", "generalisation", "locality", "same_subject", "old_loss_rise", "weight_growth")
_EDITS = ("edit_score", "retention", "locality_gold", "paraphrase_success", "neighbourhood_success", "collapse_at")


def closing_text(entry: Mapping[str, Any], path: pathlib.Path) -> str:
    """The matrix, the headline numbers and of pre-training the ledger of a finished run."""
    values = {k: v for k, v in metrics.summary(entry).items() if math.isfinite(v)}
    if "sum_loss" in entry:
        lines = [loss_matrix_text(entry), "", _numbers(values, _LOSSES), _ledger(entry)]
    elif edit_metrics.is_edits(entry):
        lines = [edit_course_text(entry), "", _numbers(values, _EDITS)]
    elif isinstance(entry.get("correct"), list):
        lines = [accuracy_matrix_text(entry), "", _numbers(values, (*_NUMBERS, *setting_metrics.named(entry)))]
    else:
        lines = [f"{name} {value:.4f}" for name, value in values.items()]
    return "\n".join([*lines, f"record {path}"])


def _numbers(values: Mapping[str, float], names: Sequence[str]) -> str:
    return "   ".join(f"{name} {values[name]:.4f}" for name in names if name in values)


def _ledger(entry: Mapping[str, Any]) -> str:
    ledger, unit = entry["ledger"], entry["scenario"].get("unit", "tokens")
    trained = sum(ledger[name] for name in LEDGER[:4])
    parts = f"branch {(ledger['branch_new'] + ledger['branch_replay']) / 1e6:.2f} M, repeated {ledger['repeated'] / 1e6:.2f} M"
    return f"{trained / 1e6:.2f} M {unit} trained on ({parts}), {ledger['flops']:.2e} FLOPs, {entry['seconds']['total']:.0f} s"


def accuracy_matrix_text(entry: Mapping[str, Any]) -> str:
    """Accuracy in percent after each experience (rows) on each evaluation set (columns); '.' where it was not evaluated."""
    names = [plain(name)[:12] for name in entry["scenario"].get("eval_names", range(len(entry["n"])))]
    a = metrics.accuracy(entry["correct"], entry["n"])
    mean = metrics.macro(a, entry["first_seen"])
    if len(names) > 12:
        last = "  ".join(f"{v:.4f}" for v in mean)
        return f"accuracy after each experience (macro over the sets seen)\n{last}"
    rows = [
        (str(learned(entry, i)), [*("." if math.isnan(v) else f"{100 * v:.1f}" for v in row), f"{100 * mean[i]:.1f}"])
        for i, row in enumerate(a)
    ]
    return _grid([*names, "macro"], rows, max(6, *(len(name) for name in names)) + 1)


def edit_course_text(entry: Mapping[str, Any]) -> str:
    """The main numbers after 1, 10, 100, ... edits."""
    steps = edit_metrics.course(entry)
    names = [name for name in _COURSE if any(name in step for step in steps)]
    rows = [(f"{step['edits']:.0f}", [f"{step[name]:.4f}" if name in step else "." for name in names]) for step in steps]
    return _grid(names, rows, max(map(len, names)) + 2)


def learned(entry: Mapping[str, Any], i: int) -> int:
    """Experiences that were learned when row `i` of the matrix was taken: several lie between two evaluations."""
    about = entry["scenario"]
    return min((i + 1) * about.get("evaluate_every", 1), about.get("learned", i + 1))


def loss_matrix_text(entry: Mapping[str, Any]) -> str:
    """Nats per token after each experience (rows) on each evaluation set (columns), the floor below where it is known."""
    names = [plain(name)[:14] for name in entry["scenario"]["eval_names"]]
    matrix = loss_metrics.loss_matrix([entry["sum_loss_start"], *entry["sum_loss"]], entry["tokens"])
    table = [("before" if i == 0 else str(i), list(row)) for i, row in enumerate(matrix)]
    if all(value is not None for value in entry["floor"]):
        table.append(("floor", entry["floor"]))
    rows = [(label, [f"{v:.4f}" for v in (*row, sum(row) / len(names))]) for label, row in table]
    return _grid([*names, "mean"], rows, max(7, *(len(name) for name in names)) + 2)


def _grid(names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], width: int) -> str:
    return "\n".join(
        label.ljust(8) + "".join(cell.rjust(width) for cell in cells) for label, cells in [("after", names), *rows]
    )
