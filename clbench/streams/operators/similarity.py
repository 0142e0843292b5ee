"""How alike groups of images are, and orders that make the most or the least of it.

Distances are whole numbers, so that ties and comparisons are the same on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from clbench.streams import rng
from clbench.streams.operators.dealing import split
from clbench.streams.scenario import Dataset
from clbench.streams.transforms import TransformedImages

SIDE = 32  # images that differ in size, or are larger, are brought to this side
MOST = 500  # images of a group that its mean is made of
STEP = 1e-4  # distances are counted in it: pixels lie in 0..1


def distances(data: Dataset, groups: Sequence[np.ndarray], transform: Any) -> np.ndarray:
    """Euclidean distances of mean pictures in steps of 1e-4 -> [G, G] int64.

    `groups` are sample ids; `transform` is one tuple of steps for all, or a list of them.
    """
    steps = transform if isinstance(transform, list) else [transform] * len(groups)
    means = np.stack([_mean(data, np.sort(ids)[:MOST], one) for ids, one in zip(groups, steps, strict=True)])
    gaps = means[:, None, :] - means[None, :, :]
    return np.rint(np.sqrt((gaps**2).sum(2)) / STEP).astype(np.int64)


def _mean(data: Dataset, ids: np.ndarray, transform: Any) -> np.ndarray:
    """Mean of pixels in 0..1 [P] float64."""
    source = TransformedImages(data.images, transform) if transform else data.images
    total: Any = 0
    for part in np.array_split(ids, max(1, len(ids) // 100)):
        total = total + np.stack([_small(image, source.shape) for image in source.raw(part)]).sum(0, dtype=np.int64)
    return np.asarray(total, np.float64).ravel() / (255 * len(ids))


def _small(image: np.ndarray, shape: tuple[int, int] | None) -> np.ndarray:
    from PIL import Image

    if shape is not None and max(shape) <= SIDE:
        return image
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))


def grouped(d: np.ndarray, sizes: Sequence[int], key: int, near: bool) -> list[int]:
    """An order whose groups of `sizes` neighbours hold near classes, or far ones: swaps from a drawn start while they help."""
    order = rng.permutation(key, len(d))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    sign = 1 if near else -1
    better = True
    while better:
        better = False
        for a, b in itertools.combinations(range(len(order)), 2):
            if owner[a] == owner[b]:
                continue
            mine, other = order[(owner == owner[a])], order[(owner == owner[b])]
            p, q = order[a], order[b]
            now = d[p, mine].sum() + d[q, other].sum()
            then = d[q, mine].sum() - d[q, p] + d[p, other].sum() - d[p, q]
            if sign * (then - now) < 0:
                order[a], order[b] = q, p
                better = True
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return [int(c) for part in parts for c in np.sort(part)]


def designed(d: np.ndarray, key: int, candidates: int, best: bool) -> list[int]:
    """The order with the highest or lowest score of the Curriculum Designer; the first of equal ones."""
    count = len(d)
    if count <= 7:
        every = np.array(list(itertools.permutations(range(count))))
    else:
        every = np.stack([rng.permutation(rng.key(key, k), count) for k in range(candidates)])
    scores = np.rint(designer_scores(d, every) * 1e9).astype(np.int64)
    return every[int(scores.argmax() if best else scores.argmin())].tolist()


def designer_scores(d: np.ndarray, every: np.ndarray) -> np.ndarray:
    """S of orders [P, K] -> [P].

    S(o) = 1 - v(o_1) + sum over i = 1 .. ceil((K - 1) / 2) of 1 - d(o_i, o_(K+1-i)) + d(o_i, o_(i+1))

    with rows of d [K, K] divided by their sums, and v the variance of a row's K - 1 distances over the sum of all variances:
    begin with a class that is equally far from all, keep neighbours apart and near classes at mirrored ends.
    """
    count = len(d)
    rows = d / np.maximum(d.sum(1, keepdims=True), 1)
    variance = np.array([np.delete(row, k).var() for k, row in enumerate(rows)])
    variance = variance / max(variance.sum(), 1e-300)
    total = 1 - variance[every[:, 0]]
    for i in range(split(count - 1, 2)[0]):
        total = total + 1 - rows[every[:, i], every[:, count - 1 - i]] + rows[every[:, i], every[:, i + 1]]
    return total
