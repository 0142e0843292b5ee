"""Figures of the course of runs: accuracy matrices, accuracy over experiences, profiles, losses, stability."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from clbench.report import statistics
from clbench.report.figures import grids, style
from clbench.report.figures.data import Field, Trace, short
from clbench.report.figures.style import DOUBLE, SINGLE, Chart, base

Made = Iterator[tuple[str, dict[str, Any]]]
PANELS = 30
FEW = 6  # curves that one panel can hold
BEHIND = 24  # curves in grey behind one
EDGE = (1, 3)


def matrix_chart(value: str = "accuracy", title: str = "accuracy (%)", after: str = "after") -> Chart:
    """A row for each experience, a column for each set; the numbers where the cells have room for them."""
    x = alt.X("set:O", sort=None, title="set").axis(labelLimit=90, labelAngle=0, domain=False, ticks=False)
    y = alt.Y("after:O", sort=None, title=after).axis(domain=False, ticks=False)
    lower = value == "loss"
    scale = alt.Scale(scheme="cividis", reverse=True, zero=False) if lower else alt.Scale(scheme="cividis", domain=[0, 100])
    colour = alt.Color(f"{value}:Q", scale=scale, legend=alt.Legend(title=title, titleLimit=300))
    told = [
        alt.Tooltip("after:O"),
        alt.Tooltip("set:N"),
        alt.Tooltip(f"{value}:Q", title=title, format=".4f" if lower else ".2f"),
    ]
    cells = base().mark_rect().encode(x=x, y=y, color=colour, tooltip=told)
    words = style.cell_words(value, ".2f" if lower else ".0f").encode(x=x, y=y)
    return style.chart(cells, words, height=alt.Step(18))


def faceted(panel: Chart, labels: Sequence[str], columns: int, tall: float) -> Chart:
    """A panel for each label, over the width of a page."""
    columns = min(columns, len(labels))
    panel = panel.properties(width=round((DOUBLE - 34) / columns - 14) if columns > 2 else 90, height=tall)
    panel.data = alt.Undefined
    facet = alt.Facet("label:N", sort=list(labels), title=None)
    return panel.facet(facet=facet, columns=columns, spacing=10, data=alt.NamedData("table"))


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels of tidy rows in their order, each once."""
    return list(dict.fromkeys(row["label"] for row in rows))


def matrix(fields: Sequence[Field]) -> Made:
    """Accuracy on each set (columns) after each experience (rows), mean over runs, a panel for each learner."""
    for field in fields:
        for end, lines in style.pages(field.lines, PANELS):
            rows = []
            for line in lines:
                values = grids.matrix([t.matrix for t in line.traces])
                names = range(1, len(values["accuracy"][0]) + 1)
                rows += grids.labelled(grids.unfold("matrix", values, sets=names), style.fitted(line.label, 21))
            yield f"{field.file}{end}", style.paper(faceted(matrix_chart(), labels_of(rows), 5, 74), rows, field.title, DOUBLE)


def curves_chart(
    x: str = "after", title: str = "experience", y: str = "accuracy", words: str = "accuracy (%)", legend: bool = True
) -> Chart:
    """Curves told apart by colour and legend: mean over runs, the band is their range. A click in the legend chooses."""
    axis = style.count() if x == "after" else alt.Axis()
    across = alt.X(f"{x}:Q", title=title, axis=axis, scale=alt.Scale(zero=False, nice=False))
    scale = alt.Scale(zero=False)
    key = alt.Legend(title=None, columns=2) if legend else None
    colour = alt.Color("label:N", sort=None, legend=key)
    chosen = alt.selection_point(name="chosen", fields=["label"], bind="legend")
    shown = alt.condition(chosen, alt.value(1), alt.value(0.15))
    band = base().mark_area(opacity=0.18).encode(
        x=across, y=alt.Y(f"min({y}):Q", title=words, scale=scale), y2=f"max({y}):Q", color=colour,
        opacity=alt.condition(chosen, alt.value(0.18), alt.value(0.03)),
    )  # fmt: skip
    told = [alt.Tooltip("label:N"), alt.Tooltip(f"{x}:Q", title=title), alt.Tooltip(f"mean({y}):Q", title=words, format=".2f")]
    mean = alt.Y(f"mean({y}):Q", title=words, scale=scale)
    dash = alt.StrokeDash("reference:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [4, 2]]), legend=None)
    line = base().mark_line(strokeWidth=1.3).encode(x=across, y=mean, color=colour, opacity=shown, strokeDash=dash)
    marks = base().mark_point(filled=True, size=22).encode(x=across, y=mean, color=colour, opacity=shown, tooltip=told)
    if x != "after":  # many points: no marks
        marks = base().mark_point(filled=True, size=60, opacity=0).encode(x=across, y=mean, tooltip=told)
    return style.chart(band, line, marks.add_params(chosen), height=170)


def _panels_chart(x: str, title: str, y: str, words: str) -> Chart:
    """One curve with all others in grey behind it: readable with any number of curves."""
    across = alt.X(f"{x}:Q", title=title, axis=alt.Axis(tickCount=4, grid=False), scale=alt.Scale(zero=False, nice=False))
    up = alt.Y(f"mean({y}):Q", title=words, axis=alt.Axis(tickCount=4, grid=False), scale=alt.Scale(zero=False))
    behind = alt.Chart(alt.NamedData("all")).mark_line(style="pale line", strokeWidth=0.5)
    band = base().mark_area(opacity=0.25).encode(x=across, y=alt.Y(f"min({y}):Q", title=words), y2=f"max({y}):Q")
    dash = alt.StrokeDash("reference:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [4, 2]]), legend=None)
    front = base().mark_line(strokeWidth=1.5).encode(x=across, y=up, strokeDash=dash)
    return alt.layer(behind.encode(x=across, y=up, detail="label:N"), band, front)


def curves(fields: Sequence[Field]) -> Made:
    """Accuracy over experiences on the sets seen so far: mean over runs, the band is their range."""
    for field in fields:
        every = [{**row, "reference": line.reference} for line in field.lines for row in curve_rows(line, 21)]
        yield from (
            (f"{field.file}{end}", made)
            for end, made in _drawn(every, field.title, "after", "experience", "accuracy", "accuracy (%)")
        )


def curve_rows(line: Any, longest: int) -> list[dict[str, Any]]:
    """Tidy rows of one line over experiences, under its label."""
    return grids.labelled(grids.over_experiences(line), style.fitted(line.label, longest))


def _drawn(
    every: list[dict[str, Any]], heading: str, x: str, title: str, y: str, words: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Up to six curves in one panel, more in a panel each."""
    labels = labels_of(every)
    if len(labels) <= FEW:
        yield "", style.paper(curves_chart(x, title, y, words), every, heading)
        return
    some = {labels[int(i)] for i in np.linspace(0, len(labels) - 1, min(len(labels), BEHIND))}
    behind = [{k: v for k, v in row.items() if k != "reference"} for row in every if row["label"] in some]
    for end, part in style.pages(labels, PANELS):
        figure = faceted(_panels_chart(x, title, y, words), part, 5, 56)
        yield end, style.paper(figure, [row for row in every if row["label"] in part], heading, DOUBLE, all=behind)


def profiles(fields: Sequence[Field]) -> Made:
    """Share of runs above each accuracy, scenarios with equal weight; learners that ran on the same scenarios together."""
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    references = set()
    for field in fields:
        for line in field.lines:
            if "legacy" not in line.row["marks"].split():
                key = (line.row["learner"], line.row["model"])
                values = [t.run.values["last_macro"] for t in line.traces if "last_macro" in t.run.values]
                scores.setdefault(key, {}).setdefault(field.scenario, []).extend(values)
                references |= {key} if line.reference else set()
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for key, held in scores.items():
        groups.setdefault(tuple(sorted(held)), []).append(key)
    groups = {names: keys for names, keys in groups.items() if len(names) > 1 or len(keys) > 1}
    for number, (names, keys) in enumerate(sorted(groups.items(), key=lambda g: (-len(g[0]), g[0]))):
        rows = [row for key in sorted(keys) for row in _profile(key, keys, scores[key], key in references)]
        words = (f"{len(names)} scenarios: " if len(names) > 1 else "") + style.fitted(", ".join(map(short, names)), 70)
        for end, made in _drawn(rows, words, "above", "accuracy after the last experience (%)", "share", "runs above it (%)"):
            yield f"{number + 1}{end}", made


def _profile(
    key: tuple[str, str], keys: Sequence[tuple[str, str]], scores: Mapping[str, list[float]], reference: bool
) -> list[dict[str, Any]]:
    limits = np.linspace(0, 1, 51)
    learner, model = key
    label = style.fitted(short(f"{learner} {model}" if len({m for _, m in keys}) > 1 else learner), 21)
    shares = grids.percent(statistics.profile(scores, limits.tolist()))
    return [
        {"label": label, "above": above, "share": share, "reference": reference}
        for above, share in zip(grids.percent(limits), shares, strict=True)
    ]


def over_chart(x: str, title: str, upper: tuple[str, str], colour: str, floors: bool = False) -> Chart:
    """A number over tokens or steps with the learning rate below it; dotted where an experience ends."""
    name, words = upper
    across = alt.X(f"{x}:Q", title=title, scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(format="~s", grid=False))
    above = alt.X(f"{x}:Q", title=None, scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(labels=False, grid=False))
    key = alt.Color(f"{colour}:N", sort=None, legend=alt.Legend(title=None, columns=3, symbolType="stroke"))
    told = [
        alt.Tooltip(f"{colour}:N"),
        alt.Tooltip(f"{x}:Q", format=","),
        alt.Tooltip(f"mean({name}):Q", title=words, format=".4f"),
    ]
    table = alt.Chart(alt.NamedData("table"))
    up = alt.Y(f"mean({name}):Q", title=words, scale=alt.Scale(zero=False))
    line = table.mark_line(strokeWidth=1.1).encode(x=above, y=up, color=key)
    hover = table.mark_point(opacity=0, size=60).encode(x=above, y=up, detail=f"{colour}:N", tooltip=told)
    band = table.mark_area(opacity=0.15).encode(x=above, y=alt.Y(f"min({name}):Q", title=words), y2=f"max({name}):Q", color=key)
    edges = (
        alt.Chart(alt.NamedData("edges")).mark_rule(style="quiet line", strokeDash=list(EDGE), strokeWidth=0.7).encode(x="x:Q")
    )
    floor = (
        alt.Chart(alt.NamedData("floors"))
        .mark_rule(strokeDash=[5, 3], strokeWidth=0.7)
        .encode(y="floor:Q", color=f"{colour}:N")
    )
    panels = [band, line, hover, edges] + ([floor] if floors else [])
    rate = alt.Y("mean(lr):Q", title="learning rate", axis=alt.Axis(tickCount=3, format="~g"))
    lower = alt.layer(table.mark_line(strokeWidth=1, style="ink line").encode(x=across, y=rate), edges).properties(
        width=190, height=54
    )
    return alt.vconcat(alt.layer(*panels).properties(width=190, height=140), lower, spacing=6).resolve_scale(x="shared")


def loss_chart(unit: str = "") -> Chart:
    """Training loss, a line for each seed, with the learning rate below."""
    return over_chart("x", unit, ("loss", "loss"), "seed")


def loss(fields: Sequence[Field]) -> Made:
    """Training loss with the learning rate below it, where records have `curves`; a line for each seed."""
    for field in fields:
        for line in field.lines:
            found = [(t, data) for t in line.traces if (data := loss_curves(t.extra.get("curves")))]
            if not found:
                continue
            rows = [
                {"seed": f"seed {t.run.seed}", "x": x, "loss": y, "lr": lr}
                for t, data in found
                for x, y, lr in zip(data["x"], data["loss"], data.get("lr") or [None] * len(data["x"]), strict=True)
            ]
            first = found[0][1]
            edges = [{"x": edge} for edge in first["edges"]]
            made = style.paper(loss_chart(first["unit"]), rows, f"{field.title}: {line.label}", edges=edges)
            yield f"{field.file}-{line.file}", made


def loss_curves(given: Any) -> dict[str, Any] | None:
    """`curves` of a record as lists, or None where it does not hold together; numbers that are not finite are gaps."""
    if not isinstance(given, Mapping):
        return None
    unit = next((name for name in ("tokens", "step") if _numbers(given.get(name))), None)
    size = len(given[unit]) if unit else 0
    if not size or not _numbers(given.get("loss")) or len(given["loss"]) != size:
        return None
    made: dict[str, Any] = {"unit": unit, "x": _list(given[unit]), "loss": _list(given["loss"]), "edges": []}
    if made["x"].count(None) == size or made["loss"].count(None) == size:
        return None
    if _numbers(given.get("lr")) and len(given["lr"]) == size:
        made["lr"] = _list(given["lr"])
    if _numbers(given.get("boundaries")):
        made["edges"] = [v for v in _list(given["boundaries"]) if v is not None]
    return made


def _numbers(value: Any) -> bool:
    """Whether it is a list of numbers and gaps."""
    kinds = (int, float, type(None))
    return isinstance(value, list) and bool(value) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)


def _list(values: Sequence[float | None]) -> list[float | None]:
    return grids.plain([math.nan if v is None or abs(v) > 1e300 else float(v) for v in values])


def stability_chart() -> Chart:
    """Accuracy on each set at every evaluation inside experiences; dotted where an experience begins."""
    x = alt.X("evaluation:Q", title="evaluation inside experiences", axis=style.count(grid=False), scale=alt.Scale(nice=False))
    y = alt.Y("accuracy:Q", title="accuracy (%)")
    legend = alt.Legend(title=None, columns=4, labelLimit=70, symbolLimit=12, symbolType="stroke")
    colour = alt.Color("set:N", sort=None, legend=legend)
    told = [
        alt.Tooltip("set:N"),
        alt.Tooltip("evaluation:Q"),
        alt.Tooltip("experience:Q"),
        alt.Tooltip("accuracy:Q", format=".2f"),
    ]
    dash = alt.StrokeDash("set:N", sort=None, scale=alt.Scale(range=[[1, 0], [4, 2], [1, 1.5], [4, 1, 1, 1]]), legend=legend)
    lines = base().mark_line(strokeWidth=1).encode(x=x, y=y, color=colour, strokeDash=dash)
    marks = base().mark_point(opacity=0, size=60).encode(x=x, y=y, tooltip=told)
    edges = (
        alt.Chart(alt.NamedData("edges")).mark_rule(style="quiet line", strokeDash=list(EDGE), strokeWidth=0.7).encode(x="x:Q")
    )
    return style.chart(lines, marks, edges, height=150)


def stability(fields: Sequence[Field]) -> Made:
    """Accuracy on each set at every evaluation inside experiences, where records have `stability.trace`; first seed."""
    for field in fields:
        for line in field.lines:
            found = next((made for t in line.traces if (made := _trace(t))), None)
            if found is None:
                continue
            values, edges = found
            names = [style.fitted(name, 12) for name in field.sets.names]
            rows = grids.unfold("stability", values, sets=names)
            made = style.paper(stability_chart(), rows, f"{field.title}: {line.label}", SINGLE, edges=edges)
            yield f"{field.file}-{line.file}", made


def _trace(trace: Trace) -> tuple[dict[str, Any], list[dict[str, float]]] | None:
    return trace_values(trace.extra.get("stability"), trace.matrix.shape[1])


def trace_values(given: Any, width: int) -> tuple[dict[str, Any], list[dict[str, float]]] | None:
    """Experiences [K] and accuracies [K, E] of a record's trace, and where experiences begin; None where malformed."""
    rows = given.get("trace") if isinstance(given, Mapping) else None
    try:
        made = [[math.nan if c is None else c / n for c, n in zip(r["correct"], r["n"], strict=True)] for r in rows]  # type: ignore[union-attr]
        experiences = [int(r["experience"]) for r in rows]  # type: ignore[union-attr]
        a = np.array(made, np.float64)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError):
        return None
    if a.ndim != 2 or a.shape[1] != width:
        return None
    edges = [{"x": k + 1.5} for k in np.flatnonzero(np.diff(experiences)).tolist()]
    return {"experience": [k + 1 for k in experiences], "accuracy": grids.percent(a)}, edges
