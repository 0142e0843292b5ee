"""Figures of the course of runs: accuracy matrices, accuracy over experiences, profiles, losses, stability."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clbench.report import statistics
from clbench.report.figures import style
from clbench.report.figures.data import Field, Line, Trace, mean_matrix, short, steps
from clbench.report.figures.style import COLOURS, DOUBLE, GREY, INK, SINGLE, Series

Made = Iterator[tuple[str, Figure]]
PANELS = 30


def matrix(fields: Sequence[Field]) -> Made:
    """Accuracy on each set (columns) after each experience (rows), mean over runs, a panel for each learner."""
    for field in fields:
        for end, lines in style.pages(field.lines, PANELS):
            maps = [(style.fitted(line.label, 21), mean_matrix(line)) for line in lines]
            figure = style.heat_maps(maps, _matrix, 5, 1.34, "accuracy (%)")
            yield f"{field.file}{end}", style.titled(figure, field.title)


def _matrix(axes: Axes, a: np.ndarray, bottom: bool, left: bool) -> Any:
    """One heat map; numbers where the cells have room for them, words and ticks at the outer panels only."""
    image = axes.imshow(100 * a, cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    if max(a.shape) <= 6:
        for (i, j), value in np.ndenumerate(a):
            if np.isfinite(value):
                ink = INK if value > 0.55 else "white"
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=ink)
    style.whole_numbers(axes)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda v, _: f"{v + 1:.0f}")
    axes.tick_params(length=2, labelbottom=bottom, labelleft=left)
    axes.set_xlabel("set" if bottom else "")
    axes.set_ylabel("after" if left else "")
    return image


def curves(fields: Sequence[Field]) -> Made:
    """Accuracy over experiences on the sets seen so far: mean over runs, the band is their range."""
    for field in fields:
        every = [_series(line) for line in field.lines]
        for end, part in style.pages(field.lines, PANELS):
            some = [_series(line) for line in part]
            figure = _drawn(some, every, "experience", "accuracy (%)")
            yield f"{field.file}{end}", style.titled(figure, field.title)


def _series(line: Line) -> Series:
    y = 100 * steps(line)
    return Series(line.label, np.arange(1, y.shape[1] + 1), y.mean(0), y.min(0), y.max(0), line.reference)


def _drawn(some: Sequence[Series], every: Sequence[Series], x: str, y: str, whole: bool = True) -> Figure:
    """Up to six curves in one panel, more in a panel each."""
    if len(every) <= 6:
        figure = style.paper(SINGLE, 2.5 + 0.13 * len(some))
        axes = figure.subplots()
        style.one_panel(axes, some)
        figure.legend(loc="outside lower left", ncols=1 if max(len(s.label) for s in some) > 18 else 2, labelspacing=0.2)
        panels = [axes]
    else:
        rows = -(-len(some) // 5)
        figure = style.paper(DOUBLE, 0.6 + 1.12 * rows)
        panels = style.many_panels(figure, some, 5, every)
    if whole:
        for axes in panels:
            style.whole_numbers(axes)
    if len(panels) == 1:
        panels[0].set_xlabel(x)
        panels[0].set_ylabel(y)
    else:
        figure.supxlabel(x, fontsize=7.5)
        figure.supylabel(y, fontsize=7.5)
    return figure


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
    limits = np.linspace(0, 1, 101)
    for number, (names, keys) in enumerate(sorted(groups.items(), key=lambda g: (-len(g[0]), g[0]))):
        several = len({model for _, model in keys}) > 1
        made = []
        for learner, model in sorted(keys):
            share = 100 * np.array(statistics.profile(scores[learner, model], limits.tolist()))
            label = short(f"{learner} {model}" if several else learner)
            made.append(Series(label, 100 * limits, share, share, share, (learner, model) in references))
        for i in range(0, len(made), PANELS):
            end = f"-{i // PANELS + 1}" if i else ""
            figure = _drawn(made[i : i + PANELS], made, "accuracy after the last experience (%)", "runs above it (%)", False)
            words = f"{len(names)} scenarios: " if len(names) > 1 else ""
            yield (
                f"{number + 1}{end}",
                style.titled(figure, words + style.fitted(", ".join(map(short, names)), 70)),
            )


def loss(fields: Sequence[Field]) -> Made:
    """Training loss with the learning rate below it, where records have `curves`; a line for each seed."""
    for field in fields:
        for line in field.lines:
            found = [(t, data) for t in line.traces if (data := _curves(t.extra.get("curves")))]
            if not found:
                continue
            rates = any("lr" in data for _, data in found)
            figure = style.paper(SINGLE, 3.2 if rates else 2.3)
            grid = figure.subplots(2 if rates else 1, 1, sharex=True, squeeze=False, height_ratios=(2.2, 1)[: 1 + rates])
            panels = [row[0] for row in grid]
            for i, (trace, data) in enumerate(found):
                ink = COLOURS[i % len(COLOURS)]
                panels[0].plot(data["x"], data["loss"], color=ink, linewidth=0.8, label=f"seed {trace.run.seed}")
                if "lr" in data:
                    panels[1].plot(data["x"], data["lr"], color=ink, linewidth=0.8)
            for axes in panels:
                for edge in found[0][1]["boundaries"]:
                    axes.axvline(edge, color=GREY, linewidth=0.5, linestyle=":")
            panels[0].set_ylabel("loss")
            if rates:
                panels[1].set_ylabel("learning rate")
            panels[-1].set_xlabel(found[0][1]["unit"])
            if len(found) > 1:
                figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
            yield f"{field.file}-{line.file}", style.titled(figure, f"{field.title}: {line.label}")


def _curves(given: Any) -> dict[str, Any] | None:
    """`curves` of a record as arrays, or None where it does not hold together; numbers that are not finite are gaps."""
    if not isinstance(given, Mapping):
        return None
    unit = next((name for name in ("tokens", "step") if _numbers(given.get(name))), None)
    size = len(given[unit]) if unit else 0
    if not size or not _numbers(given.get("loss")) or len(given["loss"]) != size:
        return None
    made: dict[str, Any] = {"unit": unit, "x": _array(given[unit]), "loss": _array(given["loss"]), "boundaries": []}
    if _numbers(given.get("lr")) and len(given["lr"]) == size:
        made["lr"] = _array(given["lr"])
    if _numbers(given.get("boundaries")):
        made["boundaries"] = [v for v in _array(given["boundaries"]).tolist() if math.isfinite(v)]
    return made


def _numbers(value: Any) -> bool:
    """Whether it is a list of numbers and gaps."""
    kinds = (int, float, type(None))
    return isinstance(value, list) and bool(value) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)


def _array(values: Sequence[float | None]) -> np.ndarray:
    made = np.array([math.nan if v is None or abs(v) > 1e300 else float(v) for v in values])
    return np.where(np.isfinite(made), made, np.nan)


def stability(fields: Sequence[Field]) -> Made:
    """Accuracy on each set at every evaluation inside experiences, where records have `stability.trace`; first seed."""
    for field in fields:
        for line in field.lines:
            found = next((made for t in line.traces if (made := _trace(t))), None)
            if found is None:
                continue
            a, steps_of = found
            figure = style.paper(SINGLE, 2.6 + 0.13 * (-(-min(a.shape[1], 12) // 4)))
            axes = figure.subplots()
            x = np.arange(1, len(a) + 1)
            for j in range(a.shape[1]):
                shade = COLOURS[j % len(COLOURS)]
                dash = ("-", "--", ":", "-.")[(j // len(COLOURS)) % 4]
                name = style.fitted(line.traces[0].sets.names[j], 12) if a.shape[1] <= 12 else "_"
                axes.plot(x, 100 * a[:, j], color=shade, linestyle=dash, linewidth=0.9, label=f"\u200b{name}")
            for edge in np.flatnonzero(np.diff(steps_of)):
                axes.axvline(edge + 1.5, color=GREY, linewidth=0.5, linestyle=":")
            axes.set_xlabel("evaluation inside experiences")
            axes.set_ylabel("accuracy (%)")
            style.whole_numbers(axes)
            axes.grid(axis="y")
            if a.shape[1] <= 12:
                figure.legend(loc="outside lower left", ncols=4, columnspacing=1)
            yield f"{field.file}-{line.file}", style.titled(figure, f"{field.title}: {line.label}")


def _trace(trace: Trace) -> tuple[np.ndarray, np.ndarray] | None:
    """Accuracies [K, E] and experiences [K], or None where the record has none that hold together."""
    rows = trace.extra.get("stability", {}).get("trace")
    try:
        size = trace.matrix.shape[1]
        a = np.array([[math.nan if c is None else c / n for c, n in zip(r["correct"], r["n"], strict=True)] for r in rows])
        experiences = np.array([int(r["experience"]) for r in rows])
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError):
        return None
    return (a, experiences) if a.ndim == 2 and a.shape[1] == size else None
