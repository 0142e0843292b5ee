"""The value that makes a model give an answer: a vector that is added to one module's output at the subject, found by Adam.

    min over delta   mean over contexts of  -log p(answer | context, prompt; delta)
                     + kl * KL(P_delta || P_0) at the subject + decay * |delta| / |v_0|^2,   |delta| <= clamp * |v_0|

v_0 is the module's output at the subject of the prompt by itself. The distribution after the subject's last token stands for
"{subject} is a ..." (as in the code of ROME); the decay is of the norm, not of its square, as in the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clbench.streams.tokens.edits import Request
from clbench.training.editing.key_values import told
from clbench.training.editing.requests import check_options, descend
from clbench.training.runtime import Runtime


@dataclass(frozen=True)
class Search:
    """Options of the search for a value.

    lr     of Adam; None: 0.1 * clamp * |v_0| / sqrt(D), a step of which is a tenth of what is allowed
    steps  at most; as in the code the loss is looked at that often, so there is a step less
    top    end when the whole answer is the first choice behind so many contexts, `patience` times (ENCORE); 0: never
    """

    lr: float | None = None
    steps: int = 20
    clamp: float = 4.0
    kl: float = 0.0625
    decay: float = 0.5
    stop_below: float = 0.05
    top: int = 0
    patience: int = 4

    def __post_init__(self) -> None:
        least = {"steps": (self.steps, 1), "clamp": (self.clamp, 0), "kl": (self.kl, 0), "decay": (self.decay, 0)}
        least |= {"top": (self.top, 0), "patience": (self.patience, 1), "stop_below": (self.stop_below, 0)}
        check_options(**least, **({} if self.lr is None else {"lr": (self.lr, 0)}))


@contextmanager
def added(module: nn.Module, place: int, change_D: Tensor) -> Iterator[None]:
    """While it lasts `change` is added to the module's output [B, L, D] at one place."""

    def change(_: nn.Module, inputs: object, y: Tensor) -> Tensor:
        return torch.cat([y[:, :place], (y[:, place] + change_D.to(y.dtype))[:, None], y[:, place + 1 :]], 1)

    handle = module.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def output_at(model: nn.Module, module: nn.Module, tokens: Tensor, place: int) -> Tensor:
    """What a module gives at one place: tokens [B, L] -> [B, D] float32."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, inputs, y: found.append(y[:, place].float()))
    try:
        model(tokens)
    finally:
        handle.remove()
    return found[0]


def find_value(
    runtime: Runtime, model: nn.Module, module: nn.Module, request: Request, before: np.ndarray, search: Search
) -> tuple[Tensor, Tensor]:
    """(delta, v_0) [D] float32 each of a request; `before` are contexts [M, C]."""
    texts, places = told(request, before, runtime.device)
    start_D = output_at(model, module, texts[0][:, :-1], places[0])[0]
    with torch.no_grad():
        plain = model(texts[0][:, :-1])[0, places[0]].float().log_softmax(-1)
    delta_D = torch.zeros_like(start_D, requires_grad=True)
    most = search.clamp * float(start_D.norm())
    lr = 0.1 * most / len(start_D) ** 0.5 if search.lr is None else search.lr
    loss, is_first = _objective(model, module, texts, places, len(request.target), delta_D, start_D, plain, search)

    @torch.no_grad()
    def project() -> None:
        if (norm := float(delta_D.norm())) > most:
            delta_D.mul_(most / norm)

    optimizer = torch.optim.Adam([delta_D], lr=lr)
    descend(runtime, [delta_D], loss, optimizer, search.steps - 1, search.stop_below, project, is_first)
    return delta_D.detach(), start_D


def _objective(
    model: nn.Module,
    module: nn.Module,
    texts: list[Tensor],
    places: list[int],
    length: int,
    delta_D: Tensor,
    start_D: Tensor,
    plain_V: Tensor,
    search: Search,
) -> tuple[Callable[[], Tensor], Callable[[], bool]]:
    """The loss of `find_value`, and whether the last look at it is one at which to end."""
    state = {"met": 0, "right": 0}
    number = sum(map(len, texts))

    def loss() -> Tensor:
        nats, kl = delta_D.new_zeros(()), delta_D.new_zeros(())
        for i, (text, place) in enumerate(zip(texts, places, strict=True)):
            with added(module, place, delta_D):
                z = model(text[:, :-1]).float()
            wanted, said = text[:, -length:], z[:, -length:].log_softmax(-1)
            nats = nats - said.gather(-1, wanted[..., None]).mean((1, 2)).sum() / number
            if i == 0:
                now = z[0, place].log_softmax(-1)
                kl = (now.exp() * (now - plain_V)).sum()
            else:
                state["right"] = int((said.argmax(-1) == wanted).all(1).sum())
        return nats + search.kl * kl + search.decay * delta_D.norm() / start_D.square().sum()

    def is_first() -> bool:
        state["met"] += bool(search.top) and state["right"] >= search.top
        return bool(search.top) and state["met"] >= search.patience

    return loss, is_first
