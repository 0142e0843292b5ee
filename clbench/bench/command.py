"""`clbench bench`: measures, shows a table, writes results/bench/NAME.json."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
from typing import Any

from clbench.bench import options, table
from clbench.interfaces import UserError


def run(args: argparse.Namespace) -> tuple[str, int]:
    """The text to show and the exit code: 0 also where a target is missed, for a busy machine proves nothing."""
    kind, overrides = options.split(args)
    if kind == "cases":
        return _cases(args, overrides)
    if kind == "scaling":
        from clbench.bench import scaling

        found = scaling.measure(args, overrides)
        text = scaling.text(found)
    elif kind in ("online", "adapting"):
        from clbench.bench import online

        found = online.measure(args, kind)
        text = online.text(found)
        online.write_csv(found, target(args, args.name or kind).with_suffix(".csv"))
    else:
        from clbench.bench import startup

        found = startup.measure(args.records or (100 if args.quick else options.RECORDS), quick=args.quick)
        text = startup.text(found)
    path = target(args, args.name or kind)
    write(path, found)
    return f"{text}\n\n{path}", 0


def run_tokens(args: argparse.Namespace) -> tuple[str, int]:
    """`clbench bench tokens`: the text to show and the exit code."""
    from clbench.bench import tokens

    path = target(args, args.name or "tokens")
    found = tokens.measure(args)
    write(path, found)
    return f"{tokens.text(found)}\n\n{path}", 0


def _cases(args: argparse.Namespace, overrides: list[str]) -> tuple[str, int]:
    name, preset = options.chosen(args, overrides)
    path = target(args, name)
    from clbench.bench import measure, stand_ins

    with stand_ins.of(preset, args.stand_ins) as preset:
        found = measure.measure(name, preset, args.quick, lambda part: write(path, part | {"complete": False}))
    found["stand_ins"] = bool(args.stand_ins)
    found["bf16_against_fp32"] = table.precision_rows(found)
    found["targets"] = table.targets_of(preset, found)
    write(path, found | {"complete": True})
    return f"{table.cases_text(found, found['targets'])}\n\n{path}", 0


def target(args: argparse.Namespace, name: str) -> pathlib.Path:
    """Where the file goes; `UserError` if it cannot."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--name must be letters, digits, '.', '_' and '-', got {name!r}")
    folder = pathlib.Path(args.results_dir).expanduser() / "bench"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    return folder / f"{name}.json"


def write(path: pathlib.Path, found: dict[str, Any]) -> None:
    """As JSON, whole or not at all; floats with six digits are enough."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def rounded(value: Any) -> Any:
    """The same with floats of six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
