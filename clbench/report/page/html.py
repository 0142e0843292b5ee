"""`clbench report html`: one file with everything in it, to open from a disk, a mail or a server.

It asks the network for nothing, and its Content-Security-Policy lets it ask for nothing: its scripts and its style are named by
their hashes, and nothing is evaluated (Vega reads its expressions by its own interpreter). Texts of records lie in the page as
JSON, and the script shows them by `textContent`; where there are no scripts, jinja2 escapes them.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clbench.config import suite
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import formats, suites
from clbench.report.figures import plots
from clbench.report.formats import Table

FOLDER = pathlib.Path(__file__).resolve().parent
SCRIPTS = ("core", "figures", "board", "table", "stream", "across", "row", "losses", "edits", "compare", "start")
EXPORTED = "window.vegaEmbed = vegaEmbed;"
PLAIN_ROWS = 200  # of the table where there are no scripts
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src {style}; img-src data:; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types default"
)


def write(results: pathlib.Path, out: pathlib.Path | None = None, since: pathlib.Path | None = None) -> pathlib.Path:
    """Write the page of a results folder -> its path (`results`/report.html by default).

    The same folder gives the same bytes. `since`: an earlier leaderboard.csv or its folder, to say what changed.

    Raises:
        UserError: no such folder, a file that cannot be read or written, no altair or vl-convert.
    """
    if not results.is_dir():
        raise UserError(f"there is no folder {results}")
    path = out or results / "report.html"
    if path.is_dir():
        raise UserError(f"{path} is a folder; say the file to write")
    plots.needed()
    from clbench.report.page import contents

    beside = path.resolve().parent == results.resolve()
    record.write_text(path, page(contents.collect(results, beside, since), suite_tables(results)))
    return path


def suite_tables(results: pathlib.Path) -> list[Table]:
    """The matrix of every suite that the folder has a run of, and what is missing from it."""
    made = [suites.of_folder(results, name) for name in suite.names()]
    return [suites.shown(*one) for one in made if any(row.values for row in one[1].values())]


def page(data: Mapping[str, Any], matrices: Sequence[Table] = ()) -> str:
    """The page around its data: ASCII text. `matrices` are tables of suites."""
    import jinja2
    from markupsafe import Markup

    style, library = _read("style.css"), bundle()
    script = "(() => {\n'use strict';\n" + "".join(_read(f"{name}.js") for name in SCRIPTS) + "})();\n"
    policy = _POLICY.format(scripts=f"{_hash(library)} {_hash(script)}", style=_hash(style))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    parts = {"policy": policy, "style": style, "library": library, "script": script, "data": embedded(data)}
    template = environment.from_string(_read("page.html"))
    text = template.render(
        rows=plain_rows(data),
        suites=[shown_cells(one) for one in matrices],
        **{name: Markup(part) for name, part in parts.items()},
    )
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii") + "\n"


def shown_cells(table: Table) -> dict[str, Any]:
    """A table as words for the template: title, columns, rows of cells, notes."""
    rows = [[formats.cell(table, name, row.get(name)) or "-" for name in table.columns] for row in table.rows]
    return {"title": table.title, "columns": table.columns, "rows": rows, "notes": table.notes}


@functools.cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed, minified, as ASCII text."""
    import vl_convert

    text = vl_convert.javascript_bundle(EXPORTED)
    return re.sub(r"[^\x00-\x7f]", lambda found: "".join(f"\\u{unit:04x}" for unit in _units(found[0])), text)


def _units(character: str) -> list[int]:
    made = character.encode("utf-16-be")
    return [int.from_bytes(made[i : i + 2], "big") for i in range(0, len(made), 2)]


def plain_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """The first rows of the leaderboard as text: stream, learner, model, accuracy, its interval, ranks, seeds."""
    made = []
    for i, (scenario, learner, model, _, manifest, *_) in enumerate(data["lines"][:PLAIN_ROWS]):
        value = {
            name: data["columns"].get(name, {i: None})[i] for name in ("last_macro_mean", "last_macro_low", "last_macro_high")
        }
        mean, low, high = ("" if v is None else f"{100 * v:.1f}" for v in value.values())
        rank = data["columns"].get("rank", {i: None})[i] or []
        ranks = "-".join(str(v) for v in dict.fromkeys(rank))
        made.append(
            [
                f"{scenario} {manifest}",
                learner,
                model,
                mean,
                f"{low} to {high}" if low else "",
                ranks,
                str(len(data["runs"][i])),
            ]
        )
    return made


def embedded(data: Any) -> str:
    """JSON that nothing in HTML can end or begin: ASCII without `<`, `>` and `&`. `ValueError` for NaN."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('ascii')).digest()).decode('ascii')}'"
