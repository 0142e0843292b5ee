"""Signatures of configuration targets, as `inspect` describes them, read from the source text: nothing is imported.

So a wrong argument is answered before torch is loaded, and the class stays the only place where its arguments are listed.
What the source does not say plainly (an annotation that is not understood, `**kwargs`, a compiled module) is let through.
Tests hold every signature here to `inspect.signature` and `typing.get_type_hints` of the imported object.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from inspect import Parameter
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from clbench.config.definitions import Definition, definition, find_module, nearest, split_target
from clbench.interfaces import UserError

__all__ = ["SPECIAL", "UNKNOWN", "find_module", "nearest", "problems", "signature", "split_target"]

SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
UNKNOWN = object()  # a default that the source does not say plainly
_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "None": NoneType, "Path": str, "PathLike": str}
_TYPES |= dict.fromkeys(("list", "tuple", "Sequence", "Iterable", "set", "frozenset"), list)
_TYPES |= dict.fromkeys(("dict", "Mapping"), dict)
_WORDS = {NoneType: "null", list: "list", dict: "mapping"}


def signature(target: str) -> inspect.Signature | None:
    """A target's signature without `self`; None where the source does not tell. Unknown names raise `UserError`.

    Defaults are as a configuration says them: lists for tuples, nodes for functions and objects, else `UNKNOWN`. Annotations
    are the types of a configuration (`Path` is str, sequences are lists, mappings dicts); empty where anything may come.
    """
    found = definition(target)
    return _signature(found) if found is not None else None


def _signature(found: Definition, depth: int = 0) -> inspect.Signature | None:
    node = found.node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _made(_parameters(node.args, found))
    if not isinstance(node, ast.ClassDef) or depth > 8:
        return None
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _made(list(_parameters(item.args, found))[1:])
    inherited: dict[str, Parameter] = {}
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    for base in node.bases:
        parent = found.beside(base.id) if isinstance(base, ast.Name) else None
        above = _signature(parent, depth + 1) if parent is not None else None
        if above is None or not is_dataclass:
            return above
        inherited |= above.parameters
    return _made((inherited | {p.name: p for p in _fields(found)}).values() if is_dataclass else ())


def _made(parameters: Iterable[Parameter]) -> inspect.Signature:
    return inspect.Signature(list(parameters), __validate_parameters__=False)  # `field` may put those with a default first


def _fields(found: Definition) -> Iterator[Parameter]:
    """The parameters that a dataclass adds to those of its bases."""
    for item in found.node.body:
        own = isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)
        if own and isinstance(item.target, ast.Name):
            yield _parameter(item.target.id, Parameter.POSITIONAL_OR_KEYWORD, item.annotation, item.value, found)


def _parameters(args: ast.arguments, found: Definition) -> Iterator[Parameter]:
    """All but `*args`, which a configuration cannot give."""
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    for a, default in zip(positional, defaults, strict=True):
        kind = Parameter.POSITIONAL_ONLY if a in args.posonlyargs else Parameter.POSITIONAL_OR_KEYWORD
        yield _parameter(a.arg, kind, a.annotation, default, found)
    for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _parameter(a.arg, Parameter.KEYWORD_ONLY, a.annotation, default, found)
    if args.kwarg:
        yield Parameter(args.kwarg.arg, Parameter.VAR_KEYWORD)


def _parameter(name: str, kind: Any, annotation: ast.expr | None, default: ast.expr | None, found: Definition) -> Parameter:
    value = Parameter.empty if default is None else _default(default, found)
    return Parameter(name, kind, default=value, annotation=Parameter.empty if annotation is None else _hint(annotation, found))


def _default(node: ast.expr, found: Definition, depth: int = 0) -> Any:
    """A default as a configuration says it.

    A function or class by its name is a partial node without options; a call of one, or of `partial`, a node with those given.
    """
    with suppress(ValueError):
        return _plain(ast.literal_eval(node))
    if isinstance(node, ast.Name):
        named = found.beside(node.id, own=True) if depth < 5 else None
        if named is None:
            return UNKNOWN
        if isinstance(named.node, ast.Assign | ast.AnnAssign):
            return _default(named.node.value, named, depth + 1) if named.node.value else UNKNOWN
        return {"_target_": named.target, "_partial_": True}
    if not isinstance(node, ast.Call) or any(k.arg is None for k in node.keywords):
        return UNKNOWN
    is_partial = ast.unparse(node.func) in ("partial", "functools.partial") and len(node.args) == 1
    made = _default(node.args[0] if is_partial else node.func, found, depth)
    options = {str(k.arg): _default(k.value, found, depth) for k in node.keywords}
    if not isinstance(made, dict) or "_target_" not in made or UNKNOWN in options.values() or (node.args and not is_partial):
        return UNKNOWN
    return (made if is_partial else {"_target_": made["_target_"]}) | options


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return UNKNOWN if UNKNOWN in (items := [_plain(item) for item in value]) else items
    return value if value is None or isinstance(value, bool | int | float | str) else UNKNOWN


def _hint(node: ast.expr, found: Definition, depth: int = 0) -> Any:
    """An annotation as a type of configurations; `Parameter.empty` where anything may come."""
    match node:
        case ast.Constant(value=None):
            return NoneType
        case ast.Constant(value=str(text)):
            return _hint(ast.parse(text, mode="eval").body, found, depth)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _either([left, right], found, depth)
        case ast.Subscript(value=outer, slice=inner):
            items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            name = _last(outer)
            if name == "Literal":
                return Literal[tuple(ast.literal_eval(item) for item in items)]
            if name in ("Optional", "Union"):
                return _either([*items, *([ast.Constant(None)] if name == "Optional" else [])], found, depth)
            return _hint(outer, found, depth)
    name = _last(node)
    if name in _TYPES or depth > 4:
        return _TYPES.get(name, Parameter.empty)
    alias = found.beside(name, own=True)
    known = alias is not None and isinstance(alias.node, ast.Assign)
    return _hint(alias.node.value, alias, depth + 1) if alias is not None and known else Parameter.empty


def _either(items: list[ast.expr], found: Definition, depth: int) -> Any:
    every = tuple(_hint(item, found, depth) for item in items)
    return Parameter.empty if Parameter.empty in every else Union[every]  # noqa: UP007 their number is not known


def _last(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def problems(node: Mapping[str, Any], where: str, supplied: Iterable[str] = ()) -> list[str]:
    """Everything that is wrong with a node that has `_target_`, one line each; `supplied` arguments come from clbench."""
    target = node["_target_"]
    if not isinstance(target, str):
        return [f"{where}._target_ must be a name, got {target!r}"]
    try:
        found = definition(target)
    except UserError as error:
        return [f"{where}: {error}"]
    signed = _signature(found) if found is not None else None
    if found is None or signed is None:
        return []
    named = {name: p for name, p in signed.parameters.items() if p.kind is not p.VAR_KEYWORD}
    given = {key: value for key, value in node.items() if key not in SPECIAL}
    lines = []
    for key, value in given.items():
        if key in supplied:
            lines.append(f"{where}.{key} is given by clbench and cannot be set")
        elif key in named:
            lines += _mismatch(named[key].annotation, value, f"{where}.{key}")
        elif named.keys() == signed.parameters.keys():
            names = [name for name in named if name not in supplied]
            lines.append(f"{where}.{key}: {found.node.name} has no argument '{key}'{nearest(key, names)}")
    if not node.get("_partial_"):
        missing = [name for name, p in named.items() if p.default is p.empty and name not in given and name not in supplied]
        lines += [f"{where}.{name} is missing: {found.node.name} needs it" for name in missing]
    return lines


def _mismatch(hint: Any, value: Any, where: str) -> list[str]:
    """One line if a value is of none of the types that an annotation names."""
    kinds = _kinds(hint)
    if hint is Parameter.empty or any(_fits(value, kind) for kind in kinds):
        return []
    words = [str(kind) for kind in kinds if not isinstance(kind, type)]
    shown = " or ".join(sorted({_WORDS.get(kind, kind.__name__) if isinstance(kind, type) else str(kind) for kind in kinds}))
    return [f"{where} must be {shown}, got {value!r}{nearest(str(value), words) if words else ''}"]


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of a type: types, and the values of a `Literal` (None as its type)."""
    if get_origin(hint) is Union:
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    if get_origin(hint) is Literal:
        return [NoneType if value is None else value for value in get_args(hint)]
    return [hint]


def _fits(value: Any, kind: Any) -> bool:
    if not isinstance(kind, type):
        return str(value) == str(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (list, dict):
        return isinstance(value, list | tuple if kind is list else Mapping)
    return type(value) is kind
