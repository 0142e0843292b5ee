"""`clbench report html`: one file with everything in it, to open from a disk, a mail or a server.

It asks the network for nothing, and its Content-Security-Policy lets it ask for nothing: the only script and the only style
are named by their hashes. Texts of records lie in the page as JSON alone, and the script shows them by `textContent`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clbench.interfaces import UserError
from clbench.records import record
from clbench.report.page import contents

FOLDER = pathlib.Path(__file__).resolve().parent
SCRIPTS = (
    *("core", "numbers", "colours", "plot", "figures", "board", "table", "scatter", "row"),
    *("losses", "edits", "compare", "start"),
)
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def write(results: pathlib.Path, out: pathlib.Path | None = None) -> pathlib.Path:
    """Write the page of a results folder -> its path (`results`/report.html by default).

    The same folder gives the same bytes. `UserError` if there is no such folder or the file cannot be written.
    """
    if not results.is_dir():
        raise UserError(f"there is no folder {results}")
    path = out or results / "report.html"
    if path.is_dir():
        raise UserError(f"{path} is a folder; say the file to write")
    beside = path.resolve().parent == results.resolve()
    record.write_text(path, page(contents.collect(results, beside)))
    return path


def page(data: Mapping[str, Any]) -> str:
    """The page around its data: ASCII text."""
    style = _read("style.css")
    script = "(() => {\n'use strict';\n" + "".join(_read(f"{name}.js") for name in _scripts(data)) + "})();\n"
    policy = _POLICY.format(script=_hash(script), style=_hash(style))
    parts = {"policy": policy, "style": style, "script": script, "data": embedded(data)}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("page.html"))


def _scripts(data: Mapping[str, Any]) -> Sequence[str]:
    """The scripts of a page; `sums` only where a record has rows of other evaluators."""
    return SCRIPTS if not any("/" in name for name in data["columns"]) else (*SCRIPTS[:-1], "sums", SCRIPTS[-1])


def embedded(data: Any) -> str:
    """JSON that nothing in HTML can end or begin: ASCII without `<`, `>` and `&`. `ValueError` for NaN."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('ascii')).digest()).decode('ascii')}'"
