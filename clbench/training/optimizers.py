"""Optimisers by name: torch's own, those of timm, two that find the rate, and two that need no schedule.

name         beside the rate
sgd          momentum as given
adam         betas as given; decay is added to the gradient
adamw        betas as given; decoupled decay
lion         betas 0.9, 0.99; decoupled decay; one moment; wants rates 3 to 10 times below AdamW's (2023, arXiv 2302.06675)
lamb         betas as given; gradient norm at most 1; with decay the step is as long as the weights (2020, arXiv 1904.00962)
adafactor    second moments by rows and columns of each matrix; the rate as given (2018, arXiv 1804.04235)
prodigy      betas as given; decoupled decay; finds the rate, so the rate is 1 (2024, arXiv 2306.06101; package prodigyopt)
dadapt_adam  the same (2023, arXiv 2301.07733, see `dadapt_adam.py`)
schedule_free_sgd, schedule_free_adamw
             an average of the weights answers; momentum, or the first of the betas, says how near to it gradients are taken;
             decay is decoupled for both (2024, arXiv 2405.15682, see `schedule_free.py`)

prodigy and dadapt_adam estimate one step size d, the distance to a solution, for all groups: groups have one rate, or 0 for
none, and a schedule multiplies it. They start at d = 1e-6, so that the first steps hardly move. With optimizer_state=keep d
goes on: it never falls, and what a first experience found may be much for a small shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from clbench.interfaces import UserError
from clbench.training.dadapt_adam import DAdaptAdam
from clbench.training.schedule_free import ScheduleFree

Optimizer = Literal[
    "sgd", "adam", "adamw", "lion", "lamb", "adafactor", "prodigy", "dadapt_adam", "schedule_free_sgd", "schedule_free_adamw"
]  # fmt: skip
FINDS_RATE = ("prodigy", "dadapt_adam")
AVERAGES = ("schedule_free_sgd", "schedule_free_adamw")
LION_BETAS = (0.9, 0.99)


def check(name: str, option: str = "learner.optimizer", **rates: float) -> None:
    """`UserError` for a name that is none of them, for rates of groups that it cannot have, for a package that is missing."""
    if name not in get_args(Optimizer):
        raise UserError(f"unknown {option}={name}: choose {', '.join(get_args(Optimizer))}")
    if name in FINDS_RATE and len(set(rates.values()) - {0}) > 1:
        owner = option.removesuffix("optimizer")
        found = ", ".join(f"{owner}{rate}={value:g}" for rate, value in rates.items())
        raise UserError(f"{option}={name} finds one rate for all weights: choose 1 for each (0 freezes), got {found}")
    if name == "prodigy":
        _prodigy(option)


def _prodigy(option: str) -> Any:
    try:
        import prodigyopt  # type: ignore[reportMissingImports] of an extra
    except ImportError as error:
        raise UserError(f"{option}=prodigy needs prodigyopt ({error}): pip install 'clbench[optimizers]'") from None
    return prodigyopt.Prodigy


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
    check(name, "optimizer", **{f"group {i}": group["lr"] for i, group in enumerate(groups)})
    given = list(groups)
    if name == "sgd":
        return torch.optim.SGD(given, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    if name == "adam":
        return torch.optim.Adam(given, betas=betas, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(given, betas=betas, weight_decay=weight_decay)
    if name == "schedule_free_sgd":
        return ScheduleFree(given, momentum, None, weight_decay)
    if name == "schedule_free_adamw":
        return ScheduleFree(given, *betas, weight_decay)
    if name == "dadapt_adam":
        return DAdaptAdam(given, betas, weight_decay)
    if name == "prodigy":  # which prints a line where it is given a decay of its own
        return _prodigy("optimizer")([{"weight_decay": weight_decay, **group} for group in given], betas=betas)
    from timm.optim.adafactor import Adafactor
    from timm.optim.lamb import Lamb
    from timm.optim.lion import Lion

    if name == "lion":
        return Lion(given, betas=LION_BETAS, weight_decay=weight_decay)
    if name == "lamb":
        return Lamb(given, betas=betas, weight_decay=weight_decay)
    return Adafactor(given, lr=float(given[0]["lr"]), weight_decay=weight_decay, scale_parameter=False)
