"""The online protocol: small batches in stream order, some updates on each, and a memory that changes at every step.

    for each batch of the stream: (draw from the memory, one step of `fit`) `updates` times; offer the samples to the memory

With `updates` below 1 some batches have no update (0.25: one of four has, counted over the samples of the whole run, whatever
experiences they came in); their samples are offered to the memory at once and count as visited, and looks fall between them.
Insertion comes after the optimiser's step, so no batch replays itself. The further updates on one batch count as replayed
visits: a batch at hand is a memory of one batch.

A batch is a pure function of its step and of the memory; what changes after a step is in the learner's state. So a killed run
goes on from the middle of a pass, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Experience, Place, UserError
from clbench.models.heads import LOWEST
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch, shuffled
from clbench.training import looks
from clbench.training.memory import exemplar_means

Augment = Literal["both", "new", "replayed", "none"]
Start = Literal["second_batch", "second_experience"]


@dataclass
class OnlineBatch:
    """New samples `new`, those drawn from the memory `old` (None: none) at its slots `rows` [R].

    key      of the update's random choices
    again    this is not the first update on the new samples
    last     it is the last one
    trained  how many of the drawn samples are trained on (MIR draws more than it trains on); None: all
    """

    new: ImageBatch
    old: ImageBatch | None
    rows: np.ndarray
    key: int = 0
    again: bool = False
    last: bool = True
    trained: int | None = None

    @property
    def ids(self) -> Tensor:
        return torch.cat([part.ids for part in (self.new, self.old) if part is not None])

    @property
    def replayed(self) -> int:
        """Visits that are none to new samples: the memory's, and all of a repeated update."""
        return len(self) if self.again else len(self) - len(self.new)

    def __len__(self) -> int:
        drawn = 0 if self.old is None else len(self.old)
        return len(self.new) + (drawn if self.trained is None else min(drawn, self.trained))

    @property
    def joined(self) -> ImageBatch:
        """New and drawn samples as one batch."""
        return self.new if self.old is None else ImageBatch.cat([self.new, self.old])


class OnlineStream:
    """Batches of an experience for `fit`; its `after_step` is `store`.

    replay   size of a draw; None: the whole memory
    start    the first draw: from the second batch on, or from the second experience on
    past     draw from samples of earlier experiences alone
    augment  which samples are seen under the random transform
    trained  see `OnlineBatch`

    passed   what entered the memory before the first update, as `store` gives it
    """

    def __init__(
        self,
        learner: Any,
        experience: Experience,
        *,
        replay: int | None,
        start: Start = "second_batch",
        past: bool = False,
        trained: int | None = None,
    ):
        if learner.augment not in ("both", "new", "replayed", "none"):
            raise UserError(f"unknown learner.augment={learner.augment}: choose both, new, replayed or none")
        self.runtime = runtime = learner.runtime
        self.data, self.index, self.memory, self.head = (
            experience.train,
            experience.index,
            learner.memory,
            getattr(learner, "head", None),
        )
        self.replay, self.past, self.trained = replay, past, trained
        self.draws = start == "second_batch" or experience.index > 0
        self.augments_old = learner.augment in ("both", "replayed")
        self.key, self.updates = runtime.key("replay"), per_batch(learner.updates)
        augment = learner.augment in ("both", "new")
        self.new = shuffled(self.data, learner.batch_size, learner.epochs, runtime.key("train"), augment)
        self.steps = math.ceil(self.new.steps * self.updates)
        self._places: list[int] | None = None  # the batch of each update, where not every batch has one
        if self.updates < 1:
            self._places = places(self.memory.visited, len(self.data), self.new.steps, learner.batch_size, self.updates)
            self.steps = len(self._places)
        self._taken: tuple[int, Any] = (-1, None)
        self.passed = (
            self._pass(0, self.batch_of(0), Place(runtime.experience, 0, self.steps, 0)) if self._places is not None else []
        )

    def batch_of(self, step: int) -> int:
        """The batch of the stream that an update is made on; behind the last update, the number of batches."""
        if self._places is None:
            return math.floor(step / self.updates)
        return self._places[step] if step < self.steps else self.new.steps

    def __call__(self, step: int) -> OnlineBatch:
        """New samples and a draw; the memory is as the steps before have left it."""
        number, key = self.batch_of(step), rng.key(self.key, step)
        new = self._batch(number)
        rows, old = self.draw(key)
        again, last = step > 0 and self.batch_of(step - 1) == number, self.batch_of(step + 1) > number
        return OnlineBatch(new, old, rows, key, again, last or step + 1 == self.steps, self.trained)

    def draw(self, key: int) -> tuple[np.ndarray, ImageBatch | None]:
        """Slots of a draw from the memory [R], and its samples; None where there are none."""
        among = self.memory.experience < self.index if self.past else None
        rows = self.memory.rows(key, self.replay, among) if self.draws else np.zeros(0, np.int64)
        shown = rng.key(key, "augment") if self.augments_old else None
        return rows, self.memory.batch(rows, self.data, shown) if len(rows) else None

    def _batch(self, number: int) -> ImageBatch:
        """A batch of the stream; the one at hand is not asked for again. Its classes have appeared."""
        if self._taken[0] != number:
            self._taken = (number, self.new(number))
            if self.head is not None:
                self.head.see(labels(self._taken[1]))
        return self._taken[1]

    def store(self, place: Place, batch: OnlineBatch) -> list[tuple[int, int]]:
        """After the last update on a batch: offer its samples to the memory, and those of batches that have no update.

        -> (slot, position in `batch.new`, or -1) of those that entered, in their order
        """
        if not batch.last:
            return []
        number = self.batch_of(place.step)
        after = self.new.steps if place.step + 1 == self.steps else self.batch_of(place.step + 1)
        entered = self.memory.insert(self.data, self.new.rows(number), batch.new, self.index)
        done = Place(place.experience, place.step + 1, place.steps, place.global_step + 1)
        return entered + self._pass(number + 1, after, done)

    def _pass(self, first: int, after: int, place: Place) -> list[tuple[int, int]]:
        """Offer the samples of batches without an update to the memory -> (slot, -1) of those that entered."""
        entered: list[tuple[int, int]] = []
        for number in range(first, after):
            looks.at_step("train", place, 0.0, self.runtime.used_new)
            passing = self._batch(number)
            self.runtime.count_visits(len(passing), 0)
            found = self.memory.insert(self.data, self.new.rows(number), passing, self.index)
            entered += [(slot, -1) for slot, _ in found]
        return entered


def places(before: int, samples: int, batches: int, size: int, updates: Fraction) -> list[int]:
    """The batches that have an update, of an experience of `samples` in passes of `batches` in all, `size` each but the last.

    One update for each `size` / `updates` samples of the run, of which `before` have come: t falls on the batch that holds the
    run's sample number t size / updates. So boundaries of experiences, told or hidden, move no update.
    """
    each = -(-samples // size)
    first, last = (math.ceil(n * updates / size) for n in (before, before + samples * (batches // each)))
    numbers = (math.floor(t * size / updates) - before for t in range(first, last))
    return [(n // samples) * each + (n % samples) // size for n in numbers]


def per_batch(updates: float) -> Fraction:
    """Updates for each batch of the stream as an exact number; `UserError` where it is none above 0."""
    if isinstance(updates, bool) or not isinstance(updates, int | float) or not 0 < updates < math.inf:
        raise UserError(f"learner.updates must be a number above 0, got {updates!r}")
    return Fraction(str(updates))


def grow(learner: Any, experience: Experience) -> None:
    """Rows for the experience's classes, which wait until the first sample of theirs comes."""
    if experience.new_classes:
        learner.head.grow(len(experience.new_classes), learner.runtime.generator("head"))


def scores(learner: Any, batch: Any) -> Tensor:
    """Scores [B, num_seen] of the network under the learner's head; classes that have not appeared have the lowest."""
    return learner.head(learner.model.features(batch))


def replay_loss(learner: Any, batch: OnlineBatch, combine: Literal["joint", "added"]) -> Tensor:
    """Cross-entropy over the classes seen: the mean over new and drawn samples in one pass, or the sum of two passes' means."""
    if combine == "joint" or batch.old is None:
        joined = batch.joined
        return F.cross_entropy(scores(learner, joined), labels(joined))
    return sum_of(F.cross_entropy(scores(learner, part), labels(part)) for part in (batch.new, batch.old))


def labels(batch: ImageBatch) -> Tensor:
    """Labels [B] of training samples."""
    assert batch.y is not None
    return batch.y


def sum_of(parts: Any) -> Tensor:
    """The sum of some scalars."""
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def gradients(loss: Tensor, params: Sequence[Tensor], keep: bool = False) -> list[Tensor]:
    """Gradients of a loss; zeros for parameters that it does not depend on."""
    found = torch.autograd.grad(loss, params, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(params, found, strict=True)]


def flat(parts: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Gradients, or zeros where there are none, as one vector [P] in float64 (float32 where the device has no float64)."""
    kind = torch.float32 if params[0].device.type == "mps" else torch.float64
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1).to(kind) for p, g in zip(params, parts, strict=True)]
    )


def give(params: Sequence[Tensor], vector: Tensor) -> None:
    """Make a vector [P] the gradients of parameters, in place where they have some."""
    for p, part in zip(params, vector.split([p.numel() for p in params]), strict=True):
        part = part.reshape(p.shape).to(p.dtype)
        if p.grad is None:
            p.grad = part
        else:
            p.grad.copy_(part)


class MemoryMeans:
    """Class means of the memory's features [K, D] under the network of now: taken when they are asked for.

    Kept until `forget`, or until the memory is offered more: batches without an update change it alone.

    For answers in the middle of an experience: features and means are L2-normalised, a class without samples is NaN.
    """

    def __init__(self, learner: Any, like: Any, num_classes: int):
        self.learner, self.like, self.num_classes = learner, like, num_classes
        self._found: Tensor | None = None
        self._at = -1  # what the memory had been offered then

    def __call__(self) -> Tensor:
        if self._found is None or self._at != self.learner.memory.visited:
            self._at = self.learner.memory.visited
            model, data = self.learner.model, self.learner.memory.data(self.like)
            model.eval()
            with torch.no_grad():
                batches = [] if data is None else list(data.test_batches(128))
                features = [
                    torch.zeros(0, model.num_features, device=self.learner.runtime.device),
                    *map(model.features, batches),
                ]
                y = torch.cat([torch.zeros(0, dtype=torch.int64, device=features[0].device), *(labels(b) for b in batches)])
                self._found = exemplar_means(torch.cat(features), y, self.num_classes)
        return self._found

    def forget(self) -> None:
        """The network or the memory has changed."""
        self._found = None


def nearest_mean(features: Tensor, means_KD: Tensor) -> Tensor:
    """Minus the squared distance of L2-normalised features [B, D] to unit means -> [B, K]; LOWEST where there is no mean."""
    cosines = F.normalize(features, dim=1) @ means_KD.T
    return (2 * cosines - 2).nan_to_num(nan=LOWEST)
