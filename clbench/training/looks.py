"""Evaluation inside training: callbacks from the optimisation loop to an observer that the runner sets.

The runner sets an observer around `learn`; training code calls the functions below. Nothing that a learner holds leads to the
observer, which has the evaluation data: it stands in a context variable, behind a handle. Without an observer nobody looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from clbench.interfaces import Place
from clbench.streams.handles import Handle, opened


class Observer:
    """Looks at a model while it trains; the runner's, because a learner never sees an evaluation set. This one sees nothing."""

    def at_step(self, name: str, place: Place, lr: float, visits: int) -> float:
        """Evaluate before the step of `place`, or after the last one, where it is time -> seconds that it took.

        `lr` is the rate of the first group in the step, or in the last one; `visits` those to new samples so far.
        """
        return 0.0

    def trunk_ended(self, model: nn.Module) -> None:
        """A branch or an average will be evaluated instead of these weights: evaluate them too."""

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the lists and numbers of `state`."""


_CURRENT: ContextVar[Handle | None] = ContextVar("observer", default=None)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Around `learn`: the observer is asked by everything that trains inside."""
    token = _CURRENT.set(Handle("the observer", observer))
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def modes_kept(*owners: Any) -> Iterator[None]:
    """Around a look: the modules of `owners` (modules, and objects that hold some) are in their modes again afterwards."""
    modes = {module: module.training for owner in owners for module in _modules(owner)}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _modules(value: Any, inside: bool = False) -> Iterator[nn.Module]:
    """Modules of a module, of an object's attributes, and of lists and mappings among these."""
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _modules(item, True)
    elif not inside and hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _modules(item, True)


def _observer() -> Observer | None:
    handle = _CURRENT.get()
    return None if handle is None else opened(handle)


def at_step(name: str, place: Place, lr: float, visits: int) -> float:
    """`fit` of this name is between steps: let the observer evaluate -> seconds it took."""
    observer = _observer()
    return 0.0 if observer is None else observer.at_step(name, place, lr, visits)


def trunk_ended(model: nn.Module) -> None:
    """Let the observer evaluate weights that will not be the learner's answer."""
    if (observer := _observer()) is not None:
        observer.trunk_ended(model)


def state_dict() -> dict[str, Any] | None:
    """What the observer has noted, for a snapshot; None without one."""
    observer = _observer()
    return None if observer is None else observer.state_dict()


def load_state_dict(state: dict[str, Any] | None) -> None:
    """Give the observer of a resumed run what it had noted."""
    if (observer := _observer()) is not None and state is not None:
        observer.load_state_dict(state)
