"""ROME (Meng et al. 2022, "Locating and Editing Factual Associations in GPT", NeurIPS, arXiv 2202.05262), and r-ROME.

Each edit is one rank-one change of the second matrix of one MLP, seen as a memory of keys (subjects) and values. With k the key
at the subject's last token, v* = v_0 + delta the value that makes the model say the answer (`training.editing.value_search`)
and C = E[k k^T] over old text, of all changes with (W + Delta) k = v* the one that changes old outputs least is
    Delta = (v* - W k) (C^-1 k)^T / (k^T C^-1 k)

variant  the key is a mean over contexts before the prompt, and the code does not use it everywhere (k_p: prompt by itself,
         k: mean over the prompt by itself and behind contexts, v_j the output in context j):
    rome    delta (C^-1 k)^T / (k_p^T C^-1 k): the released code. Two keys: k_p^T C^-1 k can come near 0, and one such edit
            ("disabling", Gupta et al. 2024, arXiv 2403.07175) ruins the model
    r_rome  (v_0 + delta - mean_j v_j) (C^-1 k)^T / (k^T C^-1 k): one key, as in the paper's formula (Gupta et al. 2024)
    p_rome  delta (C^-1 k_p)^T / (k_p^T C^-1 k_p): one key, that of the prompt by itself

Default is rome, because that is what tables call so. Why a stream of edits collapses: nothing protects what earlier edits
wrote; edit i changes the output at an earlier key k' by (v* - W k) k^T C^-1 k' / (k^T C^-1 k), and Delta of all n edits has
rank n <= H.

Deviations: contexts are pieces of old text instead of samples of the model, `contexts` of `context` tokens (20 of 5 and 10 in
the code); the layer is the one before the last but one (GPT-2 XL: 17 of 48): of the decoder of `edit_facts` the first, where
tracing finds its facts (`models/facts.json`). C is taken once, of the model as it is given, and never again, as in the code.
Own choice: 25 steps (20). Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, UserError
from clbench.streams.tokens.edits import Request
from clbench.training.editing import key_values
from clbench.training.editing.requests import check_options, each, edit_data
from clbench.training.editing.site import Site
from clbench.training.editing.value_search import Search, check_clamp_by, find_value, size_given, weights_given
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore

VARIANTS = ("rome", "r_rome", "p_rome")


class Rome:
    """One rank-one change of a layer for each request. State: weights and C."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="logits", needs_boundaries=False)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        variant: Literal[
            "rome", "r_rome", "p_rome"
        ] = "rome",  # rome (the released code) | r_rome (one key) | p_rome (one key, that of the prompt by itself)
        layer: int | None = None,  # the block whose MLP is changed; null: the one before the last but one
        contexts: int = 8,  # pieces of old text before the prompt, over which the key is a mean
        context: int = 8,  # tokens of each
        lr: float | None = None,  # of the search for a value; null: by the size of the layer's output
        steps: int = 25,
        clamp: float = 4.0,  # largest change of a value, of its size
        clamp_by: Literal["now", "start"] = "now",  # whose size: now (of the edited model) | start (of the model as given)
        kl: float = 0.0625,  # weight of what is said of the subject otherwise
        decay: float = 0.5,
    ):
        if variant not in VARIANTS:
            raise UserError(f"learner.variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        check_options(contexts=(contexts, 0), context=(context, 1))
        check_clamp_by(clamp_by)
        blocks: Any = model.layers
        self.site = Site(model, max(0, len(blocks) - 3) if layer is None else layer)
        self.model, self.runtime, self.variant = model, runtime, variant
        self.contexts, self.context = contexts, context
        self.search = Search(lr=lr, steps=steps, clamp=clamp, kl=kl, decay=decay)
        self.given = weights_given([self.site]) if clamp_by == "start" else []
        self.moment_HH = torch.zeros(0, 0, dtype=torch.float64, device=runtime.device)
        runtime.meter.trained = self.site.linear.weight.numel()

    def learn(self, experience: Experience) -> dict[str, float]:
        """Each request by itself, in stream order -> the mean and the largest norm of a change."""
        self.model.eval()
        data = edit_data(experience)
        if not self.moment_HH.numel():
            self.moment_HH = key_values.second_moment(self.site, data, self.runtime.device)
        norms = []
        for (request,) in each(self.runtime, self, experience):
            delta_DH = self._change(request, data)
            key_values.apply(self.site, delta_DH)
            norms.append(float(delta_DH.norm()))
        return {"change_mean": sum(norms) / len(norms), "change_max": max(norms)} if norms else {}

    def _change(self, request: Request, data: Any) -> Tensor:
        """Delta [D, H] of one request."""
        before = key_values.contexts(data, self.contexts, self.context, self.runtime.key("contexts", request.id))
        size = size_given([self.site], self.given, request, self.runtime.device, False) if self.given else None
        delta_D, start_D = find_value(self.runtime, self.site, request, before, self.search, size=size)
        plain_H, behind_MH = key_values.keys_of(self.site, request, before, self.runtime.device)
        mean_H = torch.cat([plain_H[None], behind_MH]).mean(0)
        return rome_change(self.variant, self.site, delta_D.double(), start_D.double(), plain_H, mean_H, self.moment_HH)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        return self.model(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights, now and as given, and C."""
        return collect(self, "model", "moment_HH", *(["given"] if self.given else []))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def rome_change(
    variant: str, site: Site, delta_D: Tensor, start_D: Tensor, plain_H: Tensor, mean_H: Tensor, moment_HH: Tensor
) -> Tensor:
    """Delta [D, H] of a variant; `start` is the layer's output at the prompt's own key, `mean` the key over contexts."""
    if variant == "rome":
        return key_values.rank_one(delta_D, mean_H, plain_H, moment_HH)
    if variant == "p_rome":
        return key_values.rank_one(delta_D, plain_H, plain_H, moment_HH)
    weight, bias = (p.detach().double() for p in (site.linear.weight, site.linear.bias))
    return key_values.rank_one(start_D + delta_D - (weight @ mean_H + bias), mean_H, mean_H, moment_HH)
