"""GRACE (Hartvigsen et al. 2023, "Aging with GRACE", NeurIPS, arXiv 2211.11031): a codebook in one layer, weights stay.

The codebook holds keys k_i, radii e_i and values v_i. At every token with the layer's input q, j the nearest key:
    y = v_j where |q - k_j| <= e_j,   W q + b elsewhere
An edit takes q* at the last token of its prompt, j the nearest key, d its distance:
    no key, or d > e_init + e_j     new key q* with radius e_init
    else, the same answer           no new key; e_j = max(e_j, d)
    else                            new key q* with radius d / 2; e_j = d / 2 - 1e-5
    d = 0                           the same prompt again: its answer is replaced
and then `steps` steps of Adam on this key's value alone, min -log p(answer | prompt), stopping below `stop_below`.

replace  "last": the token alone whose input is near a key; "after": the tokens after it too, up to the next such token
official_label  answers are the same where the means of their token ids are: the code compares the mean of the labels with the
                mask -100 of the prompt's tokens among them, so that answers meet by chance. Else the answers themselves
start           of a value: "cold" uniform in [0, 1), as in the code, or "warm", what the layer gives

Deviations: in the code the last token of the prompt alone is looked up, and a later token of the answer keeps that decision;
here each token is looked up by itself, so that an answer does not depend on what is known of its prompt, and ordinary text
meets the codebook too. In the code the same prompt twice makes neither edit fire. Early stopping is in the code's configuration
only. Own choices: the layer, the second one of the MLP of the last block but one; radius 0.3 (1 in the
code): half the distance between keys of different facts of `edit_facts`, of which the nearest 1 % are 0.65 apart.
Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, UserError
from clbench.streams.tokens.edits import Request
from clbench.training.editing.requests import check_options, descend, each, whole
from clbench.training.editing.site import Site, last_but_one
from clbench.training.editing.suffix import Suffix, nats
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore

PARTS = ("model", "keys_NH", "values_ND", "radii_N", "labels")
APART = 1e-5  # between the radii of two keys with different answers


class Grace:
    """A codebook around one layer. State: weights, which stay as they are, and the codebook."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="logits", needs_boundaries=False)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        layer: int | None = None,  # the block whose MLP has the codebook; null: the last but one
        radius: float = 0.3,  # of a new key
        lr: float = 1.0,
        steps: int = 100,  # of an edit, at most
        stop_below: float = 1e-2,  # nats per token from which on no step is made
        start: Literal["cold", "warm"] = "cold",  # cold (uniform in 0..1) | warm (the layer's own output)
        replace: Literal["last", "after"] = "last",  # last (the token near a key) | after (the tokens after it too)
        official_label: bool = False,  # compare answers as the released code does
    ):
        check_options(radius=(radius, 0), lr=(lr, 0), steps=(steps, 1), stop_below=(stop_below, 0))
        if start not in ("cold", "warm"):
            raise UserError(f"learner.start must be cold or warm, got {start!r}")
        if replace not in ("last", "after"):
            raise UserError(f"learner.replace must be last or after, got {replace!r}")
        self.model, self.runtime, self.site = model, runtime, Site(model, last_but_one(model, layer))
        self.radius, self.lr, self.steps, self.stop_below = radius, lr, steps, stop_below
        self.start, self.replace, self.official_label = start, replace, official_label
        width, hidden = self.site.linear.weight.shape
        self.keys_NH = torch.zeros(0, hidden, device=runtime.device)
        self.values_ND = torch.zeros(0, width, device=runtime.device)
        self.radii_N = torch.zeros(0, device=runtime.device)
        self.labels: list[Any] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Each request by itself, in stream order."""
        self.model.eval()
        for (request,) in each(self.runtime, self, experience):
            self._edit(request)
        return {"keys": float(len(self.keys_NH))}

    def _edit(self, request: Request) -> None:
        tokens, length = whole(request, self.runtime.device), len(request.target)
        suffix = Suffix(self.site, tokens[:, :-1])
        query_H = suffix.keys[0, -length]
        row = self._place(query_H, self._label(request))
        if self.start == "cold":
            gen = self.runtime.generator("grace", request.id)
            self.values_ND[row] = torch.rand(self.values_ND.shape[1], generator=gen).to(self.values_ND)
        else:
            self.values_ND[row] = self.site.linear(query_H).detach()
        value_1D = self.values_ND[row : row + 1].clone().requires_grad_()
        hit, j = self._near(suffix.keys)
        own = (hit & (j == row))[..., None]
        others = torch.where(hit[..., None], self.values_ND[j].to(suffix.values.dtype), suffix.values)

        def loss() -> Tensor:
            z = suffix.logits(torch.where(own, value_1D.to(others.dtype), others))
            return nats(z, tokens, length).mean()

        optimizer = torch.optim.Adam([value_1D], lr=self.lr)
        self.runtime.meter.trained = max(self.runtime.meter.trained, self.values_ND.numel() + value_1D.numel())
        descend(self.runtime, [value_1D], loss, optimizer, self.steps, self.stop_below)
        self.values_ND[row] = value_1D.detach()[0]

    def _place(self, query_H: Tensor, label: Any) -> int:
        """The row of the codebook for an answer at a query; radii are settled."""
        if not len(self.keys_NH):
            return self._add(query_H, label, self.radius)
        distances = (self.keys_NH - query_H).norm(dim=1)
        d, j = (part.item() for part in distances.min(0))
        j, reach = int(j), float(self.radii_N[int(j)])
        if d == 0:
            self.labels[j] = label
            return j
        if d > self.radius + reach:
            return self._add(query_H, label, self.radius)
        if label == self.labels[j]:
            self.radii_N[j] = max(reach, d)
            return j
        self.radii_N[j] = d / 2 - APART
        return self._add(query_H, label, d / 2)

    def _label(self, request: Request) -> Any:
        """What the answers of two requests are compared by."""
        answer = [int(token) for token in request.target]
        masked = len(request.prompt)
        return (sum(answer) - 100 * masked) / (len(answer) + masked) if self.official_label else answer

    def _add(self, query_H: Tensor, label: Any, radius: float) -> int:
        """A new row, its value still 0."""
        self.keys_NH = torch.cat([self.keys_NH, query_H[None]])
        self.values_ND = torch.cat([self.values_ND, self.values_ND.new_zeros(1, self.values_ND.shape[1])])
        self.radii_N = torch.cat([self.radii_N, self.radii_N.new_tensor([radius])])
        self.labels.append(label)
        return len(self.labels) - 1

    def _near(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a key answers at each token, and the row of the nearest one [B, L]; q [B, L, H]."""
        distances = torch.cdist(q.flatten(0, 1).float(), self.keys_NH, compute_mode="donot_use_mm_for_euclid_dist")
        d, j = (part.view(q.shape[:2]) for part in distances.min(1))
        hit = d <= self.radii_N[j]
        if self.replace == "after":
            places = torch.arange(q.shape[1], device=q.device).expand(hit.shape)
            latest = torch.where(hit, places, -1).cummax(1).values  # the last token so far that is near a key
            hit, j = latest >= 0, j.gather(1, latest.clamp(min=0))
        return hit, j

    def _looked_up(self, q: Tensor, y: Tensor) -> Tensor:
        """Values where a key is near, the layer's own output y [B, L, D] elsewhere; q [B, L, H]."""
        if not len(self.keys_NH):
            return y
        hit, j = self._near(q)
        return torch.where(hit[..., None], self.values_ND[j].to(y.dtype), y)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        with self.site.changed(self._looked_up):
            return self.model(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights and codebook."""
        return collect(self, *PARTS)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
