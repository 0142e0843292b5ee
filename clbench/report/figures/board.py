"""Figures of whole rows: leaderboard, overview, cost against accuracy, forgetting of each set, where the seconds went."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt
import numpy as np

from clbench.report import costs
from clbench.report.figures import grids, style
from clbench.report.figures.data import Field, Line, forgotten, steps
from clbench.report.figures.style import DOUBLE, SINGLE, Chart, base

Made = Iterator[tuple[str, dict[str, Any]]]
ROWS = 50
LAST = "accuracy after the last experience (%)"
VERDICTS = {
    "worse": "worse",
    "best": "best mean",
    "not distinguishable": "not distinguishable from it (t, Holm)",
    "too few seeds": "too few shared seeds to tell",
    "no spread": "same difference on every seed",
    "reference": "reference or legacy",
}
_SECONDS = (
    "datum.value < 120 ? format(datum.value, '.3~r') + ' s' : "
    "datum.value < 7200 ? format(datum.value / 60, '.3~r') + ' min' : format(datum.value / 3600, '.3~r') + ' h'"
)
_BYTES = "replace(format(datum.value, '.3~s'), 'G', ' G') + 'B'"
# Kind -> what it costs, how a tick is written, its value of a row.
COSTS: dict[str, tuple[str, str, Any]] = {
    "cost_seconds": ("time of a run", _SECONDS, lambda row: row["seconds_mean"]),
    "cost_held": ("held after the last experience", _BYTES, costs.held),
    "cost_memory": ("peak memory", _BYTES, lambda row: _times(row["peak_memory_mb_mean"], 1e6)),
    "cost_trained": ("parameters trained", "format(datum.value, '.3~s')", lambda row: row["parameters_trained"]),
}
MOST_POINTS = 150
ON, OFF, ASIDE = "no other is as cheap and as good", "others", "reference or legacy"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def verdict(line: Line) -> str:
    """What a line says against the best, in the words of the legend."""
    return VERDICTS["reference"] if line.reference else VERDICTS.get(line.row["vs_best"], VERDICTS["reference"])


def leaderboard_chart() -> Chart:
    """A row for each line: runs pale, interval, mean; the mean as a number at the right."""
    y = alt.Y("label:N", sort=None, title=None).axis(domain=False, ticks=False, labelPadding=4)
    scale = alt.Scale(zero=False, padding=18, nice=False)
    colour = alt.Color("verdict:N", sort=list(VERDICTS.values())).legend(title=None, columns=1, symbolType="circle")
    names = ("not distinguishable", "too few seeds", "no spread", "reference")
    undecided = f"indexof({[VERDICTS[name] for name in names]}, datum.verdict) >= 0"
    told = [alt.Tooltip("label:N"), *(alt.Tooltip(f"{name}:Q", format=".2f") for name in ("mean", "low", "high"))]
    told += [alt.Tooltip("verdict:N")]
    x = alt.X("accuracy:Q", title=LAST, scale=scale).axis(grid=True)
    runs = base().transform_flatten(["runs"], ["accuracy"]).mark_tick(style="pale", thickness=1, height=7).encode(x=x, y=y)
    range_ = base().mark_rule(strokeWidth=1.6).encode(x=alt.X("low:Q"), x2="high:Q", y=y, color=colour)
    shape = alt.condition(f"datum.verdict == '{VERDICTS['reference']}'", alt.value("square"), alt.value("circle"))
    where = {"x": alt.X("mean:Q"), "y": y, "color": colour, "tooltip": told, "shape": shape}
    full = base().transform_filter(f"!({undecided})").mark_point(filled=True, size=34, opacity=1).encode(**where)
    hollow = base().transform_filter(undecided).mark_point(style="hollow", size=26, opacity=1, strokeWidth=1.3).encode(**where)
    words = base().mark_text(align="right", dx=-1).encode(x=alt.value("width"), y=y, text=alt.Text("mean:Q", format=".1f"))
    return style.chart(runs, range_, full, hollow, words, height=alt.Step(12))


def leaderboard_rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Mean, interval and runs of each line, in per cent."""
    return [_leaderboard_row(line) for line in lines]


def _leaderboard_row(line: Line) -> dict[str, Any]:
    low, high = line.row["last_macro_low"], line.row["last_macro_high"]
    runs = [grids.percent(t.run.values["last_macro"]) for t in line.traces if "last_macro" in t.run.values]
    made = {"label": line.label, "mean": grids.percent(line.last), "verdict": verdict(line), "runs": runs}
    return made | {"low": None if low is None else grids.percent(low), "high": None if high is None else grids.percent(high)}


def leaderboard(fields: Sequence[Field]) -> Made:
    """Mean of last_macro, its 95 % interval and every run."""
    for field in fields:
        for end, lines in style.pages(field.lines, ROWS):
            yield f"{field.file}{end}", style.paper(leaderboard_chart(), leaderboard_rows(lines), field.title)


def overview(fields: Sequence[Field]) -> Made:
    """The leaderboard beside accuracy over experiences, a few curves named: the picture of a README."""
    for field in fields:
        for end, lines in style.pages(field.lines, ROWS):
            room = 4.1 * max(len(line.label) for line in lines) + 40
            left = leaderboard_chart().properties(width=max(90, 0.45 * DOUBLE - room))
            height = max(170, 12 * len(lines))
            right = _ends_chart(max(len(line.traces[0].matrix) for line in lines)).properties(
                width=0.42 * DOUBLE, height=height
            )
            figure = alt.hconcat(left, right, spacing=14, data=alt.NamedData("table")).resolve_scale(color="independent")
            curves, ends = _ends(lines, height)
            made = style.paper(figure, leaderboard_rows(lines), field.title, DOUBLE, curves=curves, ends=ends)
            yield f"{field.file}{end}", made


def _chosen(lines: Sequence[Line]) -> list[int]:
    """References, the best, the worst, and up to four between them, evenly by rank."""
    rest = [i for i, line in enumerate(lines) if not line.reference]
    picks = {rest[int(i)] for i in np.linspace(0, len(rest) - 1, min(6, len(rest))).round()} if rest else set()
    return sorted(picks | set([i for i, line in enumerate(lines) if line.reference][:1]))


def _ends_chart(longest: int) -> Chart:
    """Curves of the chosen lines, named at their ends; the others pale behind them."""
    scale = alt.Scale(domain=[1, longest + 0.6 * max(1, longest - 1)], nice=False)
    axis = style.count(values=list(range(1, longest + 1, max(1, longest // 8))), grid=False)
    x = alt.X("after:Q", title="experience", scale=scale, axis=axis)
    y = alt.Y("accuracy:Q", title="accuracy on what was seen so far (%)", scale=alt.Scale(zero=False))
    colour = alt.Color("label:N", sort=None, legend=None)
    curves = alt.Chart(alt.NamedData("curves"))
    pale = curves.transform_filter("!datum.chosen").mark_line(style="pale line", strokeWidth=0.6)
    bold = curves.transform_filter("datum.chosen").mark_line(strokeWidth=1.2, point={"size": 10})
    ends = alt.Chart(alt.NamedData("ends"))
    lead = ends.mark_rule(strokeWidth=0.5).encode(x=x, y=y, x2="to:Q", y2="at:Q", color=colour)
    words = ends.mark_text(align="left", dx=2).encode(x=alt.X("to:Q"), y=alt.Y("at:Q"), text="label:N", color=colour)
    return alt.layer(pale.encode(x=x, y=y, detail="label:N"), bold.encode(x=x, y=y, color=colour), lead, words)


def _ends(lines: Sequence[Line], height: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the mean curves, and where the names of the chosen ones stand."""
    chosen, rows, ends = _chosen(lines), [], []
    for i, line in enumerate(lines):
        y = grids.percent(steps(line).mean(0))
        label = style.fitted(line.label, 22)
        rows += [{"label": label, "after": k + 1, "accuracy": v, "chosen": i in chosen} for k, v in enumerate(y)]
        if i in chosen:
            ends.append({"label": label, "after": len(y), "accuracy": y[-1], "to": len(y) + 0.07 * max(1, len(y) - 1)})
    known = [row["accuracy"] for row in rows if row["accuracy"] is not None]
    gap = 9.5 * max(1.0, max(known) - min(known)) / height
    for end, at in zip(ends, _spread([end["accuracy"] for end in ends], gap), strict=True):
        end["at"] = round(at, 3)
    return rows, ends


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Heights for labels: as near to the values as a gap between them allows, in the same order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    at = [values[i] for i in order]
    for _ in range(200):
        moved = False
        for k in range(len(at) - 1):
            if (lack := gap - (at[k + 1] - at[k])) > 1e-9:
                at[k], at[k + 1], moved = at[k] - lack / 2, at[k + 1] + lack / 2, True
        if not moved:
            break
    return [at[order.index(i)] for i in range(len(values))]


def cost_chart(kind: str, height: int = 220) -> Chart:
    """Accuracy against a cost; nobody is both cheaper and better than the front, which is drawn as stairs."""
    title, ticks, _ = COSTS[kind]
    x = alt.X(
        "cost:Q",
        title=title,
        scale=alt.Scale(type="log", padding=14, nice=False),
        axis=alt.Axis(labelExpr=ticks, tickCount=5, grid=False),
    )
    y = alt.Y("accuracy:Q", title=LAST, scale=alt.Scale(zero=False, padding=10, nice=False))
    colour = alt.Color("kind:N", sort=[OFF, ON, ASIDE], legend=alt.Legend(title=None, columns=3))
    told = [alt.Tooltip("label:N"), *(alt.Tooltip(f"{name}:Q", format=".2f") for name in ("accuracy", "low", "high"))]
    told += [alt.Tooltip("cost:Q", title=title, format=".4~s"), alt.Tooltip("kind:N")]
    front = base().transform_filter(f"datum.kind == '{ON}'").mark_line(interpolate="step-after", strokeWidth=1)
    ranges = base().mark_rule(strokeWidth=0.8, opacity=0.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour)
    points = base().mark_point(filled=True, size=38, opacity=0.9).encode(
        x=x, y=y, color=colour, tooltip=told,
        shape=alt.condition(f"datum.kind == '{ASIDE}'", alt.value("square"), alt.value("circle")),
    )  # fmt: skip
    named = base().transform_filter("isValid(datum.name)").mark_text(baseline="middle", align="left")
    words = named.encode(x=alt.X("name_x:Q"), y=alt.Y("name_y:Q"), text="name:N")
    return style.chart(ranges, front.encode(x=x, y=y, color=colour), points, words, height=height)


def cost_rows(lines: Sequence[Line], kind: str, size: tuple[float, float] = (210, 220)) -> list[dict[str, Any]]:
    """Lines with a cost, those of the front named where their names cover nothing in a panel of `size`."""
    found = [(line, float(value)) for line in lines if (value := COSTS[kind][2](line.row))]
    fair = [(line, value) for line, value in found if not line.reference]
    on = costs.front([(value, line.last) for line, value in fair])
    front = {id(line) for (line, _), yes in zip(fair, on, strict=True) if yes}
    found.sort(key=lambda p: (id(p[0]) not in front, -p[0].last))
    rows = [_cost_row(line, value, id(line) in front) for line, value in found[:MOST_POINTS]]
    place_names(rows, size)
    return rows


def _cost_row(line: Line, cost: float, on: bool) -> dict[str, Any]:
    whole = _leaderboard_row(line)
    made = {"label": line.label, "cost": cost, "accuracy": whole["mean"], "low": whole["low"], "high": whole["high"]}
    return made | {"kind": ASIDE if line.reference else ON if on else OFF}


def place_names(rows: Sequence[dict[str, Any]], size: tuple[float, float]) -> None:
    """Give rows a name and its place, the first ones first, where it covers no point and no other name.

    `size`: of the panel in pixels. A row whose name has no room stays without one.
    """
    if not rows:
        return
    x, y = [math.log(row["cost"]) for row in rows], [row["accuracy"] for row in rows]
    ends = [*y, *(row[name] for row in rows for name in ("low", "high") if row[name] is not None)]
    wide, tall = (max(1e-9, max(v) - min(v)) for v in (x, ends))
    scale = (size[0] - 28) / wide, (size[1] - 20) / tall
    dots = [(14 + scale[0] * (a - min(x)), 10 + scale[1] * (b - min(ends))) for a, b in zip(x, y, strict=True)]
    taken = [(a - 4, b - 4, a + 4, b + 4) for a, b in dots]
    stairs = sorted(dot for dot, row in zip(dots, rows, strict=True) if row["kind"] == ON)
    for (a, b), (right, top) in itertools.pairwise(stairs):
        taken += [(a, b - 1, right, b + 1), (right - 1, b, right + 1, top)]
    for row, (a, b) in zip(rows, dots, strict=True):
        name = style.fitted(row["label"], 24)
        width = 4.3 * len(name)
        for dx, dy in (
            (6, 0),
            (-6 - width, 0),
            (-width / 2, 9),
            (-width / 2, -9),
            (5, 7),
            (5, -7),
            (-5 - width, 7),
            (-5 - width, -7),
        ):
            box = (a + dx, b + dy - 4, a + dx + width, b + dy + 4)
            inside = box[0] >= 0 and box[2] <= size[0] and box[1] >= 0 and box[3] <= size[1]
            if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                taken.append(box)
                row["name"] = name
                row["name_x"] = float(f"{math.exp(min(x) + (box[0] - 14) / scale[0]):.6g}")
                row["name_y"] = round(min(ends) + (b + dy - 10) / scale[1], 4)
                break


def cost(fields: Sequence[Field]) -> Made:
    """Accuracy against seconds and against bytes held."""
    for field in fields:
        panels, rows = [], []
        for kind in ("cost_seconds", "cost_held"):
            found = cost_rows(field.lines, kind)
            if found:
                panels.append(cost_chart(kind).transform_filter(f"datum.of == '{kind}'").properties(width=210))
                rows += [{**row, "of": kind} for row in found]
        if panels:
            figure = alt.hconcat(*panels, data=alt.NamedData("table"))
            yield field.file, style.paper(figure, rows, field.title, DOUBLE)


def forgetting_chart() -> Chart:
    """Points lost on each old set (columns) by each line (rows)."""
    y = alt.Y("label:N", sort=None, title=None).axis(domain=False, ticks=False)
    x = alt.X("set:N", sort=None, title=None).axis(domain=False, ticks=False, labelLimit=60, labelAngle=0)
    scale = alt.Scale(scheme="purples", domainMin=0, clamp=True)
    title = "points lost since the best"
    colour = alt.Color("lost:Q", scale=scale, legend=alt.Legend(title=title, titleLimit=300))
    told = [alt.Tooltip("label:N"), alt.Tooltip("set:N"), alt.Tooltip("lost:Q", title=title, format=".2f")]
    cells = base().mark_rect().encode(x=x, y=y, color=colour, tooltip=told)
    words = style.cell_words("lost", ".0f").encode(x=x, y=y)
    return style.chart(cells, words, height=alt.Step(13))


def forgetting_rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Tidy rows of what was lost on the sets that anybody could lose; [] without any."""
    tables = [grids.percent(forgotten(line)) for line in lines]
    names = lines[0].traces[0].sets.names
    old = [j for j in range(len(names)) if any(j < len(t) and t[j] is not None for t in tables)]
    return [
        {"label": line.label, "set": style.fitted(names[j], 14), "lost": table[j]}
        for line, table in zip(lines, tables, strict=True)
        for j in old
    ]


def forgetting(fields: Sequence[Field]) -> Made:
    """Forgetting of each old set: a row for each learner, a column for each set; the best row on top."""
    for field in fields:
        for end, lines in style.pages(field.lines, ROWS):
            if rows := forgetting_rows(lines):
                width = DOUBLE if len(rows) > 7 * len(lines) else SINGLE
                yield f"{field.file}{end}", style.paper(forgetting_chart(), rows, field.title, width)


def seconds_chart() -> Chart:
    """Where the seconds of a run went, a bar for each line."""
    y = alt.Y("label:N", sort=None, title=None).axis(domain=False, ticks=False)
    x = alt.X("seconds:Q", title="seconds of a run, mean over seeds")
    told = [alt.Tooltip("label:N"), alt.Tooltip("phase:N"), alt.Tooltip("seconds:Q", format=".3~r")]
    colour = alt.Color("phase:N", sort=list(grids.PHASES), legend=alt.Legend(title=None, columns=1))
    order = alt.Order("place:Q")
    placed = base().transform_calculate(place=f"indexof({list(grids.PHASES)}, datum.phase)")
    return style.chart(placed.mark_bar().encode(x=x, y=y, color=colour, order=order, tooltip=told), height=alt.Step(14))


def seconds(fields: Sequence[Field]) -> Made:
    """Optimisation, features, the rest of learning, evaluation, anything else."""
    for field in fields:
        for end, lines in style.pages(field.lines, ROWS):
            found = [(line.label, values) for line in lines if (values := grids.seconds(line.row))]
            rows = [row for label, values in found for row in grids.labelled(grids.unfold("seconds", values), label)]
            if rows:
                yield f"{field.file}{end}", style.paper(seconds_chart(), rows, field.title)
