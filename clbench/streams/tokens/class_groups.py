"""Groups of classes one after the other, for masked autoencoders: conf/scenario/cpt_mae_*.yaml. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import generators
from clbench.streams.manifest import Manifest
from clbench.streams.scenario import Dataset, Scenario
from clbench.streams.tokens.image_scenario import ImageDomain, ImageProbing, ImageScenario
from clbench.streams.tokens.layout import laid_out
from clbench.streams.tokens.mae_images import AUGMENT, Pictures


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
    probe_look: int = 50,
    probe_sequences: int = 32,
    probe_evenly: int = 4,
    budget: Mapping[str, Any] | None = None,
    test_share: float | None = None,
    test_seed: int = 0,
) -> ImageScenario:
    """Groups of classes, one experience each, dealt as in `generators.class_incremental`, whose options these are.

    groups           the group that each experience reads; null: each once. [0, 0, 0] is the control in which nothing shifts
    size             side of the images in pixels; null: that of the data set, whose images must be squares of one size
    epochs           passes over the images of each experience
    augment          views of training images: "none", "flip", or "crop" (random resized crop and flip)
    eval_images      at most so many evaluation images of each group
    probe_train      labelled training images of each group to which the linear probe is fitted after each experience
    probe_look       the same while training, at the looks, whose images are the first `probe_sequences`
    probe_evenly     looks besides those at steps 0, 1, 2, 4, 8, ...
    """
    probing = ImageProbing(probe_sequences, probe_evenly, probe_train, probe_look)
    _check_options(augment, epochs=epochs, batch=batch, eval_images=eval_images, **_numbers(probing))
    classes = (base, increment, sizes, order, order_seed, num_classes, limit_train, limit_test)
    dealt = generators.class_incremental(
        name, dataset, data_root, download, sha256, *classes, test_share=test_share, test_seed=test_seed
    )
    domains = _domains(dealt, _side(dealt.dataset, size), augment)
    chosen = list(range(len(domains))) if groups is None else list(groups)
    manifest = _layout(domains, chosen, epochs, batch, eval_images, budget)
    return ImageScenario(name, manifest, tuple(domains), probing)


def _numbers(probing: ImageProbing) -> dict[str, Any]:
    return {"probe_train": probing.labelled, "probe_look": probing.look, "probe_sequences": probing.sequences}


def _check_options(augment: str, **least: Any) -> None:
    for key, value in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"scenario.{key} must be a whole number from 1, got {value!r}")
    if augment not in AUGMENT:
        raise UserError(f"scenario.augment must be one of {', '.join(AUGMENT)}, got {augment!r}")


def _domains(dealt: Scenario, side: int, augment: str) -> list[ImageDomain]:
    data, pictures, made = dealt.dataset, Pictures(dealt.dataset.images, side), []
    for i, (entry, held) in enumerate(zip(dealt.manifest.experiences, dealt.manifest.evals, strict=True)):
        digest = hashlib.sha256(f"{data.sha256} {side} {list(entry.classes)}".encode())
        for ids in (entry.train, held.ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, "<i8").tobytes())
        of = (entry.classes, pictures, data.y, entry.train, held.ids)
        made.append(ImageDomain(f"group{i}", *of, digest.hexdigest(), augment))
    return made


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


def _layout(
    domains: Sequence[ImageDomain],
    order: Sequence[int],
    epochs: int,
    batch: int,
    eval_images: int,
    budget: Mapping[str, Any] | None,
) -> Manifest:
    if not order or any(type(d) is not int or not 0 <= d < len(domains) for d in order):
        raise UserError(f"scenario.groups must name groups 0..{len(domains) - 1}, got {list(order)}")
    parts = []
    for d in order:
        held = len(domains[d].train) // list(order).count(d)
        if held < batch:
            raise UserError(f"group {domains[d].name} has {held} images for an experience, scenario.batch is {batch}")
        parts.append((held, epochs * held // batch))
    plain = [{"unit": "images", "side": d.pictures.side, "classes": list(d.classes), "augment": d.augment} for d in domains]
    numbers = {d: min(eval_images, len(domains[d].validation)) for d in dict.fromkeys(order)}
    return laid_out(domains, order, parts, numbers, vocab=256, context=1, batch=batch, budget=budget, about=plain)
