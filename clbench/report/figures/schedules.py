"""Figures of `clbench schedule`: multipliers of schedules, and losses that a fitted law predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from clbench.report.figures import style
from clbench.report.figures.style import DOUBLE, base

Rows = Sequence[Mapping[str, Any]]


def multipliers(rows: Rows, edges: Sequence[float]) -> dict[str, Any]:
    """Multiplier of the base rate over updates, a line for each schedule; `edges`: where experiences begin.

    Rows have label, update, multiplier.
    """
    x = alt.X("update:Q", axis=alt.Axis(format="~s", grid=False), scale=alt.Scale(nice=False))
    y = alt.Y("multiplier:Q", title="multiplier of the base rate", scale=alt.Scale(zero=True))
    colour = alt.Color("label:N", sort=None, legend=alt.Legend(title=None, columns=3, symbolType="stroke"))
    lines = base().mark_line(strokeWidth=1.2).encode(x=x, y=y, color=colour)
    dotted = alt.Chart(alt.NamedData("edges")).mark_rule(style="quiet line", strokeWidth=0.6, strokeDash=[1, 3]).encode(x="x:Q")
    return style.paper(style.chart(dotted, lines, height=170), rows, "", DOUBLE, edges=[{"x": edge} for edge in edges])


def fitted_law(rows: Rows) -> dict[str, Any]:
    """Measured losses as points, predicted ones as lines, a colour for each schedule.

    Rows have label, update, and measured or predicted.
    """
    x = alt.X("update:Q", axis=alt.Axis(format="~s", grid=False), scale=alt.Scale(zero=False, nice=False))
    words, scale = "loss: points measured, lines predicted", alt.Scale(zero=False)
    colour = alt.Color("label:N", sort=None, legend=alt.Legend(title=None, columns=3))
    points = base().transform_filter("isValid(datum.measured)").mark_point(filled=True, size=7, opacity=0.5)
    lines = base().transform_filter("isValid(datum.predicted)").mark_line(strokeWidth=1.3)
    layers = (
        points.encode(x=x, y=alt.Y("measured:Q", title=words, scale=scale), color=colour),
        lines.encode(x=x, y=alt.Y("predicted:Q", title=words, scale=scale), color=colour),
    )
    return style.paper(style.chart(*layers, height=190), rows, "", DOUBLE)
