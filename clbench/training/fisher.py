"""Diagonal Fisher information, and quadratic penalties towards earlier weights.

Legend: a *weights* mapping is {parameter name: tensor}, in the order of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clbench.interfaces import UserError
from clbench.models.backbone import Backbone

Weights = dict[str, Tensor]
Part = Literal["all", "attention", "qkv"]
HELD = 2**28  # numbers of single samples' gradients that are held at a time (1 GiB)


def train_only(model: Backbone, part: str) -> None:
    """Let gradients reach all weights, or those of the attention (qkv and output), or the qkv projections alone."""
    words = {"all": ("",), "attention": ("attn.qkv.", "attn.proj."), "qkv": ("attn.qkv.",)}
    if part not in words:
        raise UserError(f"unknown part {part!r} of the backbone: choose {', '.join(words)}")
    found = 0
    for name, p in model.named_parameters():
        p.requires_grad_(any(word in name for word in words[part]))
        found += p.requires_grad
    if not found:
        raise UserError(f"learner.trainable={part}: {model.identity['name']} has no such layers; choose learner.trainable=all")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def kept(model: nn.Module) -> Weights:
    """A copy of the trainable parameters."""
    return {name: p.detach().clone() for name, p in trained(model).items()}


def moved(weights: Weights | None, device: torch.device) -> Weights | None:
    """The same on a device: what a journal holds comes back on the CPU."""
    return None if weights is None else {name: value.to(device) for name, value in weights.items()}


def quadratic_penalty(
    model: nn.Module, reference: Mapping[str, Tensor], importance: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Half the sum of importance (theta - reference)^2 over the reference's weights -> scalar; importance 1 where None.

    The released SI, MAS, RWalk and online EWC have no half: a strength of theirs is twice as large here.
    """
    own, total = dict(model.named_parameters()), 0.0
    for name, old in reference.items():
        gap = (own[name] - old).square()
        total = total + (gap if importance is None else importance[name] * gap).sum()
    assert isinstance(total, Tensor), "no weight to hold"
    return 0.5 * total


def fisher_per_sample(
    model: Backbone, head: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, classes: Sequence[int]
) -> Weights:
    """Sum over samples of the squared gradient of each one's own local cross-entropy: images x [B, C, H, W], labels y [B].

    The softmax runs over `classes`. The network must be in evaluation mode.
    """
    keep = torch.as_tensor(sorted(classes), device=y.device)

    def loss(features: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(features)[:, keep], target[None])

    return sum_per_sample(model, x, torch.searchsorted(keep, y), loss, Tensor.square)


def sum_per_sample(
    model: Any,
    x: Tensor,
    y: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    of: Callable[[Tensor], Tensor],
    weight: Tensor | None = None,
) -> Weights:
    """Sum over samples of `of`(the gradient of each one's own loss): images x [B, C, H, W] or texts [B, L], targets y [B, ...].

    loss_of  what the network says of the sample [1, ...] (features, scores of tokens) and a target -> scalar
    weight   [B], a factor of each sample's term

    The network must be in evaluation mode.
    """
    weights = {name: p.detach().contiguous() for name, p in trained(model).items()}  # vmap knows no other layout

    def loss(theta: Weights, image: Tensor, target: Tensor) -> Tensor:
        return loss_of(functional_call(model, theta, (image[None],)), target)

    total: Weights = {name: torch.zeros_like(value) for name, value in weights.items()}
    chunk = max(1, min(16, HELD // sum(value.numel() for value in weights.values())))
    for i, (images, targets) in enumerate(zip(x.split(chunk), y.split(chunk), strict=True)):
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no rule for vmap
            grads = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, targets)
        for name, g in grads.items():
            each = of(g.detach())
            if weight is not None:
                each = each * weight[i * chunk : i * chunk + len(each)].view(-1, *[1] * (each.ndim - 1))
            total[name] += each.sum(0)
        if (passes := getattr(model, "passes", None)) is not None:
            passes["eval"] += len(images) - 1  # vmap shows the network one image for all of them
    return total


def sum_per_batch(model: nn.Module, loss: Callable[[Any], Tensor], batches: Any, check_stop: Callable[[], None]) -> Weights:
    """Sum over `batches` (steps, and a batch by its step) of the squared gradient of each one's mean loss."""
    total: Weights = {}
    for step in range(batches.steps):
        check_stop()
        for name, part in fisher_per_batch(model, loss, batches(step)).items():
            total[name] = total[name] + part if name in total else part
    return total


def fisher_per_batch(model: nn.Module, loss: Callable[[Any], Tensor], batch: Any) -> Weights:
    """The squared gradient of a batch's mean loss, as PyCIL has it: far smaller than the mean of squares."""
    grads = torch.autograd.grad(loss(batch), list(trained(model).values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.detach().square()
        for (name, p), g in zip(trained(model).items(), grads, strict=True)
    }
