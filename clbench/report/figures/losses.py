"""Figures of pre-training: loss over tokens with the rate below, loss matrices, replay, stability gaps."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from clbench.report import statistics
from clbench.report.figures import style
from clbench.report.figures.data import Field, Line, mean_matrix, short
from clbench.report.figures.style import COLOURS, DOUBLE, GREY, INK, SINGLE

Made = Iterator[tuple[str, Figure]]
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)))
PANELS = 24


def _millions(axes: Axes, unit: str) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if v == 0 else f"{v / 1e6:g} M" if v >= 1e5 else f"{v:g}"))
    axes.set_xlabel(f"{unit} trained on")


def losses(fields: Sequence[Field]) -> Made:
    """Loss on every set over tokens, mean over seeds with their range; boundaries dotted, floors dashed, the rate below."""
    for field in fields:
        for line in field.lines:
            courses = line.courses()
            if not courses:
                continue
            figure = style.paper(SINGLE, 3.1 + 0.13 * (-(-min(len(field.sets.names), 12) // 2)))
            grid = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
            upper, lower = grid.tolist()
            x, stack = courses[0].tokens, np.stack([course.loss for course in courses])
            for j, name in enumerate(field.sets.names):
                ink, dash = COLOURS[j % len(COLOURS)], DASHES[(j // len(COLOURS)) % len(DASHES)]
                label = f"\u200b{style.fitted(name, 20)}" if len(field.sets.names) <= 12 else "_"
                upper.plot(x, stack[:, :, j].mean(0), color=ink, linestyle=dash, linewidth=1.0, label=label)
                if len(stack) > 1:
                    upper.fill_between(x, stack[:, :, j].min(0), stack[:, :, j].max(0), color=ink, alpha=0.15, linewidth=0)
                if (floor := field.sets.floors[j]) is not None:
                    upper.axhline(floor, color=ink, linewidth=0.5, linestyle=(0, (5, 3)))
            lower.plot(x, np.mean([course.lr for course in courses], axis=0), color=INK, linewidth=0.8)
            for axes in (upper, lower):
                for edge in courses[0].boundaries[1:]:
                    axes.axvline(edge, color=GREY, linewidth=0.6, linestyle=":")
            upper.set_ylabel(f"loss ({field.sets.measure})")
            upper.grid(axis="y")
            lower.set_ylabel("learning rate")
            lower.set_ylim(bottom=0)
            _millions(lower, field.sets.unit)
            if len(field.sets.names) <= 12:
                figure.legend(*upper.get_legend_handles_labels(), loc="outside lower left", ncols=3, columnspacing=1)
            yield f"{field.file}-{line.file}", style.titled(figure, f"{field.title}: {line.label}")


def loss_matrix(fields: Sequence[Field]) -> Made:
    """Loss on each set (columns) before and after each experience (rows), mean over seeds, a panel for each row."""
    for field in fields:
        for end, lines in style.pages(field.lines, PANELS):
            maps = [(style.fitted(line.label, 25), mean_matrix(line)) for line in lines]
            draw = functools.partial(_matrix, low=min(m.min() for _, m in maps), high=max(m.max() for _, m in maps))
            figure = style.heat_maps(maps, draw, 4, 1.5, f"loss ({field.sets.measure})")
            yield f"{field.file}{end}", style.titled(figure, field.title)


def _matrix(axes: Axes, r: np.ndarray, bottom: bool, left: bool, low: float, high: float) -> Any:
    """One heat map, light where the loss is low; numbers where the cells have room for them."""
    image = axes.imshow(r, cmap="cividis_r", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    if max(r.shape) <= 6:
        for (i, j), value in np.ndenumerate(r):
            ink = "white" if high > low and (value - low) / (high - low) > 0.45 else INK
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=ink)
    few = range(0, len(r), max(1, len(r) // 6))
    axes.set_yticks(list(few), ["before" if i == 0 else str(i) for i in few])
    sets = range(0, r.shape[1], max(1, r.shape[1] // 6))
    axes.set_xticks(list(sets), [str(j + 1) for j in sets])
    axes.set_xlabel("set")
    axes.set_ylabel("after")
    axes.tick_params(length=2)
    return image


def replay(fields: Sequence[Field]) -> Made:
    """Final loss on old sets and on the newest one against the share of replay: mean and 95 % interval, a line a learner."""
    for field in fields:
        groups: dict[tuple[str, str], list[Line]] = {}
        for line in field.lines:
            if isinstance(line.row["replay"], int | float) and not line.reference:
                groups.setdefault((line.row["learner"], line.row["model"]), []).append(line)
        groups = {name: held for name, held in groups.items() if len({line.row["replay"] for line in held}) > 1}
        if not groups:
            continue
        several = len({model for _, model in groups}) > 1
        figure = style.paper(DOUBLE, 2.5 + 0.13 * (-(-len(groups) // 3)))
        panels = figure.subplots(1, 2).tolist()
        shares = sorted({line.row["replay"] for held in groups.values() for line in held})
        for axes, name, words in zip(panels, ("retained_loss", "newest_loss"), ("old sets", "newest set"), strict=True):
            for i, ((learner, model), held) in enumerate(sorted(groups.items())):
                label = short(f"{learner} {model}" if several else learner)
                _against_share(axes, held, name, shares, i, len(groups), label)
            axes.set_xticks(range(len(shares)), [f"{100 * share:g}" for share in shares])
            axes.set_xlabel("replay (% of each batch)")
            axes.set_ylabel(f"final loss, {words} ({field.sets.measure})")
            axes.grid(axis="y")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
        yield field.file, style.titled(figure, field.title)


def _against_share(
    axes: Axes, held: Sequence[Line], name: str, shares: Sequence[float], i: int, number: int, label: str
) -> None:
    """One learner: points beside each other at the same share, their intervals, and a thin line through them."""
    ink, points = COLOURS[i % len(COLOURS)], []
    for line in sorted(held, key=lambda line: line.row["replay"]):
        values = [t.run.values[name] for t in line.traces if name in t.run.values]
        if values:
            at = shares.index(line.row["replay"]) + 0.12 * (i - (number - 1) / 2)
            low, high = statistics.bootstrap([values]) or (math.nan, math.nan)
            points.append((at, float(np.mean(values)), low, high))
    if points:
        x, y, low, high = np.array(points).T
        axes.plot(x, y, color=ink, linewidth=0.8, marker=style.MARKS[i % 6], markersize=3, label=f"\u200b{label}")
        axes.vlines(x, low, high, color=ink, linewidth=1.0)


def gaps(fields: Sequence[Field]) -> Made:
    """The stability gap: rise of the loss on old sets above that at the boundary, over the steps of later experiences."""
    for field in fields:
        drawn = [(line, found) for line in field.lines if (found := _rise(field, line)) is not None]
        for end, part in style.pages(drawn, 6):
            figure = style.paper(SINGLE, 2.5 + 0.13 * len(part))
            axes = figure.subplots()
            for i, (line, (steps, mean, low, high)) in enumerate(part):
                ink = INK if line.reference else COLOURS[i]
                axes.plot(steps, mean, color=ink, marker="o", markersize=2, linewidth=0.9, label=f"\u200b{short(line.label)}")
                axes.fill_between(steps, low, high, color=ink, alpha=0.15, linewidth=0)
            axes.axhline(0, color=GREY, linewidth=0.6)
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axes.set_xlabel("steps after the boundary")
            axes.set_ylabel(f"rise on old sets ({field.sets.measure})")
            axes.grid(axis="y")
            figure.legend(loc="outside lower left", ncols=2)
            yield f"{field.file}{end}", style.titled(figure, field.title)


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
