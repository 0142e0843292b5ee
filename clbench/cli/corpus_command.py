"""`clbench manifest corpus`: texts into folders of shards, and what is in such a folder. Loads no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from clbench.interfaces import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `clbench manifest corpus` takes."""
    parser.add_argument("action", choices=("build", "check", "show"))
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="FILE | FOLDER",
        help="for build: text or JSON lines, packed by gz, xz, bz2 or zst or not; else folders of shards",
    )
    parser.add_argument("--out", metavar="FOLDER", help="for build: the folder to write")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json; without it tokens are bytes")
    parser.add_argument("--end", metavar="TOKEN", help="the tokenizer's token after each document (<|endoftext|> or the like)")
    parser.add_argument("--field", metavar="NAME", help="where the text of a JSONL object stands (text)")
    parser.add_argument("--name-field", metavar="NAME", help="where its name stands (FILE:LINE is the name)")
    parser.add_argument("--validation", type=float, metavar="SHARE", help="share of the documents set aside (0.05)")
    parser.add_argument("--seed", type=int, metavar="N", help="which documents are set aside (0)")


def run(args: argparse.Namespace) -> int:
    """Build, check or show -> 0."""
    from clbench.streams.tokens.corpus import Shards

    paths = [Path(path).expanduser() for path in args.paths]
    if args.action == "build":
        return _build(args, paths)
    given = [name for name in _OPTIONS if getattr(args, name) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} has no effect with manifest corpus {args.action}")
    for path in paths:
        shards = Shards.open(path, verify=args.action == "check")
        print(shards.text() if args.action == "show" else f"{path}: ok, sha256 {shards.sha256}")
    return 0


_OPTIONS = ("out", "tokenizer", "end", "field", "name_field", "validation", "seed")


def _build(args: argparse.Namespace, paths: list[Path]) -> int:
    from tqdm import tqdm

    from clbench.streams.tokens import corpus_build, tokenizers
    from clbench.streams.tokens.documents import is_jsonl

    if args.out is None:
        raise UserError("say where to: clbench manifest corpus build FILE ... --out FOLDER")
    if args.end is not None and args.tokenizer is None:
        raise UserError("--end has no effect without --tokenizer: the end mark of bytes is byte 0")
    for name in ("field", "name_field"):
        if getattr(args, name) is not None and not any(map(is_jsonl, paths)):
            raise UserError(f"--{name.replace('_', '-')} has no effect: none of the files is named .jsonl, .ndjson or .json")
    given = {name: getattr(args, name) for name in ("field", "name_field", "validation", "seed")}
    recipe = corpus_build.CorpusRecipe(**{name: value for name, value in given.items() if value is not None})
    encoder = tokenizers.TokenizerFile(Path(args.tokenizer).expanduser(), args.end) if args.tokenizer else tokenizers.Bytes()
    with tqdm(unit="char", unit_scale=True, disable=None, leave=False) as bar:
        shards, there = corpus_build.build(paths, Path(args.out).expanduser(), encoder, recipe, bar.update)
    print(shards.text() + ("\nwas there already, from the same files" if there else ""))
    return 0
