"""Compares configuration values with the signature of their `_target_`, read from the source text: nothing is imported.

So a wrong argument is answered before torch is loaded, and the class stays the only place where its arguments are listed.
What the source does not say plainly (an annotation that is not understood, `**kwargs`, a compiled module) is let through.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from clbench.config.moved import current
from clbench.interfaces import UserError

SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
Kinds = frozenset[str]
_PLAIN = {"int": "int", "float": "float", "bool": "bool", "str": "str", "None": "null", "Path": "str", "PathLike": "str"}
_LISTS = ("list", "tuple", "Sequence", "Iterable", "set", "frozenset")
_DICTS = ("dict", "Mapping")


@dataclass(frozen=True)
class Parameter:
    """One argument: its annotation as source (None without one), and whether it may be left out."""

    name: str
    annotation: ast.expr | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """Arguments of a target by name, without `self`; `open` when it takes any keyword."""

    name: str
    parameters: dict[str, Parameter]
    open: bool
    module: ast.Module


def nearest(word: str, names: Iterable[str]) -> str:
    """'; did you mean X?' for a mistyped word, or nothing where no name is near."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
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
def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None


def signature(target: str, depth: int = 0) -> Signature | None:
    """Read a target's signature from its source; None where the source does not tell. Unknown names raise `UserError`."""
    path, name = split_target(target)
    if path is None or depth > 8:
        return None
    module = _parse(path.resolve())
    head = name.split(".")[0]
    for node in _statements(module):
        if isinstance(node, ast.ClassDef) and node.name == head and head == name:
            return _of_class(node, module, target, depth)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == head == name:
            return _of_function(node, module, name, skip=0)
        if isinstance(node, ast.ImportFrom) and head in (alias.asname or alias.name for alias in node.names):
            found = _imported(node, head, target)
            return signature(found, depth + 1) if found else None
    names = sorted(_names(module))
    if path.name == "__init__.py" and "." in name:
        raise UserError(f"no module {target.rsplit('.', 1)[0]} (from _target_={target})")
    if head not in names and not any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in module.body):
        raise UserError(f"{path.name} has no '{head}'{nearest(head, names)} (from _target_={target})")
    return None


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """Statements of a module, those under `if` and `try` included."""
    todo: list[ast.stmt] = list(module.body)
    while todo:
        node = todo.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try):
            todo = [*node.body, *node.orelse, *todo]


def _names(module: ast.Module) -> Iterator[str]:
    for node in _statements(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Import):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)


def _imported(node: ast.ImportFrom, head: str, target: str) -> str | None:
    """The target that an imported name stands for, or None where that cannot be told."""
    name = next(alias.name for alias in node.names if (alias.asname or alias.name) == head)
    if node.level == 0:
        return f"{node.module}.{name}"
    if ".py:" in target:
        return None
    module = target[: -len(head) - 1]
    spec = find_module(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*base, *([node.module] if node.module else []), name])


def _of_class(node: ast.ClassDef, module: ast.Module, target: str, depth: int) -> Signature | None:
    """The signature of `__init__`, of a dataclass, or of the nearest base class that has one."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _of_function(item, module, node.name, skip=1)
    inherited: dict[str, Parameter] = {}
    for base in node.bases:
        if not isinstance(base, ast.Name) or depth > 8:
            return None
        known = base.id in _names(module) or any(
            isinstance(n, ast.ImportFrom) and base.id in (a.asname or a.name for a in n.names) for n in _statements(module)
        )
        prefix = target[: target.rindex(":") + 1] if ".py:" in target else target[: target.rindex(".") + 1]
        found = signature(prefix + base.id, depth + 1) if known else None
        if found is None:
            return None
        if not _is_dataclass(node):
            return Signature(node.name, found.parameters, found.open, found.module)
        inherited |= found.parameters
    if not _is_dataclass(node):
        return Signature(node.name, {}, False, module)
    fields = [i for i in node.body if isinstance(i, ast.AnnAssign) and isinstance(i.target, ast.Name)]
    own = {i.target.id: Parameter(i.target.id, i.annotation, i.value is None) for i in fields if isinstance(i.target, ast.Name)}
    own = {name: p for name, p in own.items() if "ClassVar" not in ast.unparse(p.annotation or ast.Constant(0))}
    return Signature(node.name, inherited | own, False, module)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, module: ast.Module, name: str, skip: int) -> Signature:
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    without = len(positional) - len(args.defaults)
    found = {a.arg: Parameter(a.arg, a.annotation, i < without) for i, a in enumerate(positional) if i >= skip}
    for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found[a.arg] = Parameter(a.arg, a.annotation, default is None)
    return Signature(name, found, args.kwarg is not None, module)


def problems(node: Mapping[str, Any], where: str, supplied: Iterable[str] = ()) -> list[str]:
    """Everything that is wrong with a node that has `_target_`, one line each; `supplied` arguments come from clbench."""
    target = node["_target_"]
    if not isinstance(target, str):
        return [f"{where}._target_ must be a name, got {target!r}"]
    try:
        found = signature(target)
    except UserError as error:
        return [f"{where}: {error}"]
    if found is None:
        return []
    given = {key: value for key, value in node.items() if key not in SPECIAL}
    lines = []
    for key, value in given.items():
        if key in supplied:
            lines.append(f"{where}.{key} is given by clbench and cannot be set")
        elif key in found.parameters:
            lines += _mismatch(found.parameters[key], value, f"{where}.{key}", found.module)
        elif not found.open:
            names = [name for name in found.parameters if name not in supplied]
            lines.append(f"{where}.{key}: {found.name} has no argument '{key}'{nearest(key, names)}")
    if not node.get("_partial_"):
        missing = [p.name for p in found.parameters.values() if p.required and p.name not in given and p.name not in supplied]
        lines += [f"{where}.{name} is missing: {found.name} needs it" for name in missing]
    return lines


def _mismatch(parameter: Parameter, value: Any, where: str, module: ast.Module) -> list[str]:
    """One line if a value is none of the kinds that the annotation names."""
    if parameter.annotation is None:
        return []
    allowed = _allowed(parameter.annotation, module)
    if allowed is None or _fits(value, allowed):
        return []
    words = [kind[1:] for kind in allowed if kind.startswith("=")]
    hint = nearest(str(value), words) if words else ""
    shown = " or ".join(sorted(kind.lstrip("=") for kind in allowed))
    return [f"{where} must be {shown}, got {value!r}{hint}"]


def _fits(value: Any, allowed: Kinds) -> bool:
    if value is None:
        return "null" in allowed
    if isinstance(value, bool):
        return "bool" in allowed or f"={value}" in allowed
    if isinstance(value, Mapping):
        return "mapping" in allowed
    if isinstance(value, list | tuple):
        return "list" in allowed
    if isinstance(value, int) and "float" in allowed:
        return True
    return type(value).__name__ in allowed or f"={value}" in allowed


def _allowed(node: ast.expr, module: ast.Module, depth: int = 0) -> Kinds | None:
    """The kinds that an annotation allows; None where it may be anything."""
    if isinstance(node, ast.Constant):
        if node.value is None:
            return frozenset(["null"])
        return _allowed(ast.parse(node.value, mode="eval").body, module, depth) if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _either([node.left, node.right], module, depth)
    if isinstance(node, ast.Subscript):
        name = _last(node.value)
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Literal":
            return frozenset("null" if ast.literal_eval(item) is None else f"={ast.literal_eval(item)}" for item in items)
        if name in ("Optional", "Union"):
            found = _either(items, module, depth)
            return found if found is None or name == "Union" else found | {"null"}
        return _allowed(node.value, module, depth)
    name = _last(node)
    if name in _PLAIN:
        return frozenset([_PLAIN[name]])
    if name in _LISTS or name in _DICTS:
        return frozenset(["list" if name in _LISTS else "mapping"])
    for item in _statements(module):
        if depth < 5 and isinstance(item, ast.Assign) and name in (t.id for t in item.targets if isinstance(t, ast.Name)):
            return _allowed(item.value, module, depth + 1)
    return None


def _either(items: list[ast.expr], module: ast.Module, depth: int) -> Kinds | None:
    every = [_allowed(item, module, depth) for item in items]
    return None if any(kinds is None for kinds in every) else frozenset().union(*(kinds for kinds in every if kinds))


def _last(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
