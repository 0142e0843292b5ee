"""What a learner may be told to do around the steps of its `fit`, whatever its loss is; with no such option, nothing.

refresh    forget a little before each step (`refresh.py`): {variant: official | paper, size, noise, steps, fisher}
trainable  half | lisa: a random part of the blocks is trained (`chosen_layers.py`); with options {half: {unit, ratio}},
           {lisa: {blocks, every}}
project    bloop: the second part of the loss gives way to the first (`bloop.py`); with its option {bloop: {rate}}
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from clbench.interfaces import Data, Experience, Place, UserError
from clbench.models.backbone import Backbone
from clbench.models.pet import Pet
from clbench.training.bloop import Bloop, Parts
from clbench.training.chosen_layers import Half, Lisa, chosen_layers, option
from clbench.training.fisher import Part
from clbench.training.refresh import Modules, Refresh, by_name
from clbench.training.runtime import Runtime

RefreshOptions = Mapping[str, Any] | None
Project = Literal["bloop"] | Mapping[str, Any] | None
Trainable = Literal["all", "half", "lisa"] | Mapping[str, Any]
PartOrTrainable = Literal["all", "attention", "qkv", "half", "lisa"] | Mapping[str, Any]
Loss = Callable[[Any], Tensor]


class Steps:
    """The options of one learner. State: the refresh's Fisher information, Bloop's running mean, where there are any."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        refresh: RefreshOptions = None,
        trainable: PartOrTrainable = "all",
        project: Project = None,
    ):
        self.runtime = runtime
        self.refresh: Refresh | None = None if refresh is None else made(Refresh, "refresh", refresh, runtime)
        self.bloop: Bloop | None = None
        if project is not None:
            word, options = option(project)
            if word != "bloop":
                raise UserError(f"unknown learner.project={word}: choose bloop or null")
            self.bloop = made(Bloop, "project bloop", options, runtime)
        word, options = option(trainable)
        kinds: dict[str, Any] = {"half": Half, "lisa": Lisa}
        self.layers: Half | Lisa | None = made(kinds[word], f"trainable {word}", options) if word in kinds else None

    @property
    def state(self) -> tuple[str, ...]:
        """The name of this object in the state of a learner that calls it `stepping`; nothing where it has no state."""
        return ("stepping",) if self.bloop is not None or (self.refresh is not None and self.refresh.measures) else ()

    @contextlib.contextmanager
    def around(
        self, model: Backbone, modules: Modules, loss: Loss, *, new: Loss, parts: Parts | None = None, **hooks: Any
    ) -> Iterator[tuple[Loss, dict[str, Any]]]:
        """The loss and the hooks that `fit` is given; parameters that train must be asked for inside.

        new    the cross-entropy of a batch's new samples
        parts  that, and what is added to it, for `project`
        """
        if self.bloop is not None:
            assert parts is not None
            loss, more = self.bloop.loss(parts, lambda: list(by_name(modules).values()))
            hooks = joined(hooks, more)
            self.bloop.mean = self.bloop.mean.new_zeros(0)
        if self.refresh is not None:
            loss, hooks = self._refreshed(self.refresh, modules, loss, new, hooks)
        if self.layers is None:
            yield loss, hooks
            return
        with chosen_layers(self.layers, model, self.runtime) as at_place:
            yield loss, hooks if at_place is None else joined({"at_place": at_place}, hooks)

    def _refreshed(
        self, refresh: Refresh, modules: Modules, loss: Loss, new: Loss, hooks: dict[str, Any]
    ) -> tuple[Loss, dict[str, Any]]:
        at = [0]

        def note(place: Place) -> None:
            at[0] = place.step

        def forget_then(batch: Any) -> Tensor:
            refresh.unlearn(modules, lambda: new(batch), at[0])
            return loss(batch)

        return forget_then, joined(hooks, {"at_place": note})

    def end(self, modules: Modules, experience: Experience, new: Loss) -> None:
        """After an experience's `fit`; `new` as for `around`, of plain batches."""
        if self.bloop is not None:
            self.bloop.mean = self.bloop.mean.new_zeros(0)
        if self.refresh is not None:
            self.refresh.measure(modules, experience.train, new)

    def state_dict(self) -> dict[str, Any]:
        parts = {"refresh": self.refresh, "bloop": self.bloop}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def guided(
    pet: nn.Module | None, data: Data, loss: Loss, hooks: Mapping[str, Any] | None = None
) -> tuple[Loss, dict[str, Any]]:
    """The loss and the hooks for a `fit` on `data` that trains a pet whose kind does something around the steps (`Guide`)."""
    guide = pet.guide if isinstance(pet, Pet) else None
    if guide is None:
        return loss, dict(hooks or {})
    guide.begin(data)

    def total(batch: Any) -> Tensor:
        value, penalty = loss(batch), guide.penalty()
        return value if penalty is None else value + penalty

    return total, joined(hooks or {}, {"after_step": lambda place, batch: guide.after_step(place)})


def is_guided(pet: Any) -> bool:
    """Whether a learner's `pet` node names a kind that looks at an experience's data or counts its steps."""
    return isinstance(pet, Mapping) and str(pet.get("_target_")).rsplit(".", 1)[-1] in ("corda", "adalora")


def reads_again(refresh: Any) -> bool:
    """Whether the option makes a learner read an experience's samples again at its end."""
    return isinstance(refresh, Mapping) and refresh.get("fisher", "per_sample") != "none"


def whole(trainable: Any) -> Any:
    """The option of a learner that has no parts of the backbone to choose from; `UserError` where it names one."""
    if option(trainable)[0] not in ("all", "half", "lisa"):
        raise UserError(f"unknown learner.trainable={trainable}: choose all, half or lisa")
    return trainable


def part_of(trainable: PartOrTrainable) -> Part | str:
    """The part of the backbone that trains, but for the blocks that `half` and `lisa` choose of all."""
    word, _ = option(trainable)
    return "all" if word in ("half", "lisa") else word


def joined(hooks: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The hooks of both; where both have one of a name, the former's comes first."""

    def in_turn(first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
        def both(*arguments: Any) -> None:
            first(*arguments)
            then(*arguments)

        return both

    return {**hooks, **{name: in_turn(hooks[name], hook) if name in hooks else hook for name, hook in more.items()}}


def made(kind: type, name: str, options: Any, *given: Any) -> Any:
    """An object with the options of a mapping; `UserError` names one that it does not have."""
    known = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if not isinstance(options, Mapping) or (wrong := [key for key in options if key not in known]):
        found = wrong[0] if isinstance(options, Mapping) else options
        raise UserError(f"learner.{name} has no option {found!r}: choose {', '.join(known)}")
    return kind(*given, **options)
