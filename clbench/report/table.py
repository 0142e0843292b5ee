"""The leaderboards as tables: rows as CSV text, as a DataFrame, as columns to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clbench.records.loss_facts import LEDGER, OPTIONS
from clbench.report import board as boards
from clbench.report import costs, statistics
from clbench.report.board import Row
from clbench.report.columns import ACCURACY, EXTRA, Leaderboard, extra, extra_numbers
from clbench.report.formats import Table, csv_text, fraction, plain, safe
from clbench.report.runs import Run, joined, summarize

_TENTHS = (*costs.COLUMNS, "seconds_mean", "peak_memory_mb_mean", "stored_bytes", "exemplars")


def rows(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = (), board: Leaderboard = ACCURACY) -> list[Row]:
    """One row for each (scenario, learner, model, variant); runs without a result count, and are never missing."""
    known: dict[str, Mapping[str, Any]] = {}
    return rows_of(joined([summarize(entry, known) for entry in records]), board, dead)


def rows_of(runs: Sequence[Run], board: Leaderboard, dead: Sequence[str] = ()) -> list[Row]:
    """`rows` of runs that are summarized and joined already."""
    return [group.row for group in boards.rank(runs, board, dead)]


def leaderboard(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> Any:
    """The leaderboard as a pandas DataFrame with `COLUMNS`, and columns of other evaluators where records have them."""
    import pandas as pd

    made = rows(records, dead)
    return pd.DataFrame(made, columns=[*ACCURACY.columns, *extra(made)])


def to_csv(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> str:
    """The leaderboard as CSV text: fixed formats, so that a difference in review is a difference in results."""
    return csv_of(rows(records, dead))


def csv_of(made: Sequence[Row], board: Leaderboard = ACCURACY, columns: Sequence[str] | None = None) -> str:
    """Rows as CSV text: all columns, those of other evaluators at the end, or the given ones."""
    return csv_text(columns or (*board.columns, *extra(made)), made, formatted)


def formatted(name: str, value: Any) -> str:
    """A cell of the CSV; '' for no value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.startswith(("gap_area_", "gap_tokens_", "dip_tokens_")):
        return f"{value:.0f}"
    if not isinstance(value, float):
        return safe(value)
    if name == "flops" or name == "vs_best_p" or name in OPTIONS:
        return f"{value:.4e}" if name == "flops" else f"{value:.4g}"
    return fraction(value, 1 if name in _TENTHS else 4)


def table_text(made: Sequence[Mapping[str, Any]], board: Leaderboard = ACCURACY, width: int | None = None) -> str:
    """The main columns of each scenario, aligned: mean ± standard deviation over seeds, 95 % interval of the headline number.

    Long names are cut to fit `width`; marks never are, so a row with several of them may be wider.
    """
    head, width = _columns(board.text, made), width or board.width
    cells = [[plain(name) for name in head]]
    cells += [["-" if (word := _cell(board, row, name)) is None else word for name in head] for row in made]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    while width is not None and sum(widths) + 2 * len(widths) > width and max(widths[:2]) > 12:
        widths[widths.index(max(widths[:2]))] -= 1
    lines, scenario = ["  " + _aligned(cells[0], widths)], None
    for row, line in zip(made, cells[1:], strict=True):
        if row["scenario"] != scenario:
            scenario = row["scenario"]
            lines.append(_cut(plain(scenario), width or len(scenario)))
        lines.append("  " + _aligned(line, widths))
    return "\n".join([*lines, *statistics.legend(row["vs_best"] for row in made)])


def over_edits_text(made: Sequence[boards.Group]) -> str:
    """Reliability, generalisation, locality after 1, 10, 100, ... edits, in per cent, mean over seeds; '' for none."""
    lines: dict[tuple[str, str], list[list[str]]] = {}
    looks: dict[tuple[str, str], list[int]] = {}
    for group in made:
        courses = [run.course for run in group.runs if run.course]
        same = [course for course in courses if len(course) == len(courses[0])]
        if not same:
            continue
        place = group.row["scenario"], group.row["manifest"]
        looks.setdefault(place, [int(step["edits"]) for step in same[0]])
        cells = [_triple(steps) for steps in zip(*same, strict=True)]
        lines.setdefault(place, []).append([plain(group.row["learner"]), group.row["variant"], *cells])
    text = []
    for (scenario, manifest), rows in lines.items():
        head = ["learner", "variant", *(f"{n} edit{'s' if n > 1 else ''}" for n in looks[scenario, manifest])]
        widths = [max(len(row[i]) if i < len(row) else 0 for row in (head, *rows)) for i in range(len(head))]
        text.append(f"{plain(scenario)} ({manifest}): reliability / generalisation / locality, per cent, after so many edits")
        text += ["  " + _aligned(row, widths) for row in (head, *rows)]
    return "\n".join(text)


def _triple(steps: Sequence[Mapping[str, float]]) -> str:
    names = ("reliability", "generalisation", "locality")
    means = [sum(step[name] for step in steps) / len(steps) if all(name in step for step in steps) else None for name in names]
    return " / ".join("." if mean is None or mean != mean else f"{100 * mean:.0f}" for mean in means)


def for_people(made: Sequence[Mapping[str, Any]], board: Leaderboard = ACCURACY) -> list[Table]:
    """The main columns of each scenario, fractions in per cent, for Markdown, LaTeX and HTML."""
    columns = _columns(board.page, made)
    held: dict[str, list[dict[str, Any]]] = {}
    for row in made:
        held.setdefault(row["scenario"], []).append({name: _cell(board, row, name, True) for name in columns})
    part = "" if board is ACCURACY else f"{board.part} "
    return [Table(f"{part}{i}", plain(name), columns, lines, (board.note,)) for i, (name, lines) in enumerate(held.items())]


def _columns(names: Sequence[str], made: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(word for name in names for word in (_read(made) if name == EXTRA else (name,)))


def _read(made: Sequence[Mapping[str, Any]]) -> list[str]:
    """Numbers that only some records have, and that people read; `intransigence` is in the files, plasticity says the same."""
    return [name for name in extra_numbers(made) if name != "intransigence"]


def _cell(board: Leaderboard, row: Mapping[str, Any], name: str, page: bool = False) -> str | None:
    """A cell to read, in a terminal or on a page; None for no value."""
    if name in ("learner", "model", "variant", "marks"):
        return plain(row[name])
    if name == "seeds":
        return f"{row['n_seeds']}" + "".join(f" +{row[k]} {k}" for k in ("failed", "dead", "running") if row[k])
    if name == "?":
        return statistics.LETTERS.get(row["vs_best"] or "", "")
    if name == "vs best":
        return row["vs_best"]
    if name == "95 %":
        return _interval(row, board, page)
    if name == "Mtokens":
        return f"{sum(row[f'tokens_{part}'] or 0 for part in LEDGER[:4]) / 1e6:.2f}"
    plainly = {"seconds": ("seconds_mean", 1, ".1f"), "MB": ("stored_bytes", 1e6, ".3f"), "replay": ("replay", 1, "g")}
    if name in plainly:
        column, unit, form = plainly[name]
        return None if row[column] is None else f"{row[column] / unit:{form}}"
    return _mean_std(row.get(f"{name}_mean"), row.get(f"{name}_std"), board, page, page and board.per_cent and "/" not in name)


def _mean_std(mean: float | None, std: float | None, board: Leaderboard, page: bool, per_cent: bool) -> str | None:
    """Mean ± standard deviation; a deviation below 1 loses its 0 but on pages of fractions."""
    if mean is None or std is None:
        return None if mean is None else fraction(100 * mean, 2) if per_cent else fraction(mean)
    if per_cent:
        return f"{fraction(100 * mean, 2)} ± {100 * std:.2f}"
    text = f"{std:.4f}" if page and board.per_cent else f"{std:.4f}".lstrip("0")
    return f"{fraction(mean)}{' ± ' if page else '±'}{text}"


def _interval(row: Mapping[str, Any], board: Leaderboard, page: bool) -> str | None:
    low, high = (row[f"{board.headline}_{end}"] for end in ("low", "high"))
    if low is None:
        return None
    if not page:
        return "-".join(f"{v:.3f}".removeprefix("0") for v in (low, high))
    return " .. ".join(f"{100 * v:.2f}" if board.per_cent else fraction(v) for v in (low, high))


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(_cut(cell, wide).ljust(wide) for cell, wide in zip(line, widths, strict=False)).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
