"""The leaderboard of pre-training: losses (nats, for images squared errors), ledger, what pairs of runs say together."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from clbench.evaluation import loss_metrics
from clbench.records import loss_facts, record
from clbench.records.loss_facts import LEDGER, OPTIONS
from clbench.report import statistics
from clbench.report.columns import extra, extra_numbers, numbers_of
from clbench.report.formats import Table, csv_text, fraction, plain, safe
from clbench.report.runs import Run, summarize
from clbench.report.statistics import mean_std

SHOWN = tuple(loss_metrics.ABOUT)
ABOUT: dict[str, str] = {
    "scenario": "chosen name",
    "learner": "chosen name",
    "model": "chosen name",
    "variant": "short hash of everything but the seed",
    "manifest": "first 8 digits of the manifest's SHA-256",
    "marks": "`reference`: joint training, no contender; the others as in leaderboard.csv",
    "replay": "share of each batch that is old text, where the learner has the option",
    "branch": "share of the steps that are an annealed branch",
    "accounting": "`equal_compute`: the branch takes its steps from the experience; `equal_data`: it comes on top",
    "boundary": "the optimiser at a new experience: keep, reset, reset_moments, restore",
    "n_seeds": "runs with a result",
    "seeds": "their seeds",
    **{
        f"{name}_{part}": f"{words}: {text}"
        for name, text in loss_metrics.ABOUT.items()
        for part, words in (("mean", "mean over seeds"), ("std", "unbiased standard deviation over seeds"))
    },
    "final_loss_low": "lower end of the 95 % bootstrap interval of the mean of `final_loss` (too narrow below 5 seeds)",
    "final_loss_high": "its upper end",
    "vs_best": "`final_loss` against the lowest of the same scenario and manifest that is no reference; see leaderboard.csv",
    "vs_best_p": "p of the paired t-test on shared seeds, adjusted by Holm over the rows that were compared",
    "tokens_trunk_new": "tokens trained on: new text in trunks, largest over the runs, as all of the ledger",
    "tokens_trunk_replay": "old text in trunks",
    "tokens_branch_new": "new text in branches",
    "tokens_branch_replay": "old text in branches",
    "tokens_unique": "tokens that were read once at least",
    "tokens_repeated": "tokens that had been read before",
    "tokens_probe": "tokens looked at while training, for the curves",
    "replay_bytes": "bytes of old text that replay needed at hand",
    "flops": "floating-point operations of training, evaluation and probes",
    "seconds_mean": "mean of a run's wall seconds",
    "peak_memory_mb_mean": "mean of a run's peak memory",
    "stored_bytes": "what the learner held at the end, weights included",
    "failed": "runs without a result: raised",
    "dead": "runs without a result: process gone (the same command goes on)",
    "running": "runs without a result: at work",
}
COLUMNS = tuple(ABOUT)
_NAMED = ("final_loss", "learned_loss", "forgetting_after", "regret", "gap_depth")
_WHOLE = ("gap_area", "gap_tokens")
Row = dict[str, Any]


def rows(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> list[Row]:
    """One row for each (scenario, learner, model, variant) of pre-training records, lowest final loss first."""
    known: dict[str, Mapping[str, Any]] = {}
    return board(loss_facts.join([summarize(entry, known) for entry in records]), dead)


def board(runs: Sequence[Run], dead: Sequence[str] = ()) -> list[Row]:
    """`rows` of runs that are summarized and joined already; runs of accuracies are left out."""
    groups: dict[tuple[str, str, str, str, bool], list[Run]] = {}
    for run in runs:
        if run.loss is not None:
            groups.setdefault((run.scenario, run.learner, run.model, run.variant, run.legacy), []).append(run)
    lost = set(dead)
    made = [(_row(group, lost), group) for group in (sorted(g, key=lambda r: (r.seed, r.run_id)) for g in groups.values())]
    for (row, _), interval in zip(made, statistics.bootstraps([[_finals(group)] for _, group in made]), strict=True):
        row["final_loss_low"], row["final_loss_high"] = interval or (None, None)

    def order(pair: tuple[Row, list[Run]]) -> tuple:
        row, value = pair[0], pair[0]["final_loss_mean"]
        last = (row["learner"], row["variant"], "legacy" in row["marks"])
        return (row["scenario"], row["model"], math.inf if value is None else value, *last)

    made.sort(key=order)
    fields: dict[tuple[str, str], list[tuple[Row, list[Run]]]] = {}
    for row, group in made:
        contends = not group[0].legacy and not {"reference", "test_tuned"} & set(row["marks"].split())
        if contends and row["final_loss_mean"] is not None:
            fields.setdefault((row["scenario"], group[0].stream), []).append((row, group))
    for field in fields.values():
        statistics.against_best(field, "final_loss", lower=True)
    return [row for row, _ in made]


def _finals(group: Sequence[Run]) -> list[float]:
    usable = (run for run in group if run.loss is not None and run.loss["usable"])
    return [run.values["final_loss"] for run in usable if "final_loss" in run.values]


def _row(group: Sequence[Run], dead: set[str]) -> Row:
    first, facts = group[0], group[0].loss or {}
    done = [run for run in group if run.loss is not None and run.loss["usable"]]
    row: Row = dict.fromkeys(COLUMNS)
    row |= {name: getattr(first, name) for name in ("scenario", "learner", "model", "variant")} | facts["options"]
    row |= {"manifest": first.stream[:8], "marks": " ".join(sorted({mark for run in group for mark in run.marks}))}
    row["n_seeds"], row["seeds"] = len(done), " ".join(str(run.seed) for run in done)
    for name in SHOWN:
        row[f"{name}_mean"], row[f"{name}_std"] = mean_std([run.values[name] for run in done if name in run.values])
    for name in numbers_of(name for run in done for name in run.values):
        row[f"{name}_mean"], row[f"{name}_std"] = mean_std([run.values[name] for run in done if name in run.values])
    ledgers = [run.loss["ledger"] for run in done if run.loss is not None]
    for name in (*LEDGER, "flops"):
        column = name if name in ("replay_bytes", "flops") else f"tokens_{name}"
        row[column] = max((ledger[name] for ledger in ledgers), default=None)
    for name in ("seconds", "peak_memory_mb"):
        row[f"{name}_mean"] = mean_std([run.costs[name] for run in done if name in run.costs])[0]
    row["stored_bytes"] = max((run.costs["stored_bytes"] for run in done if "stored_bytes" in run.costs), default=None)
    row["failed"] = sum(run.status == "failed" for run in group)
    row["dead"] = sum(run.run_id in dead for run in group)
    row["running"] = sum(run.status == "running" for run in group) - row["dead"]
    return row


def csv_of(made: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """The rows as CSV text in fixed formats: all columns, those of other evaluators at the end, or the given ones."""
    return csv_text(columns or (*COLUMNS, *extra(made)), made, formatted)


def formatted(name: str, value: Any) -> str:
    """A cell of the CSV; '' for no value."""
    if value is None:
        return ""
    if "/" in name:
        return fraction(value)
    if name == "flops":
        return f"{value:.4e}"
    if name == "vs_best_p" or name in OPTIONS:
        return f"{value:.4g}" if isinstance(value, float) else safe(value)
    if name.startswith(_WHOLE):
        return f"{value:.0f}"
    if isinstance(value, float):
        return fraction(value, 1) if name.startswith(("seconds", "peak", "stored")) else fraction(value)
    return safe(value)


def write(made: Sequence[Row], results: pathlib.Path) -> list[pathlib.Path]:
    """Write `leaderboard_loss.csv`, if there are pre-training runs or were -> what was written."""
    path = results / "leaderboard_loss.csv"
    if not made and not path.exists():
        return []
    record.write_text(path, csv_of(made))
    return [path]


def troubles(runs: Sequence[Run]) -> list[str]:
    """A line for each finished record whose losses cannot be read."""
    broken = [run for run in runs if run.loss is not None and run.status == "ok" and not run.loss["usable"]]
    return [f"problem {plain(run.run_id)}: its losses cannot be read" for run in broken]


def table_text(made: Sequence[Mapping[str, Any]]) -> str:
    """The main columns of each scenario, aligned: nats per token, mean ± standard deviation over seeds."""
    more = extra_numbers(made)
    names = (*_NAMED[1:], *map(plain, more))
    head = ("learner", "model", "replay", "variant", "seeds", _NAMED[0], "?", *names, "Mtokens", "seconds", "marks")
    cells: list[tuple[str, ...]] = [head]
    for row in made:
        lost = "".join(f" +{row[k]} {k}" for k in ("failed", "dead", "running") if row[k])
        numbers = [_pair(row.get(f"{name}_mean"), row.get(f"{name}_std")) for name in (*_NAMED, *more)]
        numbers[1:1] = [statistics.LETTERS.get(row["vs_best"] or "", "")]
        seconds = "-" if row["seconds_mean"] is None else f"{row['seconds_mean']:.1f}"
        share = "-" if row["replay"] is None else f"{row['replay']:g}"
        words = (plain(row["learner"]), plain(row["model"]), share, row["variant"], f"{row['n_seeds']}{lost}")
        cells.append((*words, *numbers, f"{_trained(row) / 1e6:.2f}", seconds, plain(row["marks"])))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines, scenario = ["  " + _aligned(head, widths)], None
    for row, line in zip(made, cells[1:], strict=True):
        if row["scenario"] != scenario:
            scenario = row["scenario"]
            lines.append(plain(scenario))
        lines.append("  " + _aligned(line, widths))
    return "\n".join([*lines, *statistics.legend(row["vs_best"] for row in made)])


def for_people(made: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The main columns of each scenario, for Markdown, LaTeX and HTML."""
    columns = ("learner", "replay", "model", "variant", "seeds", *_NAMED, "95 %", "vs best", "Mtokens", "seconds", "marks")
    more = extra_numbers(made)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in made:
        line = {name: row[name] for name in ("learner", "model", "variant", "marks")}
        lost = "".join(f" +{row[k]} {k}" for k in ("failed", "dead", "running") if row[k])
        line |= {"replay": None if row["replay"] is None else f"{row['replay']:g}", "seeds": f"{row['n_seeds']}{lost}"}
        pairs = {name: (row.get(f"{name}_mean"), row.get(f"{name}_std")) for name in (*_NAMED, *more)}
        line |= {name: _pair(*pair, " ± ") for name, pair in pairs.items()}
        low, high = row["final_loss_low"], row["final_loss_high"]
        line["95 %"] = None if low is None else f"{fraction(low)} .. {fraction(high)}"
        seconds = None if row["seconds_mean"] is None else f"{row['seconds_mean']:.1f}"
        line |= {"vs best": row["vs_best"], "Mtokens": f"{_trained(row) / 1e6:.2f}", "seconds": seconds}
        groups.setdefault(row["scenario"], []).append(line)
    notes = (
        "Nats per token, mean ± unbiased standard deviation over seeds; 95 %: bootstrap interval of the mean of final_loss.",
    )
    columns = (*columns, *more)
    return [Table(f"losses {i}", plain(name), columns, lines, notes) for i, (name, lines) in enumerate(groups.items())]


def _trained(row: Mapping[str, Any]) -> int:
    return sum(row[f"tokens_{name}"] or 0 for name in LEDGER[:4])


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(wide) for cell, wide in zip(line, widths, strict=True)).rstrip()


def _pair(mean: float | None, std: float | None, sign: str = "±") -> str:
    return "-" if mean is None else fraction(mean) + ("" if std is None else sign + f"{std:.4f}".lstrip("0"))


def closing_text(entry: Mapping[str, Any], path: pathlib.Path) -> str:
    """The loss matrix, the headline numbers and the ledger of a finished run."""
    values, ledger = loss_metrics.summary(entry), entry["ledger"]
    names = (
        "final_loss",
        "learned_loss",
        "forgetting_after",
        "regret",
        "gap_depth",
        "anneal_gain_new",
        "probe_own",
        "probe_seen",
    )
    shown = "   ".join(f"{n} {values[n]:.4f}" for n in names if n in values and math.isfinite(values[n]))
    trained = sum(ledger[name] for name in LEDGER[:4])
    parts = f"branch {(ledger['branch_new'] + ledger['branch_replay']) / 1e6:.2f} M, repeated {ledger['repeated'] / 1e6:.2f} M"
    unit = entry["scenario"].get("unit", "tokens")
    used = f"{trained / 1e6:.2f} M {unit} trained on ({parts}), {ledger['flops']:.2e} FLOPs, {entry['seconds']['total']:.0f} s"
    return f"{matrix_text(entry)}\n\n{shown}\n{used}\nrecord {path}"


def matrix_text(entry: Mapping[str, Any]) -> str:
    """Nats per token after each experience (rows) on each evaluation set (columns), the floor below where it is known."""
    names = [plain(name)[:14] for name in entry["scenario"]["eval_names"]]
    tokens = entry["tokens"]
    start = loss_metrics.loss_matrix([entry["sum_loss_start"]], tokens)[0]
    after = loss_metrics.loss_matrix(entry["sum_loss"], tokens)
    table = [("before", start), *((str(i + 1), row) for i, row in enumerate(after))]
    if all(value is not None for value in entry["floor"]):
        table.append(("floor", entry["floor"]))
    width = max(7, *(len(name) for name in names)) + 2
    lines = ["after".ljust(8) + "".join(name.rjust(width) for name in names) + "mean".rjust(width)]
    for label, row in table:
        mean = sum(row) / len(names)
        lines.append(label.ljust(8) + "".join(f"{v:.4f}".rjust(width) for v in row) + f"{mean:.4f}".rjust(width))
    return "\n".join(lines)
