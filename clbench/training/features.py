"""Feature passes over a whole data set, without gradients, under the test transform; batches of ready features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import Place
from clbench.streams import rng
from clbench.streams.images.data import shuffled
from clbench.training import looks
from clbench.training.runtime import Runtime


def extract(runtime: Runtime, model: Any, data: Any, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Features of every sample of `data` in evaluation mode -> features [N, D] float32 on the device, labels [N] int64."""
    model.eval()
    features, labels = [], []
    with runtime.phase("extract"), torch.no_grad():
        for batch in data.test_batches(batch_size):
            runtime.check_stop()
            features.append(model.features(batch))
            labels.append(batch.y)
    return torch.cat(features), torch.cat(labels).to(features[0].device)


def augmented(runtime: Runtime, model: Any, data: Any, batch_size: int, name: str) -> tuple[Tensor, Tensor]:
    """As `extract`, of one shuffled pass as the images are augmented: one `name` in one experience, one order and one view."""
    batches = shuffled(data, batch_size, 1, runtime.key("drift", name))
    model.eval()
    features, labels = [], []
    with runtime.phase("extract"), torch.no_grad():
        for step in range(batches.steps):
            runtime.check_stop()
            batch = batches(step)
            features.append(model.features(batch))
            labels.append(batch.y)
    return torch.cat(features), torch.cat(labels).to(features[0].device)


def streamed_features(runtime: Runtime, model: Any, data: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [B, D] and labels [B] batch by batch, in the order of the data: for statistics that are valid after each.

    Samples count as visits. After every batch an observer may look, so that a learner without `fit` can be `anytime`.
    """
    steps = -(-len(data) // batch_size)
    for step, batch in enumerate(data.test_batches(batch_size), 1):
        runtime.check_stop()
        runtime.count_visits(len(batch), 0)
        model.eval()
        with runtime.phase("extract"), torch.no_grad():
            features = model.features(batch)
        yield features, batch.y.to(features.device)
        place = Place(runtime.experience, step, steps, runtime.meter.by_name.get("stream", 0) + step)
        looks.at_step("stream", place, 0.0, runtime.used_new)


class FeatureBatches:
    """Shuffled batches of ready features: features [N, D], labels [N]; a pure function of the step."""

    def __init__(self, features: Tensor, y: Tensor, batch_size: int, epochs: int, key: int):
        self.features, self.y, self.batch_size, self.key = features, y, batch_size, key
        self.per_epoch = -(-len(y) // batch_size)
        self.steps = epochs * self.per_epoch
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Features [B, D] and labels [B]."""
        epoch, i = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, rng.permutation(rng.key(self.key, epoch), len(self.y)))
        rows = torch.as_tensor(self._order[1][i * self.batch_size : (i + 1) * self.batch_size], device=self.y.device)
        return self.features[rows], self.y[rows]
