"""From stored pixels to what a model sees: named preprocessing profiles, and the pipeline that applies them on the device.

The transform is part of a number's identity: on CIFAR-100 Resize 256 + crop 224 and Resize 224 differ by about two points
for class means of one ViT. Every random choice is a function of (key, sample id), so it depends on no other sample.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench import counter
from clbench.interfaces import UserError
from clbench.streams.resample import crop_resize

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Profile:
    """One way to look at images.

    test   the shorter side is resized to `resize`, the centre `size` x `size` is kept (resize = size: no margin);
           `squash` resizes both sides to `resize`
    train  "rrc": random resized crop (area share `scale`, aspect 3/4..4/3), "pad": pad by an eighth and crop,
           "resize_crop": resize to `train_resize`, random crop; then flip with probability 1/2 and brightness jitter
    """

    name: str
    size: int
    mean: tuple[float, ...] = NONE[0]
    std: tuple[float, ...] = NONE[1]
    resize: int = 0
    squash: bool = False
    test_kernel: str = "bicubic"
    train: str = "rrc"
    train_kernel: str = "bilinear"
    train_resize: int = 0
    scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    brightness: float = 0.0


def make_profile(name: str, size: int, config: dict[str, Any] | None = None) -> Profile:
    """A profile by name for a model of input `size`; `config` is timm's own of the weights (used by "timm").

    Families as in the released code of the papers: pilot (also APER, EASE, MOS, SSIAT, L2P, DualPrompt), ranpac (CIFAR), coda
    (CIFAR; OVOR), lae, slca_cifar, slca_imagenet, slca_finegrained, fecam. `small` is for networks at 32 px.
    """
    config = config or {}
    margin = round(size * 256 / 224)
    mean, std = tuple(config.get("mean", HALF)), tuple(config.get("std", HALF))
    own = config.get("interpolation", "bicubic")
    plain = Profile(name, size, resize=size)
    pilot = replace(plain, resize=margin, scale=(0.05, 1.0))
    slca = replace(plain, resize=margin, train_kernel="bicubic")
    profiles = {
        "timm": replace(
            plain, mean=mean, std=std, resize=math.floor(size / config.get("crop_pct", 0.9)), test_kernel=own, train_kernel=own
        ),
        "unit": plain,
        "imagenet": replace(plain, mean=IMAGENET[0], std=IMAGENET[1], resize=margin, train_kernel="bicubic"),
        "cifar": replace(plain, mean=CIFAR[0], std=CIFAR[1]),
        "small": replace(plain, mean=HALF, std=HALF, train="pad", test_kernel="bilinear"),
        "pilot": pilot,
        "ranpac": replace(pilot, resize=size),
        "coda": replace(plain, test_kernel="bilinear"),
        "lae": replace(plain, resize=margin, test_kernel="bilinear"),
        "slca_cifar": replace(slca, mean=CIFAR[0], std=CIFAR[1], brightness=63 / 255),
        "slca_imagenet": replace(slca, mean=IMAGENET[0], std=IMAGENET[1]),
        "slca_finegrained": replace(
            slca, mean=IMAGENET[0], std=IMAGENET[1], train="resize_crop", train_resize=round(size * 300 / 224)
        ),
        "fecam": replace(plain, test_kernel="bilinear", train="test"),
    }
    if name not in profiles:
        close = difflib.get_close_matches(name, profiles, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"unknown preprocessing profile {name!r}{hint} (one of {', '.join(sorted(profiles))})")
    return profiles[name]


def random_boxes(key: int, ids: np.ndarray, shapes: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """torchvision's RandomResizedCrop rule: ten tries of (area share, log-uniform aspect 3/4..4/3), else the centre.

    ids [B], shapes [B, 2] (H, W) -> boxes [B, 4] (top, left, height, width), whole numbers.
    """
    height, width = shapes[:, 0].astype(np.int64), shapes[:, 1].astype(np.int64)
    boxes = np.zeros((len(ids), 4), np.int64)
    todo = np.ones(len(ids), bool)
    for attempt in range(10):
        share, ratio, top, left = (counter.uniform(counter.key(key, "crop", attempt, n), ids) for n in range(4))
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = np.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = np.rint(np.sqrt(area * aspect)).astype(np.int64), np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = todo & (w > 0) & (h > 0) & (w <= width) & (h <= height)
        i, j = (top * (height - h + 1)).astype(np.int64), (left * (width - w + 1)).astype(np.int64)
        boxes[fits] = np.stack([i, j, h, w], 1)[fits]
        todo &= ~fits
    wide = width / height
    h = np.where(wide < 3 / 4, np.rint(width / (3 / 4)), height).astype(np.int64)
    w = np.where(wide > 4 / 3, np.rint(height * (4 / 3)), width).astype(np.int64)
    centre = np.stack([(height - h) // 2, (width - w) // 2, h, w], 1)
    boxes[todo] = centre[todo]
    return boxes


class Pipeline:
    """Turns stored images into model input [B, 3, S, S] on `device`.

    augment  the scenario's choice for training: "profile" (the profile's), "none" (the test transform), "shift" (pad and
             crop without flip: for images where a mirror image means something else)
    """

    def __init__(self, profile: Profile, device: torch.device, augment: str = "profile"):
        self.device = torch.device(device)
        self.profile = profile
        if augment == "none":
            self.train = replace(profile, train="test", flip=False, brightness=0.0)
        elif augment == "shift":
            self.train = replace(profile, train="pad", flip=False, brightness=0.0)
        else:
            self.train = profile

    def __call__(self, images: Any, ids: np.ndarray, key: int | None) -> Tensor:
        """Images (array [B, H, W, 3] uint8, or a list of [H, W, 3]) -> normalised float [B, 3, S, S]; key None: test view."""
        profile = self.profile if key is None else self.train
        x = self._test(images) if key is None or profile.train == "test" else self._train(images, ids, key)
        if key is not None and profile.flip:
            flip = torch.from_numpy(counter.uniform(counter.key(key, "flip"), ids) < 0.5).to(x.device)
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        if key is not None and profile.brightness:
            gain = 1 + profile.brightness * (2 * counter.uniform(counter.key(key, "brightness"), ids) - 1)
            x = (x * torch.from_numpy(gain).float().to(x.device)[:, None, None, None]).clamp(0, 1)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (profile.mean, profile.std))
        return (x - mean) / std

    def _test(self, images: Any) -> Tensor:
        p = self.profile
        shapes = _shapes(images)
        height, width = shapes[:, 0], shapes[:, 1]
        short = np.minimum(height, width)
        to = np.stack([np.where(height == short, p.resize, p.resize * height // short)] * 1, 1)
        sizes = np.stack([to[:, 0], np.where(width == short, p.resize, p.resize * width // short)], 1)
        if p.squash:
            sizes[:] = p.resize
        return self._resized_crops(images, sizes, p.test_kernel, np.rint((sizes - p.size) / 2).astype(np.int64))

    def _train(self, images: Any, ids: np.ndarray, key: int) -> Tensor:
        p, shapes = self.train, _shapes(images)
        if p.train == "rrc":
            return self._crops(images, random_boxes(key, ids, shapes, p.scale), p.size, p.train_kernel)
        pad = p.size // 8 if p.train == "pad" else 0
        to = p.size if p.train == "pad" else p.train_resize
        whole = np.concatenate([np.zeros_like(shapes), shapes], 1)
        x = F.pad(self._crops(images, whole, to, p.train_kernel), (pad,) * 4)
        room = to + 2 * pad - p.size + 1
        top, left = ((counter.uniform(counter.key(key, "shift", n), ids) * room).astype(np.int64) for n in range(2))
        rows = torch.from_numpy(top[:, None] + np.arange(p.size)).to(x.device)
        columns = torch.from_numpy(left[:, None] + np.arange(p.size)).to(x.device)
        x = x.gather(2, rows[:, None, :, None].expand(-1, 3, -1, x.shape[3]))
        return x.gather(3, columns[:, None, None, :].expand(-1, 3, p.size, -1))

    def _resized_crops(self, images: Any, sizes: np.ndarray, kernel: str, corner: np.ndarray) -> Tensor:
        """Resize each image to its own size, then keep S x S from `corner` (zeros where the image is smaller)."""
        s = self.profile.size
        if not isinstance(images, np.ndarray):
            return torch.stack(
                [self._resized_crops(i[None], sizes[k : k + 1], kernel, corner[k : k + 1])[0] for k, i in enumerate(images)]
            )
        height, width = (int(v) for v in sizes[0])
        x = _resize(torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2), height, width, kernel)
        top, left = (int(v) for v in corner[0])
        x = F.pad(x, (max(0, -left), max(0, s - width), max(0, -top), max(0, s - height)))
        top, left = max(0, top), max(0, left)
        return x[:, :, top : top + s, left : left + s]

    def _crops(self, images: Any, boxes: np.ndarray, size: int, kernel: str) -> Tensor:
        if isinstance(images, np.ndarray):
            x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
            return crop_resize(x, torch.from_numpy(boxes), size, kernel)
        with ThreadPoolExecutor(4) as pool:
            done = pool.map(lambda pair: _pil_crop(pair[0], pair[1], size, kernel), zip(images, boxes.tolist(), strict=True))
            return torch.from_numpy(np.stack(list(done))).to(self.device).permute(0, 3, 1, 2).float() / 255


def _shapes(images: Any) -> np.ndarray:
    if isinstance(images, np.ndarray):
        return np.tile(np.array(images.shape[1:3], np.int64), (len(images), 1))
    return np.array([image.shape[:2] for image in images], np.int64)


def _resize(x_u8: Tensor, height: int, width: int, kernel: str) -> Tensor:
    """Whole images [B, 3, H, W] uint8 -> [B, 3, height, width] float in 0..1, with Pillow's kernels."""
    from clbench.streams.resample import matrices

    b, _, h, w = x_u8.shape
    if (h, w) == (height, width):
        return x_u8.float() / 255
    zero = torch.zeros(1)
    across = matrices(zero, zero + w, w, width, kernel)[0].to(x_u8.device)
    down = matrices(zero, zero + h, h, height, kernel)[0].to(x_u8.device)
    x = torch.matmul(x_u8.float(), across.T).clamp_(0, 255)
    return torch.matmul(down, x).clamp_(0, 255) / 255


def _pil_crop(image: np.ndarray, box: Sequence[int], size: int, kernel: str) -> np.ndarray:
    from PIL import Image

    top, left, height, width = box
    part = Image.fromarray(image[top : top + height, left : left + width])
    mode = Image.Resampling.BILINEAR if kernel == "bilinear" else Image.Resampling.BICUBIC
    return np.asarray(part.resize((size, size), mode))
