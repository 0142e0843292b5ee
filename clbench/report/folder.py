"""`clbench report`: a results folder -> its leaderboards, printed and written as CSV. The same records give the same bytes."""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from clbench.records import record
from clbench.report import statistics, table
from clbench.report.board import Group, rank
from clbench.report.columns import ACCURACY, EDITS, LEADERBOARDS, Leaderboard
from clbench.report.formats import Table, plain, to_csv
from clbench.report.runs import Filter, Run, Scan, scan

_PANEL_ROW = ("manifest", "learner", "replay", "model", "variant", "marks", "n_seeds", "seeds")


def report(results_dir: str | pathlib.Path, strict: bool = False, wanted: Filter | None = None) -> tuple[str, int]:
    """The tables for the terminal -> (text, exit code: 1 if strict and something is wrong).

    Without a filter it also rebuilds the CSV files of the leaderboards from `records/`; a filtered view writes nothing.
    """
    results = pathlib.Path(results_dir).expanduser()
    found = scan(results, wanted)
    boards = {board: rank(found.runs, board, found.dead) for board in LEADERBOARDS}
    written: list[pathlib.Path] = []
    for board, made in boards.items() if not wanted else ():
        if made or (results / board.file).exists() or (found.problems and board is ACCURACY):
            written += write(made, board, results)
    if not found.runs and not found.problems:
        return f"no records in {results / 'records'}", 1 if strict else 0
    lines: list[str] = []
    for board, made in boards.items():
        if made or (board is ACCURACY and not found.runs):
            lines += [table.table_text([group.row for group in made], board), ""]
        if board is EDITS and (text := table.over_edits_text(made)):
            lines += [text, ""]
    lines += troubles(found)
    lines.append("a filtered view: nothing is written" if wanted else f"written {', '.join(map(str, written))}")
    return "\n".join(lines), 1 if strict and is_bad(found) else 0


def write(made: Sequence[Group], board: Leaderboard, results: pathlib.Path) -> list[pathlib.Path]:
    """Write a leaderboard and a file for each scenario, and remove those of scenarios that are gone -> what was written."""
    record.write_text(results / board.file, table.csv_of([group.row for group in made], board))
    held: dict[str, list[Group]] = {}
    for group in made:
        held.setdefault(file_name(group.row["scenario"]), []).append(group)
    folder, texts = results / board.folder, {}
    for name, group in held.items():
        if not board.panel:
            texts[name] = table.csv_of([g.row for g in group], board)
        elif known := [g for g in group if g.row["n_seeds"]]:
            texts[name] = panel(known, board)
    head = ",".join(_PANEL_ROW if board.panel else board.columns[:5])
    for name, text in texts.items():
        record.write_text(folder / f"{name}.csv", text)
    for path in folder.glob("*.csv"):
        if path.stem not in texts and _starts_with(path, head.encode()):
            path.unlink(missing_ok=True)
    return [results / board.file, *([folder] if texts or not board.panel else [])]


def panel(made: Sequence[Group], board: Leaderboard) -> str:
    """The rows of a scenario as CSV text, by learner and share of replay, each number of the panel with its interval.

    Intervals: 95 % bootstrap of the mean over seeds, none with one seed.
    """
    lines: list[dict[str, Any]] = [{name: group.row[name] for name in _PANEL_ROW} for group in made]
    for name in board.panel:
        values = [[run.values[name] for run in group.runs if name in run.values] for group in made]
        for line, v, interval in zip(lines, values, statistics.bootstraps([[v] for v in values]), strict=True):
            low, high = interval or (None, None)
            line |= {f"{name}_mean": statistics.mean_std(v)[0], f"{name}_low": low, f"{name}_high": high}
    lines.sort(key=lambda line: (line["manifest"], line["learner"], line["replay"] or 0.0, line["variant"]))
    columns = (*_PANEL_ROW, *(f"{name}_{part}" for name in board.panel for part in ("mean", "low", "high")))
    return to_csv(Table("", "", columns, lines)) + "\n"


def file_name(scenario: str) -> str:
    """A file name for any scenario name, without a suffix: names that are not plain lower-case words get a hash."""
    word = re.sub(r"[^a-z0-9_.-]+", "_", scenario.lower()).strip("._-")[:60]
    devices = ("con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10)))
    if word and word == scenario and word.split(".")[0] not in devices:
        return word
    return f"{word or 'scenario'}-{hashlib.sha256(scenario.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _starts_with(path: pathlib.Path, head: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(head)) == head
    except OSError:
        return False


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
    lines += [f"problem {plain(line)}" for line in found.problems]
    return lines + [f"problem {plain(run.run_id)}: its losses cannot be read" for run in found.runs if _is_broken(run)]


def _is_broken(run: Run) -> bool:
    return run.status == "ok" and not run.usable
