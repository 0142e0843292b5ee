"""`clbench report plot`: the figures of the page at paper size, as PNG, SVG or PDF.

matplotlib is imported here and in `figures_*`, and nowhere else. The same records and the same matplotlib give the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import warnings
from collections.abc import Iterator, Sequence
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
    "profiles": "share of runs above each accuracy, across scenarios",
    "loss": "training loss and learning rate, of records with curves",
    "stability": "accuracy inside experiences, of records with a trace",
    **{
        "losses": "pre-training: loss on every set over tokens with the boundaries, the learning rate below",
        "loss_matrix": "pre-training: loss on every set before and after every experience",
        "replay": "pre-training: final loss on old sets and on the newest against the share of replay",
        "gaps": "pre-training: rise of the loss on old sets after a boundary, over steps",
    },
    "edits": "model editing: reliability, generalisation, locality, loss on old text over the number of edits",
}
LOSSES = ("losses", "loss_matrix", "replay", "gaps")  # of records of pre-training
FORMS = ("png", "svg", "pdf")


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
        UserError: an unknown kind or format, no matplotlib, nothing to draw, a folder that cannot be written.
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
    with _ink():
        for kind in dict.fromkeys(kinds or KINDS):
            found: list[pathlib.Path] = []
            of_kind = LOSS if kind in LOSSES else EDITS if kind == "edits" else ACCURACY
            for name, figure in makers[kind]([field for field in fields if field.board is of_kind]):
                again = sum(path.stem == f"{kind}-{name}" for path in found)
                end = f"-again{len(found)}" if again else ""
                found.append(_save(figure, out / f"{kind}-{name}{end}.{form}", form))
            if kinds and not found:
                what = {"loss": "`curves`", "stability": "`stability.trace`"}.get(kind, "an old set")
                what = "two learners or two scenarios" if kind == "profiles" else what
                what = "edits" if kind == "edits" else what
                if kind in LOSSES:
                    what = "two shares of replay" if kind == "replay" else "losses"
                raise UserError(f"there is nothing to draw for {kind}: no record has {what}")
            made += found
    return made


def _makers() -> dict[str, Any]:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"figures need matplotlib ({error}): pip install 'clbench[report]'") from None
    from clbench.report.figures import board as board
    from clbench.report.figures import edits, losses
    from clbench.report.figures import runs as runs

    own = {name: getattr(board, name) for name in ("leaderboard", "overview", "cost", "forgetting")}
    own |= {name: getattr(losses, name) for name in LOSSES} | {"edits": edits.edits}
    return own | {name: getattr(runs, name) for name in ("matrix", "curves", "profiles", "loss", "stability")}


@contextlib.contextmanager
def _ink() -> Iterator[None]:
    """Our own settings, whatever a user's matplotlibrc says; a sign that no font has is drawn as a box, without a word."""
    import matplotlib

    from clbench.report.figures.style import RC

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        yield


def _save(figure: Any, path: pathlib.Path, form: str) -> pathlib.Path:
    """Write one figure in one move, without dates or versions that would change its bytes from day to day."""
    import matplotlib

    creator = f"clbench, matplotlib {matplotlib.__version__}"
    metadata = {
        "png": {"Software": creator},
        "svg": {"Date": None, "Creator": creator},
        "pdf": {"CreationDate": None, "ModDate": None, "Creator": creator, "Producer": creator},
    }[form]
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, metadata=metadata)
    data = buffer.getvalue()
    if form == "svg":
        data = re.sub(rb"[ \t]+\n", b"\n", data)  # no spaces at line ends: editors and hooks would remove them
    _move(path, data)
    return path


def _move(path: pathlib.Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
