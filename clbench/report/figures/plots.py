"""`clbench report plot`: the figures of the page at paper size, as PNG, SVG or PDF.

vl-convert draws the specifications, without a display, a browser or the network. The same records and versions give the same
bytes of SVG and PNG; a PDF names its subsets of fonts at random.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from clbench.config.signatures import nearest
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report.columns import ACCURACY, EDITS, LOSS
from clbench.report.runs import Filter

KINDS: dict[str, str] = {
    "leaderboard": "last accuracy of every learner with its interval",
    "overview": "leaderboard beside accuracy over experiences",
    "matrix": "accuracy on every set after every experience",
    "curves": "accuracy over experiences",
    "forgetting": "what was lost on every set",
    "cost": "accuracy against time and against bytes held, with the Pareto front",
    "seconds": "where the seconds of every learner went",
    "profiles": "share of runs above each accuracy, across scenarios",
    "loss": "training loss and learning rate, of records with curves",
    "stability": "accuracy inside experiences, of records with a trace",
    **{
        "losses": "pre-training: loss on every set over tokens with the boundaries, the learning rate below",
        "loss_matrix": "pre-training: loss on every set before and after every experience",
        "replay": "pre-training: final loss on old sets and on the newest against the share of replay",
        "gaps": "pre-training: rise of the loss on old sets after a boundary, over steps",
        "trade": "pre-training: final loss on old sets against that on the newest",
    },
    "edits": "model editing: reliability, generalisation, locality, loss on old text over the number of edits",
}
LOSSES = ("losses", "loss_matrix", "replay", "gaps", "trade")  # of records of pre-training
FORMS = ("png", "svg", "pdf")
_LACK = {
    "loss": "`curves`",
    "stability": "`stability.trace`",
    "profiles": "two learners or two scenarios",
    "replay": "two shares of replay",
    "cost": "a cost",
    "seconds": "seconds",
    "edits": "edits",
    **dict.fromkeys(("losses", "loss_matrix", "gaps", "trade"), "losses"),
}


def write(
    results: pathlib.Path,
    out: pathlib.Path,
    kinds: Sequence[str] = (),
    form: str = "svg",
    wanted: Filter | None = None,
) -> list[pathlib.Path]:
    """Draw figures of the finished records in `results` into the folder `out` -> their paths, `KIND-SCENARIO-STREAM.FORM`.

    kinds   names from `KINDS`; none means all of which the records have something to show
    form    "png" (300 dpi), "svg" (text stays text) or "pdf"
    wanted  which records

    Raises:
        UserError: an unknown kind or format, no altair or vl-convert, nothing to draw, a folder that cannot be written.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"no figure {kind!r}{nearest(kind, KINDS)} (one of: {', '.join(KINDS)})")
    if form not in FORMS:
        raise UserError(f"no format {form!r}{nearest(form, FORMS)} (one of: {', '.join(FORMS)})")
    makers = _makers()
    from clbench.report.figures import data

    fields = data.read(results, wanted)
    if not fields:
        raise UserError(f"no finished run in {results / 'records'}, so there is nothing to draw")
    record.ensure_writable(out)
    made: list[pathlib.Path] = []
    for kind in dict.fromkeys(kinds or KINDS):
        found: list[pathlib.Path] = []
        board = LOSS if kind in LOSSES else EDITS if kind == "edits" else ACCURACY
        for name, figure in makers[kind]([field for field in fields if field.board is board]):
            again = sum(path.stem == f"{kind}-{name}" for path in found)
            end = f"-again{len(found)}" if again else ""
            found.append(save(figure, out / f"{kind}-{name}{end}.{form}", form))
        if kinds and not found:
            raise UserError(f"there is nothing to draw for {kind}: no record has {_LACK.get(kind, 'an old set')}")
        made += found
    return made


def needed() -> None:
    """Raise `UserError` without the libraries that draw."""
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise UserError(f"figures need altair and vl-convert ({error}): pip install 'clbench[report]'") from None


def _makers() -> dict[str, Any]:
    needed()
    from clbench.report.figures import board as board
    from clbench.report.figures import edits, losses
    from clbench.report.figures import runs as runs

    own = {name: getattr(board, name) for name in ("leaderboard", "overview", "cost", "forgetting", "seconds")}
    own |= {name: getattr(losses, name) for name in LOSSES} | {"edits": edits.edits}
    return own | {name: getattr(runs, name) for name in ("matrix", "curves", "profiles", "loss", "stability")}


def creator() -> str:
    """What draws: the libraries with their versions."""
    return ", ".join(["clbench", *(f"{name} {version(name)}" for name in ("altair", "vl-convert-python"))])


def drawn(figure: Mapping[str, Any], form: str) -> bytes:
    """A specification as a file of one of `FORMS`."""
    import vl_convert

    number: dict[str, str] = {}
    text = vl_convert.vegalite_to_svg(json.dumps(figure), allowed_base_urls=[])

    def named(found: re.Match[str]) -> str:  # Vega counts on from figure to figure
        return found[1] + number.setdefault(found[2], f"{found[3]}{len(number)}")

    text = re.sub(r'(id="|url\(#)((clip|gradient_)\d+)(?=[")])', named, text)
    text = re.sub(r'(?<= )(?:d|transform|x|y|x1|x2|y1|y2|width|height)="[^"<]*"', _rounded, text)
    if form == "png":
        return vl_convert.svg_to_png(text, ppi=300)
    if form == "pdf":
        return vl_convert.svg_to_pdf(text)
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return f"{head}<!-- {creator()} -->\n{text.rstrip()}\n".encode()


def _rounded(attribute: re.Match[str]) -> str:
    """A place in a picture with two decimals: a hundredth of a point."""
    return re.sub(r"\d+\.\d{3,}(?:e-?\d+)?", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), attribute[0])


def save(figure: Mapping[str, Any], path: pathlib.Path, form: str) -> pathlib.Path:
    """Write one figure in one move."""
    data = drawn(figure, form)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path
