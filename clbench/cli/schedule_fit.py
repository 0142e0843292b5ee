"""`clbench schedule fit`: laws fitted to the curves of records, with their errors on schedules held out. Loads no torch.

The sums of rates in a law take a third of the rate for a third of the training. Runs with other peaks do not keep to that where
AdamW learns as much at a lower rate (`results/pretraining`: such runs are 0.02 nats off, and ten times the error of the rest),
so `--peak` fits those of one peak alone, and several peaks together get a note.

With --refine: the next schedule from the gradient norms of a record (`pretraining.refinement`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.records import rates
from clbench.records.record import write_text
from clbench.training.pretraining import law_fits, refinement
from clbench.training.pretraining.law_fits import LAWS, Curve, Fit

DRAWS = 100
NEAR = 0.05  # of the largest rate
FEWEST = 3  # runs of a schedule for an interval
CONTROL = "steps"
FIGURES = (".svg", ".png", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", metavar="RECORD", help="records of pre-training, or folders of them")
    parser.add_argument("--held-out", nargs="+", metavar="RECORD", help="records to predict (else: each schedule in turn)")
    parser.add_argument("--scenario", metavar="NAME", help="of folders, the records of this scenario")
    laws = [name for name in LAWS if name != CONTROL]
    parser.add_argument("--law", choices=laws, help=f"{' or '.join(laws)} ({laws[0]}), beside {CONTROL}")
    parser.add_argument("--peak", type=float, metavar="RATE", help="runs whose largest rate is this: see below")
    parser.add_argument("--fade", type=float, metavar="F", help="how a fall of the rate fades in an update (0.999)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", metavar="FILE", help="the fitted law as .json, for `schedule show --fitted`; or a figure")
    parser.add_argument("--refine", action="store_true", help="the next schedule from a record's gradient norms")
    parser.add_argument("--experience", type=int, metavar="N", help="of --refine: whose norms (0)")
    parser.add_argument("--values", type=int, metavar="N", help="of --refine: how many multipliers (33)")


@dataclass(frozen=True)
class Row:
    """One law on the runs of one schedule: mean losses at the last look, their difference, and mean |error| over all looks.

    low, high  95 % interval of `error` over runs; None with a reason in `why`
    """

    law: str
    schedule: str
    part: str
    runs: int
    measured: float
    predicted: float
    error: float
    absolute: float
    low: float | None
    high: float | None
    why: str


def run(args: argparse.Namespace) -> int:
    """Fit, predict, print -> 0."""
    _check(args)
    if args.refine:
        return refine(args)
    args.law, args.fade = args.law or next(iter(LAWS)), 0.999 if args.fade is None else args.fade
    out = None if args.out is None else _checked_out(Path(args.out))
    entries = rates.entries(args.records, args.scenario)
    others = rates.entries(args.held_out, args.scenario) if args.held_out else []
    both = {entry["run_id"] for entry in entries} & {entry["run_id"] for entry in others}
    if both:
        raise UserError(f"record {min(both)} is given to be fitted and to be held out")
    rates.check_alike([*entries, *others])
    curves, copies = _unique([rates.curve(entry) for entry in entries])
    held, more = _unique([rates.curve(entry) for entry in others])
    known = {_identity(curve): curve.name for curve in curves}
    if twin := next((curve for curve in held if _identity(curve) in known), None):
        raise UserError(
            f"record {twin.name} is held out, but the same as {known[_identity(twin)]} until its first experience ends"
        )
    curves, held = _of_peak(curves, args.peak), _of_peak(held, args.peak) if held else held
    fits = {law: law_fits.fit(law, curves, args.fade) for law in (args.law, CONTROL)}
    rows = _fitted(fits, curves)
    notes = [*_near(_grouped(held or curves), _grouped(curves)), *_peaks_noted([*curves, *held])]
    if held:
        rows += [row for fit in fits.values() for row in _held(fit, curves, held)]
    else:
        more_rows, more_notes = _in_turn(tuple(fits), curves, args.fade)
        rows, notes = rows + more_rows, notes + more_notes
    made = _described(entries[0], fits, rows, notes, copies + more)
    print(json.dumps(made, indent=1) if args.json else _text(made))
    if out is not None:
        _write(out, fits[args.law], [*curves, *held])
        print(f"written {out}", file=sys.stderr if args.json else sys.stdout)
    return 0


def _of_peak(curves: list[Curve], peak: float | None) -> list[Curve]:
    """Curves whose largest rate is `peak`; all where None. `UserError` names the peaks that there are."""
    found = [curve for curve in curves if peak is None or math.isclose(curve.rates.max(), peak, rel_tol=1e-3)]
    if not found:
        raise UserError(f"no run with --peak {peak:g}: the largest rates are {', '.join(_peaks(curves))}")
    return found


def _peaks(curves: Sequence[Curve]) -> list[str]:
    return [f"{peak:g}" for peak in sorted({float(f"{curve.rates.max():.3g}") for curve in curves})]


def _peaks_noted(curves: Sequence[Curve]) -> list[str]:
    """A line where rates with several peaks are fitted together."""
    peaks = _peaks(curves)
    if len(peaks) < 2:
        return []
    return [f"largest rates {', '.join(peaks)}: a law takes less rate for less training; --peak {peaks[-1]} fits one alone"]


def _check(args: argparse.Namespace) -> None:
    """`UserError` for options that cannot be, or go with the other use."""
    for name in ("held_out", "law", "peak", "fade", "out") if args.refine else ("experience", "values"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no effect {'with' if args.refine else 'without'} --refine")
    if args.fade is not None and not 0 < args.fade <= 1:
        raise UserError(f"--fade must be above 0 and at most 1, got {args.fade:g}")
    if args.values is not None and args.values < 2:
        raise UserError(f"--values must be at least 2, got {args.values}")


def refine(args: argparse.Namespace) -> int:
    """Print the next schedule as words for `clbench run`, with a sketch -> 0. Several runs (seeds): of their mean norms."""
    from clbench.cli.schedule_command import Shown, sketch

    experience, number = str(args.experience or 0), 33 if args.values is None else args.values
    entries = rates.entries(args.records, args.scenario)
    rates.check_alike(entries)
    held: list[Any] = [entry.get("gradient_norms") for entry in entries]
    for entry, noted in zip(entries, held, strict=True):
        if not isinstance(noted, dict) or experience not in noted["values"]:
            raise UserError(
                f"record {entry['run_id']} holds no gradient norms of experience {experience}: run it with gradient_norms=l1 "
                "(l2 for SGD) force=true"
            )
    kinds = {(noted["kind"], len(noted["values"][experience])) for noted in held}
    if len(kinds) > 1:
        raise UserError("the records hold norms of different kinds or numbers: refine them apart")
    kind = kinds.pop()[0]
    values = refinement.refined(np.mean([noted["values"][experience] for noted in held], axis=0), kind, number)
    shown = [float(f"{value:.4g}") for value in values]
    if args.json:
        print(json.dumps({"kind": kind, "experience": int(experience), "runs": len(held), "values": shown}))
        return 0
    label = f"refined from {kind} norms of {len(held)} run{'s' * (len(held) > 1)}, experience {experience}"
    print(sketch(Shown(label, values[None])))
    words = ",".join(f"{value:g}" for value in shown)
    print(f"\nwords for clbench run, beside a base rate tuned anew:\nschedule=table 'schedule.values=[{words}]'")
    return 0


def _checked_out(out: Path) -> Path:
    if out.suffix not in (".json", *FIGURES):
        raise UserError(f"--out {out}: the name must end in .json, .svg, .png or .pdf")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    return out


def _unique(curves: Sequence[Curve]) -> tuple[list[Curve], int]:
    """Curves without those that are the same until the first experience ends, and how many these were."""
    found = {_identity(curve): curve for curve in reversed(curves)}
    return list(reversed(found.values())), len(curves) - len(found)


def _identity(curve: Curve) -> tuple[bytes, ...]:
    return (*curve.same_rates, curve.losses.tobytes())


def _near(judged: dict[str, list[Curve]], fitted: dict[str, list[Curve]]) -> list[str]:
    """A line for each schedule whose rates after warm-up are within 5 % of the largest those of another one that is fitted."""
    notes = []
    for label, (curve, *_) in judged.items():
        for other, (twin, *_) in fitted.items():
            a, b = curve.kept.rates, twin.kept.rates
            if other != label and len(a) == len(b) and np.abs(a - b).max() <= NEAR * a.max():
                notes.append(f"{label} has nearly the rates of {other}: that it is predicted from it says little")
                break
    return notes


def _grouped(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.label, []).append(curve)
    return groups


def _row(fit: Fit, schedule: str, part: str, curves: Sequence[Curve], interval: tuple[float, float] | str) -> Row:
    made = [fit(curve) for curve in curves]
    measured = [curve.kept.losses for curve in curves]
    seen, said = (float(np.mean([values[-1] for values in one])) for one in (measured, made))
    absolute = np.mean([np.abs(p - m).mean() for p, m in zip(made, measured, strict=True)])
    low, high, why = (None, None, interval) if isinstance(interval, str) else (*interval, "")
    return Row(fit.law, schedule, part, len(curves), seen, said, said - seen, float(absolute), low, high, why)


def _fitted(fits: dict[str, Fit], curves: Sequence[Curve]) -> list[Row]:
    groups = _grouped(curves)
    return [_row(fit, label, "fitted", group, "fitted to these") for fit in fits.values() for label, group in groups.items()]


def _held(fit: Fit, curves: Sequence[Curve], held: Sequence[Curve]) -> list[Row]:
    return [_row(fit, label, "held out", group, _interval(fit, curves, group)) for label, group in _grouped(held).items()]


def _in_turn(laws: Sequence[str], curves: Sequence[Curve], fade: float) -> tuple[list[Row], list[str]]:
    """Every schedule predicted by a fit to the others; a line for each that cannot be."""
    groups, rows, notes = _grouped(curves), [], []
    if len(groups) < 2:
        return [], ["nothing is held out: these are runs of one schedule (--held-out RECORD names others)"]
    for law in laws:
        for label, group in groups.items():
            rest = [curve for curve in curves if curve.label != label]
            try:
                rows += _held(law_fits.fit(law, rest, fade), rest, group)
            except UserError as error:
                notes.append(f"{law} without {label}: {error}")
    return rows, notes


def _interval(fit: Fit, curves: Sequence[Curve], held: Sequence[Curve]) -> tuple[float, float] | str:
    """Percentiles of the error at the last look: runs of every schedule and of `held` drawn anew, the law fitted again."""
    if len(held) < FEWEST:
        return f"no interval: {len(held)} run{'s' * (len(held) > 1)}, {FEWEST} are needed"
    draw, found = np.random.default_rng(0), []
    groups = list(_grouped(curves).values())
    for _ in range(DRAWS):
        chosen = [group[i] for group in groups for i in draw.integers(len(group), size=len(group))]
        again = law_fits.fit(fit.law, chosen, fit.fade, start=fit)
        ours = [held[i] for i in draw.integers(len(held), size=len(held))]
        found.append(np.mean([again(curve)[-1] - curve.kept.losses[-1] for curve in ours]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _described(entry: Any, fits: dict[str, Fit], rows: list[Row], notes: list[str], copies: int) -> dict[str, Any]:
    first = next(iter(fits))
    measured = {row.schedule: row.measured for row in rows}
    final = {row.schedule: row.predicted for row in rows if row.law == first}
    judged = [row for row in rows if row.law == first and row.part == "held out"]
    exact = min(judged, key=lambda row: abs(row.error)) if judged else None
    return {
        "scenario": entry["scenario"]["name"],
        "sets": rates.first_sets(entry),
        "model": entry["model"]["name"],
        "copies": copies,
        "fits": {law: fit.state_dict() | {"constants": fit.constants} for law, fit in fits.items()},
        "rows": [asdict(row) for row in rows],
        "notes": notes,
        "lowest_predicted": min(final, key=lambda name: final[name]),
        "lowest_measured": min(measured, key=lambda name: measured[name]),
        "most_exact": None if exact is None else exact.schedule,
        "held_out_error": {law: _mean_error(rows, law) for law in fits},
    }


def _mean_error(rows: Sequence[Row], law: str) -> float | None:
    found = [abs(row.error) for row in rows if row.law == law and row.part == "held out"]
    return float(np.mean(found)) if found else None


def _text(made: dict[str, Any]) -> str:
    rows = [Row(**row) for row in made["rows"]]
    runs = sum(row.runs for row in rows if row.law == CONTROL and row.part == "fitted")
    sets = ", ".join(made["sets"])
    lines = [f"{runs} runs of {made['scenario']}, {made['model']}: experience 0, loss on {sets} at its looks"]
    if made["copies"]:
        lines.append(f"{made['copies']} more are the same until experience 0 ends, and count once")
    for law, fit in made["fits"].items():
        constants = "  ".join(f"{name} {value:.4g}" for name, value in fit["constants"].items())
        lines += ["", f"{law:<12} {LAWS[law].about}", f"{'':<12} {constants}  (fade {fit['fade']:g})"]
    wide = max(len(row.schedule) for row in rows)
    heads = "runs  measured  predicted    error  95 % interval       |error| of looks"
    lines += ["", f"{'schedule':<{wide}}  {'law':<11}  {'part':<8}  {heads}"]
    for row in rows:
        interval = row.why if row.low is None else f"{row.low:+.4f} to {row.high:+.4f}"
        numbers = f"{row.runs:>4}  {row.measured:>8.4f}  {row.predicted:>9.4f}  {row.error:>+7.4f}"
        lines.append(f"{row.schedule:<{wide}}  {row.law:<11}  {row.part:<8}  {numbers}  {interval:<18}  {row.absolute:.4f}")
    lines += ["", *made["notes"]]
    for law, error in made["held_out_error"].items():
        if error is not None and not math.isnan(error):
            lines.append(f"{law}: mean |error| at the last look of schedules held out {error:.4f}")
    lines.append(f"lowest loss predicted: {made['lowest_predicted']}; measured: {made['lowest_measured']}")
    if made["most_exact"] is not None:
        lines.append(f"predicted most exactly: {made['most_exact']}")
    return "\n".join(lines)


def _write(out: Path, fit: Fit, curves: Sequence[Curve]) -> None:
    if out.suffix == ".json":
        write_text(out, json.dumps(fit.state_dict(), indent=1) + "\n")
    else:
        _draw(out, fit, curves)


def _draw(out: Path, fit: Fit, curves: Sequence[Curve]) -> None:
    """Measured losses as points, predicted ones as lines, a colour for each schedule."""
    from clbench.report.figures import plots

    plots.needed()
    from clbench.report.figures import schedules

    rows = []
    for label, group in _grouped(curves).items():
        for curve in group:
            found = zip(curve.kept.steps, curve.kept.losses, strict=True)
            rows += [{"label": label, "update": float(step), "measured": float(loss)} for step, loss in found]
        found = zip(group[0].kept.steps, fit(group[0]), strict=True)
        rows += [{"label": label, "update": float(step), "predicted": float(loss)} for step, loss in found]
    plots.save(schedules.fitted_law(rows), out, out.suffix[1:])
