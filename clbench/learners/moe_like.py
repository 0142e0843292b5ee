"""Experts beside one MLP for edits, after the idea of MEMoE (Wang & Li 2024, arXiv 2405.19086); not the paper's method.

The paper adds experts beside a frozen MLP and routes to them by the input and by words that anchor the edited knowledge. No
code and no numbers of its own are known here, so this is a stand-in of the same family, named so. With k the input of the
second layer of one block's MLP, W frozen, at every token by itself:
    y = W k + b + p_e U_e V_e k,    e = argmax_j p_j,    p = softmax(G k)
U_e [D, r] starts at 0, V_e [r, H] and G [E, H] at random. Each edit trains U, V and G by Adam on its answer, from a loss below
`stop_below` on not at all.

Own choices: everything but the form of the sum: rank, number of experts, one expert a token, the router's input, no anchor, no
losses of the router's own. Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience
from clbench.training.editing.requests import check_options, descend, each, whole
from clbench.training.editing.site import Site, last_but_one
from clbench.training.editing.suffix import Suffix, nats
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class MoeLike:
    """Low-rank experts with a router; weights stay. State: weights, experts, router."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="logits", needs_boundaries=False)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        layer: int | None = None,  # the block whose MLP has experts; null: the last but one
        experts: int = 4,
        rank: int = 8,  # of each
        lr: float = 1e-2,
        steps: int = 40,  # of an edit, at most
        stop_below: float = 1e-2,  # nats per token from which on no step is made
    ):
        check_options(experts=(experts, 1), rank=(rank, 1), lr=(lr, 0), steps=(steps, 1), stop_below=(stop_below, 0))
        self.model, self.runtime, self.site = model, runtime, Site(model, last_but_one(model, layer))
        self.lr, self.steps, self.stop_below = lr, steps, stop_below
        width, hidden = self.site.linear.weight.shape
        gen = runtime.generator("experts")
        self.up_EDR = torch.zeros(experts, width, rank, device=runtime.device)
        self.down_ERH = (torch.randn(experts, rank, hidden, generator=gen) / hidden**0.5).to(runtime.device)
        self.gate_EH = (torch.randn(experts, hidden, generator=gen) / hidden**0.5).to(runtime.device)
        runtime.meter.trained = sum(p.numel() for p in (self.up_EDR, self.down_ERH, self.gate_EH))

    def learn(self, experience: Experience) -> dict[str, float]:
        """Each request by itself, in stream order."""
        self.model.eval()
        steps = 0
        for (request,) in each(self.runtime, self, experience):
            steps += self._edit(whole(request, self.runtime.device), len(request.target))
        return {"steps": float(steps)}

    def _edit(self, tokens: Tensor, length: int) -> int:
        params = [p.requires_grad_() for p in (self.up_EDR, self.down_ERH, self.gate_EH)]

        suffix = Suffix(self.site, tokens[:, :-1])

        def loss() -> Tensor:
            return nats(suffix.logits(self._beside(suffix.keys, suffix.values)), tokens, length).mean()

        steps = descend(self.runtime, params, loss, torch.optim.Adam(params, lr=self.lr), self.steps, self.stop_below)
        for p in params:
            p.requires_grad_(False)
        return steps

    def _beside(self, k: Tensor, y: Tensor) -> Tensor:
        """The layer's output [B, L, D] with that of each token's expert; k [B, L, H]."""
        flat = k.reshape(-1, k.shape[-1]).float()
        share, chosen = (flat @ self.gate_EH.T).softmax(-1).max(-1)
        inside = torch.einsum("nh,erh->ner", flat, self.down_ERH)
        made = torch.einsum("ner,edr->ned", inside, self.up_EDR)
        own = made.gather(1, chosen[:, None, None].expand(-1, 1, made.shape[-1]))[:, 0]
        return y + (share[:, None] * own).view(y.shape).to(y.dtype)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        with self.site.changed(self._beside):
            return self.model(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights, experts, router."""
        return collect(self, "model", "up_EDR", "down_ERH", "gate_EH")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
