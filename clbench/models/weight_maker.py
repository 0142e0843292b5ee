"""The network of a hypernetwork: from the embedding of a task to the weights of another network, in chunks.

Legend: E embedding of a task, C of a chunk, N chunks, P weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init


class WeightMaker(nn.Module):
    """Embedding of a task [E] -> weights [P], `chunk` of them for each chunk embedding. Its outputs start with variance 1.

    core  "chunk_mlp": layers of `sizes` units with ReLU, each chunk by itself; "lstm": one LSTM of `sizes[0]` units that goes
          from chunk to chunk, and a linear layer
    """

    def __init__(self, core: str, sizes: Sequence[int], chunk: int, task_width: int, chunk_width: int, gen: torch.Generator):
        super().__init__()
        self.chunk, self.chunk_width = chunk, chunk_width
        self.chunks_NC = nn.Parameter(torch.zeros(0, chunk_width))
        widths = [task_width + chunk_width, *sizes]
        self.cell: nn.LSTMCell | None = None
        if core == "lstm":
            self.cell = skip_init(nn.LSTMCell, widths[0], sizes[0])  # type: ignore[assignment]
            widths = widths[1:]
        self.layers = nn.ModuleList(skip_init(nn.Linear, a, b) for a, b in pairwise([*widths, chunk]))
        for name, p in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(p)
            elif name.startswith("cell") or name.startswith(f"layers.{len(self.layers) - 1}."):
                nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=gen)
            elif name != "chunks_NC":
                nn.init.kaiming_normal_(p, generator=gen)

    def cover(self, count: int, gen: torch.Generator) -> None:
        """Embeddings for as many chunks as `count` weights need."""
        more = -(-count // self.chunk) - len(self.chunks_NC)
        if more > 0:
            fresh = torch.randn(more, self.chunk_width, generator=gen).to(self.chunks_NC)
            self.chunks_NC = nn.Parameter(torch.cat([self.chunks_NC.detach(), fresh]))

    @torch.no_grad()
    def grow(self, more: int, gen: torch.Generator) -> None:
        """Add units to every hidden layer, or to the LSTM; what they give to the units that are there is weighted by 0.

        So the made weights stay. What new units are given is drawn as at the start.
        """
        if not more:
            return
        if self.cell is not None:
            cell, old = self.cell, self.cell.hidden_size
            cell.weight_ih = nn.Parameter(_more_gates(cell.weight_ih, more, 0, gen))
            cell.weight_hh = nn.Parameter(_more_gates(cell.weight_hh, more, more, gen))
            cell.bias_ih, cell.bias_hh = (nn.Parameter(_more_gates(b, more, 0, None)) for b in (cell.bias_ih, cell.bias_hh))
            cell.hidden_size = old + more
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            rows = more if i < len(self.layers) - 1 else 0
            columns = more if i or self.cell is not None else 0
            std = (2 / (layer.in_features + columns)) ** 0.5
            layer.weight = nn.Parameter(_grown(layer.weight, rows, columns, std, gen))
            layer.bias = nn.Parameter(torch.cat([layer.bias, layer.bias.new_zeros(rows)]))
            layer.in_features, layer.out_features = layer.in_features + columns, layer.out_features + rows

    def forward(self, embedding_E: Tensor, count: int) -> Tensor:
        """The first `count` weights of a task."""
        chunks = self.chunks_NC[: -(-count // self.chunk)]
        x = torch.cat([embedding_E.expand(len(chunks), -1), chunks], dim=1)
        if self.cell is not None:
            states, state = [], None
            for row in x:
                state = self.cell(row[None], state)
                states.append(state[0])
            x = torch.cat(states)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x).flatten()[:count]

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Fill in place, with as many chunk embeddings and units as there are."""
        for name, p in list(self.named_parameters()):
            if state[name].shape != p.shape:
                part, _, last = name.rpartition(".")
                setattr(self.get_submodule(part), last, nn.Parameter(p.new_empty(state[name].shape)))
        if self.cell is not None:
            self.cell.hidden_size = self.cell.weight_hh.shape[1]
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            layer.out_features, layer.in_features = layer.weight.shape
        return super().load_state_dict(state, strict, assign)


def _grown(weight_OI: Tensor, rows: int, columns: int, std: float, gen: torch.Generator) -> Tensor:
    """A weight with new rows, drawn, and new columns, which are 0 in the rows that are there."""
    out, width = weight_OI.shape
    drawn = torch.randn(rows, width + columns, generator=gen).to(weight_OI) * std
    return torch.cat([torch.cat([weight_OI, weight_OI.new_zeros(out, columns)], dim=1), drawn])


def _more_gates(weight: Tensor, rows: int, columns: int, gen: torch.Generator | None) -> Tensor:
    """The four gates of an LSTM, each with new rows; a bias (no generator) with zeros."""
    if gen is None:
        return torch.cat([part for gate in weight.chunk(4) for part in (gate, gate.new_zeros(rows))])
    return torch.cat([_grown(gate, rows, columns, (weight.shape[1] + columns) ** -0.5, gen) for gate in weight.chunk(4)])
