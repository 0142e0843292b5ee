"""`clbench bench adapting`: test-time adaptation in batches of 10 (--batch), clbench's `tent` beside a loop written by hand.

Both adapt the scales and shifts of the same network (`resnet18_slim`, or --model) to the same images by the entropy of their
answers, under BatchNorm's statistics of the batch, with Adam. The hand-written loop is what one would write: uint8 images are
normalised, forward, entropy, backward, step, and the answers are kept. Rounds of both alternate, as in `bench online`.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clbench.interfaces import Budget
from clbench.learners.tent import Tent
from clbench.models.precision import set_precision
from clbench.streams.images.data import ImageData
from clbench.streams.images.pixels import Pipeline
from clbench.streams.scenario import ArrayImages
from clbench.training.adaptation import NORMS
from clbench.training.runtime import Runtime

CLASSES, RATE = 10, 1e-3


class ByHand:
    """The loop that one would write."""

    def __init__(self, model: Any, x: np.ndarray, y: np.ndarray, precision: str, batch: int):
        self.net, self.head = model.net.eval().requires_grad_(False), nn.Linear(model.num_features, CLASSES)
        self.precision, self.channels_last, self.batch, self.at = precision, model.channels_last, batch, 0
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (model.profile.mean, model.profile.std))
        self.x, self.answers = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), []
        for module in self.net.modules():
            if isinstance(module, NORMS):
                module.requires_grad_(True)
            if isinstance(module, _BatchNorm):
                module.running_mean = module.running_var = None
        self.adapted = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.adapted, lr=RATE)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            x = (self.x[self.at : self.at + self.batch].float() / 255 - self.mean) / self.std
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                features = self.net(x)
            z = self.head(features.float())
            log_p = z.log_softmax(1)
            (-(log_p.exp() * log_p).sum(1)).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.answers += z.argmax(1).tolist()
            self.at += self.batch


class OfClbench:
    """`tent` on the test images of one set, batch by batch."""

    def __init__(self, model: Any, x: np.ndarray, y: np.ndarray, precision: str, batch: int):
        self.model, self.batch, self.at = set_precision(model, precision), batch, 0
        self.runtime = Runtime(0, torch.device("cpu"), Budget(epochs=1), precision)
        rows = np.arange(len(x))
        pipeline = Pipeline(model.profile, "cpu", "none")
        self.images = ImageData(ArrayImages(x), rows, rows, y, pipeline, None, "test")
        self.learner = Tent(self.model, self.runtime, adapt_lr=RATE)
        cast(Any, self.learner.head).grow(CLASSES, self.runtime.generator("head"))
        self.learner.begin()
        self.answers: list[int] = []

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            z: Tensor = self.learner.predict(cast(Any, self.images.batch(np.arange(self.at, self.at + self.batch))))
            self.answers += z.argmax(1).tolist()
            self.at += self.batch


LOOPS = {"by hand": ByHand, "clbench": OfClbench}
