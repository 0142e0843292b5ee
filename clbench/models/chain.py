"""A network as a chain of modules: groups of its layers, or blocks, that run one after another.

Containers (`Sequential`, `ModuleList`) are opened; a normalisation belongs to what stands before it, parameters that stand
beside all modules (position embeddings) to the first. What is found is run once: each must run once, in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clbench.interfaces import UserError

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True, eq=False)
class Link:
    """One module of the chain: `entry` is given its input; `names` are those of its parameters in the backbone."""

    entry: nn.Module
    names: tuple[str, ...]


def chain(model: Any, number: int) -> list[Link]:
    """The parts of a `Backbone` in at most `number` groups of about as many parts. `UserError` for a network that has none."""
    parts = _parts(model)
    names = {p: name for name, p in model.named_parameters()}
    _check_order(model, [part[0] for part in parts])
    links, taken = [], set[str]()
    for group in reversed(np.array_split(np.arange(len(parts)), min(number, len(parts)))):
        modules = [module for i in group for module in parts[i]]
        own = [names[p] for module in modules for p in module.parameters()]
        own = list(names.values()) if group[0] == 0 else own
        links.append(Link(parts[group[0]][0], tuple(name for name in dict.fromkeys(own) if name not in taken)))
        taken.update(own)
    return links[::-1]


def _parts(module: nn.Module) -> list[list[nn.Module]]:
    """Modules with parameters, each with the normalisations behind it."""
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    while len(children) == 1 and not isinstance(module, nn.Sequential | nn.ModuleList):
        (module,) = children
        children = [child for child in module.children() if next(child.parameters(), None) is not None]
        if not children:
            return [[module]]
    found: list[list[nn.Module]] = []
    for child in children:
        if isinstance(child, NORMS) and found:
            found[-1].append(child)
        elif isinstance(child, nn.Sequential | nn.ModuleList):
            found += _parts(child)
        else:
            found.append([child])
    return found


@torch.no_grad()
def _check_order(model: Any, modules: list[nn.Module]) -> None:
    ran: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, args: ran.append(module)) for module in modules]
    modes, passes = [(m, m.training) for m in model.modules()], dict(model.passes)
    try:
        size, device = model.profile.size, next(model.parameters()).device
        model.eval()
        model.features(torch.zeros(2, 3, size, size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
        model.passes.update(passes)
    if ran != modules or not modules:
        raise UserError(f"model {model.identity['name']} is no chain of modules: they do not run once each, in their order")


def inputs_of(link: Link, run: Callable[[], Any], flat: bool = True) -> Tensor:
    """What a module is given [B, ...] while `run()` passes a batch through the network; `flat`: as [B, D]."""
    found: list[Tensor] = []
    hook = link.entry.register_forward_pre_hook(lambda module, args: found.append(args[0].detach().float()))
    try:
        run()
    finally:
        hook.remove()
    return torch.cat([z.flatten(1) for z in found] if flat else found)


def run_from(link: Link, z: Tensor, model: Any, run: Callable[[Tensor], Tensor]) -> Tensor:
    """What `run(images)` gives where the module is given z [B, ...], whatever comes before it."""
    hook = link.entry.register_forward_pre_hook(lambda module, args: (z, *args[1:]))
    try:
        size = model.profile.size
        return run(torch.zeros(len(z), 3, size, size, device=z.device))
    finally:
        hook.remove()
