"""Where a configuration's target is defined, by its source text. Nothing is imported: records of others name targets too."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from clbench.config.moved import current
from clbench.interfaces import UserError


def nearest(word: str, names: Iterable[str]) -> str:
    """'; did you mean X?' for a mistyped word, or nothing where no name is near."""
    close = difflib.get_close_matches(word, list(names), n=3, cutoff=0.5)
    close.sort(key=lambda name: (-difflib.SequenceMatcher(None, name, word).ratio(), sorted(name) != sorted(word)))
    return f"; did you mean '{close[0]}'?" if close else ""


def find_module(name: str) -> ModuleSpec | None:
    """The spec of a module by dotted name. Unlike `importlib.util.find_spec` it imports no parent package."""
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    for i, part in enumerate(rest):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join([first, *rest[: i + 1]]), list(spec.submodule_search_locations)) if part else None
    return spec


def split_target(target: str) -> tuple[Path | None, str]:
    """A target as (source file, name in it): `pkg.module.Class` or `path/to/file.py:Class`. `UserError` if nothing is there."""
    if ".py:" in target:
        path, name = target.rsplit(":", 1)
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"no file {path} (from _target_={target})")
        return file, name
    parts = current(target).split(".")
    for n in range(len(parts) - 1, 0, -1):
        spec = find_module(".".join(parts[:n]))
        if spec is not None:
            source = spec.origin if spec.origin and spec.origin.endswith(".py") else None
            return (Path(source) if source else None), ".".join(parts[n:])
    if len(parts) < 2:
        raise UserError(f"_target_={target} names no module: write module.Class or path/to/file.py:Class")
    raise UserError(f"no module {'.'.join(parts[:-1])} (from _target_={target}); it must be installed or lie in this folder")


@functools.cache
def module(path: Path) -> ast.Module:
    """The syntax tree of a source file. `UserError` with the line of a syntax error."""
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None


@functools.cache
def _names(path: Path) -> Mapping[str, ast.stmt]:
    """Name -> the first statement of a module that defines or imports it, those under `if` and `try` included."""
    found: dict[str, ast.stmt] = {}
    todo: list[ast.stmt] = list(module(path).body)
    while todo:
        node, names = todo.pop(0), []
        match node:
            case ast.If() | ast.Try():
                todo = [*node.body, *node.orelse, *todo]
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                names = [node.name]
            case ast.Import() | ast.ImportFrom():
                names = [alias.asname or alias.name.split(".")[0] for alias in node.names]
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [t.id for t in targets if isinstance(t, ast.Name)]
        for name in names:
            found.setdefault(name, node)
    return found


@dataclass(frozen=True)
class Definition:
    """Where a target is defined: the statement (class, function or assignment), the file, and its name from there."""

    node: Any
    path: Path
    target: str

    def beside(self, name: str, own: bool = False) -> Definition | None:
        """What a name of the same module means; None where it cannot be told.

        `own`: nor where it comes from a package that is neither this one nor clbench, whose files may be long.
        """
        target = self.target[: max(self.target.rfind("."), self.target.rfind(":")) + 1] + name
        node = _names(self.path).get(name)
        if own and isinstance(node, ast.ImportFrom):
            root = (_imported(node, name, target) or "").partition(".")[0]
            if root not in ("clbench", self.target.partition(".")[0]):
                return None
        with suppress(UserError):
            return definition(target) if node is not None else None
        return None


def definition(target: str, depth: int = 0) -> Definition | None:
    """Follow a target through imports to its definition; None where the source does not tell. Unknown names: `UserError`."""
    path, name = split_target(target)
    if path is None or depth > 8:
        return None
    path, head = path.resolve(), name.partition(".")[0]
    names = _names(path)
    node = names.get(head)
    if isinstance(node, ast.ImportFrom):
        found = _imported(node, head, target)
        return definition(found, depth + 1) if found else None
    if node is not None:
        return Definition(node, path, target) if head == name and not isinstance(node, ast.Import) else None
    if path.name == "__init__.py" and "." in name:
        raise UserError(f"no module {target.rsplit('.', 1)[0]} (from _target_={target})")
    if "*" not in names:
        own = sorted(n for n, found in names.items() if not isinstance(found, ast.ImportFrom))
        raise UserError(f"{path.name} has no '{head}'{nearest(head, own)} (from _target_={target})")
    return None


def _imported(node: ast.ImportFrom, head: str, target: str) -> str | None:
    """The target that an imported name stands for, or None where that cannot be told."""
    name = next(alias.name for alias in node.names if (alias.asname or alias.name) == head)
    if node.level == 0:
        return f"{node.module}.{name}"
    spec = find_module(target[: -len(head) - 1]) if ".py:" not in target else None
    if spec is None or not spec.parent:
        return None
    with suppress(ImportError):  # beyond the top of a package
        return f"{importlib.util.resolve_name('.' * node.level + (node.module or ''), spec.parent)}.{name}"
    return None
