"""What lies in a folder of class folders: image files by class, links followed, and a count of all that is passed over."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from clbench.interfaces import UserError

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .ppm .pgm .pbm .pnm .tif .tiff .gif .jp2 .avif".split()
)  # upper case too
SYSTEM = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"))  # folders that no user made
CIRCLES, HIDDEN, LOOSE = (
    "link(s) in a circle or to folders read already",
    "hidden or of the system",
    "file(s) beside the class folders",
)


class Listing:
    """Reads class folders and counts what it passes over."""

    def __init__(self) -> None:
        self.passed_over: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def classes(self, folder: Path) -> list[str]:
        """Names of the class folders, sorted as text; links to folders are class folders too."""
        names = []
        for entry in _entries(folder):
            if _hidden(entry.name):
                self.passed_over[HIDDEN] += 1
            elif entry.is_dir():
                names.append(_checked_name(folder, entry.name))
            else:
                self.passed_over[LOOSE] += 1
        if not names:
            raise UserError(f"{folder} holds no class folders")
        return sorted(names)

    def images(self, folder: Path) -> list[Path]:
        """Image files of a class, sorted by name below its folder, at any depth.

        Every folder is read once, links last; a link to a folder above the class leads in a circle and is not followed.
        """
        found: list[Path] = []
        todo, links = [folder], []
        seen = {(one.st_dev, one.st_ino) for one in map(os.stat, folder.resolve().parents)}
        while todo or links:
            place = todo.pop() if todo else links.pop(0)
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                self.passed_over[CIRCLES] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            for entry in sorted(_entries(place), key=lambda one: one.name):
                if _hidden(entry.name):
                    self.passed_over[HIDDEN] += 1
                elif entry.is_dir():
                    (links if entry.is_symlink() else todo).append(place / entry.name)
                elif _suffix(entry.name) in EXTENSIONS and (entry.is_file() or entry.is_symlink()):  # broken links are named
                    found.append(place / entry.name)
                else:
                    self.kinds[_suffix(entry.name) or "no suffix"] += 1
        return sorted(found, key=lambda path: path.relative_to(folder).as_posix())

    def text(self) -> str:
        """What was passed over, in a few words; empty where nothing was."""
        said = [f"{number} {what}" for what, number in sorted(self.passed_over.items())]
        if self.kinds:
            common = ", ".join(kind for kind, _ in sorted(self.kinds.items(), key=lambda one: (-one[1], one[0]))[:5])
            said.append(f"{sum(self.kinds.values())} file(s) that are no image ({common})")
        return ", ".join(said)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from None


def _checked_name(folder: Path, name: str) -> str:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{folder} holds a class folder whose name is not UTF-8, {os.fsencode(name)!r}: rename it") from None
    return name
