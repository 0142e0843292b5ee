"""How wide a network's features are: a network from outside is asked, with shapes alone where that is possible.

A timm network's `num_features` is what leaves its last stage. MobileNets, GhostNets, VGGs and others put a layer behind the
pooling: their features are `head_hidden_size` wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clbench.interfaces import UserError
from clbench.models import weights as files


class _Features(nn.Module):
    """Images [B, 3, S, S] -> features [B, D], as a `Backbone` asks for them."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        return net.forward_head(net.forward_features(x), pre_logits=True)


def measured(net: nn.Module, side: int, name: str) -> int:
    """The width D of the features of a network for images of `side` pixels. `UserError` where it gives no [B, D]."""
    asked, was = _Features(net).eval(), net.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                state = {key: value.to("meta") for key, value in [*asked.named_parameters(), *asked.named_buffers()]}
                found = functional_call(asked, state, (torch.empty(2, 3, side, side, device="meta"),))
            except Exception:  # code that looks at values, or makes tensors of its own, has no answer from shapes alone
                found = asked(torch.zeros(2, 3, side, side))
    except Exception as error:  # a foreign network raises many kinds
        why = f"{type(error).__name__}: {files.line(error)}"
        raise UserError(f"model {name} gives no features of images of {side} x {side} pixels: {why}") from None
    finally:
        net.train(was)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != 2:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"model {name}: features of 2 images must be [2, D], got {shape}")
    return found.shape[1]
