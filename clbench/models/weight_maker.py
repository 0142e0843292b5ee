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
        """Fill in place, with as many chunk embeddings as there are."""
        if state["chunks_NC"].shape != self.chunks_NC.shape:
            self.chunks_NC = nn.Parameter(torch.empty_like(state["chunks_NC"], device=self.chunks_NC.device))
        return super().load_state_dict(state, strict, assign)
