"""Pages of the public names of `clbench`: what each is, and its documentation, which mkdocstrings reads from the source."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import clbench
from clbench.config.definitions import find_module, module
from clbench.guide.site import prose

_ROOMS = {  # the first part of a name's home -> title and what it holds
    "interfaces": ("The nouns", "Protocols and small classes that everything else is written against."),
    "streams": ("Streams", "Scenarios, manifests, entries, data sets and random numbers."),
    "models": ("Models", "Backbone, heads and parameter-efficient modules."),
    "training": ("Training", "The one loop that trains, and what learners share."),
    "evaluation": ("Numbers", "Formulas over sums: accuracies, losses, other suites' definitions."),
    "config": ("Configuration", "A run's configuration from words."),
    "run": ("Finished runs", "A learner as it was when its run ended."),
    "testing": ("Contract", "Checks that a learner or a scenario of your own must pass."),
}


def pages() -> dict[str, str]:
    """File -> page: a page for each room, and one that lists all names."""
    made, listed = {}, []
    for room, (title, what) in _ROOMS.items():
        found = [name for name in clbench.__all__ if clbench._HOME[name].partition(".")[0] == room]
        rows = [(f"[{name}]({room}.md#{home(name)})", prose.text(first_line(name))) for name in found]
        listed += [f"## {title}", what, prose.table(("name", "what it is"), rows)]
        parts = [f"# {title}", what, f"`from clbench import {', '.join(found)}`"]
        parts += [f"::: {home(name)}" for name in found]
        made[f"api/{room}.md"] = "\n\n".join(parts) + "\n"
    head = [
        "# Python names",
        "Everything that a plug-in needs is imported from `clbench` itself: `from clbench import Learner, fit`."
        " Other modules may move without notice.",
    ]
    return made | {"api/index.md": "\n\n".join([*head, *listed]) + "\n"}


def home(name: str) -> str:
    """The dotted path of a public name: an object in its module, or a module."""
    return f"clbench.{clbench._HOME[name]}.{name}"


def first_line(name: str) -> str:
    """The first line of its docstring."""
    return (ast.get_docstring(_node(f"clbench.{clbench._HOME[name]}", name)) or "").partition("\n")[0]


def _node(where: str, name: str) -> Any:
    """What a module defines under a name, or the module of that name inside a package."""
    if (inner := find_module(f"{where}.{name}")) is not None and inner.origin:
        return module(Path(inner.origin))
    spec = find_module(where)
    assert spec is not None and spec.origin is not None
    for node in module(Path(spec.origin)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _node(str(node.module), name)
    raise AssertionError(f"{where} does not define {name}")
