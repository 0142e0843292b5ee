"""From a folder of records to the leaderboard: a pure function of the folder, byte for byte."""

from __future__ import annotations

import hashlib
import math
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clbench.evaluation import metrics
from clbench.records import record
from clbench.report import costs, losses, statistics
from clbench.report.columns import ABOUT, COLUMNS, DETAILS, SHOWN, extra, extra_numbers, numbers_of
from clbench.report.formats import csv_text, fraction, plain, safe
from clbench.report.runs import Filter, Run, Scan, scan, summarize, variant
from clbench.report.statistics import mean_std

__all__ = ["ABOUT", "COLUMNS", "SHOWN", "mean_std", "plain", "report", "rows", "safe", "to_csv", "variant"]
Row = dict[str, Any]


def rows(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> list[Row]:
    """One row for each (scenario, learner, model, variant); runs without a result count, and are never missing."""
    known: dict[str, Mapping[str, Any]] = {}
    return board([summarize(entry, known) for entry in records], dead)


def board(runs: Sequence[Run], dead: Sequence[str] = ()) -> list[Row]:
    """`rows` of runs that are summarized already; those of pre-training have a table of their own (`losses`)."""
    groups: dict[tuple[str, str, str, str, bool], list[Run]] = {}
    for run in (run for run in runs if run.loss is None):
        groups.setdefault((run.scenario, run.learner, run.model, run.variant, run.legacy), []).append(run)
    lost = set(dead)
    groups = {key: sorted(group, key=lambda r: (r.seed, r.run_id)) for key, group in groups.items()}
    made = [(_row(group, lost), group) for group in groups.values()]
    _spread([row for row, _ in made], [_finals(group) for _, group in made])

    def order(pair: tuple[Row, list[Run]]) -> tuple:
        row = pair[0]
        value = row["last_macro_mean"]
        last = (row["learner"], row["variant"], "legacy" in row["marks"])
        return (row["scenario"], row["model"], math.inf if value is None else -value, *last)

    made.sort(key=order)
    fields: dict[tuple[str, str], list[tuple[Row, list[Run]]]] = {}
    for row, group in made:
        contends = not group[0].legacy and not {"reference", "test_tuned"} & set(row["marks"].split())
        if contends and row["last_macro_mean"] is not None:
            fields.setdefault((row["scenario"], group[0].stream), []).append((row, group))
    for field in fields.values():
        statistics.against_best(field, "last_macro")
        _fronts([row for row, _ in field])
    return [row for row, _ in made]


def _row(group: Sequence[Run], dead: set[str]) -> Row:
    done, first = [run for run in group if run.status == "ok"], group[0]
    row: Row = dict.fromkeys(COLUMNS)
    row |= {name: getattr(first, name) for name in ("scenario", "learner", "model", "variant")}
    row |= {"manifest": first.stream[:8], "marks": " ".join(sorted({mark for run in group for mark in run.marks}))}
    row["n_seeds"], row["seeds"] = len(done), " ".join(str(run.seed) for run in done)
    for name in (*SHOWN, *DETAILS):
        mean, std = mean_std([run.values[name] for run in done if name in run.values])
        row |= {f"{name}_mean": mean} | ({f"{name}_std": std} if name in SHOWN else {})
    row |= costs.columns([run.costs for run in done])
    row |= others(done)
    row["failed"] = sum(run.status == "failed" for run in group)
    row["dead"] = sum(run.run_id in dead for run in group)
    row["running"] = sum(run.status == "running" for run in group) - row["dead"]
    return row


def others(done: Sequence[Run]) -> Row:
    """Mean and standard deviation over finished runs of the numbers of other evaluators; {} without any."""
    row: Row = {}
    for name in numbers_of(name for run in done for name in run.values):
        row[f"{name}_mean"], row[f"{name}_std"] = mean_std([run.values[name] for run in done if name in run.values])
    return row


def _finals(group: Sequence[Run]) -> list[float]:
    return [run.values["last_macro"] for run in group if run.status == "ok" and "last_macro" in run.values]


def _spread(made: Sequence[Row], finals: Sequence[list[float]]) -> None:
    """Interquartile mean and interval of `last_macro` of every row that has a result."""
    known = [(row, values) for row, values in zip(made, finals, strict=True) if values]
    middles, intervals = statistics.iqms([v for _, v in known]), statistics.bootstraps([[v] for _, v in known])
    for (row, _), middle, interval in zip(known, middles, intervals, strict=True):
        row["last_macro_iqm"] = middle
        row["last_macro_low"], row["last_macro_high"] = interval or (None, None)


def _fronts(field: Sequence[Row]) -> None:
    for name, cost in (("pareto_bytes", costs.held), ("pareto_seconds", lambda row: row["seconds_mean"])):
        found = costs.front([(cost(row), row["last_macro_mean"]) for row in field])
        for row, on in zip(field, found, strict=True):
            row[name] = None if cost(row) is None else on


def leaderboard(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> Any:
    """The leaderboard as a pandas DataFrame with `COLUMNS`, and columns of other evaluators where records have them."""
    import pandas as pd

    made = rows(records, dead)
    return pd.DataFrame(made, columns=[*COLUMNS, *extra(made)])


def to_csv(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> str:
    """The leaderboard as CSV text: fixed formats, so that a difference in review is a difference in results."""
    return csv_of(rows(records, dead))


def csv_of(made: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows as CSV text: all columns, those of other evaluators at the end, or the given ones."""
    return csv_text(columns or (*COLUMNS, *extra(made)), made, formatted)


def formatted(name: str, value: Any) -> str:
    """A cell of the CSV; '' for no value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "vs_best_p":
        return f"{value:.4g}"
    if isinstance(value, float):
        cost = name in costs.COLUMNS or name in ("seconds_mean", "peak_memory_mb_mean", "stored_bytes", "exemplars")
        return fraction(value, 1) if cost else fraction(value)
    return safe(value)


def file_name(scenario: str) -> str:
    """A file name for any scenario name, without a suffix: names that are not plain lower-case words get a hash."""
    word = re.sub(r"[^a-z0-9_.-]+", "_", scenario.lower()).strip("._-")[:60]
    devices = ("con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10)))
    if word and word == scenario and word.split(".")[0] not in devices:
        return word
    return f"{word or 'scenario'}-{hashlib.sha256(scenario.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def write(made: Sequence[Row], results: pathlib.Path) -> None:
    """`leaderboard.csv` and a CSV for each scenario in `leaderboards/`; files there of scenarios that are gone are removed."""
    record.write_text(results / "leaderboard.csv", csv_of(made))
    groups: dict[str, list[Row]] = {}
    for row in made:
        groups.setdefault(file_name(row["scenario"]), []).append(row)
    folder = results / "leaderboards"
    for name, group in groups.items():
        record.write_text(folder / f"{name}.csv", csv_of(group))
    for path in folder.glob("*.csv"):
        if path.stem not in groups and _is_ours(path):
            path.unlink(missing_ok=True)


def _is_ours(path: pathlib.Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.readline(4096).startswith(",".join(COLUMNS[:5]).encode())
    except OSError:
        return False


def report(results_dir: str | pathlib.Path, strict: bool = False, wanted: Filter | None = None) -> tuple[str, int]:
    """The table for the terminal -> (text, exit code: 1 if strict and something is wrong).

    Without a filter it also rebuilds `leaderboard.csv` and `leaderboards/` from `records/`; a filtered view writes nothing.
    """
    results = pathlib.Path(results_dir).expanduser()
    found = scan(results, wanted)
    made, lower = board(found.runs, found.dead), losses.board(found.runs, found.dead)
    path = results / "leaderboard.csv"
    whole, written = not wanted, []
    if whole and (made or found.problems or path.exists()):
        write(made, results)
        written = [path, results / "leaderboards"]
    if not found.runs and not found.problems:
        return f"no records in {results / 'records'}", 1 if strict else 0
    lines = [*([table_text(made), ""] if made or not lower else []), *([losses.table_text(lower), ""] if lower else [])]
    lines += [*troubles(found), *losses.troubles(found.runs)]
    if whole:
        from clbench.report import loss_panel

        written += [*losses.write(lower, results), *loss_panel.write(found.runs, results)]
    lines.append(f"written {', '.join(map(str, written))}" if whole else "a filtered view: nothing is written")
    return "\n".join(lines), 1 if strict and is_bad(found) else 0


def is_bad(found: Scan) -> bool:
    """Whether a run failed or died, or a file is no record."""
    return bool(found.dead or found.problems or any(run.status == "failed" for run in found.runs))


def troubles(found: Scan) -> list[str]:
    """How many records there are, and a line for each that has no result and for each file that is none."""
    dead = set(found.dead)
    counts = Counter("dead" if run.run_id in dead else run.status for run in found.runs)
    lines = [f"{len(found.runs)} records: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))]
    for run in found.runs:
        what = f"{run.run_id}  {plain(run.scenario)} {plain(run.learner)} seed {run.seed}"
        if run.status == "failed":
            lines.append(f"failed  {what}: {run.trouble}")
        elif run.run_id in dead:
            lines.append(f"dead    {what}: its process is gone; the same command goes on where it was")
    return lines + [f"problem {plain(line)}" for line in found.problems]


def table_text(made: Sequence[Mapping[str, Any]], width: int = 120) -> str:
    """The main columns of each scenario, aligned: mean ± standard deviation over seeds, 95 % interval of last_macro.

    Long names are cut to fit; marks never are, so a row with several of them may be wider.
    """
    names, more = ("step_macro", "last_macro", "forgetting"), extra_numbers(made)
    head = ("learner", "model", "variant", "seeds", *names[:2], "95 %", "?", names[2], *map(plain, more), "seconds", "marks")
    cells: list[tuple[str, ...]] = [head]
    for row in made:
        numbers = [_pair(row.get(f"{name}_mean"), row.get(f"{name}_std")) for name in (*names, *more)]
        seconds = "-" if row["seconds_mean"] is None else f"{row['seconds_mean']:.1f}"
        lost = "".join(f" +{row[k]} {k}" for k in ("failed", "dead", "running") if row[k])
        known = (plain(row["learner"]), plain(row["model"]), row["variant"], f"{row['n_seeds']}{lost}")
        numbers[2:2] = [_interval(row), statistics.LETTERS.get(row["vs_best"] or "", "")]
        cells.append((*known, *numbers, seconds, plain(row["marks"])))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    over = sum(widths) + 2 * len(widths) - width
    while over > 0 and max(widths[:2]) > 12:
        longest = widths.index(max(widths[:2]))
        widths[longest] -= 1
        over -= 1
    lines, scenario = ["  " + _aligned(head, widths)], None
    for row, line in zip(made, cells[1:], strict=True):
        if row["scenario"] != scenario:
            scenario = row["scenario"]
            lines.append(_cut(plain(scenario), width))
        lines.append("  " + _aligned(line, widths))
    return "\n".join([*lines, *statistics.legend(row["vs_best"] for row in made)])


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["last_macro_low"], row["last_macro_high"]
    return "-" if low is None else "-".join(f"{v:.3f}".removeprefix("0") for v in (low, high))


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(_cut(cell, wide).ljust(wide) for cell, wide in zip(line, widths, strict=True)).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _pair(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return fraction(mean) + ("" if std is None else "±" + f"{std:.4f}".lstrip("0"))


def accuracy_matrix_text(entry: Mapping[str, Any]) -> str:
    """Accuracy in percent after each experience (rows) on each evaluation set (columns); '.' where it was not evaluated."""
    names = [plain(name)[:12] for name in entry["scenario"].get("eval_names", range(len(entry["n"])))]
    a = metrics.accuracy(entry["correct"], entry["n"])
    mean = metrics.macro(a, entry["first_seen"])
    if len(names) > 12:
        last = "  ".join(f"{v:.4f}" for v in mean)
        return f"accuracy after each experience (macro over the sets seen)\n{last}"
    width = max(6, *(len(name) for name in names)) + 1
    lines = ["after".ljust(8) + "".join(name.rjust(width) for name in names) + "macro".rjust(width)]
    for i, row in enumerate(a):
        cells = "".join(("." if math.isnan(v) else f"{100 * v:.1f}").rjust(width) for v in row)
        lines.append(str(i + 1).ljust(8) + cells + f"{100 * mean[i]:.1f}".rjust(width))
    return "\n".join(lines)
