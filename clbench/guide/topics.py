"""The guide's pages by topic. Reads Markdown files, imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from clbench.config.definitions import nearest
from clbench.interfaces import UserError


def topics() -> dict[str, Path]:
    """Topic -> its page, by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.md"))}


def title(path: Path) -> str:
    """The first heading of a page."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def read(topic: str) -> str:
    """The page of a topic. `UserError` with the nearest one where there is none."""
    found = topics()
    if topic not in found:
        raise UserError(f"no topic '{topic}'{nearest(topic, found)} (one of: {', '.join(found)})")
    return found[topic].read_text(encoding="utf-8")
