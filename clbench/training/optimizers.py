"""Optimisers by name: torch's own, and those of timm.

name       beside the rate
sgd        momentum as given
adam       betas as given; decay is added to the gradient
adamw      betas as given; decoupled decay
lion       betas 0.9, 0.99; decoupled decay; one moment; wants rates 3 to 10 times below AdamW's (2023, arXiv 2302.06675)
lamb       betas as given; gradient norm at most 1; with decay the step is as long as the weights (2020, arXiv 1904.00962)
adafactor  second moments by rows and columns of each matrix; the rate as given (2018, arXiv 1804.04235)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from clbench.interfaces import UserError

Optimizer = Literal["sgd", "adam", "adamw", "lion", "lamb", "adafactor"]
LION_BETAS = (0.9, 0.99)


def check(name: str, option: str = "learner.optimizer") -> None:
    """`UserError` for a name that is none of them."""
    if name not in get_args(Optimizer):
        raise UserError(f"unknown {option}={name}: choose {', '.join(get_args(Optimizer))}")


def build(
    name: str,
    groups: Sequence[dict[str, Any]],
    *,
    momentum: float,
    nesterov: bool,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimiser over `groups`, each with its `lr`; what a name has no use for is not read."""
    check(name, "optimizer")
    given = list(groups)
    if name == "sgd":
        return torch.optim.SGD(given, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    if name == "adam":
        return torch.optim.Adam(given, betas=betas, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(given, betas=betas, weight_decay=weight_decay)
    from timm.optim.adafactor import Adafactor
    from timm.optim.lamb import Lamb
    from timm.optim.lion import Lion

    if name == "lion":
        return Lion(given, betas=LION_BETAS, weight_decay=weight_decay)
    if name == "lamb":
        return Lamb(given, betas=betas, weight_decay=weight_decay)
    return Adafactor(given, lr=float(given[0]["lr"]), weight_decay=weight_decay, scale_parameter=False)
