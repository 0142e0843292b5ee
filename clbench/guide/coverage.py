"""Which methods of other suites are here, and what is here alone: a page made of `peers.yaml` and the learners themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.config import families, registry
from clbench.interfaces import UserError

PEERS = Path(__file__).parent / "peers.yaml"


def load(path: Path = PEERS) -> dict[str, Any]:
    """Suites and methods. `UserError` where a method names a learner or a suite that does not exist."""
    import yaml

    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = registry.choices("learner")
    for row in found["methods"]:
        if "here" in row and learner_of(row) not in known:
            raise UserError(f"{path.name}: {row['method']}: no learner '{learner_of(row)}'")
        if wrong := row.keys() - {"method", "here"} - found["suites"].keys():
            raise UserError(f"{path.name}: {row['method']}: no suite '{min(wrong)}'")
    return found


def learner_of(row: Mapping[str, Any]) -> str:
    """The learner that a row's words choose."""
    return str(row["here"]).split()[0].removeprefix("learner=")


def names(row: Mapping[str, Any], suite: str) -> list[str]:
    """What a suite calls a method; several where it has several forms."""
    return [name.strip() for name in str(row.get(suite, "")).split(",") if name.strip()]


def counts(found: Mapping[str, Any], suite: str) -> tuple[int, int]:
    """(methods of a suite that are here, all its methods)."""
    mine = [(len(names(row, suite)), "here" in row) for row in found["methods"]]
    return sum(n for n, here in mine if here), sum(n for n, _ in mine)


def only_here(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Family -> clbench's own learners that no suite of the file has, those of pre-training left out."""
    elsewhere = {learner_of(row) for row in found["methods"] if "here" in row and len(row) > 2}
    rows: dict[str, list[str]] = {}
    own = [(name, path) for name, (path, *_) in registry.choices("learner").items() if registry.origin(path) == "clbench"]
    for family, name, _ in families.sorted_by_family("learner", own):
        if name not in elsewhere and registry.asks("learner", name) == "predict":
            rows.setdefault(family, []).append(name)
    return rows


def page(found: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    suites = found["suites"]
    lines = [
        "# Coverage: methods of other suites",
        "",
        "Which methods of five suites clbench has, and the words that choose each. Made from the learners and from what the",
        "suites' repositories held at the commits below; `clbench help coverage` shows this page.",
        "",
        *_table(
            ("suite", "methods", "here", "repository", "commit", "counted"),
            [
                (
                    s["name"],
                    str(counts(found, key)[1]),
                    str(counts(found, key)[0]),
                    s["repository"],
                    f"{s['commit']} ({s['date']})",
                    s["counted"],
                )
                for key, s in suites.items()
            ],
        ),
        "",
        "A method here has the same name and paper, not the same numbers: where code and paper differ, the learner's docstring",
        "says which is meant. An empty cell: the suite does not have the method; no word under `clbench`: clbench does not.",
        "",
        *_table(
            ("method", "clbench", *(s["name"] for s in suites.values())),
            [
                (row["method"], f"`{row['here']}`" if "here" in row else "", *(", ".join(names(row, key)) for key in suites))
                for row in found["methods"]
            ],
        ),
        "",
        "Learners that none of the five suites has:",
        "",
        *(f"- {family}: {', '.join(f'`{name}`' for name in names)}" for family, names in only_here(found).items()),
    ]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its columns aligned so that a terminal shows it too."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    return [f"| {' | '.join(row)} |" for row in (padded[0], ["-" * width for width in widths], *padded[1:])]


def write() -> Path:
    """Make the page anew, beside this file."""
    path = PEERS.with_name("coverage.md")
    path.write_text(page(load()), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write())
