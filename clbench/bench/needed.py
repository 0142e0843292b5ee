"""Passes that a learner needs on a stream: what is left without logging and without computing anything twice.

T experiences with n_t training and m_t test images; S = sum over t of (m_0 + ... + m_t), the images tested over the run when
all those of the classes seen are tested after every experience. A frozen network sees each image once; one that changes sees
every test image anew. From the formulas of the methods, not from what clbench does: tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True)
class Passes:
    """Images: `full` and `adapter` forward and backward, `forward` without gradients."""

    full: float = 0
    adapter: float = 0
    forward: float = 0

    def seconds(self, rates: Mapping[str, float]) -> float:
        """The floor: these passes at these rates (images per second by kind)."""
        return sum(getattr(self, kind) / rates[kind] for kind in ("full", "adapter", "forward") if getattr(self, kind))


@dataclass(frozen=True)
class Stream:
    """Images of each experience; epochs that the learner trains; its options; whether it tunes a module."""

    train: Sequence[int]
    test: Sequence[int]
    epochs: int
    options: Mapping[str, Any]
    visited: float | None = None

    @property
    def pet(self) -> bool:
        """Whether a module is tuned; else the whole network."""
        return str((self.options.get("pet") or {}).get("_target_", "none")).rpartition(".")[2] != "none"

    @property
    def tested(self) -> int:
        return sum(accumulate(self.test))


def _once(s: Stream) -> Passes:
    return Passes(forward=sum(s.train) + sum(s.test))


def _slca(s: Stream) -> Passes:
    return Passes(full=s.epochs * sum(s.train), forward=sum(s.train) + s.tested)


def _finetune(s: Stream) -> Passes:
    steps = s.epochs * sum(s.train)
    return Passes(adapter=steps, forward=s.tested) if s.pet else Passes(full=steps, forward=s.tested)


def _inflora(s: Stream) -> Passes:
    """Inputs of the attention before and after the training of an experience."""
    return Passes(adapter=s.epochs * sum(s.train), forward=2 * sum(s.train) + s.tested)


def _first(s: Stream, forward: float) -> Passes:
    first = s.epochs * s.train[0]
    return Passes(adapter=first, forward=forward) if s.pet else Passes(full=first, forward=forward)


def _ranpac(s: Stream) -> Passes:
    return _first(s, sum(s.train) + sum(s.test)) if s.pet else _once(s)


def _aper(s: Stream) -> Passes:
    return _first(s, 2 * (sum(s.train) + sum(s.test)))


def _ease(s: Stream) -> Passes:
    """New classes in all subspaces so far; every test image under every adapter once."""
    means = sum((t + 1) * n for t, n in enumerate(s.train))
    return Passes(adapter=s.epochs * sum(s.train), forward=means + len(s.train) * sum(s.test))


def _lae(s: Stream) -> Passes:
    """From the second experience on the module stands still for a share of the batches, and the offline one exists."""
    size = int(s.options["batch_size"])
    visits = [s.epochs * (n // size * size if n >= size else n) for n in s.train]
    each = [min(n, size) for n in s.train]
    share = float(s.options["freeze"])
    still = [0] + [round(share * v) // b * b for v, b in zip(visits[1:], each[1:], strict=True)]
    return Passes(adapter=sum(visits) - sum(still), forward=sum(still) + 2 * s.tested - s.test[0])


def _mos(s: Stream) -> Passes:
    """Statistics, prototypes under A_0, every test image under A_0; and the adapters that retrieval visits besides.

    Those depend on the data: `visited` pairs of image and adapter; where they are not known, the adapter of an image's own
    experience alone.
    """
    n, m = sum(s.train), sum(s.test)
    visited = m - s.test[0] if s.visited is None else s.visited
    return Passes(adapter=s.epochs * n, forward=2 * n - s.train[0] + m + visited)


KNOWN: dict[str, Callable[[Stream], Passes]] = {
    "ncm": _once,
    "fecam": _once,
    "ranpac": _ranpac,
    "aper": _aper,
    "slca": _slca,
    "slca_pp": _slca,
    "finetune": _finetune,
    "sd_lora": _finetune,
    "inflora": _inflora,
    "lae": _lae,
    "ease": _ease,
    "mos": _mos,
}


def stream_of(job: Any) -> Stream:
    """The stream of a `runner.Job`, for `KNOWN`."""
    manifest, options = job.scenario.manifest, job.config["learner"]
    train = [len(e.train) for e in manifest.experiences]
    test = [sum(len(e.ids) for e in manifest.evals if e.first_seen == t) for t in range(len(train))]
    return Stream(train, test, options.get("epochs") or job.scenario.budget.epochs, options)
