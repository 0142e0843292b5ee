"""Prompt pools on a frozen network: what L2P, DualPrompt and CODA-Prompt share.

A *query* is the bare network's feature of an image; a prompt is chosen, or weighted, by the cosine of the query and its key.
Matching is in fp32, outside the network's passes: a rounded cosine could choose another prompt.

Legend: B batch, M prompts of a pool, D features, k prompts chosen, b blocks of the network, L tokens of a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.models.backbone import Backbone
from clbench.models.pet import Pet, State


class GrownPool(nn.Module):
    """Rows of one shape, added part by part (one an experience). Only the newest part trains, the others stand still.

    Loading a state with more parts than there are adds them first; parts that are there already are filled in place.
    """

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)
        self.parts = nn.ParameterList()
        self.anchor: Tensor
        self.register_buffer("anchor", torch.zeros(0), persistent=False)  # where new parts go

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def add(self, rows: Tensor) -> None:
        """Append a copy of rows [n, *shape]; from now on they are what trains."""
        assert rows.shape[1:] == self.shape
        self._keep([*self.parts, nn.Parameter(rows.detach().clone().to(self.anchor.device))])

    def _keep(self, parts: Sequence[nn.Parameter]) -> None:
        for i, part in enumerate(parts):
            part.requires_grad_(i == len(parts) - 1)
        self.parts = nn.ParameterList(parts)

    @property
    def newest(self) -> Tensor:
        """The part that trains [n, *shape]."""
        return self.parts[-1]

    def rows(self) -> Tensor:
        """All rows [M, *shape], in the order in which they came."""
        return torch.cat(list(self.parts)) if len(self.parts) else self.anchor.new_zeros(0, *self.shape)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill in place; parts that are missing are added, parts too many are removed."""
        parts: list[nn.Parameter] = []
        for i in range(len(state_dict)):
            rows = state_dict[f"parts.{i}"]
            fits = i < len(self.parts) and self.parts[i].shape == rows.shape
            parts.append(self.parts[i] if fits else nn.Parameter(torch.empty_like(rows, device=self.anchor.device)))
        self._keep(parts)
        return super().load_state_dict(state_dict, strict, assign)


def query(model: Backbone, batch: Any) -> Tensor:
    """Features of the bare network [B, D] float32, without a gradient; those of test-view batches are remembered by id."""
    with torch.no_grad(), ExitStack() as stack:
        for pet in model.pets:
            stack.enter_context(pet.off())
        return model.features(batch)


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosine of every query [B, D] with every key [M, D] -> [B, M] float32."""
    return F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T


def attended(queries: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    """Weights cos(q * a_m, k_m) of queries [B, D], attention vectors and keys [M, b, D] -> [B, b, M] float32.

    Two matrix products instead of the [B, M, b, D] of the formula: q * a has the squared norm q^2 . a^2.
    """
    dots = torch.einsum("bd,mnd->bnm", queries, attention * F.normalize(keys, dim=-1))
    squares = torch.einsum("bd,mnd->bnm", queries.square(), attention.square())
    return dots / squares.clamp_min(1e-24).sqrt()


def most_similar(similarity: Tensor, count: int, batchwise: bool = False) -> Tensor:
    """The `count` best columns of every row of similarity [B, M] -> [B, count] int64.

    `batchwise`: batch-majority selection, the columns chosen by most rows (ties: the lowest index) for every row.
    """
    chosen = similarity.topk(count, dim=1).indices
    if batchwise:
        votes = torch.bincount(chosen.flatten(), minlength=similarity.shape[1])
        chosen = votes.argsort(descending=True, stable=True)[:count].expand(len(chosen), count)
    return chosen


def prefix_blocks(pet: Pet) -> list[str]:
    """Numbers of the blocks that a prefix hangs on, in their order."""
    return [name.removesuffix("/k") for name in pet.values if name.endswith("/k")]


def as_prefixes(pet: Pet, x: Tensor) -> State:
    """Keys and values [..., b, 2, L, D] -> what `pet.use` takes: one tensor [..., L, D] a block and part."""
    state = {}
    for i, block in enumerate(prefix_blocks(pet)):
        state[f"{block}/k"], state[f"{block}/v"] = x[..., i, 0, :, :], x[..., i, 1, :, :]
    return state


def orthonormal(earlier: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Gram-Schmidt on N(0, I) draws: unit rows [count, F], orthogonal to each other and to all of `earlier` [M, F].

    In float64, against an orthonormal basis of the earlier rows, which may have been trained and need not be orthogonal.
    Where M + count exceeds F there is no such room: then the new rows are orthogonal to each other only.
    """
    width = earlier.shape[1]
    assert count <= width
    fresh = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if 0 < len(earlier) <= width - count:
        basis = torch.linalg.qr(earlier.detach().double().cpu().T).Q
        for _ in range(2):  # the second round removes what rounding left in the first
            fresh = fresh - (fresh @ basis) @ basis.T
    q, r = torch.linalg.qr(fresh.T)
    return (q * r.diagonal().sign()).T.float()
