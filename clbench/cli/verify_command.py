"""`clbench verify`: check records, repeat the beginning of some, print the schema. Only a repeat loads torch."""

from __future__ import annotations

import random
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clbench.config import registry
from clbench.interfaces import UserError
from clbench.records import record, rerun
from clbench.records.safe_text import plain
from clbench.records.verify import Verdict, line, verdicts, verify
from clbench.run.restored import read_yaml, restored

STEPS = 2  # experiences that are repeated


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", default="results", metavar="PATH", help="a record or a results folder (results)")
    words = "repeat the first two experiences of a record, or of N drawn from PATH (1), and compare every count and loss"
    parser.add_argument("--rerun", nargs="?", const="1", metavar="N | RECORD", help=words)
    parser.add_argument("--seed", type=int, metavar="N", help="with --rerun N: which ones are drawn (0)")
    parser.add_argument("--data-root", metavar="DIR", help="where data and weights lie (the environment's CLBENCH_DATA)")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of a record")


def run(args: Namespace) -> tuple[str, int]:
    """What the command was asked for -> (text, exit code)."""
    if args.schema:
        return (Path(record.__file__).parent / "record.schema.json").read_text(encoding="ascii").rstrip("\n"), 0
    if args.rerun is None:
        if args.seed is not None:
            raise UserError("--seed has no effect without --rerun")
        return verify(args.path, args.data_root, targets())
    number = int(args.rerun) if args.rerun.isdigit() else None
    path = Path(args.path if number is not None else args.rerun).expanduser()
    return repeat(path, 1 if number is None else number, args.seed or 0, args.data_root)


def targets() -> dict[str, list[str]]:
    """Learners' names -> the classes that configuration files of that name choose."""
    made: dict[str, list[str]] = {}
    for name, paths in registry.choices("learner").items():
        made[name] = [found for path in paths if isinstance(found := read_yaml(path).get("_target_"), str)]
    return made


def repeat(path: Path, number: int, seed: int, data_root: str | None) -> tuple[str, int]:
    """`repeated` -> (text, exit code)."""
    made = repeated(path, number, seed, data_root)
    good = sum(v.verdict == "verified" for v in made)
    text = "\n".join([*map(line, made), f"{len(made)} repeated: {good} verified"])
    return text, 1 if any(v.verdict == "failed" for v in made) else 0


def repeated(path: Path, number: int, seed: int, data_root: str | None) -> list[Verdict]:
    """Repeat the first experiences of a record, or of `number` finished ones of a folder, drawn with `seed`.

    A record that cannot be repeated here (no data, no weights) raises `UserError` where it was named, and is self-reported
    where it was drawn.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if number < 1:
        raise UserError("--rerun needs a number from 1")
    alone = not path.is_dir()
    files = [path] if alone else list(_drawn(path, number, seed))
    if not files:
        raise UserError(f"{path} holds no finished record to repeat")
    made = []
    for file in files:
        checked = verdicts(file, data_root)[0]
        if checked.verdict in ("failed", "unfinished"):
            made.append(checked)
            continue
        if (why := _by_other_code(record.read(file))) is not None:
            made.append(Verdict(file.name, "self-reported", (why,)))
            continue
        print(f"repeating {STEPS} experiences of {file.name}", file=sys.stderr, flush=True)
        try:
            made.append(_again(file, data_root))
        except UserError as error:
            if alone:
                hint = "" if data_root else " (--data-root DIR names the folder of data and weights)"
                raise UserError(f"{file.name} cannot be repeated here: {error}{hint}") from None
            made.append(Verdict(file.name, "self-reported", (f"it cannot be repeated here: {error}",)))
        except Exception as error:  # whatever a learner raises: the other records are repeated all the same
            why = f"its repeat raises {type(error).__name__}: {plain(str(error))[:200]}"
            made.append(Verdict(file.name, "failed", (why,)))
    return made


def _drawn(path: Path, number: int, seed: int) -> Iterator[Path]:
    folder = path / "records" if (path / "records").is_dir() else path
    good = [e["run_id"] for e in record.entries(folder, []) if e["status"] == "ok" and _by_other_code(e) is None]
    for run_id in sorted(random.Random(seed).sample(good, min(number, len(good)))):
        yield folder / f"{run_id}.json"


def _by_other_code(entry: Mapping[str, Any]) -> str | None:
    """Why a record cannot be repeated count for count, or None: a change of the code moved the numbers of such runs."""
    said, here = entry["numbers_version"], record.numbers_version(entry["config"])
    if said == here:
        return None
    return f"it cannot be repeated count for count: other code made its numbers (numbers_version {said}, here {here})"


def _again(file: Path, data_root: str | None) -> Verdict:
    """Build the run from its record, see that it is the same run, repeat its beginning, compare."""
    entry = record.read(file)
    config = restored(entry, data_root, file.parent)
    registry.check(config)
    from clbench.run import runner

    try:
        job = runner.prepare(config)
    except UserError:
        if config["device"] == "cpu":
            raise
        job = runner.prepare(config | {"device": "auto"})  # a device that is not here: the comparison says so
    manifest, state = job.scenario.manifest.sha256, job.model.identity["state_sha256"]
    if manifest != entry["scenario"]["manifest_sha256"]:
        return Verdict(file.name, "failed", (f"its configuration makes the stream {manifest[:12]}, it names another",))
    if state != entry["model"]["state_sha256"]:
        why = f"its weights give the state {state[:12]} here, it says {str(entry['model']['state_sha256'])[:12]}"
        return Verdict(file.name, "self-reported", (why,))
    if job.run_id != entry["run_id"]:
        return Verdict(
            file.name, "self-reported", (f"its configuration is run {job.run_id} here: other code made its numbers",)
        )
    stream = job.scenario.manifest
    done = 0 if job.options.continues is None else len(record.read(job.options.continues)["experiences"])
    steps = min(done + max(STEPS, stream.evaluate_every), len(stream.experiences))
    flags = (entry.get("machine") or {}).get("flags") or {}
    return rerun.compare(file.name, entry, runner.repeat(job, flags, steps))
