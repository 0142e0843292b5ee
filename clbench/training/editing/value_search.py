"""The value that makes a model give an answer: a vector that is added to one module's output at the subject, found by Adam.

    min over delta   mean over contexts of  -log p(answer | context, prompt; delta)
                     + kl * KL(P_delta || P_0) at the subject + decay * |delta| / |v_0|^2,   |delta| <= clamp * |v_0|

v_0 is the module's output at the subject of the prompt by itself, and what `clamp` is a multiple of: of the model as it is, or
of the model as it was given (`size_given`). The distribution after the subject's last token stands for
"{subject} is a ..." (as in the code of ROME); the decay is of the norm, not of its square, as in the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.streams.tokens.edits import Request
from clbench.training.editing.key_values import told
from clbench.training.editing.requests import check_options, descend
from clbench.training.editing.site import Site
from clbench.training.editing.suffix import Suffix
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


def check_clamp_by(value: str) -> None:
    """`UserError` for an option `clamp_by` that is neither `now` nor `start`."""
    if value not in ("now", "start"):
        raise UserError(f"learner.clamp_by must be now or start, got {value!r}")


def weights_given(sites: Sequence[Site]) -> list[Tensor]:
    """Copies of the weights [D, H] at `sites`."""
    return [site.linear.weight.detach().clone() for site in sites]


@torch.no_grad()
def size_given(sites: Sequence[Site], given: Sequence[Tensor], request: Request, device: torch.device, of_block: bool) -> float:
    """|v_0| of a request at the last of `sites` in the model as it was given, with weights `given` [D, H] there."""
    now = [site.linear.weight.clone() for site in sites]
    blocks: Any = sites[-1].model.layers
    module = blocks[sites[-1].layer] if of_block else sites[-1].linear
    try:
        for site, weight in zip(sites, given, strict=True):
            site.linear.weight.copy_(weight)
        prompt = torch.from_numpy(request.prompt)[None].to(device)
        return float(output_at(sites[-1].model, module, prompt, request.subject).norm())
    finally:
        for site, weight in zip(sites, now, strict=True):
            site.linear.weight.copy_(weight)


def find_value(
    runtime: Runtime,
    site: Site,
    request: Request,
    before: np.ndarray,
    search: Search,
    of_block: bool = False,
    size: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(delta, v_0) [D] float32 each of a request; `before`: contexts [M, C]. The module: the layer of `site`, or its block.

    `size` stands for |v_0| in the bound of |delta|; None: that of the model as it is.
    """
    texts, places = told(request, before, runtime.device)
    goal = _Goal(site, texts, places, len(request.target), of_block)
    start_D = goal.start_NLD[0, places[0]].float()
    delta_D = torch.zeros_like(start_D, requires_grad=True)
    most = search.clamp * (float(start_D.norm()) if size is None else size)
    lr = 0.1 * most / len(start_D) ** 0.5 if search.lr is None else search.lr
    seen = {"met": 0, "right": 0}

    def loss() -> Tensor:
        nats, kl, right = goal(delta_D)
        seen["right"] = right
        return nats + search.kl * kl + search.decay * delta_D.norm() / start_D.square().sum()

    def is_first() -> bool:
        seen["met"] += bool(search.top) and seen["right"] >= search.top
        return bool(search.top) and seen["met"] >= search.patience

    @torch.no_grad()
    def project() -> None:
        if (norm := float(delta_D.norm())) > most:
            delta_D.mul_(most / norm)

    optimizer = torch.optim.Adam([delta_D], lr=lr)
    descend(runtime, [delta_D], loss, optimizer, search.steps - 1, search.stop_below, project, is_first)
    return delta_D.detach(), start_D


class _Goal:
    """delta -> nats of the answer, KL at the subject of the first text, and texts behind contexts whose whole answer is right.

    All texts are one batch, shorter ones filled up behind their ends: nothing that stands there is seen from before.
    """

    def __init__(self, site: Site, texts: list[Tensor], places: list[int], length: int, of_block: bool):
        most = max(text.shape[1] for text in texts)
        filled = torch.cat([torch.nn.functional.pad(text, (0, most - text.shape[1])) for text in texts])
        device, each_N = filled.device, torch.tensor([len(text) for text in texts], device=filled.device)
        ends_N = torch.tensor([text.shape[1] for text in texts], device=device).repeat_interleave(each_N)
        places_N = torch.tensor(places, device=device).repeat_interleave(each_N)
        self.rows_N1 = torch.arange(len(filled), device=device)[:, None]
        self.wanted_NT = ends_N[:, None] - length + torch.arange(length, device=device)  # places of the answers
        self.answers_NT = filled[self.rows_N1, self.wanted_NT]
        self.suffix = Suffix(site, filled[:, :-1])
        self.start_NLD = self.suffix.output() if of_block else self.suffix.values
        self.logits = self.suffix.after if of_block else self.suffix.logits
        self.marked_NL1 = (torch.arange(most - 1, device=device) == places_N[:, None])[..., None].to(self.start_NLD.dtype)
        self.subject = places[0]
        with torch.no_grad():
            self.plain_V = self.logits(self.start_NLD)[0, self.subject].float().log_softmax(-1)

    def __call__(self, delta_D: Tensor) -> tuple[Tensor, Tensor, int]:
        """(mean nats of a token, KL(P_delta || P_0), number of right answers behind contexts)."""
        z = self.logits(self.start_NLD + self.marked_NL1 * delta_D.to(self.start_NLD.dtype)).float()
        said = z[self.rows_N1, self.wanted_NT - 1].log_softmax(-1)
        nats = -said.gather(-1, self.answers_NT[..., None]).mean()
        now = z[0, self.subject].log_softmax(-1)
        right = int((said[1:].argmax(-1) == self.answers_NT[1:]).all(1).sum())
        return nats, (now.exp() * (now - self.plain_V)).sum(), right
