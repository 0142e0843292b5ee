"""Figures of whole rows: leaderboard, overview, cost against accuracy, forgetting of each set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clbench.report import costs
from clbench.report.figures import style
from clbench.report.figures.data import Field, Line, forgotten, steps
from clbench.report.figures.style import COLOURS, DOUBLE, FRONT, GREY, INK, PALE, SINGLE
from clbench.report.formats import fraction

Made = Iterator[tuple[str, Figure]]
ROWS = 50


def leaderboard(fields: Sequence[Field]) -> Made:
    """Mean of last_macro, its 95 % interval and every run."""
    for field in fields:
        for end, lines in style.pages(field.lines, ROWS):
            figure = style.paper(SINGLE, 0.95 + 0.155 * len(lines))
            axes = figure.subplots()
            dots(axes, lines)
            _key(axes, lines)
            yield f"{field.file}{end}", style.titled(figure, field.title)


def dots(axes: Axes, lines: Sequence[Line]) -> None:
    """A row for each line: runs pale, interval, mean; the mean as a number at the right."""
    for y, line in enumerate(lines):
        row, ink = line.row, _ink(line)
        runs = [100 * t.run.values["last_macro"] for t in line.traces if "last_macro" in t.run.values]
        axes.plot(runs, [y] * len(runs), linestyle="", marker="|", markersize=5, color=PALE, zorder=2)
        if row["last_macro_low"] is not None:
            axes.plot([100 * row["last_macro_low"], 100 * row["last_macro_high"]], [y, y], color=ink, linewidth=1.6, zorder=3)
        mark, fill = ("s" if line.reference else "o"), _fill(line)
        axes.plot([100 * line.last], [y], marker=mark, markersize=3.6, color=ink, mfc=fill, mew=0.9, zorder=4)
        axes.annotate(
            f"{100 * line.last:.1f}", (1, y), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            fontsize=7, va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    low, high = axes.get_xlim()
    lack = max(0.0, 10 - (high - low)) / 2
    axes.set_xlim(low - lack, high + lack)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("accuracy after the last experience (%)")
    axes.spines["left"].set_visible(False)


def _ink(line: Line) -> str:
    if line.reference:
        return INK
    return COLOURS[1] if line.row["vs_best"] in ("best", "not distinguishable") else COLOURS[0]


def _fill(line: Line) -> str:
    hollow = ("not distinguishable", "too few seeds", "no spread")
    return "white" if line.reference or line.row["vs_best"] in hollow else _ink(line)


def _key(axes: Axes, lines: Sequence[Line]) -> None:
    """A legend of the signs that occur."""
    found = {"reference" if line.reference else line.row["vs_best"] for line in lines}
    words = (
        ("best", COLOURS[1], "o", COLOURS[1], "best mean"),
        ("not distinguishable", COLOURS[1], "o", "white", "not distinguishable from it (paired t, Holm)"),
        ("worse", COLOURS[0], "o", COLOURS[0], "worse"),
        ("too few seeds", COLOURS[0], "o", "white", "too few shared seeds to tell"),
        ("no spread", COLOURS[0], "o", "white", "same difference on every seed: cannot be told"),
        ("reference", INK, "s", "white", "reference or legacy"),
    )
    for name, ink, mark, fill, label in words:
        if name in found:
            axes.plot([], [], linestyle="", marker=mark, markersize=3.6, color=ink, mfc=fill, mew=0.9, label=label)
    if any(line.row["last_macro_low"] is not None for line in lines):
        axes.plot([], [], color=GREY, linewidth=1.6, label="95 % interval of the mean; ticks: runs")
    axes.figure.legend(loc="outside lower left", ncols=1, handlelength=1.4, labelspacing=0.2, borderpad=0.1)


def overview(fields: Sequence[Field]) -> Made:
    """The leaderboard beside accuracy over experiences, a few curves named: the picture of a README."""
    for field in fields:
        for end, lines in style.pages(field.lines, ROWS):
            figure = style.paper(DOUBLE, max(3.2, 0.95 + 0.155 * len(lines)))
            left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
            dots(left, lines)
            _key(left, lines)
            _ends(right, lines)
            yield f"{field.file}{end}", style.titled(figure, field.title)


def _chosen(lines: Sequence[Line]) -> list[int]:
    """References, the best, the worst, and up to four between them, evenly by rank."""
    rest = [i for i, line in enumerate(lines) if not line.reference]
    picks = {rest[int(i)] for i in np.linspace(0, len(rest) - 1, min(6, len(rest))).round()} if rest else set()
    return sorted(picks | set([i for i, line in enumerate(lines) if line.reference][:1]))


def _ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Curves of the chosen lines, named at their ends; the others pale behind them."""
    chosen = _chosen(lines)
    ends: list[tuple[float, str, str]] = []
    longest = 1
    for i, line in enumerate(lines):
        y = 100 * steps(line).mean(0)
        x = np.arange(1, len(y) + 1)
        longest = max(longest, len(y))
        if i not in chosen:
            axes.plot(x, y, color=PALE, linewidth=0.6, zorder=1)
            continue
        place = sum(colour != INK for _, _, colour in ends) % len(COLOURS)
        ink, mark = (INK, "s") if line.reference else (COLOURS[place], style.MARKS[place])
        axes.plot(x, y, color=ink, linestyle="--" if line.reference else "-", marker=mark, markersize=3, zorder=3)
        ends.append((float(y[-1]), line.label, ink))
    low, high = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None
    gap = (high - low) * 0.13 / (figure.get_figheight() - 1.3)
    where = _spread([y for y, _, _ in ends], gap)
    for (y, label, ink), at in zip(ends, where, strict=True):
        axes.annotate(
            style.fitted(label, 20), (longest, y), xytext=(longest + 0.06 * max(1, longest - 1), at), textcoords="data",
            fontsize=7, color=ink, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": ink, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
    axes.set_xlabel("experience")
    axes.set_ylabel("accuracy on what was seen so far (%)")
    style.whole_numbers(axes)
    axes.grid(axis="y")


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


def cost(fields: Sequence[Field]) -> Made:
    """Accuracy against seconds and against bytes held; nobody is both cheaper and better than the front."""
    for field in fields:
        figure = style.paper(DOUBLE, 3.6)
        panels = figure.subplots(1, 2, sharey=True)
        lists = [
            [(line, line.row["seconds_mean"]) for line in field.lines if line.row["seconds_mean"]],
            [(line, held) for line in field.lines if (held := costs.held(line.row))],
        ]
        words = (("time of a run", style.seconds_text), ("held after the last experience", style.bytes_text))
        titled = style.titled(figure, field.title)
        for axes, found, (label, ticks) in zip(panels, lists, words, strict=True):
            axes.set_xlabel(label)
            axes.grid(True)
            if found:
                style.logarithmic(axes, [value for _, value in found], ticks)
                _front(axes, found)
        panels[0].set_ylabel("accuracy after the last experience (%)")
        low, high = panels[0].get_ylim()
        panels[0].set_yticks([tick for tick in panels[0].get_yticks() if low <= tick <= min(high, 100)])
        panels[0].set_ylim(low, high + 0.12 * (high - low))  # room for names above the front
        figure.legend(*_handles(panels), loc="outside lower left", ncols=3, handlelength=1.6)
        figure.canvas.draw()
        figure.set_layout_engine("none")
        for axes, found in zip(panels, lists, strict=True):
            best = _on_front(found)
            stairs = _stairs(found, axes.get_xlim()[1])
            points = [(c, 100 * line.last, style.fitted(line.label, 24), line in best) for line, c in found]
            style.place_labels(axes, sorted(points, key=lambda p: (not p[3], -p[1], p[0], p[2])), stairs)
        yield field.file, titled


def _handles(panels: Sequence[Axes]) -> tuple[list, list[str]]:
    found = {}
    for axes in panels:
        found |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def _on_front(found: Sequence[tuple[Line, float]]) -> list[Line]:
    fair = [(line, value) for line, value in found if not line.reference]
    on = costs.front([(value, line.last) for line, value in fair])
    return [line for (line, _), yes in zip(fair, on, strict=True) if yes]


def _front(axes: Axes, found: Sequence[tuple[Line, float]]) -> None:
    """The points, and the front as stairs through those that are on it."""
    best = _on_front(found)
    groups = (
        ("no other is as cheap and as good", [p for p in found if p[0] in best], "o", FRONT, FRONT),
        ("others", [p for p in found if p[0] not in best and not p[0].reference], "o", GREY, GREY),
        ("reference", [p for p in found if p[0].reference], "s", INK, "white"),
    )
    for order, (label, points, mark, ink, fill) in zip((5, 3, 4), groups, strict=True):
        if points:
            x, y = [c for _, c in points], [100 * line.last for line, _ in points]
            axes.plot(x, y, linestyle="", marker=mark, markersize=4, color=ink, mfc=fill, label=label, zorder=order)
    stairs = _stairs(found, axes.get_xlim()[1])
    if stairs:
        axes.step(*zip(*stairs, strict=True), where="post", color=FRONT, linewidth=0.9, zorder=2)


def _stairs(found: Sequence[tuple[Line, float]], right: float) -> list[tuple[float, float]]:
    """The front from its cheapest point to the right edge."""
    best = _on_front(found)
    made = sorted((c, 100 * line.last) for line, c in found if line in best)
    return [*made, (right, made[-1][1])] if made else []


def forgetting(fields: Sequence[Field]) -> Made:
    """Forgetting of each old set: a row for each learner, a column for each set; the best row on top."""
    for field in fields:
        for end, lines in style.pages(field.lines, ROWS):
            tables = [100 * forgotten(line) for line in lines]
            old = [j for j in range(len(tables[0])) if np.isfinite([t[j] for t in tables if j < len(t)]).any()]
            if not old:
                continue
            values = np.array([t[old] for t in tables])
            wide = len(old) > 7
            height = 1.05 + 0.165 * len(lines)
            figure = style.paper(DOUBLE if wide else SINGLE, height)
            axes = figure.subplots()
            most = max(5.0, float(np.nanmax(np.abs(values))))
            image = axes.imshow(values, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
            if len(old) <= (16 if wide else 8):
                for (i, j), value in np.ndenumerate(values):
                    ink = "white" if abs(value) > 0.62 * most else INK
                    axes.text(j, i, fraction(value, 0) if np.isfinite(value) else "", ha="center", va="center", color=ink)
            _sets(axes, [lines[0].traces[0].sets.names[j] for j in old])
            axes.set_yticks(range(len(lines)), [line.label for line in lines])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            bar = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=40, pad=0.15 / height, shrink=0.9)
            bar.set_label("points lost since the best")
            bar.outline.set_visible(False)  # type: ignore[operator]
            yield f"{field.file}{end}", style.titled(figure, field.title)


def _sets(axes: Axes, names: Sequence[str]) -> None:
    """Names of the sets on the x axis; leaning where they are long, thinned out where they are many."""
    every = -(-len(names) // 24)
    shown = [style.fitted(name, 14) if i % every == 0 else "" for i, name in enumerate(names)]
    lean = max(map(len, shown)) * len(shown) > 40
    axes.set_xticks(
        range(len(names)), shown, rotation=45 if lean else 0, ha="right" if lean else "center", rotation_mode="anchor"
    )
