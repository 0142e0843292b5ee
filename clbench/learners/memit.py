"""MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer", ICLR, arXiv 2210.07229), and ENCORE as its options.

Requests come in batches of `batch`. Their values are searched at the last of `layers` and spread over all of them (see
`training.editing.spread`); with K [H, N] the keys of the batch at a layer and R what is missing, the change is ridge regression
against old text:
    Delta = R K^T (weight H C + P + ridge H I + K K^T)^-1

weight     of C = E[k k^T], per hidden unit: E[k^T C^-1 k] = H, so this transfers between widths. 3.1 (GPT-2 XL) and 0.92
           (GPT-J) in the code of MEMIT
past_keys  P is the sum of k k^T of all earlier edits, so that they stay what they are; else P = 0: the code of 2022 remembers
           nothing of earlier batches, and a stream of small ones collapses like ROME's, later
ridge      norm constraint: penalises |Delta|^2 in the solve, so that weights grow slowly
top, patience  most-probable early stopping: the search for a value ends when the whole answer is the first choice behind `top`
           contexts for the `patience`-th time; 0: never
ENCORE (Gupta et al. 2025, arXiv 2502.01636) is MEMIT with past_keys, ridge and top: learner=encore.

Own choices: weight 0.1, because requests come one at a time here and a single key of usual size then gets 10 / 11 of its change
(a half with 1, a quarter with 3.1); clamp 4 as for ROME (0.75 in the code for GPT-2 and GPT-J, too little for this width).
Deviations: contexts are pieces of old text; the early stop counts contexts whose whole answer is right, where the code counts
tokens until they equal 5. The norm constraint is against the weights as they are, as in the code.
Published number: none read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, UserError
from clbench.training.editing import key_values
from clbench.training.editing.requests import check_options, each, edit_data
from clbench.training.editing.site import Site
from clbench.training.editing.spread import Change, edit_together
from clbench.training.editing.value_search import Search, check_clamp_by, weights_given
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class Memit:
    """Batches of edits as regularised least squares. State: weights, C and, with `past_keys`, the sum over earlier keys."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="logits", needs_boundaries=False)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        batch: int = 1,  # requests that are edited together
        layers: Sequence[int] | None = None,  # blocks, rising; null: the one before the last but one, and the one below
        weight: float = 0.1,  # of old text, per hidden unit
        past_keys: bool = False,  # keep what earlier edits wrote
        ridge: float = 0.0,  # norm constraint
        contexts: int = 8,  # pieces of old text before the prompt, over which keys are means
        context: int = 8,  # tokens of each
        lr: float | None = None,  # of the search for a value; null: by the size of the block's output
        steps: int = 40,
        clamp: float = 4.0,  # largest change of a value, of its size
        clamp_by: Literal["now", "start"] = "now",  # whose size: now (of the edited model) | start (of the model as given)
        kl: float = 0.0625,  # weight of what is said of the subject otherwise
        decay: float = 0.5,
        top: int = 0,  # early stopping: contexts behind which the whole answer must be the first choice; 0: never
        patience: int = 4,  # times that it must be so
    ):
        check_options(batch=(batch, 1), weight=(weight, 0), ridge=(ridge, 0), contexts=(contexts, 0), context=(context, 1))
        check_clamp_by(clamp_by)
        if top > contexts:
            raise UserError(f"learner.top={top} is never met: there are learner.contexts={contexts}")
        blocks: Any = model.layers
        self.model, self.runtime, self.batch = model, runtime, batch
        self.sites = [Site(model, layer) for layer in key_values.check_layers(layers, len(blocks))]
        self.weight, self.past_keys, self.ridge = weight, past_keys, ridge
        self.contexts, self.context = contexts, context
        self.search = Search(lr=lr, steps=steps, clamp=clamp, kl=kl, decay=decay, top=top, patience=patience)
        self.given = weights_given(self.sites) if clamp_by == "start" else []
        self.moments_HH: list[Tensor] = []
        self.past_HH: list[Tensor] = []
        runtime.meter.trained = sum(site.linear.weight.numel() for site in self.sites)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Batch after batch, in stream order."""
        return self.run(experience, self._change)

    def run(self, experience: Experience, change: Change) -> dict[str, float]:
        """The same with any `change(number of the layer, R, K)`."""
        self.model.eval()
        data = edit_data(experience)
        if not self.moments_HH:
            self.moments_HH = [key_values.second_moment(site, data, self.runtime.device) for site in self.sites]
            self.past_HH = [torch.zeros_like(moment) for moment in self.moments_HH] if self.past_keys else []
        for requests in each(self.runtime, self, experience, self.batch):
            told = (self.search, self.contexts, self.context, change, self.given)
            keys = edit_together(self.runtime, self.model, self.sites, requests, data, *told)
            for past, keys_HN in zip(self.past_HH, keys, strict=False):
                past += keys_HN @ keys_HN.T
        return {}

    def _change(self, m: int, residual_DN: Tensor, keys_HN: Tensor) -> Tensor:
        return key_values.least_squares(residual_DN, keys_HN, self.prior(m))

    def prior(self, m: int) -> Tensor:
        """What a change at layer number m is weighed against [H, H]."""
        moment = self.moments_HH[m]
        prior = self.weight * len(moment) * moment
        if self.past_HH:
            prior = prior + self.past_HH[m]
        return prior + self.ridge * len(moment) * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        return self.model(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights, now and as given, C, sums over earlier keys."""
        return collect(self, "model", "moments_HH", "past_HH", *(["given"] if self.given else []))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
