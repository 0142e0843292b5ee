"""Tables as text, CSV, Markdown, LaTeX, HTML or JSON. Every cell may hold anything: each format disarms it in its own way.

A cell is a word, a number, a truth value or None (no value: empty, `-` where people read it, `null` in JSON).
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clbench.config.signatures import nearest
from clbench.interfaces import UserError
from clbench.records.safe_text import plain

FORMS = ("text", "csv", "md", "latex", "html", "json")
SUFFIXES = {".txt": "text", ".csv": "csv", ".md": "md", ".tex": "latex", ".html": "html", ".htm": "html", ".json": "json"}
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0308": '"',
    "\u030a": "r",
    "\u030c": "v",
    "\u0327": "c",
}
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char34}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "…": r"\ldots{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{c: f"{{{c}}}" for c in "-`'[]*,!?"},  # no ligatures, no optional arguments, no starred rows
}


@dataclass(frozen=True)
class Table:
    """A titled table; `numeric` names the columns that stand to the right, `part` is its short name on the command line."""

    part: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    notes: tuple[str, ...] = ()
    digits: Mapping[str, int] = field(default_factory=dict)


def safe(text: Any) -> str:
    """A cell that a spreadsheet does not take for a formula, on one line."""
    word = plain(text)
    return f"'{word}" if word[:1] in ("=", "+", "-", "@") else word


def fraction(value: float, digits: int = 4) -> str:
    """Fixed decimals; a value that rounds to zero has no sign, whatever the order of the sums."""
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def form_of(form: str | None, out: str | None) -> str:
    """The format asked for, or the one that the file's suffix says."""
    if form is not None:
        return form
    if out is None:
        return "text"
    suffix = "." + out.rsplit(".", 1)[-1].lower() if "." in out else ""
    if suffix not in SUFFIXES:
        raise UserError(f"{out}: no format has the suffix {suffix or '(none)'}; say --format {'|'.join(FORMS)}")
    return SUFFIXES[suffix]


def render(tables: Sequence[Table], form: str, part: str | None = None) -> str:
    """Tables in one format, ending without a newline. `part` picks one of them; CSV holds just one."""
    names = [table.part for table in tables]
    if part is not None:
        if part not in names:
            raise UserError(f"no part {part!r}{nearest(part, names)} (one of: {', '.join(names)})")
        tables = [table for table in tables if table.part == part]
    if form == "csv" and len(tables) > 1:
        raise UserError(f"CSV holds one table: say --part {'|'.join(names)}")
    if form == "json":
        parts = {table.part: [_json_row(table, row) for row in table.rows] for table in tables}
        made = next(iter(parts.values())) if len(parts) == 1 else parts
        return json.dumps(made, indent=1, ensure_ascii=True, allow_nan=False)
    maker = {"text": to_text, "csv": to_csv, "md": to_markdown, "latex": to_latex, "html": to_html}[form]
    return "\n\n".join(maker(table) for table in tables)


def _json_row(table: Table, row: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: row.get(name) for name in table.columns}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def cell(table: Table, name: str, value: Any) -> str:
    """A value as people read it, not yet disarmed; '' for none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return fraction(value, table.digits.get(name, 4))
    return plain(value)


def _cells(table: Table, empty: str = "-") -> list[list[str]]:
    return [[cell(table, name, row.get(name)) or empty for name in table.columns] for row in table.rows]


def _right(table: Table) -> list[bool]:
    """Which columns hold numbers."""
    kinds = [[row.get(name) for row in table.rows if row.get(name) is not None] for name in table.columns]
    return [bool(k) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in k) for k in kinds]


def to_text(table: Table) -> str:
    """Aligned columns under a title, notes below."""
    cells, right = _cells(table), _right(table)
    widths = [max(len(line[i]) for line in [list(table.columns), *cells]) for i in range(len(table.columns))]
    lines = [table.title] if table.title else []
    for line in [list(table.columns), *cells]:
        parts = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        lines.append(("  " + "  ".join(parts)).rstrip())
    return "\n".join([*lines, *(f"  {plain(note)}" for note in table.notes)])


def csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], formatted: Callable[[str, Any], str]) -> str:
    """Rows under a header, each cell by `formatted(column, value)`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([safe(name) for name in columns])
    writer.writerows([formatted(name, row.get(name)) for name in columns] for row in rows)
    return out.getvalue()


def to_csv(table: Table) -> str:
    """A header and rows; cells that look like formulas are disarmed, numbers stay numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.rows:
        texts = ((row.get(name), cell(table, name, row.get(name))) for name in table.columns)
        writer.writerow([text if isinstance(v, int | float) else safe(text) for v, text in texts])
    return out.getvalue().rstrip("\n")


def markdown(text: str) -> str:
    """A word in a cell of a Markdown table: no markup, no HTML, no end of the cell."""
    word = re.sub(r"([\\`*\[\]|~#$!])", r"\\\1", plain(text))
    word = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", word)
    return word.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", ":&#47;/").replace("@", "&#64;")


def to_markdown(table: Table) -> str:
    """A GitHub table with its title and notes."""
    right = _right(table)
    lines = [f"**{markdown(table.title)}**", ""] if table.title else []
    lines.append("| " + " | ".join(markdown(name) for name in table.columns) + " |")
    lines.append("|" + "|".join("--:" if r else "---" for r in right) + "|")
    lines += ["| " + " | ".join(markdown(c) for c in line) + " |" for line in _cells(table)]
    return "\n".join([*lines, *(line for note in table.notes for line in ("", markdown(note)))])


def latex(text: str) -> str:
    """A word in LaTeX for any engine: commands escaped, common accents as commands, anything else beyond ASCII as [U+...]."""
    out: list[str] = []
    for c in unicodedata.normalize("NFC", plain(text)):
        if c in _TEX:
            out.append(_TEX[c])
            continue
        parts = unicodedata.normalize("NFD", c)
        if c.isascii():
            out.append(c)
        elif len(parts) == 2 and parts[0].isascii() and parts[0].isalpha() and parts[1] in _ACCENTS:
            out.append(f"\\{_ACCENTS[parts[1]]}{{{parts[0]}}}")
        elif c == "ß":
            out.append(r"\ss{}")
        else:
            out.append(f"{{[}}U+{ord(c):04X}{{]}}")
    return "".join(out)


def to_latex(table: Table) -> str:
    """A booktabs table to be input; its first line says what the document needs."""
    right = _right(table)
    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}[t]", r"\centering\footnotesize"]
    if table.title:
        lines.append(f"\\caption{{{latex(table.title)}}}")
    lines += [f"\\begin{{tabular}}{{{''.join('r' if r else 'l' for r in right)}}}", r"\toprule"]
    lines += [" & ".join(latex(name) for name in table.columns) + r" \\", r"\midrule"]
    lines += [" & ".join("--" if c == "-" else latex(c) for c in line) + r" \\" for line in _cells(table)]
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [f"\\par\\smallskip{{\\footnotesize {latex(note)}}}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}"])


def latex_document(body: str) -> str:
    """A whole document around tables, for a look at them."""
    head = "\\documentclass{article}\n\\usepackage[landscape,margin=1cm]{geometry}\n\\usepackage{booktabs}"
    return f"{head}\n\\begin{{document}}\n\\scriptsize\n{body}\n\\end{{document}}"


def to_html(table: Table) -> str:
    """A `<table>` without style or script; every text is escaped."""
    right = _right(table)

    def line(tag: str, words: Sequence[str]) -> str:
        cells = (
            f"<{tag}{' scope=col' if tag == 'th' else ''}{' align=right' if r else ''}>{html.escape(plain(w))}</{tag}>"
            for w, r in zip(words, right, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(line("td", cells) for cells in _cells(table))
    notes = "".join(f"\n<p>{html.escape(plain(note))}</p>" for note in table.notes)
    head = line("th", table.columns)
    caption = f"<caption>{html.escape(plain(table.title))}</caption>\n" if table.title else ""
    return f"<table>\n{caption}<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>{notes}"
