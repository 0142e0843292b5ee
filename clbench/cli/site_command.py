"""`clbench site`: the guide, the catalogue and the Python names as static HTML. Loads no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from clbench.cli.help_text import EXAMPLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="where to write: pages/, mkdocs.yml, html/")
    parser.add_argument("--pages", action="store_true", help="Markdown and mkdocs.yml alone: needs no extra")
    words = "whose CARDS.md stands on the learners' pages (results)"
    parser.add_argument("--results-dir", default="results", metavar="DIR", help=words)


def commands() -> dict[str, str]:
    """Command -> its help."""
    from clbench.cli.main import parser_of
    from clbench.report import subcommands

    made = {name: parser_of(name).format_help() for name in EXAMPLES}
    return made | {f"report {page}": parser_of("report", page).format_help() for page in subcommands.PAGES}


def run(args: argparse.Namespace) -> int:
    """Write the pages, and the HTML unless told not to -> 0."""
    from clbench.guide.site import build

    folder, cards = Path(args.folder).expanduser(), Path(args.results_dir).expanduser() / "CARDS.md"
    made = build.pages(cards.read_text(encoding="utf-8") if cards.is_file() else "", commands())
    build.write(folder, made)
    no_cards = "" if cards.is_file() else f"; no cards: {cards} is not there"
    print(f"written {len(made)} pages under {folder / 'pages'}{no_cards}")
    if not args.pages:
        print(f"written {build.build(folder)}; its search needs a server: python -m http.server -d {folder / 'html'}")
    return 0
