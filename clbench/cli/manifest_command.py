"""`clbench manifest`: write, check or show the stream of a scenario. Loads no torch."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from clbench.config import compose, registry
from clbench.interfaces import UserError
from clbench.streams.images import damage
from clbench.streams.manifest import Manifest


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=("write", "check", "show"))
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE | FILE", help="choices and options; for check: files, too")
    parser.add_argument("--out", metavar="FILE", help="for write: the file to write")


def run(args: Namespace) -> int:
    """Do what `args.action` says -> exit code."""
    if args.out and args.action != "write":
        raise UserError(f"--out has no effect with manifest {args.action}")
    if args.action == "check":
        return check(args.overrides)
    scenario = _scenario(args.overrides)
    if args.action == "show":
        print(scenario.text())
        return 0
    if not args.out:
        raise UserError("say where to: clbench manifest write ... --out FILE")
    return write(scenario, Path(args.out))


def _scenario(overrides: list[str]) -> Any:
    found = compose.compose(overrides)[0]
    registry.check(found)
    return compose.build(found["scenario"])


def write(scenario: Any, out: Path) -> int:
    """Write the manifest, with the names of the classes where it has any; another stream is not overwritten."""
    made = scenario.manifest
    if out.exists() and Manifest.load(out).sha256 != made.sha256:
        raise UserError(f"{out} holds another stream; choose another name or remove it first")
    made.save(out, scenario.class_names() if hasattr(scenario, "class_names") else {})
    print(f"{out}: sha256 {made.sha256}")
    return 0


def check(words: list[str]) -> int:
    """Check files against their hashes; of a scenario that is named by overrides, decode every image."""
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    overrides = [word for word in words if word not in files]
    if not words:
        raise UserError("say what to check: clbench manifest check FILE, or scenario=NAME ... to decode its images")
    for path in files:
        print(f"{path}: ok, sha256 {Manifest.load(path).sha256}")
    if not overrides:
        return 0
    scenario = _scenario(overrides)
    found = damage.check(scenario, lambda line: print(f"clbench: {line}", file=sys.stderr, flush=True))
    if not found.number:
        print(f"{scenario.name}: ok, sha256 {scenario.manifest.sha256}; no image has to be decoded")
        return 0
    print(f"{scenario.name}: {found.text()}")
    if found.damaged:
        more = len(found.damaged) - damage.MOST_LINES
        lines = [*found.damaged[: damage.MOST_LINES], *([f"and {more} more"] if more > 0 else [])]
        raise UserError("\n".join([*lines, f"{len(found.damaged)} of {found.number} images cannot be decoded"]))
    print(f"{scenario.name}: ok, sha256 {scenario.manifest.sha256}")
    return 0
