"""How a kind of parameter-efficient tuning changes the weight of a linear layer: W x becomes (W + D) x, D is 0 at the start.

A kind is a formula, `Form`, of what it sees of a layer in a pass; it is linear in x, so it can be merged. `pet_weights.py`,
`pet_corda.py` and `pet_adalora.py` hold the kinds. `unmerge` puts the weight back that `merge` found, to the last bit.

Shapes: x [B, ..., I], W [O, I]; a value has its own shape, or a first axis B where a batch mixes states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.models.pet import Init, Network, Pet
from clbench.models.pet_modules import LORA_TARGETS, Spec
from clbench.models.pet_sites import Blocks, Rows, chosen, linear_of, net_of

Value = tuple[Tensor, bool]  # and whether its first axis is the batch


class Pass(NamedTuple):
    """What a kind sees of a layer in a pass: input, W x (no bias) on demand, W, values and frozen tensors by name."""

    x: Tensor
    wx: Callable[[], Tensor]
    weight: Tensor
    get: Callable[[str], Value]
    fixed: Callable[[str], Tensor]


Form = Callable[[Pass], Tensor]


class Site(NamedTuple):
    """A target layer: the name of its values, and its rows (all, or a third)."""

    name: str
    layer: nn.Linear
    rows: Rows

    @property
    def weight(self) -> Tensor:
        """Those rows of the layer's weight [O, I]."""
        return self.rows.of(self.layer.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        out, into = self.weight.shape
        return out, into


@dataclass(eq=False)
class WeightChange:
    """Adds D x to the output of a linear layer's rows; called with a sign, it folds D into the weight or takes it out."""

    pet: Pet
    site: Site
    form: Form
    before: Tensor | None = None
    per_token: ClassVar[bool] = True

    def add(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Hook behind the layer."""
        if not self.pet.active:
            return out
        name, layer, rows = self.site
        bias = 0 if layer.bias is None else rows.of(layer.bias)

        def get(part: str) -> Value:
            return self.pet.get(f"{name}/{part}", len(args[0]))

        delta = self.form(Pass(args[0], lambda: rows.of_output(out) - bias, self.site.weight, get, self._fixed))
        return rows.added(out, delta)

    def __call__(self, sign: float) -> None:
        """D is what the kind makes of the unit vectors, in float64."""
        whole, rows = self.site.layer.weight, self.site.rows
        if sign < 0:
            assert self.before is not None
            rows.set_(whole, self.before)
            self.before = None
            return
        w = self.site.weight.double()

        def get(part: str) -> Value:
            return self.pet.values[f"{self.site.name}/{part}"].double(), False

        eye = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
        delta = self.form(Pass(eye, lambda: w.T, w, get, lambda part: self._fixed(part).double())).T
        self.before = self.site.weight.clone()
        rows.set_(whole, w + delta)

    def _fixed(self, part: str) -> Tensor:
        own = getattr(self.pet, f"{self.site.name}/{part}", None)
        return getattr(self.pet, f"frozen_{part}") if own is None else own


def target_sites(model: Network, kind: str, targets: Sequence[str], blocks: Blocks, rank: int) -> list[Site]:
    """The target layers of the chosen blocks. No row may be a target twice: a merge could not tell the changes apart."""
    unknown = [t for t in targets if t not in LORA_TARGETS]
    if unknown or not targets:
        raise UserError(f"unknown targets {list(unknown)} of pet={kind}: choose from {', '.join(LORA_TARGETS)}")
    if len(set(targets)) != len(targets) or ("qkv" in targets and {"q", "k", "v"} & set(targets)):
        raise UserError(f"pet={kind}: targets={list(targets)} name a layer twice: choose qkv or its thirds, each once")
    if rank < 1:
        raise UserError(f"pet={kind}: rank must be at least 1, got {rank}")

    def every() -> Iterator[Site]:
        for i, block in chosen(net_of(model), blocks, kind, ("mlp",)):
            for target in targets:
                yield Site(f"{i}/{target}", *linear_of(block, target, kind))

    return list(every())


def attach(
    model: Network,
    runtime: Any,
    kind: str,
    sites: Sequence[Site],
    spec: Spec,
    form: Form,
    frozen: Mapping[str, Tensor] | None = None,
) -> Pet:
    """The pet with its hooks. `frozen` tensors go with it, but into no state: they follow from the seed or from W."""
    pet = Pet(model, runtime, kind, spec)
    for name, value in (frozen or {}).items():
        pet.register_buffer(name, value.to(runtime.device), persistent=False)
    for site in sites:
        change = WeightChange(pet, site, form)
        site.layer.register_forward_hook(change.add)
        pet.merges.append(change)
    return pet


def copied(value: Tensor) -> Init:
    """A start that is known."""
    return lambda x, generator: x.copy_(value)


def filled(value: float) -> Init:
    return lambda x, generator: x.fill_(value)


def guided_only(pet: Pet | None, begun: bool) -> None:
    """`UserError` where a pet with a guide is trained by a learner that has not told it."""
    if not begun and pet is not None and pet.training and torch.is_grad_enabled():
        raise UserError(f"pet={pet.kind} must be told before it is trained: choose learner=finetune, aper or ranpac")
