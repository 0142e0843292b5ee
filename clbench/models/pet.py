"""Parameter-efficient tuning (PET): few trainable values that change what a frozen network computes, and not its code.

A `Pet` owns named values and hangs on an unmodified timm network, or on a decoder, by hooks (`pet_modules.py` says what kinds
there are, `pet_sites.py` and `pet_decoder.py` what each hook does). What a pass computes with is chosen around it:

    model.features(batch)                        the pet's own values, which are trained
    with pet.off(): ...                          the bare network
    with pet.use(state): ...                     other values of the same shapes, for all samples
    with pet.use(stack(states), rows): ...       sample b uses states[rows[b]]: one pass serves a batch with mixed states

A *state* is a plain dictionary of tensors, so a bank of them is a list, its mean is `average`, and it needs no class.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clbench.interfaces import Data, Place, UserError
from clbench.models.backbone import Backbone
from clbench.models.decoder import Decoder
from clbench.streams import rng

Network = Backbone | Decoder
State = dict[str, Tensor]
Init = Callable[[Tensor, torch.Generator], Any]


class PetRuntime(Protocol):
    """What a pet needs of the runtime: device, generators by name, and where training stands (for dropout)."""

    seed: int
    device: torch.device
    experience: int
    used_visits: int

    def generator(self, *parts: int | str) -> torch.Generator:
        """A CPU generator of its own for the seed, the experience and the parts."""
        ...


class Guide(Protocol):
    """What a kind does around a training beside being trained; `training.steps.guided` sees to it. Its state is the pet's."""

    def begin(self, data: Data) -> None:
        """Before the steps on an experience's data."""
        ...

    def penalty(self) -> Tensor | None:
        """What joins the loss of a batch."""
        ...

    def after_step(self, place: Place) -> None:
        """After the step of `place`, while its gradients are there."""
        ...


class Pet(nn.Module):
    """Named values attached to a backbone. `spec` gives each value's shape and its initial distribution.

    The backbone is frozen by attaching (its own gradients are off); `values` train. Dropout inside a pet is drawn from the
    seed, the images visited and the place, so that a resumed run draws the same; there is none before `train()`.

    tokens    where a layer is run for the first of its tokens alone: of how many. Dropout then draws what it would for all.
    in_front  positions of a decoder that it takes before a text
    drops     whether it has dropout
    """

    def __init__(self, model: Network, runtime: PetRuntime, kind: str, spec: Mapping[str, tuple[Sequence[int], Init]]):
        super().__init__()
        self.kind, self._runtime = kind, runtime
        self.inits = {name: init for name, (_, init) in spec.items()}
        self.values = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(tuple(shape), device=runtime.device)) for name, (shape, _) in spec.items()}
        )
        self.reset(runtime.generator("pet", kind, len(model.pets)))
        self._own = dict(self.values.items())
        self._now: Mapping[str, Tensor] | None = self._own
        self._rows: Tensor | None = None
        self._tag: Any = None
        self._own_named = False
        self.tokens: int | None = None
        self._model = [model]
        self._drawn = ((-1, 0), 0)
        self.merges: list[Callable[[float], None]] = []
        self._merged = False
        self.guide: Guide | None = None
        self.in_front, self.drops = 0, False
        model.freeze()
        model.pets.append(self)
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Pet:
        memo[id(self._runtime)] = self._runtime
        twin = Pet.__new__(Pet)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def reset(self, generator: torch.Generator) -> None:
        """Draw all values again (on the CPU, in the order of their names)."""
        with torch.no_grad():
            for name, value in self.values.items():
                fresh = torch.empty(value.shape)
                self.inits[name](fresh, generator)
                value.copy_(fresh)

    @property
    def active(self) -> bool:
        """Whether a pass now differs from the bare network's."""
        return self._now is not None and not self._merged

    @contextmanager
    def use(self, values: Mapping[str, Tensor] | None = None, rows: Tensor | None = None, tag: Any = None) -> Iterator[None]:
        """Compute with `values` (its own by default); with `rows` [B], each is a stack [S, ...] and sample b uses rows[b].

        `tag` promises that values (and rows) with this name never change: then features may be remembered under it.
        """
        before = self._now, self._rows, self._tag
        self._now, self._rows, self._tag = (self._own if values is None else values), rows, tag
        self._own_named |= values is None and tag is not None
        try:
            yield
        finally:
            self._now, self._rows, self._tag = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute with the bare network."""
        before = self._now, self._rows, self._tag
        self._now, self._rows, self._tag = None, None, None
        try:
            yield
        finally:
            self._now, self._rows, self._tag = before

    @contextmanager
    def only(self, samples: Sequence[int] | Tensor) -> Iterator[None]:
        """Compute with some samples of the batch that `rows` were given for, in this order."""
        before = self._rows
        if before is not None and self.active:
            self._rows = before[torch.as_tensor(samples, device=before.device)]
        try:
            yield
        finally:
            self._rows = before

    def tags(self, batch: int) -> list[Any] | None:
        """The name of each sample's values, None where they have none."""
        if self._tag is None:
            return None
        return [(self._tag, row) for row in ([0] * batch if self._rows is None else self._rows.tolist())]

    def in_use_by(self, tag: tuple[Any, int]) -> State:
        """The values in use by the samples that have this tag (see `tags`)."""
        return {name: value if self._rows is None else value[tag[1]] for name, value in self.in_use().items()}

    def in_use(self) -> Mapping[str, Tensor]:
        """The values that a pass now computes with: places that are missing from them stay bare."""
        return self._now if self._now is not None else {}

    def get(self, name: str, batch: int) -> tuple[Tensor, bool]:
        """A value now in use -> (it, whether its first axis is the batch, of `batch` rows; windows of one image follow it)."""
        assert self._now is not None
        value = self._now[name]
        if self._rows is None:
            return value, False
        rows = self._rows
        if batch != len(rows):
            if batch % len(rows):
                raise UserError(f"{len(rows)} rows of PET states for a batch of {batch}")
            rows = rows.repeat_interleave(batch // len(rows))
        return value[rows], True

    def dropout(self, x: Tensor, p: float, place: str) -> Tensor:
        """Zero a share `p` of x while training and scale the rest by 1 / (1 - p)."""
        if p == 0 or not self.training or not torch.is_grad_enabled():
            return x
        now = (self._runtime.experience, self._runtime.used_visits)
        self._drawn = (now, self._drawn[1] + 1 if self._drawn[0] == now else 0)
        key = rng.key(self._runtime.seed, "dropout", *now, self._drawn[1], place)
        shape = x.shape if self.tokens is None else (len(x), self.tokens, *x.shape[2:])
        drawn = torch.rand(shape, generator=torch.Generator(x.device).manual_seed(key >> 1), device=x.device)
        return x * (drawn if self.tokens is None else drawn[:, : x.shape[1]]).ge(p) / (1 - p)

    def state(self) -> State:
        """A copy of the values."""
        return {name: value.detach().clone() for name, value in self.values.items()}

    def insert(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the values in place. Features remembered for other states, under tags of theirs, stay."""
        if state.keys() != self.values.keys():
            raise UserError(f"this state does not belong to a {self.kind} of this shape")
        if self._own_named:
            self._model[0].forget()
        self.values.load_state_dict(dict(state))

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill in place; everything remembered is forgotten: the states that a learner has names for may be others now."""
        self._model[0].forget()
        return super().load_state_dict(state, strict, assign)

    def approach(self, state: Mapping[str, Tensor], share: float) -> None:
        """Move the values towards `state`: v <- (1 - share) v + share state."""
        follow(self._own, state, share)

    def merge(self) -> None:
        """Fold the values into the network's weights (LoRA, SSF): the same function without the extra work."""
        self._fold(1.0)

    def unmerge(self) -> None:
        self._fold(-1.0)

    def _fold(self, sign: float) -> None:
        if not self.merges:
            raise UserError(f"a {self.kind} cannot be merged into the weights: it is no affine map of them")
        if self._merged == (sign > 0):
            raise UserError(f"the {self.kind} is {'already' if self._merged else 'not'} merged")
        self._model[0].forget()
        with torch.no_grad():
            for fold in self.merges:
                fold(sign)
        self._merged = sign > 0

    def num_values(self) -> int:
        """Numbers in `values`."""
        return sum(value.numel() for value in self.values.values())


class Factory(Protocol):
    """What a configuration's `pet` node becomes."""

    def __call__(self, model: Network, runtime: Any) -> Pet | None:
        """Attach to `model`; None means that the whole backbone is meant."""
        ...


def unguided(pet: Pet | None, learner: str) -> Pet | None:
    """The pet of a learner that says nothing to a guide; `UserError` for a kind that has one."""
    if pet is not None and pet.guide is not None:
        raise UserError(
            f"pet={pet.kind} is chosen by data or steps of its training, which {learner} does not tell it: "
            "choose learner=finetune, aper or ranpac"
        )
    return pet


def stack(states: Sequence[Mapping[str, Tensor]]) -> State:
    """S states -> one whose values have a first axis of length S."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def average(states: Sequence[Mapping[str, Tensor]]) -> State:
    """The mean of several states, in fp64, in their own precision."""
    return {name: value.double().mean(0).to(value.dtype) for name, value in stack(states).items()}


def blend(a: Mapping[str, Tensor], b: Mapping[str, Tensor], share: float) -> State:
    """(1 - share) a + share b."""
    return {name: torch.lerp(value.detach(), b[name].detach(), share) for name, value in a.items()}


@torch.no_grad()
def follow(values: Mapping[str, Tensor], state: Mapping[str, Tensor], share: float) -> None:
    """Values <- (1 - share) values + share state, in place, all in one call."""
    targets = [state[name].detach().to(value) for name, value in values.items()]
    if targets:
        torch._foreach_lerp_(list(values.values()), targets, share)  # type: ignore[reportPrivateImportUsage] as torch's own EMA


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, float]:
    """Euclidean norms over all values: (of a - b, of b)."""
    gap = sum(float((a[name].detach() - b[name].detach()).double().square().sum()) for name in a)
    size = sum(float(b[name].detach().double().square().sum()) for name in a)
    return math.sqrt(gap), math.sqrt(size)


def zeros(x: Tensor, generator: torch.Generator) -> None:
    x.zero_()


def ones(x: Tensor, generator: torch.Generator) -> None:
    x.fill_(1.0)


def kaiming(x: Tensor, generator: torch.Generator) -> None:
    """Kaiming uniform with a = sqrt(5): U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    nn.init.kaiming_uniform_(x, a=math.sqrt(5), generator=generator)


def uniform(low: float, high: float) -> Init:
    return lambda x, generator: x.uniform_(low, high, generator=generator)


def normal(mean: float, std: float) -> Init:
    """N(mean, std^2)."""
    return lambda x, generator: x.normal_(mean, std, generator=generator)
