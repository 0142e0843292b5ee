"""Options of `clbench bench tokens`. Imports no torch."""

from __future__ import annotations

import argparse

from clbench.config.signatures import nearest
from clbench.interfaces import UserError

ROWS = ("loop", "paths", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", default=",".join(ROWS), help="which tables: loop,paths,memory")
    add("--model", default="decoder_tiny", help="a decoder of `clbench list models`")
    add("--batch", type=int, default=16)
    add("--context", type=int, default=64)
    add("--vocab", type=int, default=256, help="for models that leave it open")
    add("--device", default="cpu")
    add("--threads", default="auto")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--attention", choices=("auto", "explicit", "sdpa"), default="auto")
    add("--compile", action="store_true", help="torch.compile in `loop`; in `paths` compiled rows too")
    add("--warm", type=int, default=10, help="steps before anything is timed")
    add("--steps", type=int, default=15, help="of a round")
    add("--rounds", type=int, default=15)
    add("--corpus-gb", type=float, default=8.0)
    add("--read-gb", type=float, default=0.05)
    add("--name", metavar="NAME", help="of the file (tokens)")
    add("--results-dir", default="results", metavar="DIR", help="the file lies in DIR/bench (results)")


def check(args: argparse.Namespace) -> None:
    """Make a list of `rows`; `UserError` for what cannot be."""
    args.rows = args.rows.split(",")
    for name in args.rows:
        if name not in ROWS:
            raise UserError(f"no table '{name}'{nearest(name, ROWS)} (one of: {', '.join(ROWS)})")
    for name, least in (("batch", 1), ("context", 2), ("vocab", 2), ("warm", 0), ("steps", 1), ("rounds", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if not 0 < args.read_gb or args.corpus_gb * 1e9 < 4 * args.context:
        raise UserError("--read-gb and --corpus-gb must be above 0, and a corpus must hold a context")
