"""From stored pixels to what a model sees: named preprocessing profiles, and the pipeline that applies them on the device.

The transform is part of a number's identity: on CIFAR-100 Resize 256 + crop 224 and Resize 224 differ by about two points
for class means of one ViT. Every random choice is a function of (key, sample id), so it depends on no other sample.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.handles import Handle, opened
from clbench.streams.images.resample import KERNELS, crop_resize, crop_resize_one
from clbench.streams.scenario import ArrayImages

HALF = (0.5, 0.5, 0.5)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}
RESIDENT_BYTES = 16 << 30  # arrays up to this size stay on a GPU whole, as uint8
PIECE = 16  # images that a CPU makes at once: what lies between two of its steps stays in the caches
WORKERS = min(16, os.cpu_count() or 1)  # threads that decode files; results do not depend on it
Fetch = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Profile:
    """A preprocessing profile: train and test transforms.

    test   the shorter side is resized to `resize`, the centre `size` x `size` is kept (resize = size: no margin);
           `squash` resizes both sides to `resize`
    train  "rrc": random resized crop (area share `scale`, aspect 3/4..4/3); "pad": the test view moved by up to an eighth
           of its size, zeros beyond the image; "resize_crop": both sides resized to `train_resize`, random crop; "test": the
           test view. Then `flip` with probability 1/2 and `brightness` jitter (a factor 1 +- brightness)
    """

    name: str
    size: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resize: int = 0
    squash: bool = False
    test_kernel: str = "bicubic"
    train: str = "rrc"
    train_kernel: str = "bilinear"
    train_resize: int = 0
    scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    brightness: float = 0.0


def _timm(plain: Profile, config: dict[str, Any]) -> Profile:
    """The preprocessing that timm names for the weights; training crops use the same kernel."""
    own, mode = config.get("interpolation", "bicubic"), config.get("crop_mode", "center")
    if own not in KERNELS or mode not in ("center", "squash"):
        raise UserError(f"profile timm: interpolation {own!r} with crop mode {mode!r} is not supported; choose another profile")
    return replace(
        plain,
        mean=tuple(config.get("mean", HALF)),
        std=tuple(config.get("std", HALF)),
        resize=math.floor(plain.size / config.get("crop_pct", 0.9)),
        squash=mode == "squash",
        test_kernel=own,
        train_kernel=own,
    )


def make_profile(name: str, size: int, config: dict[str, Any] | None = None) -> Profile:
    """A profile by name for a model of input `size`; `config` is timm's own of the weights (used by "timm").

    Families as in the released code of the papers: pilot (also APER, EASE, MOS, SSIAT, L2P, DualPrompt), ranpac (CIFAR; its
    other data: pilot), coda (CIFAR, also OVOR; its ImageNet-R: lae), lae, slca_cifar, slca_imagenet, slca_finegrained, fecam.
    `unit` gives 0..1 without a margin, `imagenet` and `cifar` their statistics, `small` is for networks at 32 px. Sizes were
    given for 224 px and scale with the model's input.
    """
    margin = round(size * 256 / 224)
    plain = Profile(name, size, resize=size)
    pilot = replace(plain, resize=margin, scale=(0.05, 1.0))
    slca = replace(plain, resize=margin, train_kernel="bicubic")
    finegrained = {"train": "resize_crop", "train_resize": round(size * 300 / 224)}
    profiles: dict[str, Callable[[], Profile]] = {
        "timm": lambda: _timm(plain, config or {}),
        "unit": lambda: plain,
        "imagenet": lambda: replace(plain, resize=margin, train_kernel="bicubic", **IMAGENET),
        "cifar": lambda: replace(plain, **CIFAR),
        "small": lambda: replace(plain, mean=HALF, std=HALF, train="pad", test_kernel="bilinear"),
        "pilot": lambda: pilot,
        "ranpac": lambda: replace(pilot, resize=size),
        "coda": lambda: replace(plain, test_kernel="bilinear"),
        "lae": lambda: replace(plain, resize=margin, test_kernel="bilinear"),
        "slca_cifar": lambda: replace(slca, brightness=63 / 255, **CIFAR),
        "slca_imagenet": lambda: replace(slca, **IMAGENET),
        "slca_finegrained": lambda: replace(slca, **IMAGENET, **finegrained),
        "fecam": lambda: replace(plain, test_kernel="bilinear", train="test", flip=False),
    }
    if name not in profiles:
        close = difflib.get_close_matches(name, profiles, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"unknown preprocessing profile {name!r}{hint} (one of {', '.join(sorted(profiles))})")
    return profiles[name]()


def random_boxes(key: int, ids: np.ndarray, shapes: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """The rule of torchvision's RandomResizedCrop: ten tries of (area share, log-uniform aspect 3/4..4/3), else the centre.

    ids [B], shapes [B, 2] (H, W) -> boxes [B, 4] (top, left, height, width), whole numbers.
    """
    height, width = shapes[:, 0].astype(np.int64), shapes[:, 1].astype(np.int64)
    wide = width / height
    h = np.where(wide < 3 / 4, np.rint(width / (3 / 4)), height).astype(np.int64)
    w = np.where(wide > 4 / 3, np.rint(height * (4 / 3)), width).astype(np.int64)
    boxes = np.stack([(height - h) // 2, (width - w) // 2, h, w], 1)
    todo = np.ones(len(ids), bool)
    for attempt in range(10):
        if not todo.any():
            break
        share, ratio, top, left = (rng.uniform(rng.key(key, "crop", attempt, n), ids) for n in range(4))
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = np.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = np.rint(np.sqrt(area * aspect)).astype(np.int64), np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = todo & (w > 0) & (h > 0) & (w <= width) & (h <= height)
        i, j = (top * (height - h + 1)).astype(np.int64), (left * (width - w + 1)).astype(np.int64)
        boxes[fits] = np.stack([i, j, h, w], 1)[fits]
        todo &= ~fits
    return boxes


class Pipeline:
    """Turns stored images into model input [B, 3, S, S] on `device`.

    augment  the scenario's choice for training: "profile" (the profile's), "none" (the test transform), "shift" (the "pad"
             rule without flip: for images where a mirror image means something else)
    """

    def __init__(self, profile: Profile, device: torch.device | str, augment: str = "profile"):
        assert augment in ("profile", "none", "shift"), augment
        self.device = torch.device(device)
        self.profile = profile
        plain = {"none": "test", "shift": "pad"}
        self.train = replace(profile, train=plain[augment], flip=False, brightness=0.0) if augment in plain else profile
        self._mean, self._std = (torch.tensor(v, device=self.device)[:, None, None] for v in (profile.mean, profile.std))
        self._resident = Handle("resident images", weakref.WeakKeyDictionary())
        self.resident_bytes = RESIDENT_BYTES if self.device.type == "cuda" else 0

    def stored(self, source: ArrayImages, rows: np.ndarray) -> Tensor:
        """Stored pixels on the device: rows [B] -> uint8 [B, 3, H, W]. On a GPU the whole array is moved there once."""
        if source.array.nbytes > self.resident_bytes:
            return torch.from_numpy(source.array[rows]).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        resident: weakref.WeakKeyDictionary[ArrayImages, Tensor] = opened(self._resident)
        if source not in resident:
            resident[source] = torch.tensor(source.array, device=self.device)
        return resident[source][torch.from_numpy(rows).to(self.device, non_blocking=True)].permute(0, 3, 1, 2)

    def __call__(self, images: Tensor | np.ndarray | Sequence[Fetch], ids: np.ndarray, key: int | None) -> Tensor:
        """Images -> normalised float32 [B, 3, S, S]. `key` chooses the augmentation, None is the test view.

        images  uint8 [B, 3, H, W] on the device, or an array [B, H, W, 3], or a function per image that fetches
                uint8 [H, W, 3] (called in threads)
        """
        kind, ids = self.device.type, np.asarray(ids, np.int64)
        guard = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()
        with guard, torch.no_grad():
            if isinstance(images, np.ndarray):
                images = torch.from_numpy(images).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            if not isinstance(images, Tensor):
                return self._normalised(self._each(images, ids, key), ids, key).contiguous()
            if images.device.type != "cpu" or len(ids) <= PIECE:
                return self._normalised(self._batch(images, ids, key), ids, key).contiguous()
            out = torch.empty(len(ids), len(self._mean), self.profile.size, self.profile.size)
            for first in range(0, len(ids), PIECE):
                part = slice(first, first + PIECE)
                out[part] = self._normalised(self._batch(images[part], ids[part], key), ids[part], key)
            return out

    def _plan(self, ids: np.ndarray, shapes: np.ndarray, key: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """What happens to each image: box [B, 4], the size [B, 2] it is resized to, the corner [B, 2] of the S x S view."""
        p = self.profile if key is None else self.train
        whole = np.concatenate([np.zeros_like(shapes), shapes], 1)
        zeros = np.zeros_like(shapes)
        if key is not None and p.train == "rrc":
            return random_boxes(key, ids, shapes, p.scale), zeros + p.size, zeros, p.train_kernel
        if key is not None and p.train == "resize_crop":
            corner = self._draw(key, ids, p.train_resize - p.size + 1)
            return whole, zeros + p.train_resize, corner, p.train_kernel
        short = shapes.min(1, keepdims=True)
        sizes = zeros + p.resize if p.squash else p.resize * shapes // short
        corner = np.rint((sizes - p.size) / 2).astype(np.int64)
        if key is not None and p.train == "pad":
            pad = p.size // 8
            corner = corner + self._draw(key, ids, 2 * pad + 1) - pad
        return whole, sizes, corner, p.test_kernel

    @staticmethod
    def _draw(key: int, ids: np.ndarray, room: int) -> np.ndarray:
        draws = [(rng.uniform(rng.key(key, "shift", n), ids) * room).astype(np.int64) for n in range(2)]
        return np.stack(draws, 1)

    def _batch(self, x_u8: Tensor, ids: np.ndarray, key: int | None) -> Tensor:
        shapes = np.tile(np.array(x_u8.shape[2:], np.int64), (len(ids), 1))
        boxes, sizes, corner, kernel = self._plan(ids, shapes, key)
        height, width = (int(v) for v in sizes[0])
        x = crop_resize(x_u8, torch.from_numpy(boxes), (height, width), kernel)
        return window(x, corner, self.profile.size)

    def _each(self, images: Sequence[Fetch], ids: np.ndarray, key: int | None) -> Tensor:
        with ThreadPoolExecutor(WORKERS) as pool:
            views = list(pool.map(lambda fetch, i: self._one(fetch(), np.array([i]), key), images, ids))
        return torch.from_numpy(np.stack(views)).to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255

    def _one(self, image: np.ndarray, ids: np.ndarray, key: int | None) -> np.ndarray:
        boxes, sizes, corner, kernel = self._plan(ids, np.array([image.shape[:2]], np.int64), key)
        view = crop_resize_one(image, tuple(boxes[0].tolist()), (int(sizes[0, 0]), int(sizes[0, 1])), kernel)
        s, (top, left) = self.profile.size, corner[0].tolist()
        over = max(0, -top, -left, top + s - view.shape[0], left + s - view.shape[1])
        view = np.pad(view, ((over, over), (over, over), (0, 0))) if over else view
        return view[top + over : top + over + s, left + over : left + over + s]

    def _normalised(self, x: Tensor, ids: np.ndarray, key: int | None) -> Tensor:
        return (self._colours(x, ids, key) - self._mean) / self._std

    def _colours(self, x: Tensor, ids: np.ndarray, key: int | None) -> Tensor:
        """Flip and brightness of x [B, 3, S, S] in 0..1."""
        if key is not None and self.train.flip:
            flip = torch.from_numpy(rng.uniform(rng.key(key, "flip"), ids) < 0.5).to(x.device, non_blocking=True)
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        if key is not None and self.train.brightness:
            gain = 1 + self.train.brightness * (2 * rng.uniform(rng.key(key, "brightness"), ids) - 1)
            x = (x * torch.from_numpy(gain).float().to(x.device, non_blocking=True)[:, None, None, None]).clamp(0, 1)
        return x


def window(x: Tensor, corner: np.ndarray, size: int) -> Tensor:
    """Keep size x size of each image: x [B, C, H, W], corner [B, 2] (top, left; may lie outside) -> zeros beyond the image."""
    height, width = x.shape[2:]
    over = max(0, -int(corner.min()), int(corner[:, 0].max()) + size - height, int(corner[:, 1].max()) + size - width)
    x = F.pad(x, (over,) * 4) if over else x
    corner = corner + over
    if (corner == corner[:1]).all():
        top, left = corner[0].tolist()
        return x[:, :, top : top + size, left : left + size]
    rows, columns = (torch.from_numpy(corner[:, n, None] + np.arange(size)).to(x.device, non_blocking=True) for n in range(2))
    x = x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return x.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], size, -1))
