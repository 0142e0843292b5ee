"""Low-rank terms on an unmodified ViT whose norms, biases and class token are trained as well (SLCA++'s "hybrid" slow learner).

Each layer computes W x + b + s B (A x), which is (W + s B A) x + b: A [rank, in] are the first right singular vectors of W, B
[out, rank] is 0, so nothing changes at the start. The terms hang on the network by forward hooks: its own state keeps its
names, and a deep copy of network and terms together, `copy.deepcopy((model, terms))`, is a pair of its own.

Legend: I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.models.backbone import Backbone

LAYERS = ("attn.qkv", "mlp.fc1", "mlp.fc2")
OWN = ("norm", "bias", "cls_token")


def right_singular_vectors(weight: Tensor, rank: int) -> Tensor:
    """The first `rank` right singular vectors of weight [O, I], as rows [rank, I] float32.

    From the eigenvectors of the smaller Gram matrix, in float64 on the CPU. A vector's sign is free: its largest entry is
    made positive, so that all machines agree.
    """
    w = weight.detach().cpu().double()
    if w.shape[1] <= w.shape[0]:
        vectors = torch.linalg.eigh(w.T @ w).eigenvectors.flip(1)[:, :rank].T
    else:
        vectors = F.normalize(torch.linalg.eigh(w @ w.T).eigenvectors.flip(1)[:, :rank].T @ w, dim=1)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return (vectors * largest.sign()).float()


@dataclass(eq=False)
class Term:
    """The hook of one layer: adds s B (A x) to its output."""

    a: Tensor
    b: Tensor
    scale: float
    per_token: ClassVar[bool] = True

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Of x [..., I] -> [..., O]."""
        return output + self.scale * F.linear(F.linear(inputs[0], self.a), self.b)


class LowRank(nn.Module):
    """All that is trained of a ViT: `terms` ("<layer>/a", "<layer>/b") and `own`, those of its parameters whose name holds a
    word of OWN (the same tensors as the network's). Everything else of the network gets no gradient.

    `UserError` for networks without transformer blocks of linear layers and for a rank above a layer's width.
    """

    def __init__(self, model: Backbone, rank: int = 4, scale: float = 0.8, layers: Sequence[str] = LAYERS):
        super().__init__()
        self.terms, self.own = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in _linear_layers(model, rank, layers):
            a = nn.Parameter(right_singular_vectors(layer.weight, rank).to(layer.weight.device))
            b = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))
            self.terms[f"{name}/a"], self.terms[f"{name}/b"] = a, b
            layer.register_forward_hook(Term(a, b, scale))
        for name, p in model.named_parameters():
            own = any(word in name for word in OWN)
            p.requires_grad_(own)
            if own:
                self.own[name.replace(".", "/")] = p

    def num_values(self) -> int:
        """Numbers in `terms`."""
        return sum(p.numel() for p in self.terms.values())


def _linear_layers(model: Backbone, rank: int, layers: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every block, names with "/" for "."."""
    net: Any = model.net
    blocks = getattr(net, "blocks", None)
    if blocks is None or not hasattr(net, "cls_token"):
        raise UserError(f"low-rank terms need a ViT, model={model.identity['name']} is none")
    for i, block in enumerate(blocks):
        for path in layers:
            try:
                layer = block.get_submodule(path)
            except AttributeError:
                layer = None
            if not isinstance(layer, nn.Linear):
                raise UserError(f"model={model.identity['name']} has no linear layer {path} in its block {i}")
            if not 1 <= rank <= min(layer.weight.shape):
                raise UserError(f"rank={rank} does not fit {path} of {tuple(layer.weight.shape)}")
            yield f"{i}/{path.replace('.', '/')}", layer
