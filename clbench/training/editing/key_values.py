"""Keys, values and closed-form changes of one layer, for editors that locate and edit (ROME, MEMIT, EMMET, ENCORE).

Legend: D width, H hidden width, N edits. The layer is y = W k + b. K [H, N] holds one key per edit, R [D, N] by how much its
output is to change. C [H, H] = E[k k^T], uncentred. A change is W -> W + Delta; everything here is solved in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.tokens.edits import EditData, Request
from clbench.training.editing.site import Site

RIDGE = 1e-6  # of the mean of the diagonal of C, so that it can be inverted


@torch.no_grad()
def second_moment(site: Site, data: EditData, device: torch.device, batch: int = 32) -> Tensor:
    """C [H, H] float64 over every token of the old text, with a small ridge."""
    total, count = torch.zeros(0), 0
    for start in range(0, data.old_size, batch):
        rows = torch.from_numpy(data.old_text(np.arange(start, min(start + batch, data.old_size)))).to(device)
        k = site.keys(rows).flatten(0, 1).double()
        total = k.T @ k if not count else total + k.T @ k
        count += len(k)
    moment = total / count
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def contexts(data: EditData, number: int, length: int, key: int) -> np.ndarray:
    """Pieces of old text [number, length] that end where a sentence ends, if the stream says how one ends."""
    if not number:
        return np.zeros((0, length), np.int64)
    text = data.old_text(np.arange(data.old_size))
    rows, ends = np.nonzero((text == data.end) if data.end is not None else np.ones_like(text, bool))
    rows, ends = rows[ends >= length - 1], ends[ends >= length - 1]
    chosen = rng.permutation(rng.key(key, "contexts"), len(rows))[:number]
    return np.stack([text[rows[i], ends[i] + 1 - length : ends[i] + 1] for i in chosen])


def told(request: Request, before: np.ndarray, device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Prompt and answer by themselves [1, L] and behind each context [M, C + L]; the subject's place in either."""
    own = np.concatenate([request.prompt, request.target])
    texts, places = [torch.from_numpy(own)[None].to(device)], [request.subject]
    if len(before):
        behind = np.concatenate([before, np.repeat(own[None], len(before), 0)], 1)
        texts.append(torch.from_numpy(behind).to(device))
        places.append(request.subject + before.shape[1])
    return texts, places


def keys_of(site: Site, request: Request, before: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys at the subject: of the prompt by itself [H], and behind each context [M, H]; float64."""
    texts, places = told(request, before, device)
    found = [site.keys(text)[:, place].double() for text, place in zip(texts, places, strict=True)]
    return found[0][0], found[1] if len(found) > 1 else found[0][:0]


def rank_one(change_D: Tensor, key_H: Tensor, against_H: Tensor, moment_HH: Tensor) -> Tensor:
    """Delta = change u^T / (against^T u) with u = C^-1 key: of all that send `against` to `change`, where the two keys are one,
    the one that changes the outputs of old text least.
    """
    u = torch.linalg.solve(moment_HH, key_H)
    return torch.outer(change_D, u) / (against_H @ u)


def least_squares(residual_DN: Tensor, keys_HN: Tensor, prior_HH: Tensor) -> Tensor:
    """Delta = R K^T (prior + K K^T)^-1: minimises tr(Delta prior Delta^T) + |Delta K - R|^2."""
    whole = prior_HH + keys_HN @ keys_HN.T
    return torch.linalg.solve(whole, keys_HN @ residual_DN.T).T


def exact(residual_DN: Tensor, keys_HN: Tensor, prior_HH: Tensor, slack: float = 0.0) -> Tensor:
    """Delta = R (K^T prior^-1 K + slack I)^+ K^T prior^-1: with slack 0 minimises tr(Delta prior Delta^T) under Delta K = R.

    With slack s > 0 it is `least_squares` with s * prior, for every number of edits (push-through identity).
    """
    inverse_HN = torch.linalg.solve(prior_HH, keys_HN)
    gram_NN = keys_HN.T @ inverse_HN
    gram_NN = gram_NN + slack * torch.eye(len(gram_NN), dtype=gram_NN.dtype, device=gram_NN.device)
    return residual_DN @ torch.linalg.pinv(gram_NN, hermitian=True) @ inverse_HN.T


@torch.no_grad()
def apply(site: Site, delta_DH: Tensor) -> None:
    """W -> W + Delta."""
    site.linear.weight += delta_DH.to(site.linear.weight)


def check_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """Rising blocks of an option `layers`; null: the one before the last but one, and the one below it if there is one."""
    if layers is None:
        return sorted({max(0, depth - 4), max(0, depth - 3)})
    found = list(layers)
    whole = all(type(layer) is int and 0 <= layer < depth for layer in found)
    if not found or not whole or found != sorted(set(found)):
        raise UserError(f"learner.layers must be rising blocks from 0 to {depth - 1}, got {found}")
    return found
