"""What a submission shows of a row: the numbers of its leaderboard (accuracies in per cent, losses and edits as they are)."""

from __future__ import annotations

from typing import Any

from clbench.report.board import Group, Row
from clbench.report.columns import ACCURACY, EDITS, LOSS, Leaderboard

NUMBERS = {
    ACCURACY.part: ("last_macro", "step_macro", "forgetting"),
    LOSS.part: ("final_loss", "learned_loss", "forgetting_after", "regret"),
    EDITS.part: ("edit_score", "reliability", "generalisation", "locality", "old_loss_rise"),
}
UNITS = {
    ACCURACY.part: "Accuracies in per cent",
    LOSS.part: "Losses in nats per token (of images: mean squared errors)",
    EDITS.part: "Shares of edits in 0..1, losses in nats per token",
}


def board_of(group: Group) -> Leaderboard:
    """The leaderboard of a row."""
    return group.runs[0].leaderboard


def columns(board: Leaderboard) -> tuple[str, ...]:
    """Columns of a table of rows."""
    return ("learner", "model", "variant", "n_seeds", *NUMBERS[board.part], "seconds", "level")


def number(row: Row, name: str, board: Leaderboard) -> str | None:
    """Mean ± standard deviation of a number; None where the row has none."""
    mean, std = row[f"{name}_mean"], row[f"{name}_std"]
    if mean is None:
        return None
    scale, digits = (100, 2) if board.per_cent else (1, 4)
    return f"{scale * mean:.{digits}f}" + ("" if std is None else f" ± {scale * std:.{digits}f}")


def line(row: Row, board: Leaderboard, level: str) -> dict[str, Any]:
    """A row of the table, cells as text."""
    made: dict[str, Any] = {key: row[key] for key in ("learner", "model", "variant", "n_seeds")}
    made |= {name: number(row, name, board) for name in NUMBERS[board.part]}
    seconds = row["seconds_mean"]
    made["seconds"] = None if seconds is None else f"{seconds:.1f}"
    return made | {"level": " ".join([level, *str(row["marks"]).split()])}


def claim(row: Row, board: Leaderboard) -> str:
    """The right field of a badge."""
    scale, digits, unit = (100, 1, " %") if board.per_cent else (1, 3, "")
    mean, std = row[f"{board.headline}_mean"], row[f"{board.headline}_std"]
    spread = "" if std is None else f" ± {scale * std:.{digits}f}"
    name = "" if board.per_cent else f" {board.headline}"
    seeds = f"{row['n_seeds']} seed{'s' if row['n_seeds'] != 1 else ''}"
    return f"{row['learner']}{name} {scale * mean:.{digits}f}{spread}{unit}, {seeds}"


def named(row: Row) -> str:
    """A row in words."""
    return f"{row['scenario']} {row['learner']} {row['model']} {row['variant']}"
