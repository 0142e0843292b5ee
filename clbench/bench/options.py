"""Options of `clbench bench`. Imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import replace

from clbench.bench.presets import PRESETS, Case, Preset
from clbench.config.signatures import nearest
from clbench.interfaces import UserError

KINDS = {
    "cases": "learners of a preset, or --learners: seconds by phase, share of the floor, ratio to naive code",
    "scaling": "seconds and memory against the number of experiences and of classes, on synthetic images",
    "online": "one pass in batches of 10 (--batch): clbench's loop beside one written by hand, fp32 and bf16, both layouts",
    "adapting": "test-time adaptation (tent) in batches of 10 (--batch) beside a loop written by hand, as online",
    "startup": "import, --help, a mistyped option, a report over many records",
}
QUICK = ("scenario.limit_train=6", "scenario.limit_test=4")
STEPS, CLASSES, RECORDS = "5,10,20,50,100", "10,30,100,300,1000", 10_000


def overview() -> str:
    """What there is to measure, and the presets."""
    lines = ["what to measure:", *(f"  {name:<15}{text}" for name, text in KINDS.items()), "", "presets of cases:"]
    lines += [f"  {name:<15}{preset.about}" for name, preset in PRESETS.items()]
    lines += ["", "The result is a table, and results/bench/NAME.json. Measure on a machine that does nothing else."]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `clbench bench`."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="WHAT | NAME=VALUE",
        help="cases (default), scaling, online, adapting, startup; options of runs",
    )
    parser.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} (quick)")
    parser.add_argument("--cases", metavar="A,B", help="only these cases of the preset, and `sweep` for its sweep")
    parser.add_argument("--learners", metavar="A,B", help="these learners instead of the preset's")
    parser.add_argument("--scenario", metavar="NAME", help="the same as scenario=NAME")
    parser.add_argument("--model", metavar="NAME", help="the same as model=NAME")
    parser.add_argument("--precision", metavar="A,B", help="fp32, bf16, or both (the preset's)")
    parser.add_argument("--no-naive", action="store_true", help="leave out the naive versions, which take most of the time")
    parser.add_argument("--stand-ins", action="store_true", help="random images and weights of the same sizes: needs no data")
    parser.add_argument("--quick", action="store_true", help="few images, seeds and repetitions: shows that it works")
    parser.add_argument("--experiences", metavar="A,B", help=f"scaling: numbers of experiences ({STEPS})")
    parser.add_argument("--classes", metavar="A,B", help=f"scaling: numbers of classes ({CLASSES})")
    parser.add_argument("--batch", type=int, metavar="N", help="online, adapting: images a batch (10)")
    parser.add_argument("--records", type=int, metavar="N", help=f"startup: records in the report ({RECORDS})")
    parser.add_argument("--name", metavar="NAME", help="of the file (the preset's, or what is measured)")
    parser.add_argument("--results-dir", default="results", metavar="DIR", help="the file lies in DIR/bench (results)")


def split(args: argparse.Namespace) -> tuple[str, list[str]]:
    """What to measure, and the options of runs. `UserError` for options that have no effect on it."""
    overrides = list(args.overrides)
    kind = overrides.pop(0) if overrides and "=" not in overrides[0] else "cases"
    if kind not in KINDS:
        raise UserError(f"bench has no '{kind}'{nearest(kind, KINDS)} (one of: {', '.join(KINDS)})")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r}: write NAME=VALUE")
    only = {
        "cases": ("preset", "cases", "no_naive", "stand_ins", "scenario"),
        "scaling": ("experiences", "classes"),
        "startup": ("records",),
    }
    both = {
        "learners": ("cases", "scaling"),
        "model": ("cases", "scaling", "online", "adapting"),
        "precision": ("cases", "online", "adapting"),
        "batch": ("online", "adapting"),
        "quick": tuple(KINDS),
    }
    for name, value in vars(args).items():
        mine = both.get(name) or tuple(k for k, names in only.items() if name in names)
        if value not in (None, False) and mine and kind not in mine:
            raise UserError(f"--{name.replace('_', '-')} has no effect on bench {kind}")
    if kind in ("startup", "online", "adapting") and overrides:
        raise UserError(f"{overrides[0]} has no effect on bench {kind}")
    overrides = [f"{group}={value}" for group in ("scenario", "model") if (value := getattr(args, group))] + overrides
    return kind, overrides


def chosen(args: argparse.Namespace, overrides: list[str]) -> tuple[str, Preset]:
    """The preset under its name, with what the options change in it."""
    name = args.preset or "quick"
    if name not in PRESETS:
        raise UserError(f"no preset '{name}'{nearest(name, PRESETS)} (one of: {', '.join(PRESETS)})")
    preset = PRESETS[name]
    if args.learners and not args.preset and not args.quick:
        preset = replace(preset, overrides=())
    cases, swept = preset.cases, preset.sweep
    if args.cases:
        cases, swept = some(preset, listed(args.cases, "--cases"), bool(args.learners))
    if args.learners:
        cases = tuple(Case(learner, (f"learner={learner}",)) for learner in listed(args.learners, "--learners"))
    if args.no_naive:
        cases, swept = (tuple(replace(case, naive=False, least_ratio=None) for case in part) for part in (cases, swept))
    precisions = tuple(listed(args.precision, "--precision")) if args.precision else preset.precisions
    if any(p not in ("fp32", "bf16") for p in precisions):
        raise UserError(f"--precision must be fp32, bf16 or fp32,bf16, got {args.precision!r}")
    shared = [override for override in overrides if "." not in override.split("=")[0]]
    more = (*(QUICK if args.quick else ()), *(override for override in overrides if override not in shared))
    cases = tuple(replace(case, overrides=(*case.overrides, *more)) for case in cases)
    others = () if args.learners else tuple(replace(case, overrides=(*case.overrides, *more)) for case in swept)
    preset = replace(preset, cases=cases, precisions=precisions, overrides=(*preset.overrides, *shared), sweep=others)
    preset = replace(preset, seeds=2) if args.quick else preset
    return args.name or (f"{name}_part" if args.cases else name), preset


def some(preset: Preset, wanted: list[str], replaced: bool) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Cases of a preset by name, and its sweep if it is asked for."""
    if replaced:
        raise UserError("--cases chooses among the preset's, --learners takes others: give one of them")
    known = [case.name for case in preset.cases] + ["sweep"] * bool(preset.sweep)
    for name in wanted:
        if name not in known:
            raise UserError(f"no case '{name}'{nearest(name, known)} (one of: {', '.join(known)})")
    return tuple(case for case in preset.cases if case.name in wanted), preset.sweep if "sweep" in wanted else ()


def listed(text: str, option: str) -> list[str]:
    """Names with commas between."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise UserError(f"{option} needs at least one name")
    return list(dict.fromkeys(found))


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers from 1, with commas between, in ascending order."""
    try:
        found = sorted({int(part) for part in listed(text, option)})
    except ValueError:
        raise UserError(f"{option} takes whole numbers with commas between, got {text!r}") from None
    if found[0] < 1:
        raise UserError(f"{option} takes whole numbers from 1, got {text!r}")
    return found
