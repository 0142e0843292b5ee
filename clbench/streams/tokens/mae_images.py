"""Images for masked autoencoders: resize, random crops and flips, the key of each mask. Imports no torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from clbench.streams import rng
from clbench.streams.scenario import ArrayImages, ImageSource

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
        from clbench.streams.images.resample import crop_resize_one

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

        from clbench.streams.images.pixels import random_boxes
        from clbench.streams.images.resample import crop_resize

        shapes = np.tile(np.array(x.shape[1:3], np.int64), (len(x), 1))
        boxes = torch.from_numpy(random_boxes(rng.key("mae crop"), keys, shapes, (0.2, 1.0)))
        made = crop_resize(torch.from_numpy(x).permute(0, 3, 1, 2), boxes, x.shape[1], "bicubic")
        x = (made * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    flips = rng.bits(rng.key("mae flip"), keys) >> np.uint64(63) == 1
    return np.where(flips[:, None, None, None], x[:, :, ::-1], x)
