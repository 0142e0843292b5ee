"""Reproduction cards as text: a table for programs (fractions), a page for people (per cent)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clbench.report.formats import plain, safe

COLUMNS = (
    "learner",
    "kind",
    "name",
    "model",
    "last",
    "last_std",
    "average",
    "average_std",
    "source",
    "checked",
    "n_seeds",
    "seeds",
    "seconds",
    "stored_bytes",
    "marks",
    "variant",
    "tuning_runs",
    "tuning_seconds",
    "command",
)
Line = Mapping[str, Any]
HEAD = """\
# Reproduction cards

A card for each method: what was published, what was measured here, why they differ. Numbers in per cent; *last* is the accuracy
after the last experience (`last_macro`, A_B), *average* its mean over experiences (`step_macro`); ± is the unbiased standard
deviation over seeds. Published numbers are other protocols on other networks: only a preset of `conf/sweep/` reproduces one.
`clbench report` makes this page and `cards.csv` from `cards.yaml` and the records; edit `cards.yaml`.
"""


def to_csv(made: Sequence[Line]) -> str:
    """The lines as CSV text in fixed formats; a cell without a value is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in made:
        writer.writerow(["" if line[name] is None else _cell(name, line[name]) for name in COLUMNS])
    return out.getvalue()


def _cell(name: str, value: Any) -> str:
    if name in ("last", "last_std", "average", "average_std"):
        return f"{value:.4f}"
    return f"{value:.1f}" if name in ("seconds", "tuning_seconds") else safe(value)


def to_markdown(cards: Mapping[str, Any], made: Sequence[Line]) -> str:
    """The page: streams, an overview of what was measured, then the cards in their order."""
    streams = cards["streams"]
    parts = [HEAD, "## Measured here\n"]
    parts += [
        f"- `{name}`: {_plain(s['about'])} (scenario `{s['scenario']}`, model `{s['model']}`)" for name, s in streams.items()
    ]
    rows = []
    for learner in cards["cards"]:
        ours = [line for line in made if line["learner"] == learner and line["kind"] == "ours"]
        cells = [[_seeded(line) for line in _current(ours, name)] or ["-"] for name in streams]
        rows.append([f"[{learner}](#{learner})", *("<br>".join(cell) for cell in cells)])
    parts += ["", _grid(["last accuracy (seeds)", *streams], rows)]
    for learner, card in cards["cards"].items():
        parts += ["", *_card(learner, card, [line for line in made if line["learner"] == learner])]
    return "\n".join(parts) + "\n"


def _current(ours: Sequence[Line], stream: str) -> list[Line]:
    """The lines of a stream, without those of older code where the present code has some."""
    found = [line for line in ours if line["name"] == stream]
    return [line for line in found if "legacy" not in str(line["marks"]).split()] or found


def _card(learner: str, card: Mapping[str, Any], made: Sequence[Line]) -> Iterator[str]:
    source = ", ".join(_plain(word) for word in (card["paper"], card["year"]) if word)
    link = f" [{card['link']}]({card['link']})" if card["link"] else ""
    yield f"## {learner}\n\n**{_plain(card['title'])}**" + (f" ({source})" if source else "") + link + "\n"
    published = [line for line in made if line["kind"] == "published"]
    ours = [line for line in made if line["kind"] == "ours"]
    if published:
        head = ("published", "weights", "last", "average", "source")
        yield _grid(
            head, [[x["name"], x["model"], _per_cent(x, "last"), _per_cent(x, "average"), _source(x)] for x in published]
        )
    else:
        yield "No published number is given: none was read in its source."
    yield ""
    if ours:
        head = ("ours", "last", "average", "seeds", "seconds", "stored MB", "marks", "variant")
        yield _grid(head, [_measured(line) for line in ours]) + "\n"
    for line in ours:
        if line["command"]:
            yield f"- {line['name']} {line['variant']}: `{_plain(line['command'])}`"
    for entry in card["ours"]:
        yield f"- Tuning for {entry['stream']}: {_tuning(entry['tuning'])}"
    yield f"\nGap: {_plain(card['gap'])}\n\nQuirks: {_plain(card['quirks'])}"


def _measured(line: Line) -> list[str]:
    if not line["n_seeds"]:
        return [line["name"], "not run", *["-"] * 6]
    seconds = "-" if line["seconds"] is None else f"{line['seconds']:.1f}"
    stored = "-" if line["stored_bytes"] is None else f"{line['stored_bytes'] / 1e6:.3f}"
    numbers = [_per_cent(line, "last"), _per_cent(line, "average")]
    return [line["name"], *numbers, line["seeds"], seconds, stored, line["marks"] or "-", line["variant"]]


def _tuning(tuning: Mapping[str, Any] | None) -> str:
    if tuning is None:
        return "none, the defaults."
    return f"{_plain(tuning['grid'])}; on {_plain(tuning['stream'])}; {tuning['runs']} runs, {tuning['seconds']:.0f} s."


def _source(line: Line) -> str:
    return line["source"] if line["checked"] else f"{line['source']}; recalled, not re-checked"


def _seeded(line: Line) -> str:
    return f"{_per_cent(line, 'last')} ({line['n_seeds']})" if line["n_seeds"] else "not run"


def _per_cent(line: Line, name: str) -> str:
    if line[name] is None:
        return "-"
    if line["kind"] == "published":
        return f"{100 * line[name]:.4g}"  # no digits that the source does not give
    spread = line[f"{name}_std"]
    return f"{100 * line[name]:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _plain(text: Any) -> str:
    return plain(text).replace("`", "'")


def _grid(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(_plain(c).replace("|", "\\|") for c in row) + " |" for row in rows)])
