"""Figures of the page: the specifications, each once, and what the streams show in them.

`{unit}` and `{measure}` in a specification are words that the page fills in.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from clbench.report.figures import board, edits, losses, runs, style
from clbench.report.figures.data import Field, Line
from clbench.report.figures.style import Chart, base

ROWS = 40  # lines of a figure
LARGEST = 500_000  # characters of the figures of streams; those of the streams with most rows are kept


@functools.cache
def specifications() -> dict[str, dict[str, Any]]:
    """The Vega-Lite specification of each figure by its name."""
    charts: dict[str, Any] = {
        "leaderboard": board.leaderboard_chart(),
        "forgetting": board.forgetting_chart(),
        "seconds": board.seconds_chart(),
        "matrix": runs.matrix_chart(after="after experience"),
        "curves": runs.curves_chart(),
        "curve": runs.curves_chart(legend=False),
        "forgotten": forgotten_chart(),
        "loss": runs.loss_chart("{unit}"),
        "stability": runs.stability_chart(),
        "losses": losses.losses_chart("{unit}", "{measure}"),
        "loss_matrix": losses.loss_matrix_chart("{measure}"),
        "replay": losses.replay_chart("{measure}"),
        "gaps": gap_chart("{measure}"),
        "trade": losses.trade_chart("{measure}"),
        "edits": edits.edits_chart(),
        "sets": sets_chart(),
        "wins": wins_chart(),
        **{kind: board.cost_chart(kind, 340) for kind in board.COSTS},
    }
    specs = {name: _bare(chart.to_dict()) for name, chart in charts.items()}
    for name in ("trade", *board.COSTS):
        for layer in specs[name]["layer"]:
            if "tooltip" in layer["encoding"]:  # its points lead to their rows
                layer["encoding"]["href"] = {"field": "href", "type": "nominal"}
    return specs


def _bare(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in ("config", "$schema", "usermeta")}


def forgotten_chart() -> Chart:
    """Points lost on each set of one row, mean over seeds, the seeds as rings."""
    y = alt.Y("set:N", sort=None, title=None).axis(domain=False, ticks=False)
    title = "points lost since the best"
    bars = base().mark_bar(opacity=0.8, size=11).encode(x=alt.X("mean(lost):Q", title=title), y=y)
    bars = bars.encode(tooltip=[alt.Tooltip("set:N"), alt.Tooltip("mean(lost):Q", title="mean", format=".2f")])
    told = [alt.Tooltip("set:N"), alt.Tooltip("seed:N"), alt.Tooltip("lost:Q", format=".2f")]
    seeds = (
        base().mark_point(style="hollow", size=18, strokeWidth=1.1).encode(x=alt.X("lost:Q", title=title), y=y, tooltip=told)
    )
    known = style.chart(bars, seeds, height=alt.Step(13))
    return known.transform_filter("isValid(datum.lost)")


def gap_chart(measure: str) -> Chart:
    """The stability gap of one row: a line for each later experience."""
    scale = alt.Scale(type="symlog", nice=False)
    x = alt.X("step:Q", title="steps after the boundary", scale=scale, axis=alt.Axis(grid=False, tickCount=6))
    y = alt.Y("rise:Q", title=f"rise on old sets ({measure})")
    told = [alt.Tooltip("experience:N"), alt.Tooltip("step:Q"), alt.Tooltip("rise:Q", format=".4f")]
    colour = alt.Color("experience:N", sort=None, legend=alt.Legend(columns=4))
    line = base().mark_line(strokeWidth=1.2, point={"size": 16}).encode(x=x, y=y, color=colour, tooltip=told)
    return style.chart(base().mark_rule(style="quiet line", strokeWidth=0.6).encode(y=alt.datum(0)), line, height=220)


def sets_chart() -> Chart:
    """Two rows on each set after the last experience, joined where one is ahead of the other."""
    y = alt.Y("set:N", sort=None, title=None).axis(domain=False, ticks=False)
    told = [alt.Tooltip("label:N"), alt.Tooltip("set:N"), alt.Tooltip("accuracy:Q", format=".2f")]
    x = alt.X("accuracy:Q", title=board.LAST, scale=alt.Scale(zero=False))
    joined = base().mark_line(style="quiet line", strokeWidth=1.4).encode(x=x, y=y, detail="set:N")
    colour = alt.Color("label:N", sort=None, legend=alt.Legend(title=None, columns=1))
    shape = alt.condition("substring(datum.label, 0, 2) == 'B '", alt.value("square"), alt.value("circle"))
    marks = base().mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=colour, shape=shape, tooltip=told)
    chart = style.chart(joined, marks, height=alt.Step(14))
    return chart.transform_joinaggregate(last="max(after)", groupby=["label"]).transform_filter("datum.after == datum.last")


def wins_chart() -> Chart:
    """Win rate of each learner over its streams, from the lowest to the highest."""
    y = alt.Y("label:N", sort=None, title=None).axis(domain=False, ticks=False)
    scale = alt.Scale(domain=[0, 100])
    x = alt.X("rate:Q", title="win rate against the other contenders (%), mean over streams", scale=scale)
    told = [
        alt.Tooltip("label:N"),
        alt.Tooltip("streams:Q"),
        *(alt.Tooltip(f"{n}:Q", format=".1f") for n in ("rate", "lowest", "highest")),
    ]
    range_ = base().mark_rule(strokeWidth=1.4, opacity=0.5).encode(x=alt.X("lowest:Q"), x2="highest:Q", y=y)
    marks = base().mark_point(filled=True, size=40, opacity=1).encode(x=x, y=y, tooltip=told)
    return style.chart(range_, marks, height=alt.Step(12))


def of_streams(fields: Sequence[Field], keys: Mapping[int, str]) -> list[dict[str, Any]]:
    """What each stream shows in its figures, tables by column; `keys` names the row of the page by the identity of its row.

    Streams that have no room have no figures.
    """
    made: list[dict[str, Any]] = [{} for _ in fields]
    room = LARGEST
    for i in sorted(range(len(fields)), key=lambda i: -len(fields[i].lines)):
        found = _of_stream(fields[i], keys)
        room -= len(json.dumps(found, separators=(",", ":")))
        made[i] = found if room >= 0 else {}
    return made


def _of_stream(field: Field, keys: Mapping[int, str]) -> dict[str, Any]:
    lines = field.lines[:ROWS]
    names = {line.label: keys.get(id(line.row), "") for line in field.lines}
    made = {"leaderboard": by_column(board.leaderboard_rows(lines))}
    if rows := board.forgetting_rows(lines):
        made["forgetting"] = by_column(rows)
    for kind in board.COSTS:
        if rows := board.cost_rows(field.lines, kind, (680, 340)):
            made[kind] = by_column([{**row, "href": f"#row={names[row['label']]}"} for row in rows])
    return made


def of_losses(field: Field, keys: Mapping[int, str]) -> dict[str, Any]:
    """The same of a stream of pre-training."""
    made = {}
    if rows := losses.trade_rows(field.lines):
        places = {line.label: keys.get(id(line.row), "") for line in field.lines}
        made["trade"] = by_column([{**row, "href": f"#loss={places[row['label']]}"} for row in rows])
    if rows := losses.replay_rows(field):
        made["replay"] = by_column(rows)
    return made


def of_edits(field: Field) -> dict[str, Any]:
    """The same of a stream of edits."""
    rows = edits.edits_rows(field.lines[: edits.ROWS])
    return {"edits": by_column(rows)} if rows else {}


def by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Tidy rows as columns; what a row does not have is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_rounded(row.get(name)) for row in rows] for name in names}


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def lines_by_row(fields: Sequence[Field]) -> dict[int, Line]:
    """The line of a row of the leaderboard by the row's identity."""
    return {id(line.row): line for field in fields for line in field.lines}
