"""Plot style: sizes, colours, and the elements that every figure shares. Colours: Okabe & Ito 2008; cividis.

Figures are drawn on `Figure` objects of their own: no display, no global state, no mark-up in labels.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

SINGLE, DOUBLE = 3.3, 6.9  # inches: one column, two columns
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v", "P")
INK, GREY, PALE, FRONT = "#1a1a1a", "#6b6b6b", "#cfcfcf", "#D55E00"
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 300,
    "svg.fonttype": "none",
    "svg.hashsalt": "clbench",
    "pdf.fonttype": 42,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Series:
    """A curve: x [K], y [K], and the lowest and highest over runs [K]."""

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    reference: bool = False


def paper(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def titled(figure: Figure, words: str) -> Figure:
    """A heading, at the left, in lines that the figure has room for."""
    lines = textwrap.wrap(words, max(20, int(figure.get_figwidth() * 14)), break_on_hyphens=False)
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=8, fontweight="bold")
    return figure


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))


def logarithmic(axes: Axes, values: Sequence[float], words: Any) -> None:
    """A logarithmic x axis around positive values; `words` writes a tick."""
    axes.set_xscale("log")
    low, high = min(values), max(values)
    axes.set_xlim(low / 1.8, high * 2.4)
    decades = np.log10(high / low) + 0.6
    subs = (1.0,) if decades >= 3 else (1.0, 3.0) if decades >= 1 else (1.0, 2.0, 3.0, 5.0, 7.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: words(v)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def seconds_text(value: float) -> str:
    """A tick of time."""
    for size, unit in ((3600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} s"


def bytes_text(value: float) -> str:
    """A tick of storage."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} B"


def one_panel(axes: Axes, series: Sequence[Series]) -> None:
    """Up to six curves told apart by colour, mark and legend; references are black and dashed."""
    for i, s in enumerate(series):
        ink = INK if s.reference else COLOURS[i % len(COLOURS)]
        dash = (0, (4, 2)) if s.reference else "-"
        mark = MARKS[i % len(MARKS)] if len(s.x) <= 20 else ""
        axes.fill_between(s.x, s.low, s.high, color=ink, alpha=0.15, linewidth=0)
        axes.plot(s.x, s.y, color=ink, linestyle=dash, marker=mark, markersize=3, label=f"\u200b{s.label}")
    axes.grid(axis="y")


def many_panels(figure: Figure, series: Sequence[Series], columns: int, behind: Sequence[Series]) -> list[Axes]:
    """A panel for each curve with all others in grey behind it: readable with any number of curves."""
    rows = -(-len(series) // columns)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = [axes for line in grid for axes in line]
    for i, (axes, s) in enumerate(zip(panels, series, strict=False)):
        for other in behind:
            axes.plot(other.x, other.y, color=PALE, linewidth=0.5, zorder=1)
        ink = INK if s.reference else COLOURS[0]
        axes.fill_between(s.x, s.low, s.high, color=ink, alpha=0.2, linewidth=0, zorder=2)
        axes.plot(s.x, s.y, color=ink, linestyle=(0, (4, 2)) if s.reference else "-", linewidth=1.5, zorder=3)
        axes.set_title(fitted(s.label, 21), fontsize=7, pad=2)
        axes.tick_params(labelbottom=i // columns == rows - 1)
    for axes in panels[len(series) :]:
        axes.remove()
    return panels[: len(series)]


def pages(lines: Sequence[Any], most: int) -> Iterator[tuple[str, Sequence[Any]]]:
    """Lines in parts that fit on a page, each with the end of its file name: "", "-2", "-3"."""
    for i in range(0, len(lines), most):
        yield (f"-{i // most + 1}" if i else ""), lines[i : i + most]


def heat_maps(maps: Sequence[tuple[str, np.ndarray]], draw: Any, columns: int, tall: float, words: str) -> Figure:
    """A panel for each (label, matrix) by `draw(axes, matrix, bottom, left)`, which gives an image; one colour bar for all."""
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    height = 0.95 + tall * rows
    figure = paper(DOUBLE if columns > 2 else SINGLE, height)
    panels = [axes for line in figure.subplots(rows, columns, squeeze=False) for axes in line]
    image: Any = None
    for i, (axes, (label, matrix)) in enumerate(zip(panels, maps, strict=False)):
        image = draw(axes, matrix, i // columns == rows - 1, i % columns == 0)
        axes.spines[:].set_visible(False)
        axes.set_title(label, fontsize=7, pad=2)
    for axes in panels[len(maps) :]:
        axes.remove()
    bar = figure.colorbar(image, ax=panels[: len(maps)], orientation="horizontal", aspect=60, shrink=0.6, pad=0.15 / height)
    bar.set_label(words)
    return figure


def fitted(label: str, longest: int) -> str:
    """A label cut in its middle to that many characters."""
    half = (longest - 1) // 2
    return label if len(label) <= longest else f"{label[: longest - 1 - half]}…{label[-half:]}"


def place_labels(axes: Axes, points: Sequence[tuple[float, float, str, bool]], stairs: Sequence[tuple[float, float]]) -> None:
    """Name points (x, y, label, must) without covering a point or another name; a `must` that has no room is named anyway.

    `stairs` [(x, y)] is a line of level and upright pieces that no name may cover. Those that matter most come first.
    """
    figure: Any = axes.figure
    figure.canvas.draw()
    render = figure.canvas.get_renderer()
    unit = figure.dpi / 72
    dots = [tuple(map(float, axes.transData.transform((x, y)))) for x, y, _, _ in points]
    taken: list[tuple[float, ...]] = []
    corners = [axes.transData.transform(point) for point in stairs]
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        taken += [(x0, y0 - 1, x1, y0 + 1), (x1 - 1, min(y0, y1), x1 + 1, max(y0, y1))]
    frame = axes.get_window_extent(render)
    for (x, y, label, must), dot in zip(points, dots, strict=True):
        text = axes.annotate(
            label, (x, y), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center", ha="left", zorder=5
        )
        size = text.get_window_extent(render)
        wide, high = size.width / unit, size.height / unit
        text.remove()
        for dx, dy in _offsets(wide, high, far=must):
            left, bottom = dot[0] + dx * unit, dot[1] + (dy - high / 2) * unit
            box = (left, bottom, left + size.width, bottom + size.height)
            inside = box[0] >= frame.x0 and box[2] <= frame.x1 and box[1] >= frame.y0 and box[3] <= frame.y1
            near = [_around(other, unit, 2.5 if other is dot else 7) for other in dots]
            if inside and not any(_touch(box, other) for other in [*taken, *near]):
                _annotate(axes, (x, y), label, dx, dy, abs(dy) > high + 4)
                taken.append(box)
                break
        else:
            if must:
                _annotate(axes, (x, y), label, 5, 0, False)


def _around(dot: Sequence[float], unit: float, wide: float) -> tuple[float, ...]:
    """The box of a point, wider for the names of others, which must not seem to be its own."""
    return dot[0] - wide * unit, dot[1] - 2.5 * unit, dot[0] + wide * unit, dot[1] + 2.5 * unit


def _offsets(wide: float, high: float, far: bool) -> list[tuple[float, float]]:
    """Where a label may lie: (left edge, middle) from its point, in points of type."""
    sides, ends = [(5.0, 0.0), (-wide - 5, 0.0)], [(-wide / 2, high), (-wide / 2, -high)]
    corners = [(-wide - 2, 7.0), (2.0, 7.0), (2.0, -7.0), (-wide - 2, -7.0)]
    if not far:
        return sides + ends + corners
    steps = [k * (high + 1) for k in range(1, 9)]
    return sides + ends + corners + [(dx, sign * dy) for dy in steps for sign in (1, -1) for dx in (3.0, -wide / 2, -wide - 3)]


def _touch(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _annotate(axes: Axes, point: tuple[float, float], label: str, dx: float, dy: float, led: bool) -> None:
    arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2} if led else None
    axes.annotate(
        label,
        point,
        xytext=(dx, dy),
        textcoords="offset points",
        fontsize=7,
        va="center",
        ha="left",
        arrowprops=arrow,
        zorder=5,
    )
