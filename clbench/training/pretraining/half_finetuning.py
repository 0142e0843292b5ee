"""Half fine-tuning (Hui et al. 2024, arXiv 2404.18466): in every stage a random half of the matrices is frozen."""

from __future__ import annotations

import re

from torch import nn

from clbench.streams import rng


def categories(model: nn.Module) -> dict[str, list[str]]:
    """Matrices inside numbered blocks by block and kind (attention or feed-forward): {"3 attention": [names]}."""
    found: dict[str, list[str]] = {}
    for name, p in model.named_parameters():
        block = re.search(r"\.(\d+)\.", f".{name}")
        if block is not None and p.ndim >= 2:
            kind = "attention" if re.search(r"attn|attention|qkv|query|key|value", name) else "feed-forward"
            found.setdefault(f"{block[1]} {kind}", []).append(name)
    return found


def freeze_random_half(model: nn.Module, key: int | None) -> list[str]:
    """Freeze a random half of each category, chosen by `key`; None unfreezes everything -> the frozen names.

    Of an odd number the larger half is frozen in every other category, so that over all it is half.
    """
    model.requires_grad_(True)
    frozen: list[str] = []
    if key is None:
        return frozen
    for i, (category, names) in enumerate(sorted(categories(model).items())):
        order = rng.permutation(rng.key(key, category), len(names))
        frozen += [names[j] for j in order[: (len(names) + i % 2) // 2]]
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    return frozen
