"""Losses that several methods share. Shapes: logits z [B, K], targets y [B] int64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import UserError

MASKINGS = ("local", "seen", "batch")


def masked_cross_entropy(z: Tensor, y: Tensor, masking: str, classes: Sequence[int]) -> Tensor:
    """Cross-entropy whose softmax runs over some classes only -> scalar.

    masking  "seen": all K; "local": `classes` (those of the experience); "batch": those that occur in `y`.
    Every target must be among the classes that stay. Logits left out get a zero gradient.
    """
    if masking == "seen":
        return F.cross_entropy(z, y)
    if masking == "local":
        keep = torch.tensor(sorted(classes)).to(z.device, non_blocking=True)
    elif masking == "batch":
        keep = y.unique()
    else:
        raise UserError(f"unknown masking {masking!r}: choose {', '.join(MASKINGS)}")
    return F.cross_entropy(z[:, keep], torch.searchsorted(keep, y))


def margin_logits(cosines: Tensor, y: Tensor, scale: float, margin: float) -> Tensor:
    """CosFace: scale x (cosine, less `margin` at the own class); cosines [B, K], y [B]."""
    own = y[:, None] == torch.arange(cosines.shape[1], device=y.device)
    return scale * (cosines - margin * own)


def normalised_cross_entropy(z: Tensor, y: Tensor, blocks: Sequence[int], temperature: float) -> Tensor:
    """SLCA's logit normalisation: divide z by the mean over blocks of each block's norm (+1e-7) and by `temperature`.

    `blocks` are the widths of the classifier's parts, one an experience. The loss does not change when z is scaled.
    """
    alike = [(width, len(list(group))) for width, group in groupby(blocks)]  # neighbours of one width are measured at once
    parts = z.split([width * count for width, count in alike], dim=1)
    norms = [part.unflatten(1, (count, width)).norm(dim=2) for part, (width, count) in zip(parts, alike, strict=True)]
    mean = (torch.cat(norms, dim=1) + 1e-7).mean(dim=1, keepdim=True)
    return F.cross_entropy(z / mean / temperature, y)


def symmetric_cross_entropy(z: Tensor, y: Tensor, a: float, b: float) -> Tensor:
    """Mean of a CE + b RCE, RCE = -sum_c p_c log(onehot_c): p is at least 1e-7, onehot at least 1e-4."""
    p = z.softmax(1).clamp_min(1e-7)
    target = F.one_hot(y, z.shape[1]).to(p).clamp_min(1e-4)
    return a * F.cross_entropy(z, y) - b * (p * target.log()).sum(1).mean()
