"""Command-line overrides: their keys, and error messages for a wrong choice. Imports neither torch nor Hydra."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clbench.config.registry import GROUPS, choices
from clbench.config.signatures import nearest
from clbench.interfaces import UserError

_KEY = re.compile(r"[~+]{0,2}([^=@]+)")


def check_groups(overrides: Sequence[Any]) -> None:
    """Raises `UserError` for a group set to a number or null: a group is chosen by a name, and Hydra's error is obscure."""
    for o in overrides:
        group = o.get_key_element()
        if group in GROUPS and not o.is_sweep_override() and not o.is_delete() and not isinstance(o.value(), str | list):
            if o.value() is None:
                raise UserError(f"{o.input_line} has no effect: leave it out")
            raise UserError(unknown_choice(group, str(o.value()), list(choices(group))))


def unknown_choice(group: str, name: str, names: Sequence[str]) -> str:
    """Error message for a name that a group does not have."""
    return f"no {group} '{name}'{nearest(name, names)} (one of: {', '.join(names)})"


def key_of(override: str) -> str:
    """`learner.lr` of `+learner.lr=0.1`; the override itself where it has no key."""
    found = _KEY.match(override)
    return found[1].strip() if found else override


def looks_like_path(key: str, value: str) -> bool:
    """Whether a value that is no valid expression is taken for a path: by its option, a slash or a suffix. No list is one."""
    named = key_of(key).rpartition(".")[2] in ("dataset", "path", "data_root", "results_dir", "weights")
    pathlike = named or "/" in value or os.sep in value or re.search(r"\.\w{1,8}$", value) is not None
    structured = value[:1] in "'\"" or (value[:1], value[-1:]) in (("[", "]"), ("{", "}"))
    return pathlike and not structured


def dotted(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all options in a nested configuration."""
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{name}.")


def word(value: Any) -> str:
    """A value as Hydra reads it on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(word(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./:@-]+", value):
        return "'" + value.replace("'", "\\'") + "'"
    return str(value)
