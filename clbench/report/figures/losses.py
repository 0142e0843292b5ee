"""Figures of pre-training: loss over tokens with the rate below, loss matrices, replay, stability gaps, old sets and newest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt
import numpy as np

from clbench.report import statistics
from clbench.report.figures import grids, style
from clbench.report.figures.data import Field, Line, mean_matrix, short
from clbench.report.figures.runs import faceted, labels_of, matrix_chart, over_chart
from clbench.report.figures.style import DOUBLE, SINGLE, Chart, base

Made = Iterator[tuple[str, dict[str, Any]]]
PANELS = 24
SHARES = ("old sets", "newest set")


def losses_chart(unit: str = "tokens", measure: str = "nats") -> Chart:
    """Loss on every set over what was trained on, mean over seeds with their range; floors dashed, the rate below."""
    return over_chart("tokens", f"{unit} trained on", ("loss", f"loss ({measure})"), "set", floors=True)


def losses_sets(field: Field, line: Line, longest: int = 20) -> dict[str, list[dict[str, Any]]] | None:
    """The data of `losses_chart`: table, edges, floors; None without looks."""
    courses = line.courses()
    if not courses:
        return None
    names = [style.fitted(name, longest) for name in field.sets.names]
    rows = grids.unfold("losses", grids.losses(courses), sets=names, seeds=range(len(courses)))
    floors = [{"set": name, "floor": floor} for name, floor in zip(names, field.sets.floors, strict=True) if floor is not None]
    return {"table": rows, "edges": [{"x": edge} for edge in courses[0].boundaries[1:]], "floors": floors}


def losses(fields: Sequence[Field]) -> Made:
    """Loss on every set over tokens."""
    for field in fields:
        for line in field.lines:
            if found := losses_sets(field, line):
                chart = losses_chart(field.sets.unit, field.sets.measure)
                yield (
                    f"{field.file}-{line.file}",
                    style.paper(chart, found.pop("table"), f"{field.title}: {line.label}", SINGLE, **found),
                )


def loss_matrix_chart(measure: str = "nats") -> Chart:
    """Loss on each set (columns) before the first (0) and after each experience (rows); light is low."""
    return matrix_chart("loss", f"loss ({measure})")


def loss_matrix(fields: Sequence[Field]) -> Made:
    """The matrix of each line, mean over seeds, a panel for each."""
    for field in fields:
        for end, lines in style.pages(field.lines, PANELS):
            rows = []
            for line in lines:
                values = {"loss": grids.plain(mean_matrix(line))}
                names = range(1, len(field.sets.names) + 1)
                rows += grids.labelled(grids.unfold("loss_matrix", values, sets=names), style.fitted(line.label, 25))
            figure = faceted(loss_matrix_chart(field.sets.measure), labels_of(rows), 4, 80)
            yield f"{field.file}{end}", style.paper(figure, rows, field.title, DOUBLE)


def replay_chart(measure: str = "nats") -> Chart:
    """Final loss on old sets and on the newest one against the share of replay: mean and 95 % interval, a line a learner."""
    panels = [_share_chart(words, measure) for words in SHARES]
    return alt.hconcat(*panels, data=alt.NamedData("table"), spacing=12)


def _share_chart(words: str, measure: str) -> Chart:
    x = alt.X("replay:O", title="replay (% of each batch)", axis=alt.Axis(labelAngle=0))
    y = alt.Y("loss:Q", title=f"final loss, {words} ({measure})", scale=alt.Scale(zero=False))
    colour = alt.Color("label:N", sort=None, legend=alt.Legend(title=None, columns=3))
    told = [
        alt.Tooltip("label:N"),
        alt.Tooltip("replay:O"),
        *(alt.Tooltip(f"{name}:Q", format=".4f") for name in ("loss", "low", "high")),
    ]
    beside = alt.XOffset("label:N", sort=None)
    line = base().mark_line(strokeWidth=0.9).encode(x=x, y=y, color=colour, xOffset=beside)
    marks = base().mark_point(filled=True, size=24).encode(x=x, y=y, color=colour, tooltip=told, xOffset=beside)
    ranges = base().mark_rule().encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour, xOffset=beside)
    return alt.layer(ranges, line, marks).transform_filter(f"datum.sets == '{words}'").properties(width=185, height=150)


def replay_rows(field: Field) -> list[dict[str, Any]]:
    """Contenders whose learner has several shares; [] without any."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in field.lines:
        if isinstance(line.row["replay"], int | float) and not line.reference:
            groups.setdefault((line.row["learner"], line.row["model"]), []).append(line)
    groups = {name: held for name, held in groups.items() if len({line.row["replay"] for line in held}) > 1}
    several = len({model for _, model in groups}) > 1
    rows = []
    for (learner, model), held in sorted(groups.items()):
        label = short(f"{learner} {model}" if several else learner)
        for line in sorted(held, key=lambda line: line.row["replay"]):
            for words, name in zip(SHARES, ("retained_loss", "newest_loss"), strict=True):
                values = [t.run.values[name] for t in line.traces if name in t.run.values]
                if values:
                    low, high = statistics.bootstrap([values]) or (None, None)
                    made = {"label": label, "replay": round(100 * line.row["replay"], 6), "sets": words}
                    rows.append(made | {"loss": float(np.mean(values)), "low": low, "high": high})
    return rows


def replay(fields: Sequence[Field]) -> Made:
    """Both panels for each stream that has several shares of replay."""
    for field in fields:
        if rows := replay_rows(field):
            yield field.file, style.paper(replay_chart(field.sets.measure), rows, field.title, DOUBLE)


def gaps_chart(measure: str = "nats") -> Chart:
    """The stability gap: rise of the loss on old sets above that at the boundary, over the steps after it."""
    scale = alt.Scale(type="symlog", nice=False)
    x = alt.X("step:Q", title="steps after the boundary", scale=scale, axis=alt.Axis(grid=False, tickCount=6))
    words = f"rise on old sets ({measure})"
    colour = alt.Color("label:N", sort=None, legend=alt.Legend(title=None, columns=2))
    told = [alt.Tooltip("label:N"), alt.Tooltip("step:Q"), alt.Tooltip("mean(rise):Q", title="rise", format=".4f")]
    up = alt.Y("mean(rise):Q", title=words)
    zero = base().mark_rule(style="quiet line", strokeWidth=0.6).encode(y=alt.datum(0))
    line = base().mark_line(strokeWidth=1, point={"size": 12}).encode(x=x, y=up, color=colour, tooltip=told)
    band = base().mark_area(opacity=0.15).encode(x=x, y=alt.Y("min(low):Q", title=words), y2="max(high):Q", color=colour)
    return style.chart(zero, band, line, height=150)


def gaps(fields: Sequence[Field]) -> Made:
    """Rise over later experiences and the sets old in them, mean over seeds and their range; six lines to a figure."""
    for field in fields:
        found = [(line, made) for line in field.lines if (made := _rise(field, line)) is not None]
        for end, part in style.pages(found, 6):
            rows = [
                {"label": short(line.label), "step": s, "rise": m, "low": low, "high": high}
                for line, made in part
                for s, m, low, high in zip(*map(grids.plain, made), strict=True)
            ]
            yield f"{field.file}{end}", style.paper(gaps_chart(field.sets.measure), rows, field.title)


def _rise(field: Field, line: Line) -> tuple[np.ndarray, ...] | None:
    """Steps [S], and mean, lowest and highest over seeds [S] of the rise, over later experiences and the sets old in them."""
    seeds: list[np.ndarray] = []
    steps: np.ndarray | None = None
    for course in line.courses():
        rises = []
        for k in sorted(set(course.experience.astype(int).tolist())):
            at = np.flatnonzero(course.experience == k)
            old = [j for j, own in enumerate(field.sets.first_seen) if own < k]
            if old and (steps is None or np.array_equal(course.step[at], steps)):
                steps = course.step[at]
                rises.append((course.loss[at][:, old] - course.loss[at[0], old]).mean(1))
        if rises:
            seeds.append(np.mean(rises, axis=0))
    if steps is None or not seeds:
        return None
    stack = np.stack(seeds)
    return steps, stack.mean(0), stack.min(0), stack.max(0)


def trade_chart(measure: str = "nats") -> Chart:
    """What is kept against what is learned: lower left is better; a line joins the replay shares of a learner."""
    x = alt.X("newest:Q", title=f"loss on the newest set ({measure})", scale=alt.Scale(zero=False, padding=10))
    y = alt.Y("old:Q", title=f"loss on old sets ({measure})", scale=alt.Scale(zero=False, padding=10))
    colour = alt.Color("learner:N", sort=None, legend=alt.Legend(title=None, columns=3))
    told = [alt.Tooltip("label:N"), alt.Tooltip("newest:Q", format=".4f"), alt.Tooltip("old:Q", format=".4f")]
    joined = base().transform_filter("!datum.reference && isValid(datum.replay)").mark_line(strokeWidth=0.8, opacity=0.6)
    shape = alt.condition("datum.reference", alt.value("square"), alt.value("circle"))
    marks = base().mark_point(filled=True, size=38, opacity=1).encode(x=x, y=y, color=colour, shape=shape, tooltip=told)
    return style.chart(joined.encode(x=x, y=y, color=colour, order="replay:Q"), marks, height=200)


def trade_rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Final losses of each line; [] with fewer than two."""
    names = ("newest_loss_mean", "retained_loss_mean")
    rows = []
    for line in lines:
        newest, old = (line.row[name] for name in names)
        if newest is not None and old is not None:
            known = {"label": line.label, "learner": short(line.row["learner"]), "reference": line.reference}
            rows.append(known | {"replay": line.row["replay"], "newest": newest, "old": old})
    return rows if len(rows) > 1 else []


def trade(fields: Sequence[Field]) -> Made:
    """Old sets against the newest, for each stream with two lines."""
    for field in fields:
        if rows := trade_rows(field.lines):
            yield field.file, style.paper(trade_chart(field.sets.measure), rows, field.title)
