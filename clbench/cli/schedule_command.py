"""`clbench schedule show`: multipliers of schedules as a table and a sketch, and what predictors say. Loads no torch.

`clbench schedule fit` is `schedule_fit`.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clbench.config import defaults, registry
from clbench.config.signatures import nearest, problems
from clbench.interfaces import Place, Schedule, UserError
from clbench.training.pretraining import law_fits, scaling_laws

WIDTH, HEIGHT = 72, 8
MARKS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Shown:
    """A schedule with its label and its multipliers, one row for each experience: [T, S]."""

    label: str
    rows: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("show",))
    parser.add_argument(
        "words", nargs="+", metavar="NAME | NAME.OPTION=VALUE", help="schedules, and options of one of them (or OPTION=VALUE)"
    )
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="steps of each experience (1000)")
    parser.add_argument("--experiences", type=int, default=2, metavar="N", help="how many (2)")
    parser.add_argument("--lr", type=float, default=2e-4, metavar="RATE", help="base rate for the loss laws (2e-4)")
    parser.add_argument("--fitted", metavar="FILE", help="a law that `schedule fit --out FILE.json` wrote: its predictions too")
    parser.add_argument("--out", metavar="FILE", help="draw them too: .svg, .png or .pdf")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for -> 0."""
    if args.steps < 2 or args.experiences < 1 or not 0 < args.lr < np.inf:
        raise UserError("--steps must be at least 2, --experiences at least 1, --lr above 0")
    if args.steps * args.experiences > 10_000_000:
        raise UserError("--steps times --experiences must be at most 10 million")
    if args.out:
        _check_out(Path(args.out))
    law = None if args.fitted is None else _fitted(Path(args.fitted))
    shown = [Shown(label, multipliers(s, args.steps, args.experiences)) for label, s in chosen(args.words).items()]
    parts = [table(shown, args.steps), *(sketch(one) for one in shown), ranking(shown, args.lr)]
    parts += [] if law is None else [predicted(law, shown, args.lr)]
    print("\n\n".join(parts))
    if args.out:
        draw(shown, Path(args.out))
        print(f"\nwritten {args.out}")
    return 0


def _check_out(out: Path) -> None:
    if out.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--out {out}: the name must end in .svg, .png or .pdf")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")


def _fitted(path: Path) -> law_fits.Fit:
    """The law in a file of `schedule fit`."""
    try:
        return law_fits.loaded(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # UserError is one
        raise UserError(f"{path} {error if isinstance(error, UserError) else 'is no JSON'}") from None


def chosen(words: Sequence[str]) -> dict[str, Schedule]:
    """Label -> schedule. A name may come twice as NAME@TEXT, so that two settings of it stand side by side."""
    labels = [word for word in words if "=" not in word]
    files = registry.choices("schedule")
    for label in labels:
        name = label.partition("@")[0]
        if name not in files:
            raise UserError(f"no schedule '{name}'{nearest(name, files)} (one of: {', '.join(files)})")
    if not labels or len(set(labels)) < len(labels):
        raise UserError(
            "say which schedule: clbench schedule show cosine infinite"
            if not labels
            else "each schedule may be named once; NAME@TEXT names another setting of it"
        )
    nodes = {label: defaults.read(files[label.partition("@")[0]][0]) for label in labels}
    for word in words:
        if "=" in word:
            _set(nodes, word)
    lines = [line for label, node in nodes.items() for line in problems(node, label, ("place",))]
    if lines:
        raise UserError("\n".join(lines))
    return {label: _made(node) for label, node in nodes.items()}


def _set(nodes: dict[str, dict[str, Any]], word: str) -> None:
    """Apply `NAME.OPTION=VALUE` to one schedule, or `OPTION=VALUE` to all that have it."""
    import yaml

    key, _, text = word.partition("=")
    label, _, option = key.rpartition(".")
    if label and label not in nodes:
        raise UserError(f"'{word}': no schedule '{label}' is shown{nearest(label, nodes)}")
    hit = [node for name, node in nodes.items() if option in node and label in ("", name)]
    if not hit or option.startswith("_"):
        known = {o for name, node in nodes.items() if label in ("", name) for o in node if not o.startswith("_")}
        raise UserError(
            f"'{word}': no option '{option}'{nearest(option, known)} (one of: {', '.join(sorted(known)) or 'none'})"
        )
    try:
        value = defaults.numbers(yaml.safe_load(text))
    except yaml.YAMLError:
        raise UserError(f"'{word}': {text} is no value") from None
    for node in hit:
        node[option] = value


def _made(node: Mapping[str, Any]) -> Schedule:
    options = {key: value for key, value in node.items() if not key.startswith("_")}
    return functools.partial(registry.load_target(node["_target_"]), **options)


def multipliers(schedule: Schedule, steps: int, experiences: int) -> np.ndarray:
    """The multiplier of every update: [T, S]."""
    places = ((k, n) for k in range(experiences) for n in range(steps))
    values = [float(schedule(Place(k, n, steps, k * steps + n))) for k, n in places]
    return np.array(values).reshape(experiences, steps)


def table(shown: Sequence[Shown], steps: int) -> str:
    """Multipliers at chosen updates, a column for each schedule."""
    at = sorted({min(steps - 1, round(mark * steps)) for mark in MARKS} | {steps - 1})
    wide = [max(10, len(one.label)) for one in shown]
    names = "  ".join(one.label.rjust(w) for one, w in zip(shown, wide, strict=True))
    lines = [f"experience   update  {names}"]
    for k in range(len(shown[0].rows)):
        for n in at:
            values = "  ".join(f"{one.rows[k, n]:.5g}".rjust(w) for one, w in zip(shown, wide, strict=True))
            lines.append(f"{k:>10} {n:>8}  {values}")
    return "\n".join(lines)


def sketch(one: Shown) -> str:
    """A schedule in letters: time to the right, the multiplier from 0 to its largest upwards, a bar between experiences."""
    flat, experiences = one.rows.ravel(), len(one.rows)
    top = max(float(flat.max()), 1e-12)
    columns = np.minimum(np.arange(WIDTH) * len(flat) // WIDTH, len(flat) - 1)
    heights = np.round(flat[columns] / top * (HEIGHT - 1)).astype(int)
    bars = {round(k * WIDTH / experiences) for k in range(1, experiences)}
    lines = [one.label]
    for level in reversed(range(HEIGHT)):
        cells = ["*" if heights[i] == level else "|" if i in bars else " " for i in range(WIDTH)]
        mark = f"{top:.3g}" if level == HEIGHT - 1 else "0" if level == 0 else ""
        lines.append(f"{mark:>6} |{''.join(cells)}".rstrip())
    return "\n".join(lines)


BOUND = """\
bound        convex bound on the last iterate (arXiv 2310.07831, 2501.18965), in units of distance * gradient / sqrt(updates),
             each schedule at its best base rate; best rate: that rate relative to the others. Only ratios mean something;
             all experiences count as one problem, so forgetting is not in it."""
LAWS = """\
pre-training annealing law (arXiv 2408.11029), experience 0 only
old, new     continual law (arXiv 2505.07796) after experience 1, loss on the domains of experiences 0 and 1
             Constants of the laws: 106 M parameters, web text -> knowledge text, 4 M tokens a step, base rates up to 2e-4.
             They were fitted to tens of thousands of steps, and say little of other models and shorter runs."""


def ranking(shown: Sequence[Shown], lr: float) -> str:
    """What the predictors say, best convex bound first."""
    rows = []
    for one in shown:
        flat = one.rows.ravel()
        bound = scaling_laws.convex_bound(flat)
        root = len(flat) ** 0.5
        row = [bound.value * root, bound.factor * root * float(flat.max()), scaling_laws.PRETRAINING(lr * one.rows[0])]
        if len(one.rows) > 1:
            both = (lr * one.rows[0], lr * one.rows[1])
            row += [scaling_laws.OLD_DOMAIN(*both), scaling_laws.NEW_DOMAIN(*both)]
        rows.append((one.label, row))
    rows.sort(key=lambda row: row[1][0])
    wide = max(9, *(len(label) for label, _ in rows))
    heads = ["bound", "best rate", "pre-training", "old", "new"][: len(rows[0][1])]
    lines = [
        f"predicted, best bound first (laws with a base rate of {lr:g})",
        "  ".join(["rank", "schedule".ljust(wide), *heads]),
    ]
    for i, (label, values) in enumerate(rows):
        cells = [f"{v:.4f}".rjust(len(h)) for v, h in zip(values, heads, strict=True)]
        lines.append("  ".join([f"{i + 1:>4}", label.ljust(wide), *cells]))
    return "\n".join([*lines, "", BOUND, LAWS])


def predicted(law: law_fits.Fit, shown: Sequence[Shown], lr: float) -> str:
    """What a law of one's own says of experience 0, lowest loss first."""
    rows = sorted(((law.final(lr * one.rows[0]), one.label) for one in shown), key=lambda row: row[0])
    lines = [f"fitted law '{law.law}' after experience 0, lowest loss first (base rate {lr:g})"]
    return "\n".join([*lines, *(f"{i + 1:>4}  {loss:.4f}  {label}" for i, (loss, label) in enumerate(rows))])


def draw(shown: Sequence[Shown], out: Path) -> None:
    """All schedules in one figure. `UserError` without the libraries that draw."""
    from clbench.report.figures import plots

    plots.needed()
    from clbench.report.figures import schedules

    rows = []
    for one in shown:
        flat = one.rows.ravel()
        keep = np.unique(np.linspace(0, len(flat) - 1, 4000).astype(int))
        rows += [{"label": one.label, "update": int(i), "multiplier": float(flat[i])} for i in keep]
    edges = [k * shown[0].rows.shape[1] for k in range(1, len(shown[0].rows))]
    plots.save(schedules.multipliers(rows, edges), out, out.suffix[1:])
