"""Continual pre-training on images: groups of classes one after the other, for masked autoencoders. Imports no torch.

The rules are those of `cpt`: experiences of the same group read disjoint images, orders are pure functions of a key, past the
first pass the same images come again in other orders. What is a token there is an image here: budgets, ledger and evaluation
sets count images, and the loss of an image is one number. Labels are for the linear probe alone; no learner sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from clbench import counter
from clbench.interfaces import Budget, Facts, UserError
from clbench.streams import generators, sequences
from clbench.streams.cpt import Probing
from clbench.streams.scenario import ArrayImages, Dataset, ImageSource
from clbench.streams.token_manifest import KIND, TokenBudget, TokenManifest, check

THREADS = 8  # that decode files; results do not depend on it
AUGMENT = ("none", "flip", "crop")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Stored images as squares of one size: the shorter side is resized to `side` (bicubic), the centre is kept."""

    source: ImageSource
    side: int

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Samples by id -> uint8 [B, S, S, 3]."""
        if isinstance(self.source, ArrayImages) and self.source.shape == (self.side, self.side):
            return self.source.array[ids]
        with ThreadPoolExecutor(THREADS) as pool:
            return np.stack(list(pool.map(self._one, np.asarray(ids).tolist())))

    def _one(self, number: int) -> np.ndarray:
        from clbench.streams.resample import crop_resize_one

        (image,) = self.source.raw(np.array([number]))
        height, width = image.shape[:2]
        if (height, width) == (self.side, self.side):
            return image
        short = min(height, width)
        box = ((height - short) // 2, (width - short) // 2, short, short)
        return crop_resize_one(image, box, (self.side, self.side), "bicubic")


def with_keys(pictures: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Images uint8 [B, S, S, 3] and mask keys uint64 [B] -> rows [B, S * S * 3 + 8] uint8, the key last, little endian."""
    tail = np.ascontiguousarray(keys, "<u8").view(np.uint8).reshape(len(keys), 8)
    return np.concatenate([pictures.reshape(len(pictures), -1), tail], 1)


def augmented(x: np.ndarray, keys: np.ndarray, how: str) -> np.ndarray:
    """Random views of images uint8 [B, S, S, 3], each drawn from its own key: "flip", or "crop" (with flip).

    crop: an area share of 0.2 to 1 at an aspect of 3/4 to 4/3, resized back, bicubic: as for masked autoencoders on ImageNet.
    """
    if how == "none" or not len(x):
        return x
    if how == "crop":
        import torch

        from clbench.streams.pixels import random_boxes
        from clbench.streams.resample import crop_resize

        shapes = np.tile(np.array(x.shape[1:3], np.int64), (len(x), 1))
        boxes = torch.from_numpy(random_boxes(counter.key("mae crop"), keys, shapes, (0.2, 1.0)))
        made = crop_resize(torch.from_numpy(x).permute(0, 3, 1, 2), boxes, x.shape[1], "bicubic")
        x = (made * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    flips = counter.bits(counter.key("mae flip"), keys) >> np.uint64(63) == 1
    return np.where(flips[:, None, None, None], x[:, :, ::-1], x)


@dataclass(frozen=True, eq=False)
class ImageDomain:
    """A group of classes: sample ids of its training and evaluation images, and the labels [N] of all samples."""

    name: str
    classes: tuple[int, ...]
    pictures: Pictures
    y: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    sha256: str


@dataclass(frozen=True, eq=False)
class ImageData:
    """The training images of one experience, in an order drawn once by `key`; the counterpart of `cpt.TokenData`."""

    name: str
    domain: int
    pictures: Pictures
    rows: np.ndarray
    batch: int
    steps: int
    first: int
    size: int
    key: int
    augment: str = "none"
    context: ClassVar[int] = 1

    def __len__(self) -> int:
        return self.size

    @property
    def sequence_bytes(self) -> int:
        """What one stored image takes."""
        return self.pictures.side**2 * 3

    def ids(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Images by position -> [B] int64 places in the group; `size`: only the first so many are used."""
        inside = sequences.passes(self.key, size or self.size, positions, first_in_order=True)
        return sequences.permuted(counter.key(self.key, "domain"), len(self.rows), self.first + inside)

    def read(self, positions: np.ndarray, size: int | None = None) -> np.ndarray:
        """Images by position -> rows [B, S * S * 3 + 8] uint8."""
        return self.take(self.ids(positions, size), "new", positions)

    def take(self, ids: np.ndarray, role: str, positions: np.ndarray) -> np.ndarray:
        """Images by place in the group; mask and view are drawn from (`role`, position in that stream) -> rows."""
        keys = counter.bits(counter.key(self.key, "mask", role, self.first), positions)
        return with_keys(augmented(self.pictures(self.rows[ids]), keys, self.augment), keys)


@dataclass(frozen=True, eq=False)
class Labelled:
    """What a linear probe is fitted to and judged on: rows as the model reads them, labels [N] int64."""

    train: np.ndarray
    train_y: np.ndarray
    test: np.ndarray
    test_y: np.ndarray


@dataclass(frozen=True)
class ImageProbing(Probing):
    """How often it is looked at, and how many labelled images of each set a linear probe is fitted to.

    labelled  after each experience
    look      while training
    """

    labelled: int = 1000
    look: int = 100


@dataclass(frozen=True, eq=False)
class ImageScenario:
    """A stream of images that can be run: the manifest, the images, the rules. The counterpart of `cpt.TokenScenario`."""

    name: str
    manifest: TokenManifest
    domains: tuple[ImageDomain, ...]
    augment: str = "none"
    probing: ImageProbing = field(default_factory=ImageProbing)
    asks: ClassVar[Literal["loss"]] = "loss"

    @property
    def budget(self) -> TokenBudget:
        """Images and bytes that a learner may use."""
        return TokenBudget(**self.manifest.budget)

    @cached_property
    def side(self) -> int:
        """Height and width of every image."""
        return self.domains[0].pictures.side

    @property
    def iid(self) -> bool:
        """Whether all experiences are of one group: then nothing shifts."""
        return len({entry["domain"] for entry in self.manifest.experiences}) == 1

    def facts(self) -> Facts:
        """What is compared with a learner's capabilities."""
        return Facts(self.name, "loss", False, True, False, Budget(exemplar_bytes=self.budget.exemplar_bytes))

    def data(self, index: int) -> ImageData:
        """The training images of experience `index`. Order, masks and views depend on the stream, not on the run's seed."""
        entry = self.manifest.experiences[index]
        domain = self.domains[entry["domain"]]
        key = counter.key("order", int(domain.sha256[:16], 16))
        shape = (self.manifest.batch, entry["steps"], entry["first"], entry["sequences"])
        return ImageData(entry["name"], entry["domain"], domain.pictures, domain.train, *shape, key, self.augment)

    def _held(self, j: int) -> tuple[ImageDomain, np.ndarray]:
        entry = self.manifest.evals[j]
        domain = self.domains[entry["domain"]]
        return domain, domain.validation[_spread(len(domain.validation), entry["sequences"])]

    def evaluation(self, j: int) -> np.ndarray:
        """Rows of evaluation set j -> [N, S * S * 3 + 8] uint8: whole images, each with a mask that never changes."""
        domain, ids = self._held(j)
        keys = counter.bits(counter.key("evaluation mask", int(domain.sha256[:16], 16)), np.arange(len(ids)))
        return with_keys(domain.pictures(ids), keys)

    def labelled(self, j: int) -> Labelled:
        """Labelled images of evaluation set j: some of its group's training images, and the evaluation images."""
        domain, ids = self._held(j)
        chosen = domain.train[_spread(len(domain.train), min(self.probing.labelled, len(domain.train)))]
        train = with_keys(domain.pictures(chosen), np.zeros(len(chosen), np.uint64))
        return Labelled(train, domain.y[chosen], self.evaluation(j), domain.y[ids])

    def describe(self) -> dict[str, Any]:
        """What a record says about the stream and its evaluation sets."""
        m = self.manifest
        return {
            "scenario": {
                "name": self.name,
                "kind": m.kind,
                "unit": m.unit,
                "manifest_sha256": m.sha256,
                "num_experiences": len(m.experiences),
                "eval_names": [e["name"] for e in m.evals],
                "experiences": [dict(e) for e in m.experiences],
                "context": m.context,
                "batch": m.batch,
                "vocab": m.vocab,
                "iid": self.iid,
                "probing": asdict(self.probing),
                "budget": dict(m.budget),
            },
            "n": [e["tokens"] for e in m.evals],
            "tokens": [e["tokens"] for e in m.evals],
            "floor": [None for _ in m.evals],
            "bytes_per_token": [None for _ in m.evals],
            "first_seen": [e["first_seen"] for e in m.evals],
        }


def _spread(whole: int, number: int) -> np.ndarray:
    """`number` places of 0..whole-1 in a fixed order that is spread over all of it."""
    return sequences.permuted(counter.key("evaluation"), whole, np.arange(number))


def class_groups(
    *,
    name: str,
    dataset: str,
    data_root: str | None = None,
    download: bool = False,
    sha256: str | None = None,
    base: int = 0,
    increment: int | None = None,
    sizes: Sequence[int] | None = None,
    order: str | Sequence[int] = "natural",
    order_seed: int = 0,
    num_classes: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    groups: Sequence[int] | None = None,
    size: int | None = None,
    epochs: int = 20,
    batch: int = 64,
    augment: Literal["none", "flip", "crop"] = "none",
    eval_images: int = 1000,
    probe_train: int = 1000,
    probe_look: int = 100,
    probe_sequences: int = 64,
    probe_evenly: int = 8,
    budget: Mapping[str, Any] | None = None,
) -> ImageScenario:
    """Groups of classes, one experience each. Classes are dealt as in `generators.class_incremental`, whose options these are.

    groups           the group that each experience reads; null: each once. [0, 0, 0] is the control in which nothing shifts
    size             side of the images in pixels; null: that of the data set, whose images must be squares of one size
    epochs           passes over the images of each experience
    augment          views of training images: "none", "flip", or "crop" (random resized crop and flip)
    eval_images      at most so many evaluation images of each group
    probe_train      labelled training images of each group to which the linear probe is fitted after each experience
    probe_look       and to which it is fitted while training, at the looks, whose images are the first `probe_sequences`
    probe_evenly     looks besides those at steps 0, 1, 2, 4, 8, ...
    """
    least = {"epochs": epochs, "batch": batch, "eval_images": eval_images, "probe_train": probe_train}
    for key, value in (least | {"probe_look": probe_look, "probe_sequences": probe_sequences}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"scenario.{key} must be a whole number from 1, got {value!r}")
    if augment not in AUGMENT:
        raise UserError(f"scenario.augment must be one of {', '.join(AUGMENT)}, got {augment!r}")
    dealt = generators.class_incremental(
        name,
        dataset,
        data_root,
        download,
        sha256,
        base,
        increment,
        sizes,
        order,
        order_seed,
        num_classes,
        limit_train,
        limit_test,
    )
    pictures = Pictures(dealt.dataset.images, _side(dealt.dataset, size))
    entries = zip(dealt.manifest.experiences, dealt.manifest.evals, strict=True)
    domains = [_domain(dealt.dataset, pictures, e.name, e.classes, np.asarray(e.train), np.asarray(v.ids)) for e, v in entries]
    chosen = list(range(len(domains))) if groups is None else list(groups)
    manifest = _layout(domains, chosen, augment, epochs, batch, eval_images, budget)
    return ImageScenario(
        name, manifest, tuple(domains), augment, ImageProbing(probe_sequences, probe_evenly, probe_train, probe_look)
    )


def _side(data: Dataset, size: int | None) -> int:
    if size is not None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 4:
            raise UserError(f"scenario.size must be a whole number from 4 or null, got {size!r}")
        return size
    shape = data.images.shape
    if shape is None or shape[0] != shape[1]:
        found = "files of any size" if shape is None else f"{shape[0]} x {shape[1]} pixels"
        raise UserError(f"the images of {data.name} are {found}: set scenario.size to the side they are resized to")
    return shape[0]


def _domain(
    data: Dataset, pictures: Pictures, name: str, classes: Sequence[int], train: np.ndarray, held: np.ndarray
) -> ImageDomain:
    digest = hashlib.sha256(f"{data.sha256} {pictures.side} {list(map(int, classes))}".encode())
    for ids in (train, held):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(ids, "<i8").tobytes())
    return ImageDomain(name, tuple(map(int, classes)), pictures, data.y, train, held, digest.hexdigest())


def _layout(
    domains: Sequence[ImageDomain],
    order: Sequence[int],
    augment: str,
    epochs: int,
    batch: int,
    eval_images: int,
    budget: Mapping[str, Any] | None,
) -> TokenManifest:
    if not order or any(type(d) is not int or not 0 <= d < len(domains) for d in order):
        raise UserError(f"scenario.groups must name groups 0..{len(domains) - 1}, got {list(order)}")
    experiences, first = [], dict.fromkeys(order, 0)
    for i, d in enumerate(order):
        held = len(domains[d].train) // list(order).count(d)
        if held < batch:
            raise UserError(f"group {domains[d].name} has {held} images for an experience, scenario.batch is {batch}")
        label = domains[d].name if list(order).count(d) == 1 else f"{domains[d].name}_{list(order)[: i + 1].count(d)}"
        steps = epochs * held // batch
        experiences.append({"name": label, "domain": d, "first": first[d], "sequences": held, "steps": steps})
        first[d] += held
    evals = []
    for d in dict.fromkeys(order):
        number = min(eval_images, len(domains[d].validation))
        seen = {"name": domains[d].name, "domain": d, "first_seen": list(order).index(d)}
        evals.append(seen | {"sequences": number, "tokens": number, "floor": None, "bytes_per_token": None})
    plain = [
        {
            "name": d.name,
            "sha256": d.sha256,
            "unit": "images",
            "side": d.pictures.side,
            "classes": list(d.classes),
            "augment": augment,
            "train_tokens": len(d.train),
            "validation_tokens": len(d.validation),
        }
        for d in domains
    ]
    limits = asdict(TokenBudget(**(budget or {})))
    made = TokenManifest(KIND, 256, 1, batch, tuple(plain), tuple(experiences), tuple(evals), limits)
    check(made)
    return made
