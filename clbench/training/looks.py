"""Evaluation inside training: callbacks from the optimisation loop to an observer that the runner sets.

The runner sets an observer around `learn`; training code calls the functions below. Nothing that a learner holds leads to the
observer, which has the evaluation data: it stands in a context variable, behind a handle. Without an observer nobody looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from clbench.streams.handles import Handle, opened

if TYPE_CHECKING:
    from clbench.training.pretraining.segments import Segment


class Observer(Protocol):
    """Looks at the model while it trains; the runner's, because a learner never sees an evaluation set."""

    def due(self, segment: Segment, step: int) -> bool:
        """Whether to look before update `step` (or after the last one)."""
        ...

    def look(self, model: nn.Module, segment: Segment, step: int) -> None:
        """Note the losses now, before update `step`, or after the last one."""
        ...

    def trunk_ended(self, model: nn.Module) -> None:
        """A branch or an average will be evaluated instead of these weights: evaluate them too."""
        ...

    def after_step(self, step: int, visits: int) -> float:
        """Evaluate the learner after a step of `fit`, where it is time -> seconds that it took."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the lists and numbers of `state`."""
        ...


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


def due(segment: Segment, step: int) -> bool:
    """Whether somebody wants to look before update `step` (or after the last one)."""
    observer = _observer()
    return observer is not None and observer.due(segment, step)


def look(model: nn.Module, segment: Segment, step: int) -> None:
    """Let the observer note the losses now. It may leave the model in evaluation mode."""
    if (observer := _observer()) is not None:
        observer.look(model, segment, step)


def trunk_ended(model: nn.Module) -> None:
    """Let the observer evaluate weights that will not be the learner's answer."""
    if (observer := _observer()) is not None:
        observer.trunk_ended(model)


def after_step(step: int, visits: int) -> float:
    """Let the observer evaluate the learner after update `step`, from 1, and `visits` of new samples -> seconds it took."""
    observer = _observer()
    return 0.0 if observer is None else observer.after_step(step, visits)


def state_dict() -> dict[str, Any] | None:
    """What the observer has noted, for a snapshot; None without one."""
    observer = _observer()
    return None if observer is None else observer.state_dict()


def load_state_dict(state: dict[str, Any] | None) -> None:
    """Give the observer of a resumed run what it had noted."""
    if (observer := _observer()) is not None and state is not None:
        observer.load_state_dict(state)
