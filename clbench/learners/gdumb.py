"""GDumb: a greedy sampler and a dumb learner (Prabhu, Torr & Dokania, ECCV 2020).

The stream only fills a class-balanced memory (`training/stream_memory.py`, policy balanced). For an answer, a network is
trained from its start on the memory alone, and nothing else of the stream matters: two streams that leave the same memory give
the same network. Here it is trained at the end of every experience (released: once, at the very end).

Released recipe: SGD with momentum 0.9, weight decay 1e-6, batch 16, gradients clipped at norm 10; rate a tenth in pass 0, full
in pass 1, then cosine with warm restarts (cycles of 1, 2, 4, ... passes, down to 0.01 of the rate), 256 passes; cutmix (one
box, area share U(0, 1)) in half of the batches. Passes that are a power of two end on a cycle. Rates there: 0.05 for all, from
scratch; the default rates and 32 passes here are for pre-trained backbones.
Other suites, from scratch: Mai et al. (arXiv 2101.10423) passes=30 (memory 1,000; else 70) cutmix=0 schedule=constant,
batches of 10; Mammoth passes=250 cutmix=1 clip=null, one answer after the last experience; CapyMOA optimizer=adam
schedule=constant cutmix=0 clip=null (there the network goes on from the answer before, against the definition; not built).
The published numbers are the best test accuracy over passes; here the last pass counts.
Published: CIFAR-10, ResNet-18, memory 200, 500, 1,000: 35.0, 45.4, 61.2 %; MNIST, MLP of 400, memory 4,400: 97.8 % (README).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import OnlineHead
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch, streamed
from clbench.training.fit import Recipe, fit
from clbench.training.online import labels, scores
from clbench.training.runtime import Runtime
from clbench.training.state import collect, detached, groups_of, restore
from clbench.training.stream_memory import Remembered, allowed_stream_memory

FLOOR = 0.01


def warm_restarts(place: Place, *, passes: int) -> float:
    """A tenth in pass 0, then half cosines from 1 to 0.01 over 1, 2, 4, ... passes; constant within a pass."""
    done = place.step * passes // place.steps - 1
    if done < 0:
        return 0.1
    cycle = (done + 1).bit_length() - 1
    share = (done + 1 - 2**cycle) / 2**cycle
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share))


def cut_and_mixed(x: Tensor, y: Tensor, key: int) -> tuple[Tensor, Tensor, float]:
    """A box of each image is replaced by that of another: x [B, C, H, W], y [B] -> images, the others' labels, own share.

    The box has the area share U(0, 1) about a uniform centre and is clipped at the border; the share that stays is recomputed.
    """
    share, down, right = rng.uniform(rng.key(key, "box"), np.arange(3)).tolist()
    others = torch.from_numpy(rng.permutation(rng.key(key, "others"), len(y))).to(y.device)
    box = []
    for size, centre in zip(x.shape[2:], (down, right), strict=True):
        middle, half = int(centre * size), int(size * math.sqrt(share)) // 2
        box.append(slice(max(0, middle - half), min(size, middle + half)))
    mixed = x.clone()
    mixed[:, :, box[0], box[1]] = x[others][:, :, box[0], box[1]]
    area = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
    return mixed, y[others], 1 - area / (x.shape[2] * x.shape[3])


class GDumb:
    """State: backbone, head with the classes that the memory holds, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_boundaries=False)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        passes: int = 32,  # over the memory, for each answer
        cutmix: float = 0.5,  # share of the batches
        lr: float = 0.05,  # head
        backbone_lr: float = 0.001,
        batch_size: int = 16,
        momentum: float = 0.9,  # of sgd
        weight_decay: float = 1e-6,
        clip: float | None = 10.0,
        optimizer: Literal["sgd", "adam"] = "sgd",
        schedule: Schedule | None = None,  # null: warm restarts over the passes, as released
    ):
        if passes < 1 or not 0 <= cutmix <= 1:
            raise UserError(f"learner.passes={passes} must be at least 1, learner.cutmix={cutmix} in 0..1")
        self.model, self.runtime, self.passes, self.cutmix = model, runtime, passes, cutmix
        self.lr, self.backbone_lr, self.batch_size = lr, backbone_lr, batch_size
        schedule = partial(warm_restarts, passes=passes) if schedule is None else schedule
        self.recipe = Recipe(optimizer, momentum, weight_decay=weight_decay, clip=clip, schedule=schedule)
        self.start = detached(model.state_dict())
        self.head = OnlineHead(model.num_features).to(runtime.device)
        self.memory = allowed_stream_memory(runtime, "balanced", memory)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Fill the memory, then train anew on it alone."""
        stream = streamed(experience.train, self.batch_size, 0, augment=False)
        for step in range(stream.steps):
            self.runtime.check_stop()
            self.memory.insert(experience.train, stream.rows(step), stream(step), experience.index)
        if not len(self.memory):
            raise UserError("GDumb learns from its memory alone and may keep nothing: set learner.memory above 0")
        return {**self._train(experience), "exemplars": float(len(self.memory))}

    def _train(self, experience: Experience) -> dict[str, float]:
        """From the start, with draws that depend on the seed and the memory alone."""
        key = rng.key(self.runtime.seed, "gdumb")
        self.model.load_state_dict(self.start)
        self.head = OnlineHead(self.model.num_features).to(self.runtime.device)
        self.head.grow(experience.num_seen, torch.Generator().manual_seed(rng.key(key, "head") >> 1))
        self.head.see(torch.from_numpy(self.memory.y))
        self.model.train()
        steps = [0]

        def at_place(place: Place) -> None:
            steps[0] = place.step

        def loss(batch: ImageBatch) -> Tensor:
            own, y = rng.key(key, "cutmix", steps[0]), labels(batch)
            if rng.uniform(own, np.arange(1))[0] >= self.cutmix:
                return F.cross_entropy(scores(self, batch), y)
            x, others, share = cut_and_mixed(batch.x, y, own)
            z = scores(self, x)
            return share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, others)

        stored = Remembered(self.memory, experience.train, self.batch_size, self.passes, rng.key(key, "train"), True)
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        return fit(self.runtime, "train", self, groups, loss, stored, self.recipe, at_place=at_place)

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]; a class that the memory does not hold has the lowest."""
        self.model.eval()
        return scores(self, batch)

    def state_dict(self) -> dict[str, Any]:
        """Backbone, head and memory (the start weights come from the model itself)."""
        return collect(self, "model", "head", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
