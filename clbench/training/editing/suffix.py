"""Texts through a model up to one layer, computed once: a search that changes this layer's output runs the blocks above alone.

D width, H hidden width. The numbers are those of the whole model to the last bit, as long as nothing below the layer changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clbench.training.editing.site import Site


class Suffix:
    """What texts [B, L] give up to a layer.

    keys     its inputs [B, L, H], float32
    values   its outputs [B, L, D] with the weights of now
    base     what its block gives beside them [B, L, D]: the residual stream and attention
    """

    @torch.no_grad()
    def __init__(self, site: Site, tokens: Tensor):
        model: Any = site.model
        block: Any = model.layers[site.layer]
        found: dict[str, Tensor] = {}

        def written(_: Any, inputs: Any, y: Any) -> None:
            found.update(keys=inputs[0], values=y)

        handles = [
            block.register_forward_pre_hook(lambda _, inputs: found.update(x=inputs[0])),
            block.attention["dense"].register_forward_hook(lambda _, inputs, y: found.update(attended=y)),
            site.linear.register_forward_hook(written),
        ]
        try:
            model(tokens)
        finally:
            for handle in handles:
                handle.remove()
        self._resume: Callable[[Tensor, int], Tensor] = model.resume
        self.above = site.layer + 1
        self.keys, self.values = found["keys"].float(), found["values"]
        self.base = found["x"] + found["attended"]

    def output(self) -> Tensor:
        """What the block gives [B, L, D] with the weights of now."""
        return self.base + self.values

    def logits(self, values: Tensor) -> Tensor:
        """Scores [B, L, V] where the layer gives `values` [B, L, D]."""
        return self._resume(self.base + values, self.above)

    def after(self, output: Tensor) -> Tensor:
        """Scores [B, L, V] where its block gives `output` [B, L, D]."""
        return self._resume(output, self.above)


def nats(z: Tensor, tokens: Tensor, length: int) -> Tensor:
    """Nats [B, length] of the last `length` tokens of texts [B, L]; scores z [B, L - 1, V] of all tokens but the first."""
    z, wanted = z[:, -length:].float(), tokens[:, -length:]
    return torch.nn.functional.cross_entropy(z.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
