"""Fine-tuning on one edit at a time, free or within a box: the baseline of model editing (Zhu et al. 2020, arXiv 2012.00363).

For each request Adam makes at most `steps` steps on the weights of one layer, none from a loss below `stop_below` on:
    min  -log p(answer | prompt)    over W, b of the second linear layer of one block's MLP
box   null: free ("FT"); a number e: after each step every entry is put back into [start - e, start + e], where start is the
      weight before this edit ("FT-L"): the box moves with the edits, so n edits may move an entry by n e
loss  "target": every token of the answer given those before it ("FT-M" of later code); "last": all tokens of the answer from
      the one distribution after the prompt, as in the code of Meng et al. 2022; the same for answers of one token

Own choices: the layer (the last but one), and steps of 5e-3 instead of 5e-4: matrices here are smaller, and 25 steps of 5e-4 do
not change an answer. In code of the literature GPT-2 XL has layer 1 without and 0 with a box of 5e-4.
Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, UserError
from clbench.training.editing.requests import check_options, descend, each, whole
from clbench.training.editing.site import Site, last_but_one
from clbench.training.editing.suffix import Suffix, nats
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class EditFinetune:
    """Trains one layer on each request; nothing is remembered but the weights."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="logits", needs_boundaries=False)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        layer: int | None = None,  # the block whose MLP is trained; null: the last but one
        lr: float = 5e-3,
        steps: int = 25,  # of an edit, at most
        stop_below: float = 1e-2,  # nats per token from which on no step is made
        box: float | None = None,  # largest change of an entry by one edit; null: none
        loss: Literal[
            "target", "last"
        ] = "target",  # target | last (all tokens of the answer from the one distribution after the prompt)
        weight_decay: float = 0.0,
    ):
        check_options(lr=(lr, 0), steps=(steps, 1), stop_below=(stop_below, 0), weight_decay=(weight_decay, 0))
        check_options(**({} if box is None else {"box": (box, 0)}))
        if loss not in ("target", "last"):
            raise UserError(f"learner.loss must be target or last, got {loss!r}")
        self.model, self.runtime, self.site = model, runtime, Site(model, last_but_one(model, layer))
        self.lr, self.steps, self.stop_below, self.box = lr, steps, stop_below, box
        self.reads, self.weight_decay = loss, weight_decay
        self.params = [self.site.linear.weight, self.site.linear.bias]
        runtime.meter.trained = sum(p.numel() for p in self.params)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Each request by itself, in stream order."""
        self.model.eval()
        steps = 0
        for (request,) in each(self.runtime, self, experience):
            steps += self._edit(whole(request, self.runtime.device), len(request.target))
        return {"steps": float(steps)}

    def _edit(self, tokens: Tensor, length: int) -> int:
        """Train on one text [1, L] whose last `length` tokens are the answer -> steps made."""
        start = [p.detach().clone() for p in self.params]

        suffix = Suffix(self.site, tokens[:, :-1] if self.reads == "target" else tokens[:, :-length])

        def loss() -> Tensor:
            z = suffix.logits(self.site.linear(suffix.keys))
            if self.reads == "target":
                return nats(z, tokens, length).mean()
            return -z[0, -1].float().log_softmax(-1)[tokens[0, -length:]].mean()  # all from the place after the prompt

        @torch.no_grad()
        def clamp() -> None:
            for p, before in zip(self.params, start, strict=True):
                p.clamp_(before - self.box, before + self.box)

        optimizer = torch.optim.Adam(self.params, lr=self.lr, weight_decay=self.weight_decay)
        limit = None if self.box is None else clamp
        return descend(self.runtime, self.params, loss, optimizer, self.steps, self.stop_below, limit)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        return self.model(tokens)

    def state_dict(self) -> dict[str, Any]:
        """The weights."""
        return collect(self, "model")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
