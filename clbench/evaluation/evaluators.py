"""Evaluators that a scenario names beside the one that its kind always has: `evaluator(learner, data) -> named sums`.

Sums are additive over samples and hold `n`, the number of samples; whole numbers where something is counted. They are the only
code beside clbench's own in which answers meet labels, and they never stand within a learner's reach.

A name is that of an entry point in the group `clbench.evaluators`, or, where the command line names it, `module.Class`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clbench.evaluation import edit_metrics
from clbench.interfaces import Batch, Evaluator, UserError
from clbench.streams.operators.registry import parsed

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "clbench.evaluators"
BUILT_IN = (
    "accuracy",
    "token_loss",
    "reconstruction",
    "linear_probe",
    "answers",
    "generated",
    *edit_metrics.EVALUATORS,
)  # not for plug-ins
OWN = {"activations": "clbench.evaluation.activations.Activations"}  # what a scenario may name
_ABOUT = {"activations": "shares of dormant units and ranks of features, which say what a network can still learn"}


class Answered:
    """An evaluation set whose answers are there; implements `interfaces.EvaluationSet`."""

    def __init__(
        self,
        name: str,
        classes: tuple[int, ...],
        num_seen: int,
        task: int | None,
        parts: Sequence[tuple[Tensor, Tensor]],
        batches: Callable[[int], Iterator[tuple[Batch, Tensor]]] | None = None,
    ):
        self.name, self.classes, self.num_seen, self.task = name, classes, num_seen, task
        self._parts, self._batches = parts, batches

    def __len__(self) -> int:
        return sum(len(labels) for _, labels in self._parts)

    def answers(self, learner: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores [B, num_seen] float32 and labels [B] int64 of a batch each, on the CPU: copies, an evaluator's own."""
        yield from ((scores.clone(), labels.clone()) for scores, labels in self._parts)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The samples without labels."""
        assert self._batches is not None
        return (batch for batch, _ in self._batches(batch_size))


def load(names: Sequence[str], scenario: Mapping[str, Any]) -> list[Evaluator]:
    """The evaluators that a manifest names. A dotted path is imported only where the scenario's operators name it."""
    registered = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)} if names else {}
    written = list(asked_for(scenario))
    found = []
    for name in names:
        if name in registered:
            made = registered[name].load()
        elif name in OWN or ("." in name.strip(".") and name in written):
            module, _, attribute = OWN.get(name, name).rpartition(".")
            try:
                made = getattr(importlib.import_module(module), attribute)
            except (ModuleNotFoundError, AttributeError) as error:
                raise UserError(f"evaluator {name} cannot be imported: {error}") from None
        else:
            raise UserError(_unknown(name, [*OWN, *registered]))
        made = made() if isinstance(made, type) else made
        label = getattr(made, "name", None)
        taken = label in BUILT_IN or (label in OWN and name not in OWN)
        if not callable(made) or not isinstance(label, str) or not label or taken or "/" in label:
            raise UserError(f"evaluator {name} must be callable and have a `name` of its own that holds no '/'")
        found.append(made)
    labels = [one.name for one in found]
    if len(set(labels)) < len(labels):
        raise UserError(f"two evaluators have one name: {', '.join(labels)}")
    return found


def _unknown(name: str, registered: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, registered, 1, 0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"no evaluator '{name}' is installed{hint} (write module.Class, or register it under {GROUP})"


def unknown(names: Any) -> Iterator[str]:
    """A line for each name that is neither registered nor a dotted path; imports nothing."""
    registered = [*OWN, *(entry.name for entry in importlib.metadata.entry_points(group=GROUP))]
    for name in names if isinstance(names, list | tuple) else ():
        if isinstance(name, str) and name not in registered and "." not in name.strip("."):
            yield _unknown(name, registered)


def listing() -> list[str]:
    """A line for each evaluator that a scenario may name; those of packages are not imported."""
    own = [f"  {name:<18} {_ABOUT[name]}" for name in OWN]
    entries = importlib.metadata.entry_points(group=GROUP)
    return own + [f"  {entry.name:<18} {entry.value.replace(':', '.')}  [{entry.value.split('.')[0]}]" for entry in entries]


def asked_for(scenario: Mapping[str, Any]) -> Iterator[str]:
    """The names of evaluators in the configuration of a scenario: those of its operators `evaluators`."""
    for one in scenario.get("operators") or ():
        name, options = parsed(one)
        if name == "evaluators" and isinstance(options.get("names"), list | tuple):
            yield from options["names"]


def registered_paths() -> set[str]:
    """module.Class of every evaluator of an installed package."""
    return {entry.value.replace(":", ".") for entry in importlib.metadata.entry_points(group=GROUP)}


def row_of(evaluator: Evaluator, learner: Any, sets: Sequence[Any]) -> dict[str, Any]:
    """{evaluator, sums} of one row: every sum has a value for each set, null where the set was not asked (None in `sets`)."""
    found = [None if data is None else _checked(evaluator, evaluator(learner, data), data) for data in sets]
    names = list(dict.fromkeys(name for sums in found if sums is not None for name in sums))
    return {"evaluator": evaluator.name, "sums": {n: [None if s is None else s.get(n) for s in found] for n in names}}


def _checked(evaluator: Evaluator, sums: Any, data: Any) -> dict[str, int | float]:
    """Sums as plain numbers, or `UserError`."""
    if not isinstance(sums, Mapping) or type(sums.get("n")) is not int or sums["n"] < 1:
        raise UserError(f"evaluator {evaluator.name} must return a mapping of numbers with 'n', the number of samples")
    if sums["n"] > len(data):
        raise UserError(f"evaluator {evaluator.name}: n is {sums['n']}, set {data.name} has {len(data)} samples")
    for name, value in sums.items():
        if not isinstance(name, str) or not name:
            raise UserError(f"evaluator {evaluator.name}: a sum must have a name, got {name!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"evaluator {evaluator.name}: {name} must be a finite number, got {value!r}")
    return dict(sums)
