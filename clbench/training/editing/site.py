"""The place of an edit: the second linear layer of the MLP of one block, seen as a memory of keys and values.

D width, H hidden width: y = W k + b with W [D, H]; k [.., H], what the activation gives, is the key, y [.., D] the value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError


class Site:
    """The layer `mlp.dense_4h_to_h` of block number `layer` of a decoder."""

    def __init__(self, model: nn.Module, layer: int):
        blocks: Any = model.layers
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(blocks):
            raise UserError(f"learner.layer must be a block from 0 to {len(blocks) - 1}, got {layer!r}")
        self.model, self.layer = model, layer
        self.linear: nn.Linear = blocks[layer].mlp["dense_4h_to_h"]

    @contextmanager
    def changed(self, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """While it lasts the layer gives `change(k, y)` where it would give y."""

        def hook(_: nn.Module, inputs: Any, y: Any) -> Any:
            return change(inputs[0], y)

        handle = self.linear.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def keys(self, tokens: Tensor) -> Tensor:
        """Inputs of the layer at every token: [B, L] -> [B, L, H] float32."""
        found: list[Tensor] = []

        def note(k: Tensor, y: Tensor) -> Tensor:
            found.append(k.float())
            return y

        with self.changed(note):
            self.model(tokens)
        return found[0]


def last_but_one(model: Any, layer: int | None) -> int:
    """The block of an option `layer`; null: the last but one."""
    return max(0, len(model.layers) - 2) if layer is None else layer
