"""Docstrings, comments and options of the source text as Markdown. Nothing of it is imported."""

from __future__ import annotations

import ast
import functools
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from clbench.config.definitions import Definition, definition, module
from clbench.config.signatures import SPECIAL, UNKNOWN, signature
from clbench.report.cards import word

_KINDS = {NoneType: "null", int: "int", float: "float", bool: "bool", str: "text", list: "list", dict: "options"}


def text(words: str) -> str:
    """Plain words of the source as Markdown: nothing is markup but `code`; arXiv numbers are links."""
    parts = re.split(r"(`[^`\n]+`)", words)
    return "".join(part if part.startswith("`") and len(part) > 2 else _escaped(part) for part in parts)


def _escaped(words: str) -> str:
    """No emphasis, no links, no HTML; underscores inside a word are none."""
    made = re.sub(r"([\\`*\[\]|~#])", r"\\\1", words)
    made = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", made)
    made = made.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"arXiv[: ](\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", made)


def code(words: Any) -> str:
    """Words as code in a line or a cell; none of them ends it."""
    return f"`{' '.join(str(words).replace('`', chr(39)).replace('|', chr(0x2223)).split())}`" if str(words).strip() else ""


def block(words: str, kind: str = "text") -> str:
    """Words as they stand, in a block of their own that no line of them ends."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", words))])
    return f"{fence}{kind}\n{words.rstrip()}\n{fence}"


def docstring(words: str) -> str:
    """A docstring: paragraphs as such, lines that are indented (equations, lists of options) as blocks."""
    made: list[str] = []
    for indented, lines in _runs(words.strip("\n").splitlines()):
        body = "\n".join(lines).rstrip()
        if not body.strip():
            continue
        if indented:
            width = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
            body_lines = [line[width:] for line in lines]
            made.append(named(body_lines) or block("\n".join(body_lines)))
        else:
            listed = re.sub(r"(?<=[^\n])\n(?=- )", "\n\n", text(body))
            made.append(listed)
    return "\n\n".join(made)


_ENTRY = re.compile(r"([\w.@/+-]+(?:(?:, ?|=| ?\| ?)[\w.@/+-]+)*) {2,}(\S.*)")


def named(lines: Sequence[str], left: str = "") -> str:
    """Lines of `name   what it is` as a list, lists inside an entry too; empty where they are something else."""
    made: list[str] = []
    entries: list[tuple[str, str, list[str]]] = []
    for line in filter(str.strip, lines):
        if match := _ENTRY.fullmatch(line.rstrip()):
            entries.append((match[1], match[2], []))
        elif line.startswith(" ") and entries:
            entries[-1][2].append(line)
        else:
            return ""
    for name, first, more in entries:
        width = min((len(line) - len(line.lstrip()) for line in more), default=0)
        below = [line[width:] for line in more]
        start = next((i for i, line in enumerate(below) if _ENTRY.fullmatch(line.rstrip())), len(below))
        inner = named(below[start:], left + "    ")
        said = [first, *(line.strip() for line in (below[:start] if inner else below))]
        made += [f"{left}- {code(name)}: {text(' '.join(said))}", *([inner] if inner else [])]
    return "\n".join(made)


def _runs(lines: Sequence[str]) -> Iterator[tuple[bool, list[str]]]:
    """Neighbouring lines that are indented (or `name   what it is`), or are not; an empty line ends both."""
    held: list[str] = []
    kind = False
    for line in lines:
        indented = bool(re.match(r"  |[\w./=-]+ {2,}\S", line))
        if held and (indented != kind or not line.strip()):
            yield kind, held
            held = []
        kind = indented
        held += [line] if line.strip() else []
    if held:
        yield kind, held


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(" ".join(cell.split()) for cell in row) + " |" for row in rows)])


@dataclass(frozen=True)
class Option:
    """An argument of a target: what it may be, its default as a configuration says it, the remark beside it."""

    name: str
    kinds: str
    default: str
    remark: str


def options(target: str, given: Mapping[str, Any], supplied: Sequence[str] = ()) -> list[Option]:
    """Options of a target by its source text; `given` are those of its configuration file, `supplied` clbench gives itself."""
    found, signed = definition(target), signature(target)
    remarks = _remarks(found) if found is not None else {}
    made = []
    for one in signed.parameters.values() if signed is not None else ():
        if one.name in supplied or one.kind is Parameter.VAR_KEYWORD:
            continue
        value = given.get(one.name, one.default)
        made.append(Option(one.name, kinds(one.annotation), shown(value), remarks.get(one.name, "")))
    return made


def options_table(found: Sequence[Option]) -> str:
    rows = [(code(o.name), text(o.kinds), code(o.default) or "-", text(o.remark)) for o in found]
    return table(("option", "may be", "default", "remark"), rows)


def kinds(hint: Any) -> str:
    """An annotation of `signature` in words."""
    if get_origin(hint) is Literal:
        return ", ".join(word(value) for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return ", ".join(dict.fromkeys(kinds(one) for one in get_args(hint)))
    return _KINDS.get(hint, "") if hint is not Parameter.empty else ""


def shown(value: Any) -> str:
    """A default; of a node the name of its function and its options."""
    if value is Parameter.empty:
        return "(must be given)"
    if value is UNKNOWN:
        return "(see the source)"
    if isinstance(value, Mapping) and "_target_" in value:
        inner = ", ".join(f"{k}={shown(v)}" for k, v in value.items() if k not in SPECIAL)
        name = str(value["_target_"]).rpartition(".")[2]
        return f"{name}({inner})" if inner else name
    return word(value)


def _remarks(found: Definition, depth: int = 0) -> dict[str, str]:
    """Argument or field -> the comment behind it, of a function, a class, or the class that it takes its arguments from."""
    node, comments = found.node, _comments(found.path)
    if isinstance(node, ast.ClassDef):
        own = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        made: dict[str, str] = {}
        for base in node.bases if own is None and depth < 8 else ():
            above = found.beside(base.id) if isinstance(base, ast.Name) else None
            made |= _remarks(above, depth + 1) if above is not None else {}
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        made |= {ast.unparse(n.target): comments[n.end_lineno] for n in fields if n.end_lineno in comments}
        node = own
        if node is None:
            return made
    if not isinstance(node, ast.FunctionDef):
        return {}
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    lines = [one.lineno for one in every]  # where several stand on one line, its comment is nobody's
    return {one.arg: comments[one.lineno] for one in every if one.lineno in comments and lines.count(one.lineno) == 1}


@functools.lru_cache(maxsize=256)
def _comments(path: Path) -> dict[int, str]:
    """Line -> the comment that ends it; comments of a checker of types or style are left out."""
    with path.open("rb") as file:
        found = {t.start[0]: t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT}
    return {i: c.lstrip("# ") for i, c in found.items() if not re.match(r"#\s*(noqa|type:|pyright:)", c)}


def about(target: str, whole: bool = False) -> str:
    """The docstring of a target, or of its module (`whole`); empty where the source does not say."""
    found = definition(target)
    if found is None:
        return ""
    node = module(found.path) if whole else found.node
    return ast.get_docstring(node) or "" if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else ""
