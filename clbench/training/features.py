"""Feature passes over a whole data set, without gradients, under the test transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clbench.training.runtime import Runtime


def extract(runtime: Runtime, model: Any, data: Any, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Features of every sample of `data` in evaluation mode -> features [N, D] float32 on the device, labels [N] int64."""
    model.eval()
    features, labels = [], []
    with runtime.phase("extract"), torch.no_grad():
        for batch in data.test_batches(batch_size):
            runtime.check_stop()
            with runtime.autocast():
                features.append(model.features(batch).float())
            labels.append(batch.y)
    return torch.cat(features), torch.cat(labels).to(features[0].device)
