"""One change for a batch of edits, spread over several layers, as MEMIT and its relatives do it.

For each request i a value z_i is searched at the output of the last block of the range. Then, layer by layer, upwards, on the
partly edited model: keys K [H, N] and outputs h [D, N] at the subjects are taken anew, and layer m of M takes its share of what
is missing,
    R = (Z - h) / (M - m),    W <- W + change(R, K)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clbench.streams.tokens.edits import EditData, Request
from clbench.training.editing import key_values
from clbench.training.editing.site import Site
from clbench.training.editing.value_search import Search, find_value, output_at, size_given
from clbench.training.runtime import Runtime

Change = Callable[[int, Tensor, Tensor], Tensor]  # (number of the layer in the range, R [D, N], K [H, N]) -> Delta [D, H]


def edit_together(
    runtime: Runtime,
    model: nn.Module,
    sites: Sequence[Site],
    requests: Sequence[Request],
    data: EditData,
    search: Search,
    number: int,
    length: int,
    change: Change,
    given: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Change the weights at `sites` for `requests`; `number` contexts of `length` tokens -> the keys [H, N] of each layer.

    `given` are the weights at `sites` in the model whose values bound the new ones; (): in the model as it is.
    """
    blocks: Any = model.layers
    last = blocks[sites[-1].layer]
    before = [key_values.contexts(data, number, length, runtime.key("contexts", r.id)) for r in requests]
    wanted = []
    for request, pieces in zip(requests, before, strict=True):
        size = size_given(sites, given, request, runtime.device, True) if given else None
        delta_D, start_D = find_value(runtime, sites[-1], request, pieces, search, True, size)
        wanted.append((start_D + delta_D).double())
    wanted_DN, used = torch.stack(wanted, 1), []
    for m, site in enumerate(sites):
        keys, outputs = [], []
        for request, pieces in zip(requests, before, strict=True):
            plain_H, behind_MH = key_values.keys_of(site, request, pieces, runtime.device)
            groups = [plain_H, *([behind_MH.mean(0)] if len(behind_MH) else [])]  # the prompt by itself weighs a half
            keys.append(torch.stack(groups).mean(0))
            prompt = torch.from_numpy(request.prompt)[None].to(runtime.device)
            outputs.append(output_at(model, last, prompt, request.subject)[0].double())
        keys_HN = torch.stack(keys, 1)
        residual_DN = (wanted_DN - torch.stack(outputs, 1)) / (len(sites) - m)
        key_values.apply(site, change(m, residual_DN, keys_HN))
        used.append(keys_HN)
    return used
