"""Networks that grow wider with the experiences: whole columns, a forked last stage, and a classifier for both.

Parts of earlier experiences stand still: their parameters do not train, their normalisation keeps its statistics.
Shapes: B batch, D features of one network, T parts, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.models.backbone import Backbone
from clbench.models.small_networks import ConvNet, Mlp


class Columns(nn.Module):
    """Backbones side by side; the newest one trains. A new column starts as a copy of the one before."""

    def __init__(self, first: Backbone):
        super().__init__()
        self.nets = nn.ModuleList([first])

    @property
    def newest(self) -> Backbone:
        return self.nets[-1]  # type: ignore[return-value]

    def add(self) -> None:
        """Freeze the newest column and put a copy of it beside it."""
        twin = copy.deepcopy(self.newest)
        self.newest.freeze()
        self.nets.append(twin)

    def features(self, batch: Any) -> Tensor:
        """Features of all columns, the oldest first [B, T D]."""
        return torch.cat([net.features(batch) for net in self.nets], dim=1)  # type: ignore[operator]

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill in place; columns that are missing are added, columns too many are removed."""
        count = 1 + max(int(key.split(".")[1]) for key in state)
        while len(self.nets) < count:
            self.add()
        if len(self.nets) > count:
            del self.nets[count:]
            self.newest.unfreeze()
        for net in self.nets:
            net.forget()  # type: ignore[operator]
        return super().load_state_dict(state, strict, assign)


class Fork(nn.Module):
    """Parts on one input, their outputs joined along `dim`; the newest one trains and starts as a copy of the one before."""

    def __init__(self, part: nn.Module, dim: int):
        super().__init__()
        self.parts, self.dim = nn.ModuleList([part]), dim

    def resize(self, count: int) -> None:
        """Add copies of the newest part, or remove the newest ones, until there are `count`."""
        while len(self.parts) < count:
            twin = copy.deepcopy(self.parts[-1])
            self.parts[-1].requires_grad_(False).eval()
            self.parts.append(twin)
        if len(self.parts) > count:
            del self.parts[count:]
            self.parts[-1].requires_grad_(True)

    def train(self, mode: bool = True) -> Fork:
        """Older parts stay in evaluation mode."""
        super().train(mode)
        for part in self.parts[:-1]:
            part.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Outputs side by side."""
        return torch.cat([part(x) for part in self.parts], dim=self.dim)


def fork_last_stage(model: Backbone) -> Fork:
    """Put a `Fork` in place of what comes last in a network, whose features become as many times as wide; it has one part yet.

    ResNets: the last stage; ViTs: the last block and the norm behind it; `convnet`: the last stage and the hidden units;
    `mlp`: the last layer. `UserError` for any other network.
    """
    net: Any = model.net
    if isinstance(net, ResNet):
        name = next(name for name in ("layer4", "layer3") if not isinstance(getattr(net, name), nn.Identity))
        fork = Fork(getattr(net, name), 1)
        setattr(net, name, fork)
    elif isinstance(net, VisionTransformer) and isinstance(net.fc_norm, nn.Identity) and net.attn_pool is None:
        fork = Fork(nn.Sequential(net.blocks[-1], net.norm), -1)
        net.blocks[-1], net.norm = fork, nn.Identity()
    elif isinstance(net, ConvNet):
        last = max(i for i, layer in enumerate(net.stages[:-1]) if isinstance(layer, nn.MaxPool2d | nn.Conv2d))
        first = last - 3  # a stage: twice (convolution, norm, ReLU), then pooling
        fork = Fork(nn.Sequential(*net.stages[first:], nn.Flatten(), net.dense, nn.ReLU()), 1)
        net.stages = nn.Sequential(*net.stages[:first], fork)
        net.add_module("dense", nn.Identity())
    elif isinstance(net, Mlp) and len(net.layers) > 1:
        fork = Fork(net.layers[-1], 1)
        net.layers[-1] = fork
    else:
        raise UserError(
            f"model {model.identity['name']} has no last stage to copy: choose a ResNet, a ViT whose last norm comes before "
            "pooling, convnet, or an mlp of two or more layers"
        )
    model.forget()
    return fork


class WideHead(nn.Module):
    """A linear classifier that grows in classes and in features: features [B, D'] -> logits [B, K].

    New weights are kaiming-uniform over all features (`SimpleLinear` of PyCIL), new biases 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(0, 0)), nn.Parameter(torch.zeros(0))

    def clear(self) -> None:
        """No class and no feature."""
        self.weight, self.bias = nn.Parameter(self.weight.new_zeros(0, 0)), nn.Parameter(self.bias.new_zeros(0))

    def grow(self, classes: int, features: int, generator: torch.Generator) -> None:
        """So many classes and features in all. What was there before stays, as the upper left block."""
        old, old_bias = self.weight.detach(), self.bias.detach()
        self.weight = nn.Parameter(old.new_zeros(classes, features))
        self.bias = nn.Parameter(old_bias.new_zeros(classes))
        self.redraw(generator)
        with torch.no_grad():
            self.weight[: len(old), : old.shape[1]] = old
            self.bias[: len(old_bias)] = old_bias

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """Start anew, in place; weights are drawn from a CPU generator."""
        drawn = torch.empty(self.weight.shape)
        nn.init.kaiming_uniform_(drawn, nonlinearity="linear", generator=generator)
        self.weight.copy_(drawn)
        self.bias.zero_()

    @torch.no_grad()
    def align(self, known: int) -> float:
        """Scale the rows of classes known, known + 1, ... to the old rows' mean norm -> the factor."""
        norms = self.weight.norm(dim=1)
        factor = norms[:known].mean() / norms[known:].mean()
        self.weight[known:] *= factor
        return float(factor)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, K]."""
        return nn.functional.linear(features, self.weight, self.bias)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill in place where shapes agree; else parameters are replaced."""
        for name in ("weight", "bias"):
            if getattr(self, name).shape != state[name].shape:
                setattr(self, name, nn.Parameter(torch.zeros_like(state[name], device=self.weight.device)))
        return super().load_state_dict(state, strict, assign)
