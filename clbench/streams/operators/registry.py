"""Names of operators, and the list `scenario.operators` applied to a stream. Importing it imports no operator.

A list holds names, or names with options: [permute], [{permute: {experiences: 5}}, single_pass].
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clbench.interfaces import UserError

if TYPE_CHECKING:
    from clbench.streams.scenario import Scenario

GROUP = "clbench.operators"
_NAMES = (
    *("permute", "rotate", "corrupt", "relabel", "label_noise", "long_tail", "shots", "blur", "repeat", "drift", "order"),
    *("mnist_360", "bell", "file_lists", "concatenate", "shuffle", "single_pass"),
    *("hide_boundaries", "looks", "evaluate", "test_time", "evaluators"),
)
BUILT_IN = {name: f"{__package__}.{name}.{name}" for name in _NAMES}
# options that came to an operator later: left out of a manifest at this value, so that hashes stay
ADDED: dict[str, dict[str, Any]] = {"corrupt": {"published": None}}
PLACES = ("datasets", "dataset", "support", "published", "folder")  # options that say where data lies
SUPPLIED = ("stream", "data_root", "download")  # arguments that clbench gives, those that an operator has


def targets() -> dict[str, str]:
    """Name -> dotted path of every operator: clbench's own, then those of installed packages."""
    outside = {entry.name: entry.value.replace(":", ".") for entry in importlib.metadata.entry_points(group=GROUP)}
    return {**outside, **BUILT_IN}


def parsed(one: Any) -> tuple[str, dict[str, Any]]:
    """One item of the list -> (name, options); `UserError` where it is neither a name nor a name with options."""
    if isinstance(one, str) and one:
        return one, {}
    if isinstance(one, Mapping) and len(one) == 1:
        ((name, options),) = one.items()
        if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
            return name, dict(options or {})
    raise UserError(f"scenario.operators must hold names, or {{name: {{option: value}}}}, got {one!r}")


def target_of(name: str) -> str:
    """The dotted path that a name stands for; `UserError` with the nearest one where there is none."""
    known = targets()
    if name in known:
        return known[name]
    if "." in name.strip("."):
        return name
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(f"no operator '{name}'{hint} (one of: {', '.join(known)}, or module.function)")


def _load(name: str) -> Callable[..., Any]:
    module, _, function = target_of(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise UserError(f"no module {module} (from operator {name})") from None
        raise
    except AttributeError:
        raise UserError(f"module {module} has no '{function}' (from operator {name})") from None
    if not callable(found):
        raise UserError(f"operator {name} must be a function stream -> stream, got {type(found).__name__}")
    return found


def apply(stream: Scenario, operators: Sequence[Any], data_root: str | None = None, download: bool = False) -> Scenario:
    """The stream after all operators, left to right; each is noted in the manifest with all of its options.

    Raises:
        UserError: for an unknown name, a wrong option, or a stream that an operator cannot take; one line.
    """
    from clbench.streams.operators.composition import misplaced
    from clbench.streams.scenario import Scenario

    if isinstance(operators, str | Mapping) or not isinstance(operators, Sequence):
        raise UserError(f"scenario.operators must be a list such as [permute], got {operators!r}")
    for line in misplaced([parsed(one) for one in operators]):
        raise UserError(line)
    for one in operators:
        name, options = parsed(one)
        work = _load(name)
        given = {"data_root": data_root, "download": download}
        takes = inspect.signature(work).parameters
        supplied = {key: value for key, value in given.items() if key in takes}
        try:
            filled = inspect.signature(work).bind(stream, **options, **supplied)
        except TypeError as error:
            raise UserError(f"operator {name}: {error}{_near_option(options, takes)}") from None
        filled.apply_defaults()
        left = {key for key, value in ADDED.get(name, {}).items() if filled.arguments[key] == value}
        noted = {key: value for key, value in list(filled.arguments.items())[1:] if key not in (*SUPPLIED, *left)}
        try:
            made = work(*filled.args, **filled.kwargs)
        except Exception as error:
            error.add_note(f"raised in operator {name} of scenario.operators, with {noted}")
            raise
        if not isinstance(made, Scenario):
            raise UserError(f"operator {name} must return a Scenario, got {type(made).__name__}")
        note = without_folders([{name: noted}])[0]
        stream = replace(made, manifest=replace(made.manifest, operators=(*stream.manifest.operators, note)))
    return stream


def _near_option(options: Mapping[str, Any], takes: Mapping[str, Any]) -> str:
    for option in options:
        near = difflib.get_close_matches(option, [name for name in takes if name not in SUPPLIED], 1, 0.5)
        if option not in takes and near:
            return f"; did you mean '{near[0]}'?"
    return ""


def without_folders(operators: Sequence[Any]) -> list[Any]:
    """The list with data sets named without their folders: where data lies is no part of what was run."""

    def cut(value: Any) -> Any:
        if isinstance(value, str):
            return pathlib.PurePath(value).name if "/" in value or "\\" in value else value
        return [cut(one) for one in value] if isinstance(value, list | tuple) else value

    found = []
    for one in operators:
        name, options = parsed(one)
        cleaned = {key: cut(value) if key in PLACES else value for key, value in options.items()}
        found.append({name: cleaned} if isinstance(one, Mapping) else name)
    return found
