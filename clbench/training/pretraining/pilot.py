"""A short training that is undone: what a model would be after some steps, from where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench.training.optimizer_state import Adam
from clbench.training.state import detached


def losses(model: nn.Module, tokens: np.ndarray) -> Tensor:
    """Nats of every token after the first: [B, L + 1] -> [B, L]; of images [B, ...] -> [B, 1]."""
    device = next(model.parameters()).device
    return model.loss(torch.from_numpy(tokens).to(device))  # type: ignore[operator]


@contextmanager
def after_pilot(
    model: nn.Module,
    batch: Callable[[int], np.ndarray],
    *,
    steps: int,
    lr: float,
    adam: Mapping[str, Any],
    check_stop: Callable[[], None],
    tuned: nn.Module | None = None,
) -> Iterator[None]:
    """Inside: the model after `steps` steps on `batch(step)` [B, L + 1], in evaluation mode. Afterwards: its weights as before.

    tuned  what is trained of it, where that is not all
    """
    owner = tuned or model
    kept = detached(owner.state_dict())
    optimizer = Adam(owner, **adam)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("share", 1.0)
    model.train()
    owner.train()
    for step in range(steps):
        check_stop()
        loss = losses(model, batch(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip_gradients()
        optimizer.step()
    model.eval()
    owner.eval()
    try:
        yield
    finally:
        owner.load_state_dict(kept)
