"""More evaluators: what else is counted of a learner's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clbench.interfaces import UserError
from clbench.streams.scenario import Scenario


def evaluators(stream: Scenario, names: Sequence[str] = ()) -> Scenario:
    """The same stream, evaluated by more evaluators than its kind has.

    names  of installed evaluators, or module.Class (see `evaluation.evaluators`)
    """
    if not names:
        raise UserError("evaluators.names is missing: a list of names (clbench list evaluators)")
    if isinstance(names, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"evaluators.names must be a list of names, got {names!r}")
    every = tuple(dict.fromkeys((*stream.manifest.evaluators, *names)))
    return replace(stream, manifest=replace(stream.manifest, evaluators=every))
