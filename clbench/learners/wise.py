"""WISE (Wang et al. 2024, "Rethinking the Knowledge Memory for Lifelong Model Editing", NeurIPS, arXiv 2405.14768).

One matrix W of an MLP (second layer of a block) gets side memories W', copies that are trained on edits; a router says which
answers. With k the layer's input, a text activates a memory by d = mean over tokens of |W' k - W k|.

An edit trains W' by SGD on its prompt by itself and behind pieces of old text, with another piece of old text as unrelated:
    -log p(answer) + [gamma + d_out - d_in]+ + [d_out - alpha]+ + [beta - d_in]+
d_in of prompts, d_out of the unrelated text; beta = margin * u, gamma = beta / 2, alpha = beta / 4, u the mean of |W k + b| on
old text (5, 20, 10 for alpha, beta, gamma in the code, in the units of LLMs). After each step entries stay within `reach` of W.
Sharding: only a random share `density` of the entries of W' is trained, drawn anew after every `shard` edits, when W' is stored
and starts from W again. After every `merge` stored ones these become one, by TIES: of each change the largest `kept` by size
stay, at each entry the sign of their sum is elected, and the mean is taken over those that agree.
Router: a memory is open where d is above `ratio` times the smallest d_in of its edits; the open one with the largest d answers,
W where none is.

Deviations: d is a mean over the tokens so far, so that each token is routed by what stands before it and texts by themselves;
in the code one decision holds for a whole batch, and the layer's activation stands around both outputs. No weight decay, with
which entries that are not trained shrink. Contexts are pieces of old text. Own choices: margin, shard and merge for short
streams (500 edits and 2 in the paper, of 1000), rate. Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clbench.interfaces import Capabilities, Experience
from clbench.streams import rng
from clbench.streams.tokens.edits import EditData, Request
from clbench.training.editing.key_values import contexts, told
from clbench.training.editing.requests import check_options, descend, each, edit_data
from clbench.training.editing.site import Site, last_but_one
from clbench.training.editing.suffix import Suffix, nats
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore

PARTS = ("model", "side_DH", "stored", "thresholds", "smallest", "edits", "unit")


class Wise:
    """Side memories beside one matrix. State: weights, the memory in training, stored ones, their thresholds."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="logits", needs_boundaries=False)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        layer: int | None = None,  # the block whose MLP has side memories; null: the last but one
        lr: float = 1.0,
        steps: int = 40,  # of an edit, at most
        stop_below: float = 2e-2,
        margin: float = 0.5,  # by which edits must activate a memory, in norms of the layer's output on old text
        reach: float = 1.0,  # largest change of an entry
        density: float = 0.2,  # share of the entries that are trained
        shard: int = 25,  # edits of a memory
        merge: int = 2,  # memories that become one
        kept: float = 0.53,  # share of a change that takes part in merging
        ratio: float = 0.8,  # of the least activation of an edit, above which a memory is open
        contexts: int = 8,  # pieces of old text before the prompt
        context: int = 8,  # tokens of each
    ):
        check_options(lr=(lr, 0), steps=(steps, 1), stop_below=(stop_below, 0), margin=(margin, 0), reach=(reach, 0))
        check_options(density=(density, 0), shard=(shard, 1), merge=(merge, 2), kept=(kept, 0), ratio=(ratio, 0))
        check_options(contexts=(contexts, 0), context=(context, 1))
        self.model, self.runtime, self.site = model, runtime, Site(model, last_but_one(model, layer))
        self.lr, self.steps, self.stop_below, self.margin, self.reach = lr, steps, stop_below, margin, reach
        self.density, self.shard, self.merge, self.kept, self.ratio = density, shard, merge, kept, ratio
        self.contexts, self.context = contexts, context
        self.side_DH = self.site.linear.weight.detach().clone()
        self.stored: list[Tensor] = []
        self.thresholds: list[float] = []
        self.smallest, self.edits, self.unit = float("inf"), 0, 0.0
        runtime.meter.trained = self.side_DH.numel()

    def learn(self, experience: Experience) -> dict[str, float]:
        """Each request by itself, in stream order."""
        self.model.eval()
        data = edit_data(experience)
        if not self.unit:
            rows = torch.from_numpy(data.old_text(np.arange(min(16, data.old_size)))).to(self.runtime.device)
            with torch.no_grad():
                self.unit = float(self.site.linear(self.site.keys(rows)).norm(dim=-1).mean())
        for (request,) in each(self.runtime, self, experience):
            self._edit(request, data)
        return {"memories": float(len(self.stored) + 1)}

    def _edit(self, request: Request, data: EditData) -> None:
        key = self.runtime.key("contexts", request.id)
        pieces = contexts(data, self.contexts + 1, self.context, key)
        texts, _ = told(request, pieces[:-1], self.runtime.device)
        unrelated, length = torch.from_numpy(pieces[-1:]).to(self.runtime.device), len(request.target)
        mask_DH, start_DH = self._mask(), self.site.linear.weight.detach()
        side_DH = self.side_DH.clone().requires_grad_()
        beta = self.margin * self.unit
        state: dict[str, float] = {}

        suffixes = [Suffix(self.site, text[:, :-1]) for text in texts]
        apart = Suffix(self.site, unrelated)

        def loss() -> Tensor:
            trained = torch.where(mask_DH, side_DH, side_DH.detach())
            said, inside = [], []
            for suffix, text in zip(suffixes, texts, strict=True):
                y, d = self._side(suffix, trained)
                said.append(nats(suffix.logits(y), text, length).mean(1))
                inside.append(d[:, : d.shape[1] - length + 1].mean(1))  # the tokens of the prompt
            d_in, d_out = torch.cat(inside), self._side(apart, trained)[1].mean(1)
            state["d_in"] = float(d_in.detach()[0])
            return torch.cat(said).mean() + margins(d_in, d_out, beta / 4, beta, beta / 2)

        @torch.no_grad()
        def clamp() -> None:
            side_DH.clamp_(start_DH - self.reach, start_DH + self.reach)

        descend(self.runtime, [side_DH], loss, torch.optim.SGD([side_DH], lr=self.lr), self.steps, self.stop_below, clamp)
        with torch.no_grad():
            loss()  # of the weights as they are now
        self.side_DH, self.smallest = side_DH.detach(), min(self.smallest, state["d_in"])
        self.edits += 1
        if self.edits % self.shard == 0:
            self._store()

    def _side(self, suffix: Suffix, side_DH: Tensor) -> tuple[Tensor, Tensor]:
        """A side memory's output W' k + b [B, L, D], and |W' k - W k| of each token [B, L]."""
        other = functional.linear(suffix.keys, side_DH, self.site.linear.bias)
        return other.to(suffix.values.dtype), (other - suffix.values.float()).norm(dim=-1)

    def _mask(self) -> Tensor:
        """The entries that this shard trains [D, H] bool."""
        key = rng.key(self.runtime.seed, "mask", self.edits // self.shard)
        draws = rng.uniform(key, np.arange(self.side_DH.numel())).reshape(self.side_DH.shape) < self.density
        return torch.from_numpy(draws).to(self.side_DH.device)

    def _store(self) -> None:
        """Keep the memory, begin another; merge where there are enough."""
        start = self.site.linear.weight.detach()
        self.stored.append(self.side_DH)
        self.thresholds.append(self.smallest * self.ratio)
        self.side_DH, self.smallest = start.clone(), float("inf")
        if self.edits // self.shard % self.merge == 0:
            parts, self.stored = self.stored[-self.merge :], self.stored[: -self.merge]
            self.stored.append(ties(start, parts, self.kept))
            self.thresholds[-self.merge :] = [min(self.thresholds[-self.merge :])]

    def _routed(self, k: Tensor, y: Tensor) -> Tensor:
        """The layer's output [B, L, D] by the router; k [B, L, H]."""
        memories = [*self.stored, self.side_DH]
        limits = [*self.thresholds, self.smallest * self.ratio]
        best, answer = y.new_zeros(y.shape[:2], dtype=torch.float32), y
        places = torch.arange(1, y.shape[1] + 1, device=y.device)
        for memory, limit in zip(memories, limits, strict=True):
            other = functional.linear(k.float(), memory, self.site.linear.bias)
            d = (other - y.float()).norm(dim=-1).cumsum(1) / places
            wins = (d > limit) & (d > best)
            best = torch.where(wins, d, best)
            answer = torch.where(wins[..., None], other.to(y.dtype), answer)
        return answer

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        with torch.no_grad(), self.site.changed(self._routed):
            return self.model(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights, memories, thresholds."""
        return collect(self, *PARTS)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def margins(d_in: Tensor, d_out: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """[gamma + d_out - d_in]+ + [d_out - alpha]+ + [beta - d_in]+, each a mean over those above 0; d_in [B], d_out [1]."""
    parts = (gamma + d_out - d_in, d_out - alpha, beta - d_in)
    held = [part[part > 0] for part in parts]
    return sum((part.mean() for part in held if len(part)), d_in.new_zeros(()))


def ties(start: Tensor, parts: list[Tensor], kept: float) -> Tensor:
    """Merge changes of `start`: keep a share of each, elect a sign an entry (0: plus), mean of those that agree."""
    changes = torch.stack([part - start for part in parts])
    number = max(1, round(kept * start.numel()))
    least = changes.abs().flatten(1).topk(number, 1).values[:, -1].view(-1, *[1] * start.ndim)
    trimmed = torch.where(changes.abs() >= least, changes, torch.zeros_like(changes))
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = (trimmed * sign > 0).to(changes.dtype)
    return start + (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
