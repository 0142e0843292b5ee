"""Figures of model editing: what holds after 1, 10, 100, ... edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from clbench.report.figures import style
from clbench.report.figures.data import Field, Line, short
from clbench.report.figures.style import COLOURS, DOUBLE

Made = Iterator[tuple[str, Figure]]
PANELS = (  # number, words, whether it is a share
    ("reliability", "all edits so far (%)", True),
    ("generalisation", "their paraphrases (%)", True),
    ("locality", "neighbours unchanged (%)", True),
    ("old_loss_rise", "rise on old text (nats)", False),
)
ROWS = 12  # lines of a figure
DASHES = ("-", (0, (4, 1.5)))


def edits(fields: Sequence[Field]) -> Made:
    """Reliability, generalisation, locality and the loss on old text over the number of edits; range over seeds."""
    for field in fields:
        drawn = [line for line in field.lines if line.traces[0].extra["course"]]
        for end, lines in style.pages(drawn, ROWS):
            figure = style.paper(DOUBLE, 2.1 + 0.14 * -(-len(lines) // 4))
            panels = figure.subplots(1, len(PANELS)).tolist()
            for axes, (name, words, is_share) in zip(panels, PANELS, strict=True):
                for i, line in enumerate(lines):
                    _over_edits(axes, line, name, 100 if is_share else 1, i)
                axes.set_title(words, fontsize=7, pad=3)
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.grid(axis="y")
                axes.set_xlabel("edits")
                if is_share:
                    axes.set_ylim(-3, 103)
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, columnspacing=1)
            yield f"{field.file}{end}", style.titled(figure, field.title)


def _over_edits(axes: Axes, line: Line, name: str, times: float, i: int) -> None:
    """One learner: mean over seeds, and their lowest and highest."""
    courses = [trace.extra["course"] for trace in line.traces]
    same = [course for course in courses if len(course) == len(courses[0])]
    if any(name not in step for course in same for step in course):
        return
    x = [step["edits"] for step in same[0]]
    y = times * np.array([[step[name] for step in course] for course in same])
    ink, dash, mark = COLOURS[i % 6], DASHES[i // 6 % 2], style.MARKS[i % 6]
    axes.fill_between(x, y.min(0), y.max(0), color=ink, alpha=0.15, linewidth=0)
    axes.plot(x, y.mean(0), color=ink, linestyle=dash, marker=mark, markersize=3, label=f"\u200b{short(line.label)}")
