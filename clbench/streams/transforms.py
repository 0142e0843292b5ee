"""Fixed changes of stored pixels, as a manifest states them: a list of steps, each {name: options}. Imports no torch.

    {"permute": {"seed": 0, "number": 3}}                     the fixed pixel permutation `number` of `seed`
    {"rotate": {"degrees": 45.0, "interpolation": "nearest"}} counter-clockwise about the centre, size kept, black outside
    {"turn": {"first": 30.0, "by": 0.5, "ids": "7,9-11"}}     the k-th of these samples rotated by first + k * by, others stay
    {"resize": {"size": 28}}                                  both sides to `size`, bicubic
    {"corrupt": {"kind": "fog", "severity": 3, ...}}          one of the fifteen common corruptions, see `images.corruptions`

A sample under a transform is another picture, so it has an id of its own (`picture_ids`): features that are remembered by id
never meet those of the plain sample. A package may bring steps of its own with entry points in the group
`clbench.transforms` (name -> function of an image uint8 [H, W, 3] and the options -> uint8 [H', W', 3]).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.id_runs import MAX_SAMPLES, decode_ids

PLUGINS = "clbench.transforms"
INTERPOLATIONS = ("nearest", "bilinear")
CORRUPTIONS = (  # in the order of Hendrycks & Dietterich 2019
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow"),
    *("frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
CORRUPTION_TABLES = ("auto", "cifar", "imagenet")
_ID_BITS = 27  # sample ids are below 2 ** 27 (`manifest.MAX_SAMPLES`)
Steps = tuple[dict[str, dict[str, Any]], ...]


@lru_cache(maxsize=64)
def permutation(seed: int, number: int, pixels: int) -> np.ndarray:
    """Where each pixel comes from: [pixels] int64, read-only."""
    found = rng.permutation(rng.key("permute pixels", seed, number), pixels)
    found.flags.writeable = False
    return found


def permute(image: np.ndarray, *, seed: int, number: int) -> np.ndarray:
    """Pixels of [..., H, W, 3] in another order, the channels of a pixel together. Images of one size share one order."""
    *front, height, width, channels = image.shape
    flat = image.reshape(*front, height * width, channels)
    return np.take(flat, permutation(seed, number, height * width), axis=-2).reshape(image.shape)


def rotate(image: np.ndarray, *, degrees: float, interpolation: str = "nearest") -> np.ndarray:
    """`PIL.Image.rotate` of [H, W, 3]: counter-clockwise about the centre, the size kept, black outside."""
    from PIL import Image

    turned = Image.fromarray(image).rotate(degrees, Image.Resampling[interpolation.upper()])
    return np.asarray(turned, dtype=np.uint8)


@lru_cache(maxsize=256)
def _places(ids: str) -> tuple[np.ndarray, np.ndarray]:
    """The samples of a list of ids in ascending order, and the place of each in the list."""
    listed = decode_ids(ids, MAX_SAMPLES)
    places = np.argsort(listed, kind="stable")
    return listed[places], places


def turn(image: np.ndarray, sample: int, *, first: float, by: float, ids: str) -> np.ndarray:
    """[H, W, 3] of a sample by its id, rotated further the later it stands among `ids`; one that is not there stays."""
    samples, places = _places(ids)
    k = int(np.searchsorted(samples, sample))
    if k == len(samples) or samples[k] != sample:
        return image
    return rotate(image, degrees=round(first + int(places[k]) * by, 6) % 360)


def resize(image: np.ndarray, *, size: int) -> np.ndarray:
    """[H, W, 3] -> [size, size, 3] with Pillow's bicubic kernel."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC), dtype=np.uint8)


def corrupt(image: np.ndarray, sample: int, **options: Any) -> np.ndarray:
    """[H, W, 3] of a sample by its id, corrupted; the noise is that of the id."""
    from clbench.streams.images import corruptions

    return corruptions.corrupt(image, sample, **options)


LARGEST = 4096  # pixels of a side
_STEPS = {"permute": permute, "rotate": rotate, "turn": turn, "resize": resize, "corrupt": corrupt}
_BY_SAMPLE = ("turn", "corrupt")
_FIELDS = {
    "permute": {"seed": lambda v: _whole(v, 0), "number": lambda v: _whole(v, 0)},
    "rotate": {
        "degrees": lambda v: _angle(v),
        "interpolation": lambda v: v in INTERPOLATIONS,
    },
    "turn": {"first": lambda v: _angle(v), "by": lambda v: _angle(v), "ids": lambda v: _ids(v)},
    "resize": {"size": lambda v: _whole(v, 1) and v <= LARGEST},
    "corrupt": {
        "kind": lambda v: v in CORRUPTIONS,
        "severity": lambda v: _whole(v, 1) and v <= 5,
        "seed": lambda v: _whole(v, 0),
        "table": lambda v: v in CORRUPTION_TABLES,
    },
}


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _angle(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -360 <= value <= 360


def _ids(value: Any) -> bool:
    """Whether it is a list of samples, none of them twice."""
    try:
        return isinstance(value, str) and value != "" and bool((np.diff(_places(value)[0]) > 0).all())
    except UserError:
        return False


def checked(steps: Any, where: str) -> Steps:
    """Steps as a manifest holds them; `UserError` for anything that is no known step with all of its options."""
    if not isinstance(steps, list | tuple):
        raise UserError(f"{where}: transform must be a list of steps, got {steps!r}")
    for step in steps:
        if not isinstance(step, Mapping) or len(step) != 1 or not isinstance(next(iter(step.values())), Mapping):
            raise UserError(f"{where}: a transform step must be {{name: {{options}}}}, got {step!r}")
        ((name, options),) = step.items()
        if name not in _STEPS and _plugin(name) is None:
            known = [*_STEPS, *(entry.name for entry in importlib.metadata.entry_points(group=PLUGINS))]
            near = difflib.get_close_matches(str(name), known, 1, 0.0)[0]
            raise UserError(f"{where}: unknown transform {name!r}; did you mean {near}?")
        fields = _FIELDS.get(name)
        if fields is not None and (set(options) != set(fields) or not all(fits(options[k]) for k, fits in fields.items())):
            raise UserError(f"{where}: transform {name} needs {', '.join(fields)}, got {dict(options)}")
    return tuple({name: dict(options) for name, options in step.items()} for step in steps)


def _plugin(name: str) -> importlib.metadata.EntryPoint | None:
    """A manifest is a file that anyone may hand over: it can name what is registered, not what is importable."""
    return next(iter(importlib.metadata.entry_points(group=PLUGINS, name=name)), None)


def transformed(images: Sequence[np.ndarray], steps: Steps, samples: Sequence[int] = ()) -> list[np.ndarray]:
    """Images uint8 [H, W, 3] each, after all steps. `samples` are their ids, where a step draws numbers for each of them."""
    for step in steps:
        ((name, options),) = step.items()
        if name in _STEPS:
            work: Any = _STEPS[name]
        else:
            entry = _plugin(name)
            assert entry is not None, name
            work = entry.load()
        if name == "permute" and len({image.shape for image in images}) == 1:
            images = list(permute(np.stack(images), **options))
        elif name in _BY_SAMPLE:
            images = [work(image, sample, **options) for image, sample in zip(images, samples, strict=True)]
        else:
            images = [work(image, **options) for image in images]
    return list(images)


def picture_ids(ids: np.ndarray, steps: Steps) -> np.ndarray:
    """Ids [N] of samples under a transform: the digest of the steps above the sample's own id, int64, the same everywhere."""
    if not steps:
        return ids
    digest = hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> (_ID_BITS + 2) << _ID_BITS) + ids


class TransformedImages:
    """A source of stored pixels seen through steps; implements `scenario.ImageSource`.

    first  the sample id of its first image: noise belongs to the sample, wherever it lies
    """

    def __init__(self, source: Any, steps: Steps, first: int = 0):
        self.source, self.steps, self.first = source, steps, first
        sizes = [step["resize"]["size"] for step in steps if "resize" in step]
        known = all(next(iter(step)) in _STEPS for step in steps)
        self.shape = (sizes[-1],) * 2 if sizes and known else source.shape if known else None

    def __len__(self) -> int:
        return len(self.source)

    def raw(self, ids: np.ndarray) -> list[np.ndarray]:
        """Pixels of samples by id: uint8 [H, W, 3] each."""
        return transformed(self.source.raw(ids), self.steps, (np.asarray(ids, np.int64) + self.first).tolist())
