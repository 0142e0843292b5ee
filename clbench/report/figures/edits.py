"""Figures of model editing: what holds after 1, 10, 100, ... edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from clbench.report.figures import style
from clbench.report.figures.data import Field, Line, short
from clbench.report.figures.style import DOUBLE, Chart, base

Made = Iterator[tuple[str, dict[str, Any]]]
PANELS = (  # number, words, whether it is a share
    ("reliability", "all edits so far (%)", True),
    ("generalisation", "their paraphrases (%)", True),
    ("locality", "neighbours unchanged (%)", True),
    ("old_loss_rise", "rise on old text (nats)", False),
)
ROWS = 12  # lines of a figure


def edits_chart() -> Chart:
    """Four numbers over the number of edits, a line a learner: mean over seeds and their range."""
    return alt.hconcat(*(_panel(*panel) for panel in PANELS), data=alt.NamedData("table"), spacing=10)


def _panel(name: str, words: str, is_share: bool) -> Chart:
    x = alt.X(
        "edits:Q", title="edits", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="d", tickCount=4, grid=False)
    )
    scale = alt.Scale(domain=[0, 100]) if is_share else alt.Scale(zero=True)
    y = alt.Y(f"{name}:Q", title=words, scale=scale)
    colour = alt.Color("label:N", sort=None, legend=alt.Legend(title=None, columns=4))
    numbers = [alt.Tooltip(f"{name}{end}:Q", format=".1f" if is_share else ".4f") for end in ("", "_low", "_high")]
    told = [alt.Tooltip("label:N"), alt.Tooltip("edits:Q", format=","), *numbers]
    band = base().mark_area(opacity=0.15).encode(x=x, y=alt.Y(f"{name}_low:Q", title=words), y2=f"{name}_high:Q", color=colour)
    line = base().mark_line(strokeWidth=1, point={"size": 14}).encode(x=x, y=y, color=colour, tooltip=told)
    return alt.layer(band, line).transform_filter(f"isValid(datum.{name})").properties(width=96, height=130)


def edits_rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Mean, lowest and highest over seeds of each number after so many edits; [] where nothing was asked on the way."""
    rows = []
    for line in lines:
        courses = [trace.extra["course"] for trace in line.traces]
        for steps in zip(*(course for course in courses if len(course) == len(courses[0])), strict=True):
            row: dict[str, Any] = {"label": short(line.label), "edits": int(steps[0]["edits"])}
            for name, _, is_share in PANELS:
                if all(name in step for step in steps):
                    values = [(100 if is_share else 1) * float(step[name]) for step in steps]
                    row |= {name: sum(values) / len(values), f"{name}_low": min(values), f"{name}_high": max(values)}
            rows.append(row)
    return rows


def edits(fields: Sequence[Field]) -> Made:
    """Reliability, generalisation, locality and the loss on old text over the number of edits; range over seeds."""
    for field in fields:
        drawn = [line for line in field.lines if line.traces[0].extra["course"]]
        for end, lines in style.pages(drawn, ROWS):
            yield f"{field.file}{end}", style.paper(edits_chart(), edits_rows(lines), field.title, DOUBLE)
