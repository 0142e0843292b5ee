"""`clbench tune`: choose options without looking at what they will be judged by, freeze the choice, evaluate it once.

A study is a pure function of its overrides, the sampler's seed and the results of its trials. Every trial is an ordinary record
in `results_dir/tuning/<study>/records`, away from the leaderboard; `results_dir/tuning/<study>.json` lists them all. When the
last trial is done the study is sealed: its choice is never made again, and the same command goes on with what is left. The
records of the choice lie where those of any run lie, with the same run ids, and say how it was made in `tuning`. Protocols and
what they guarantee: `clbench.tuning.streams`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.config import compose, registry
from clbench.evaluation import metrics
from clbench.interfaces import UserError, declared
from clbench.records import record
from clbench.report.numbers import check_metric
from clbench.run import provenance
from clbench.run.subprocess_job import run_alone
from clbench.tuning.options import Options, read
from clbench.tuning.space import Variable, check_functions, size, variables
from clbench.tuning.trials import SCHEMA, Study, finished, sealed, search, work

_FIRST_ONLY = ("last_macro", "last_micro", "step_macro", "step_micro", "triangle_macro", "plasticity", "worst")


def run(args: Namespace, command: list[str]) -> int:
    """Do what `clbench tune` was asked for -> exit code: 1 if no trial or no run of the choice succeeded."""
    study = prepare(read(args.overrides), command)
    print(f"study {study.name}: {study.options.protocol}, {study.trials} trials on {study.on['scenario']}", flush=True)
    made = sealed(study)
    if made is None:
        made = search(study)
    else:
        print(f"its choice was made before: {study.file}")
    if made["chosen"] is None:
        print(f"clbench: every trial failed; {study.file} says why", file=sys.stderr)
        return 1
    chosen = [f"{key}={value}" for key, value in made["chosen"].items()]
    print(f"chosen {' '.join(chosen)}  ({study.options.metric} {made['best_value']:.4f} while tuning)", flush=True)
    return evaluate(study, made)


def prepare(options: Options, command: list[str]) -> Study:
    """Check everything that can be checked before anything runs. `UserError` with one line or several."""
    check_metric(options.metric, losses=False)
    if options.protocol == "first_experience" and options.metric not in _FIRST_ONLY:
        raise UserError(f"tune.metric={options.metric} is not defined on one experience (one of: {', '.join(_FIRST_ONLY)})")
    check_functions(options.overrides)
    fixed, spaces = compose.searched(options.overrides)
    seeds = spaces.pop("seed", [override.partition("=")[2] for override in fixed if override.startswith("seed=")] or ["0"])
    fixed = [override for override in fixed if not override.startswith("seed=")]
    if not isinstance(seeds, list) or not all(seed.isdigit() for seed in seeds):
        raise UserError("seed must be whole numbers from 0: those on which the choice is evaluated")
    space = variables(spaces)
    _check_ends(fixed, space)
    base = compose.compose([*fixed, *(f"{v.key}={v.ends()[0]}" for v in space)])[0]
    results = Path(str(base["results_dir"])).expanduser().resolve()
    trials = _trials(options, space)
    from clbench.tuning.streams import guard, source

    evaluation = compose.build(base["scenario"])
    if evaluation.asks != "predict":
        raise UserError(
            f"clbench tune knows streams of images; for scenario {evaluation.name} compare options with clbench run -m"
        )
    overrides, tuned, generated = source(options, fixed, evaluation, base["scenario"])
    on = guard(options.protocol, tuned, evaluation)
    if on["shared_classes"] and options.protocol == "two_phase":
        shared = f"{on['shared_classes']} classes of {evaluation.name} are also tuned on, on other samples"
        print(f"clbench: {shared}; the record is marked classes_tuned", file=sys.stderr)
    first = [f"{v.key}={v.ends()[0]}" for v in space]
    plain = [_identity(job) for job in (base, compose.compose([*overrides, *first])[0])]
    parts = [SCHEMA, record.numbers_version(base), plain, evaluation.manifest.sha256, on, provenance.learner_name(base)]
    parts += [options.protocol, options.metric, options.sampler, options.seed, list(options.seeds), trials]
    name = record.digest([*parts, [[v.key, v.about()] for v in space]])[:12]
    study = Study(
        options, tuple(fixed), space, tuple(map(int, seeds)), results, name, trials, on, tuple(overrides), None, command
    )
    if not generated:
        return study
    from clbench.tuning.streams import stored

    record.ensure_writable(study.folder)
    return Study(**{**vars(study), "node": stored(tuned, base["scenario"], study.folder)})


def _identity(job: dict[str, Any]) -> dict[str, Any]:
    """What the numbers of a job depend on."""
    return provenance.identity(job, declared(registry.load_target(job["learner"]["_target_"]), job["learner"]))


def _trials(options: Options, space: Sequence[Variable]) -> int:
    count = size(space)
    if options.sampler != "grid":
        return options.trials or 20
    if count is None:
        endless = ", ".join(v.key for v in space if not v.values)
        raise UserError(f"tune.sampler=grid needs lists: {endless} is an interval; write choice(...), range(...) or A,B,C")
    if options.trials not in (None, count):
        raise UserError(f"tune.sampler=grid tries all {count} choices: leave tune.trials out, or take tune.sampler=random")
    return count


def _check_ends(fixed: Sequence[str], space: Sequence[Variable]) -> None:
    """Compose and check every listed value and both ends of every interval, with the first values of the others."""
    first = {v.key: v.ends()[0] for v in space}
    lines: dict[str, None] = {}
    for v in space:
        for override in v.ends():
            try:
                registry.check(compose.compose([*fixed, *(f"{key}={w}" for key, w in (first | {v.key: override}).items())])[0])
            except UserError as error:
                hint = "; for whole numbers write int(interval(a,b))" if not v.values and "int" in str(error) else ""
                lines |= dict.fromkeys(f"{line}{hint}" for line in str(error).splitlines())
    if lines:
        raise UserError("\n".join(lines))


def provenance_of(study: Study, made: Mapping[str, Any]) -> dict[str, Any]:
    """What the records of the choice say of the way to it."""
    marks = ["test_tuned"] if study.options.protocol == "test" else []
    marks += ["classes_tuned"] if study.options.protocol == "two_phase" and study.on["shared_classes"] else []
    kept = ("study", "protocol", "metric", "sampler", "seed", "seeds", "space", "on", "runs", "failed", "seconds")
    tuning = {key: made[key] for key in kept} | {"trials": len(made["trials"]), "chosen": dict(made["chosen"])}
    return tuning | {"best_value": made["best_value"], "command": made["command"], "marks": marks}


def evaluate(study: Study, made: Mapping[str, Any]) -> int:
    """Run the choice once on each seed of the evaluation stream, with its origin in the record -> exit code."""
    code = 0
    overrides = [*study.fixed, *(f"{key}={value}" for key, value in made["chosen"].items())]
    tuning = provenance_of(study, made)
    for seed in study.seeds:
        job = compose.compose([*overrides, f"seed={seed}"])[0]
        ended = run_alone(work, job, ["clbench", "run", *overrides, f"seed={seed}"], tuning)
        if ended["stopped"]:
            raise KeyboardInterrupt
        entry = finished(study.results, ended)
        if entry is None:
            print(f"clbench: seed {seed}: {ended['status']}: {(ended['text'].splitlines() or ['?'])[0]}", file=sys.stderr)
            code = 1
            continue
        print(f"seed {seed}  {_numbers(entry)}  record {study.results / 'records' / entry['run_id']}.json", flush=True)
        if ended["status"] == "skipped" and _study_of(entry) != study.name:
            code = max(code, _met(study, entry))
    return code


def _numbers(entry: Mapping[str, Any]) -> str:
    values = metrics.summary(entry)
    return "  ".join(f"{name} {values[name]:.4f}" for name in ("step_macro", "last_macro", "forgetting") if name in values)


def _study_of(entry: Mapping[str, Any]) -> Any:
    tuning = entry.get("tuning")
    return tuning.get("study") if isinstance(tuning, Mapping) else None


def _met(study: Study, entry: Mapping[str, Any]) -> int:
    """The choice had been evaluated before, by hand or by another study: nothing is overwritten -> exit code."""
    other = _study_of(entry)
    by = f"by study {other}" if other else f"by: {entry.get('machine', {}).get('command', '?')}"
    text = f"clbench: {entry['run_id']} was evaluated before, {by}; its record is not overwritten"
    untold = study.options.protocol == "test" and "test_tuned" not in entry.get("marks", ())
    text += " and lacks the mark test_tuned: choose another results_dir" if untold else f"; {study.file.name} names the choice"
    print(text, file=sys.stderr)
    return 1 if untold else 0
