"""Configuration files that say only what differs from Python: the rest comes from the signature of their `_target_`.

So an option has one default, beside its name in the class, and the composed configuration still shows every option.
Imports neither torch nor Hydra.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any

from clbench.config.signatures import SPECIAL, UNKNOWN, signature
from clbench.interfaces import UserError

GROUPS = ("learner", "schedule", "pet")  # whose files are filled; scenarios and models list their options


def filled(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node with every option that its target has a default for, in the order of the signature; nested nodes too.

    A default that is a function is named without its options: a file that wants them open says so by a node of its own.
    What the source does not say plainly is left out, and so is everything of a target that is not found.
    """
    made = {key: filled(value) if _is_node(value) else value for key, value in node.items()}
    try:
        target = node.get("_target_")
        signed = signature(target) if isinstance(target, str) else None
    except UserError:  # `check` says so, where the node is used
        return made
    options = signed.parameters.values() if signed is not None else ()
    found = {p.name: shown(p.default) for p in options if p.default is not Parameter.empty and p.default is not UNKNOWN}
    given = {p.name: made[p.name] for p in options if p.name in made}
    special = {key: made[key] for key in SPECIAL if key in made}
    order = {p.name: None for p in options if p.name in found or p.name in given}
    return special | order | found | given | {key: value for key, value in made.items() if key not in given | special}


def shown(default: Any) -> Any:
    """A default of `signature` as the composed configuration shows it."""
    return filled(default) if _is_node(default) and default.keys() != {"_target_", "_partial_"} else default


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def read(path: Path) -> dict[str, Any]:
    """A configuration file as Hydra reads it, without its defaults list: `filled` in the groups whose files are."""
    import yaml

    node = numbers(yaml.safe_load(path.read_text(encoding="utf-8")))
    return filled(node) if path.parent.name in GROUPS and _is_node(node) else node


def numbers(found: Any) -> Any:
    """YAML 1.2: 1e-3 is a number too."""
    if isinstance(found, dict):
        return {key: numbers(value) for key, value in found.items()}
    if isinstance(found, list):
        return [numbers(value) for value in found]
    if isinstance(found, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", found):
        return float(found)
    return found
