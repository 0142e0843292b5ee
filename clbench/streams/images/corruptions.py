"""The fifteen common corruptions at five severities (Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261). Imports no torch.

Each is a function of the picture, the severity and a key, with the constants of ImageNet-C or of CIFAR-10-C. Lengths of the
ImageNet table are for a shorter side of 224 pixels and scale with it; those of the CIFAR table are for 32 pixels and scale for
larger sides. Computed with NumPy, SciPy and Pillow, pictures differ from the published archives where these used other means:

    glass_blur    every pixel takes the value of a random neighbour, at once; published: swaps one after another
    motion_blur   a one-sided Gaussian along the direction, bilinear; published: ImageMagick
    fog, frost    fractal noise is a sum of octaves; published: diamond squares. Frost is a texture of such noise; published:
                  six photographs, which nobody ships here
    all           values are rounded; published: cut off

Legend: H W image; x float64 [H, W, 3] in 0..1.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import ndimage, special

from clbench.streams import rng
from clbench.streams.transforms import CORRUPTIONS

REFERENCE = {"cifar": 32, "imagenet": 224}  # the shorter side that a table is for
SMALL = 64  # the longest shorter side for which table=auto takes that of CIFAR
_TABLES: dict[str, dict[str, tuple[Any, ...]]] = {
    "imagenet": {
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot_noise": (60, 25, 12, 5, 3),
        "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
        "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius, sigma
        "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),  # sigma, farthest, passes
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # radius, sigma
        "zoom_blur": ((0.01, 11), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11)),  # step of the zoom, number of zooms
        "snow": (  # mean, deviation, zoom, threshold, radius, sigma, share of the picture
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),  # weights of picture and frost
        "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),  # strength, decay of octaves
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "elastic_transform": (  # shift, sigma, jitter of corners, in sides (244 / 224 of the published constants)
            (2 * 244 / 224, 0.7 * 244 / 224, 0.1 * 244 / 224),
            (2 * 244 / 224, 0.08 * 244 / 224, 0.2 * 244 / 224),
            (0.05 * 244 / 224, 0.01 * 244 / 224, 0.02 * 244 / 224),
            (0.07 * 244 / 224, 0.01 * 244 / 224, 0.02 * 244 / 224),
            (0.12 * 244 / 224, 0.01 * 244 / 224, 0.02 * 244 / 224),
        ),
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
        "jpeg_compression": (25, 18, 15, 10, 7),
    },
    "cifar": {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot_noise": (500, 250, 100, 75, 50),
        "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": ((0.01, 6), (0.01, 11), (0.01, 16), (0.01, 21), (0.01, 26)),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        "jpeg_compression": (80, 65, 58, 50, 40),
    },
}


def corrupt(image: np.ndarray, sample: int, *, kind: str, severity: int, seed: int, table: str) -> np.ndarray:
    """One picture, uint8 [H, W, 3] -> the same shape, uint8. A pure function of its arguments.

    sample  the sample's id: its noise is its own, whatever batch it comes in
    table   "imagenet", "cifar", or "auto": that of CIFAR where the shorter side is at most 64
    """
    side = min(image.shape[:2])
    table = table if table != "auto" else "cifar" if side <= SMALL else "imagenet"
    scale = side / REFERENCE[table]
    draws = _Draws(rng.key("corrupt", seed, kind, severity, sample))
    scale = max(1.0, scale) if table == "cifar" else scale
    found = _WORK[kind](image, _TABLES[table][kind][severity - 1], scale, draws)
    return np.rint(np.clip(found, 0, 1) * 255).astype(np.uint8) if found.dtype != np.uint8 else found


class _Draws:
    """Random numbers of one key, one after another."""

    def __init__(self, key: int):
        self.key, self.used = key, 0

    def uniform(self, *shape: int) -> np.ndarray:
        """In (0, 1)."""
        number = int(np.prod(shape, dtype=np.int64))
        self.used += number
        return rng.uniform(self.key, np.arange(self.used - number, self.used)).reshape(shape) + 2.0**-54

    def normal(self, *shape: int) -> np.ndarray:
        """With mean 0 and deviation 1."""
        return special.ndtri(self.uniform(*shape))


def _unit(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float64) / 255


def gaussian_noise(image: np.ndarray, c: float, scale: float, draws: _Draws) -> np.ndarray:
    return _unit(image) + c * draws.normal(*image.shape)


@lru_cache(maxsize=10)
def _poisson(c: float) -> tuple[np.ndarray, int]:
    """Level + P(N <= k) for N of mean level / 255 * c, of all 256 levels one after another, and the number of k of each."""
    most = int(c + 12 * np.sqrt(c) + 20)
    tables = special.pdtr(np.arange(most)[None, :], (np.arange(256) / 255 * c)[:, None])
    return (np.arange(256)[:, None] + np.minimum(tables, 1 - 2.0**-40)).ravel(), most


def shot_noise(image: np.ndarray, c: float, scale: float, draws: _Draws) -> np.ndarray:
    """Every value is a Poisson count of mean value * c, divided by c."""
    table, most = _poisson(float(c))
    level = image.astype(np.int64)
    place = np.searchsorted(table, level + np.minimum(draws.uniform(*image.shape), 1 - 2.0**-39))
    return np.clip(place - level * most, 0, most - 1) / c


def impulse_noise(image: np.ndarray, c: float, scale: float, draws: _Draws) -> np.ndarray:
    """A share c of the values becomes black or white."""
    hit, white = draws.uniform(*image.shape) < c, draws.uniform(*image.shape) < 0.5
    return np.where(hit, white.astype(np.float64), _unit(image))


def defocus_blur(image: np.ndarray, c: tuple[float, float], scale: float, draws: _Draws) -> np.ndarray:
    """A disk whose edge is smoothed."""
    radius, sigma = c[0] * scale, c[1]
    reach = int(np.ceil(radius)) + 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = ((x**2 + y**2) <= radius**2).astype(np.float64)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), sigma)
    return ndimage.convolve(_unit(image), kernel[:, :, None] / kernel.sum(), mode="mirror")


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def glass_blur(image: np.ndarray, c: tuple[float, int, int], scale: float, draws: _Draws) -> np.ndarray:
    """Smoothed, pixels moved within a neighbourhood, smoothed."""
    sigma, far = c[0] * scale, max(1, round(c[1] * scale))
    x = _smooth(_unit(image), sigma)
    height, width = x.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    for _ in range(c[2]):
        down, right = (np.floor(draws.uniform(height, width) * (2 * far + 1)).astype(np.int64) - far for _ in range(2))
        x = x[np.clip(rows + down, 0, height - 1), np.clip(columns + right, 0, width - 1)]
    return _smooth(x, sigma)


def _moved(x: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    """A mean along a direction, with the weights of half a Gaussian."""
    steps = np.arange(int(min(np.ceil(radius), np.ceil(3 * sigma))) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    angle = np.deg2rad(degrees)
    shifts = [(k * np.sin(angle), k * np.cos(angle), *(0,) * (x.ndim - 2)) for k in steps]
    parts = [w * ndimage.shift(x, s, order=1, mode="nearest") for w, s in zip(weights, shifts, strict=True)]
    return np.asarray(sum(parts)) / weights.sum()


def motion_blur(image: np.ndarray, c: tuple[float, float], scale: float, draws: _Draws) -> np.ndarray:
    return _moved(_unit(image), c[0] * scale, c[1] * scale, float(draws.uniform(1)[0]) * 90 - 45)


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of a picture, at its full size."""
    matrix = np.diag([1 / factor, 1 / factor, *(1.0,) * (x.ndim - 2)])
    centre = np.array([(n - 1) / 2 if i < 2 else 0.0 for i, n in enumerate(x.shape)])
    offset: Any = centre - matrix @ centre
    return ndimage.affine_transform(x, matrix, offset, order=1, mode="nearest")


def zoom_blur(image: np.ndarray, c: tuple[float, int], scale: float, draws: _Draws) -> np.ndarray:
    """The mean of the picture and of its middle at several zooms."""
    x = _unit(image)
    return np.asarray(x + sum(_zoomed(x, 1 + c[0] * k) for k in range(c[1]))) / (c[1] + 1)


def snow(image: np.ndarray, c: tuple[float, ...], scale: float, draws: _Draws) -> np.ndarray:
    """Flakes that fall, above a picture that is whitened."""
    mean, deviation, zoom, threshold, radius, sigma, share = c
    x = _unit(image)
    layer = _zoomed(mean + deviation * draws.normal(*x.shape[:2]), zoom)
    layer = np.clip(np.where(layer < threshold, 0, layer), 0, 1)
    layer = _moved(layer, radius * scale, sigma * scale, float(draws.uniform(1)[0]) * 90 - 135)[:, :, None]
    grey = (x @ np.array([0.299, 0.587, 0.114]))[:, :, None]
    return share * x + (1 - share) * np.maximum(x, grey * 1.5 + 0.5) + layer + layer[::-1, ::-1]


def _fractal(height: int, width: int, decay: float, draws: _Draws) -> np.ndarray:
    """Smooth noise in 0..1: grids of 2, 3, 5, 9, ... random numbers a side, each `decay` times weaker than the one before."""
    total, weight, cells = np.zeros((height, width)), 1.0, 1
    while cells < 2 * max(height, width):
        grid = draws.uniform(cells + 1, cells + 1)
        places = np.meshgrid(np.linspace(0, cells, height), np.linspace(0, cells, width), indexing="ij")
        total += weight * ndimage.map_coordinates(grid, places, order=1)
        weight, cells = weight / decay, cells * 2
    total -= total.min()
    return total / max(total.max(), 1e-12)


def frost(image: np.ndarray, c: tuple[float, float], scale: float, draws: _Draws) -> np.ndarray:
    """Bluish ridges of fractal noise."""
    height, width = image.shape[:2]
    ridges = 1 - np.abs(2 * _fractal(height, width, 1.5, draws) - 1)
    veins = (ridges * _fractal(height, width, 1.3, draws))[:, :, None] ** 0.5
    return c[0] * _unit(image) + c[1] * veins * np.array([0.85, 0.93, 1.0])


def fog(image: np.ndarray, c: tuple[float, float], scale: float, draws: _Draws) -> np.ndarray:
    x = _unit(image)
    most = float(x.max())
    return (x + c[0] * _fractal(x.shape[0], x.shape[1], c[1], draws)[:, :, None]) * most / (most + c[0])


def brightness(image: np.ndarray, c: float, scale: float, draws: _Draws) -> np.ndarray:
    """The V of HSV rises by c."""
    x = _unit(image)
    v = x.max(2, keepdims=True)
    raised = np.minimum(v + c, 1)
    return np.where(v > 0, x * raised / np.maximum(v, 1e-12), raised)


def contrast(image: np.ndarray, c: float, scale: float, draws: _Draws) -> np.ndarray:
    x = _unit(image)
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * c + mean


def elastic_transform(image: np.ndarray, c: tuple[float, float, float], scale: float, draws: _Draws) -> np.ndarray:
    """A random affine map, then a smooth random field of shifts."""
    x = _unit(image)
    height, width = x.shape[:2]
    side = min(height, width)
    shift, sigma, jitter = (value * side for value in c)
    centre, reach = np.array([(height - 1) / 2, (width - 1) / 2]), max(side / 3, 1.0)
    corners = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = np.c_[corners + jitter * (2 * draws.uniform(3, 2) - 1), np.ones(3)]
    back = np.linalg.lstsq(moved, corners, rcond=None)[0]  # [3, 2]: place in the result -> place in the picture
    fields = [2 * draws.uniform(height, width) - 1 for _ in range(2)]
    fields = [shift * ndimage.gaussian_filter(f, sigma, mode="reflect", truncate=3) if sigma else 0 * f for f in fields]
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    places = np.stack([rows + fields[0], columns + fields[1], np.ones((height, width))], axis=2) @ back
    at = (places[..., 0], places[..., 1])
    return np.stack([ndimage.map_coordinates(x[..., k], at, order=1, mode="mirror") for k in range(3)], axis=2)


def pixelate(image: np.ndarray, c: float, scale: float, draws: _Draws) -> np.ndarray:
    from PIL import Image

    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((max(1, int(width * c)), max(1, int(height * c))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX), dtype=np.uint8)


def jpeg_compression(image: np.ndarray, c: int, scale: float, draws: _Draws) -> np.ndarray:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=c)
    return np.asarray(Image.open(file).convert("RGB"), dtype=np.uint8)


_WORK: dict[str, Callable[..., np.ndarray]] = {name: globals()[name] for name in CORRUPTIONS}
