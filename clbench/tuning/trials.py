"""The trials of a study, one after another, each in a process of its own; and the file in which they are written down."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench.config import compose, registry
from clbench.evaluation import metrics
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import numbers
from clbench.run import provenance
from clbench.run.subprocess_job import run_alone, show_log
from clbench.tuning.options import Options
from clbench.tuning.space import Variable, begin

SCHEMA = 1


@dataclass(frozen=True)
class Study:
    """Everything that is known before the first trial. `node` is the tuning stream's configuration, None: as composed."""

    options: Options
    fixed: tuple[str, ...]
    space: tuple[Variable, ...]
    seeds: tuple[int, ...]
    results: Path
    name: str
    trials: int
    on: dict[str, Any]
    overrides: tuple[str, ...]
    node: dict[str, Any] | None
    command: list[str]

    @property
    def folder(self) -> Path:
        """The results folder of the trials."""
        return self.results / "tuning" / self.name

    @property
    def file(self) -> Path:
        """What is known of the trials, and the choice."""
        return self.results / "tuning" / f"{self.name}.json"


def sealed(study: Study) -> dict[str, Any] | None:
    """The study's file if its choice is made."""
    try:
        found = json.loads(study.file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{study.file} cannot be read ({error}); remove it to count the trials anew") from None
    if not isinstance(found, dict) or found.get("study") != study.name:
        raise UserError(f"{study.file} is not the file of study {study.name}; remove it to count the trials anew")
    return found if found.get("sealed") else None


def search(study: Study) -> dict[str, Any]:
    """Run the trials and seal the study -> what its file holds. Trials that are done are not run again."""
    lower = numbers.lower(study.options.metric)
    made = _described(study)
    sampler = begin(study.options.sampler, study.space, study.options.seed, study.trials, lower)
    known: dict[str, dict[str, Any]] = {}
    for number in range(study.trials):
        chosen = sampler.ask()
        key = record.canonical(chosen)
        repeat = key in known
        row = {**known[key], "seconds": 0.0, "repeats": known[key]["number"]} if repeat else _trial(study, chosen, number)
        known.setdefault(key, row)
        row = {**row, "number": number}
        made["trials"].append(row)
        sampler.tell(row["value"])
        _show(study, row)
        record.write_text(study.file, json.dumps(made, indent=1) + "\n")
    good = [row for row in made["trials"] if row["value"] is not None]
    best = min(good, key=lambda row: (row["value"] if lower else -row["value"], row["number"])) if good else None
    made |= {
        "chosen": best["chosen"] if best else None,
        "best_value": best["value"] if best else None,
        "best_trial": best and best["number"],
    }
    made |= {
        "seconds": sum(row["seconds"] for row in made["trials"]),
        "failed": study.trials - len(good),
        "sealed": best is not None,
    }
    made["runs"] = sum(len(row["runs"]) for row in made["trials"] if "repeats" not in row)
    record.write_text(study.file, json.dumps(made, indent=1) + "\n")
    return made


def _described(study: Study) -> dict[str, Any]:
    """The head of the study's file: enough to do it again."""
    options = study.options
    return {
        "study": study.name,
        "schema": SCHEMA,
        "command": provenance.command_line(study.command),
        "versions": provenance.versions() | _optuna_version(options.sampler),
        "protocol": options.protocol,
        "metric": options.metric,
        "sampler": options.sampler,
        "seed": options.seed,
        "seeds": list(options.seeds),
        "space": {v.key: v.about() for v in study.space},
        "fixed": list(study.fixed),
        "tuning_words": list(study.overrides),
        "on": study.on,
        "trials": [],
    }


def _optuna_version(sampler: str) -> dict[str, str]:
    from importlib.metadata import version

    return {} if sampler == "grid" else {"optuna": version("optuna")}


def _trial(study: Study, chosen: Mapping[str, str], number: int) -> dict[str, Any]:
    """One choice on every seed -> its row; the value is the mean over seeds, None if any of them failed."""
    row: dict[str, Any] = {"number": number, "chosen": dict(chosen), "value": None, "runs": [], "values": [], "seconds": 0.0}
    for seed in study.options.seeds:
        overrides = [*study.overrides, *(f"{key}={word}" for key, word in chosen.items()), f"seed={seed}"]
        start = time.perf_counter()
        try:
            job = compose.compose(overrides)[0] | {"results_dir": str(study.folder), "on_error": "record"}
            if study.node is not None:
                job["scenario"] = study.node
            registry.check(job)
        except UserError as error:
            return row | {"why": str(error).splitlines()[0]}
        ended = run_alone(work, job, ["clbench", "run", *overrides], None)
        if ended["stopped"] or ended["status"] == "interrupted":
            raise KeyboardInterrupt
        if ended["status"] == "busy":
            raise UserError(f"study {study.name} is at work in another process: {ended['text']}")
        entry = finished(study.folder, ended)
        row["seconds"] += entry["seconds"]["total"] if entry else time.perf_counter() - start
        if entry is None:
            return row | {"why": (ended["text"].splitlines() or ["?"])[0]}
        row["runs"].append(entry["run_id"])
        value = metrics.summary(entry).get(study.options.metric, float("nan"))
        if value != value:
            return row | {"why": f"{study.options.metric} is not defined in its record"}
        row["values"].append(value)
    return row | {"value": sum(row["values"]) / len(row["values"])}


def finished(results: Path, ended: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record that a job left, if it has a result."""
    if ended["status"] not in ("ok", "skipped"):
        return None
    entry = record.read(results / "records" / f"{ended['run_id']}.json")
    return entry if entry["status"] == "ok" else None


def work(job: dict[str, Any], command: list[str], tuning: dict[str, Any] | None) -> dict[str, Any]:
    """One run, in a process of its own."""
    show_log(False)
    from clbench.run.runner import run_job

    try:
        outcome = run_job(job, command=command, tuning=tuning)
    except UserError as error:
        return {"run_id": "", "status": "failed", "text": str(error)}
    return {"run_id": outcome.run_id, "status": outcome.status, "text": outcome.text}


def _show(study: Study, row: Mapping[str, Any]) -> None:
    words = " ".join(f"{key}={word}" for key, word in row["chosen"].items())
    how = f"{study.options.metric} {row['value']:.4f}" if row["value"] is not None else f"failed: {row.get('why', '?')}"
    end = f"as trial {row['repeats'] + 1}" if "repeats" in row else f"{row['seconds']:.0f} s"
    print(f"[{row['number'] + 1}/{study.trials}] {words}  {how}  {end}", flush=True)
