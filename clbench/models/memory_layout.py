"""How images and weights of convolutions lie in memory: channels outermost, or innermost ("channels last")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def lay_out(model: Any, channels_last: bool) -> None:
    """Keep the channels of a backbone's weights innermost, or not.

    No effect on a network with one convolution, a ViT's embedding of patches.
    """
    if sum(isinstance(module, nn.Conv2d) for module in model.modules()) < 2 or channels_last == model.channels_last:
        return
    model.channels_last = channels_last
    model.net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """Images [B, C, H, W] as the weights lie; under vmap, which has no rule for layouts, as they are."""
    in_vmap = torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined]
    return x.contiguous(memory_format=torch.channels_last) if channels_last and not in_vmap else x
