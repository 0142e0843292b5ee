"""Look of the figures: sizes, configuration of paper and of the page's themes. Colours: Okabe & Ito 2008; cividis."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt

Chart = Any  # one of altair's: what its methods are said to return does not fit together
SINGLE, DOUBLE = 238, 497  # 1/72 inch: 3.3 and 6.9 inches, one column and two
CIVIDIS = {"scheme": "cividis"}
PAPER = {
    "ground": "#ffffff", "ink": "#1a1a1a", "quiet": "#6b6b6b", "pale": "#cfcfcf", "grid": "#e6e6e6",
    "series": ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"],
}  # fmt: skip
LIGHT = PAPER | {"quiet": "#5b6470", "grid": "#e4e7eb"}
DARK = {
    "ground": "#14171b", "ink": "#e8eaed", "quiet": "#9aa4b0", "pale": "#4a525c", "grid": "#2a2f36",
    "series": ["#56b4e9", "#f0a030", "#2fc79a", "#e29bc4", "#f0e442", "#8ab4f8"],
}  # fmt: skip
FONTS = {
    "paper": "Helvetica, Arial, sans-serif",
    "page": 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif',
}


def config(colours: Mapping[str, Any], font: str, small: float, size: float) -> dict[str, Any]:
    """The Vega-Lite configuration: `small` and `size` are the type of labels and of titles."""
    ink, quiet = colours["ink"], colours["quiet"]
    styles = {name: {"color": colours[name], "fill": colours[name], "stroke": colours[name]} for name in ("pale", "quiet")}
    lines = {f"{name} line": {"color": colours[name], "stroke": colours[name]} for name in ("ink", "pale", "quiet")}
    hollow = {"hollow": {"fill": colours["ground"], "stroke": ink, "color": ink}}
    return {
        "background": colours["ground"],
        "font": font,
        "view": {"stroke": None},
        "text": {"color": ink, "fontSize": small},
        "mark": {"color": colours["series"][0]},
        "rule": {"color": ink},
        "title": {"color": ink, "fontSize": size + 0.5, "anchor": "start", "offset": 6},
        "header": {"labelColor": ink, "labelFontSize": small, "labelPadding": 3, "title": None, "labelLimit": 150},
        "axis": {
            "labelColor": ink, "titleColor": ink, "labelFontSize": small, "titleFontSize": size, "titleFontWeight": "normal",
            "domainColor": quiet, "tickColor": quiet, "gridColor": colours["grid"], "tickSize": 3, "labelLimit": 190,
            "labelOverlap": "greedy", "gridWidth": 0.6, "domainWidth": 0.6, "tickWidth": 0.6,
        },
        "legend": {
            "labelColor": ink, "titleColor": ink, "labelFontSize": small, "titleFontSize": small, "titleFontWeight": "normal",
            "orient": "bottom", "labelLimit": 230, "symbolStrokeWidth": 1.4, "symbolSize": 45, "columnPadding": 8,
            "rowPadding": 1, "offset": 4, "gradientThickness": 7, "symbolOpacity": 1, "titleLimit": 230,
            "layout": {"bottom": {"anchor": "start", "bounds": "full"}}, "gradientLength": 110,
        },
        "range": {"category": colours["series"], "heatmap": CIVIDIS, "ramp": CIVIDIS},
        "style": styles | lines | hollow,
    }  # fmt: skip


def themes() -> dict[str, dict[str, Any]]:
    """The configurations of the page by the name of the theme."""
    page = {name: config(colours, FONTS["page"], 11, 12) for name, colours in (("light", LIGHT), ("dark", DARK))}
    for made in page.values():
        made["background"] = "transparent"
    return page


def chart(*layers: alt.Chart, height: Any = 200) -> Chart:
    """Layers over the data `table`, as wide as there is room for: a column of paper, or the page."""
    return alt.layer(*layers, data=alt.NamedData("table")).properties(width=SINGLE, height=height)


def base(**more: Any) -> alt.Chart:
    """A layer to be."""
    return alt.Chart(**more)


def paper(figure: Any, table: Sequence[Mapping[str, Any]], title: str, width: int = SINGLE, **sets: Any) -> dict[str, Any]:
    """The specification of a figure with its data, for a page of paper; `sets` are further data sets by name.

    Figures of one panel are as wide as `width` in all; those of several say themselves how wide their panels are.
    """
    lines = textwrap.wrap(title, max(20, int(width / 5.2)), break_on_hyphens=False)
    made = (figure.properties(title=alt.TitleParams(text=lines)) if title else figure).to_dict()
    if "layer" in made or "mark" in made:
        made |= {"width": width, "autosize": {"type": "fit-x", "contains": "padding"}}
    look = config(PAPER, FONTS["paper"], 7.5, 8) | {"aria": False}
    return made | {"datasets": {"table": list(table), **sets}, "config": look}


def cell_words(value: str, form: str) -> alt.Chart:
    """The numbers of a heat map of at most twelve sets, dark on light cells and light on dark ones."""
    few = base().transform_joinaggregate(sets="distinct(set)", groupby=[])
    light = alt.condition(f"luminance(scale('color', datum.{value})) > 0.3", alt.value(PAPER["ink"]), alt.value("#ffffff"))
    few = few.transform_filter(f"datum.sets <= 12 && isValid(datum.{value})")
    return few.mark_text().encode(text=alt.Text(f"{value}:Q", format=form), color=light)


def count(**more: Any) -> alt.Axis:
    """An axis of whole numbers."""
    return alt.Axis(format="d", tickMinStep=1, **more)


def pages(lines: Sequence[Any], most: int) -> Iterator[tuple[str, Sequence[Any]]]:
    """Lines in parts that fit on a page, each with the end of its file name: "", "-2", "-3"."""
    for i in range(0, len(lines), most):
        yield (f"-{i // most + 1}" if i else ""), lines[i : i + most]


def fitted(label: str, longest: int) -> str:
    """A label cut in its middle to that many characters."""
    half = (longest - 1) // 2
    return label if len(label) <= longest else f"{label[: longest - 1 - half]}…{label[-half:]}"
