"""Crop and resize with Pillow's kernels: a batch by two small matrix products per image, or one image by Pillow itself.

Triangle (bilinear) and Keys' cubic with a = -0.5 (bicubic), widened by the scale when shrinking (antialias), taps inside the
crop only, weights normalised, values rounded to whole levels after each pass. Rows first, then columns: newer releases of
Pillow choose the order by the shape of the image, and bicubic overshoot that is clipped between the passes then differs by
up to 20 levels. Both functions fix the order, so they agree to one level whatever the release.

Legend: B batch, C channels, H W stored size, S T output height and width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KERNELS = {"bilinear": 1.0, "bicubic": 2.0}  # name -> reach, in pixels of the coarser grid
CHUNK = 64  # images whose weights are made together: bounds memory, keeps them in cache


def kernel(x: Tensor, name: str) -> Tensor:
    """Kernel value at signed distance x [...] (in units of the kernel's own pixel)."""
    x = x.abs()
    if name == "bilinear":
        return (1 - x).clamp_min(0)
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def most_taps(length: np.ndarray, size: int, name: str) -> int:
    """The most pixels that one pixel of the result looks at; length [B] whole, as `matrices` has it. Asks no device."""
    scale = length.astype(np.float64)[:, None] / size
    support, centre = KERNELS[name] * np.maximum(scale, 1.0), (np.arange(size, dtype=np.float64) + 0.5) * scale
    low = np.maximum(np.floor(centre - support + 0.5), 0)
    high = np.minimum(np.floor(centre + support + 0.5), length[:, None])
    return int((high - low).max())


def matrices(start: Tensor, length: Tensor, stored: int, size: int, name: str, taps: int) -> Tensor:
    """Weights [B, size, stored] that take the pixels [start, start + length) of `stored` to `size`; start, length [B] whole."""
    start, length = start.long()[:, None, None], length.double()[:, None, None]
    scale = length / size
    widened = scale.clamp_min(1.0)
    support = KERNELS[name] * widened
    centre = (torch.arange(size, dtype=torch.float64, device=start.device)[None, :, None] + 0.5) * scale
    low = torch.floor(centre - support + 0.5).clamp_min(0)
    high = torch.minimum(torch.floor(centre + support + 0.5), length)
    pixel = low + torch.arange(taps, dtype=torch.float64, device=start.device)
    weight = kernel((pixel + 0.5 - centre) / widened, name) * (pixel < high)
    weight = (weight / weight.sum(2, keepdim=True)).float()
    full = weight.new_zeros(len(length), size, stored + taps)  # the last columns only take weights that are 0
    return full.scatter_(2, start + pixel.long(), weight)[:, :, :stored]


def _levels(x: Tensor) -> Tensor:
    return x.add_(0.5).floor_().clamp_(0, 255)


def crop_resize(x_u8: Tensor, boxes: Tensor, size: int | tuple[int, int], name: str) -> Tensor:
    """Crop each image to its box and resize it to S x T (S x S for one number).

    x_u8 [B, C, H, W] uint8, boxes [B, 4] whole numbers on the CPU (top, left, height, width) -> [B, C, S, T] float32 in 0..1,
    whole multiples of 1/255.
    """
    size = (size, size) if isinstance(size, int) else size
    height, width = x_u8.shape[2:]
    host = boxes.numpy()
    if (height, width) == size and (host == (0, 0, height, width)).all():
        return x_u8.float() / 255
    if len(host) > 1 and (host == host[:1]).all():
        boxes, host = boxes[:1], host[:1]  # one pair of matrices serves all
    device = x_u8.device if x_u8.device.type != "mps" else torch.device("cpu")  # float64 is needed for Pillow's borders
    parts = []
    for first in range(0, len(x_u8), CHUNK):
        rows = slice(first, first + CHUNK) if len(host) > 1 else slice(None)
        part, taps = boxes[rows].to(device, non_blocking=True), [most_taps(host[rows, 2 + n], size[n], name) for n in (0, 1)]
        across = matrices(part[:, 1], part[:, 3], width, size[1], name, taps[1]).to(x_u8.device)
        down = matrices(part[:, 0], part[:, 2], height, size[0], name, taps[0]).to(x_u8.device)
        x = _levels(torch.matmul(x_u8[first : first + CHUNK].float(), across.transpose(1, 2)[:, None]))
        parts.append(_levels(torch.matmul(down[:, None], x)).div_(255))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def crop_resize_one(image: np.ndarray, box: tuple[int, ...], size: tuple[int, int], name: str) -> np.ndarray:
    """The same for one image with Pillow: uint8 [H, W, 3], box (top, left, height, width) -> uint8 [S, T, 3]."""
    from PIL import Image

    top, left, height, width = box
    part = Image.fromarray(image[top : top + height, left : left + width])
    mode = Image.Resampling.BILINEAR if name == "bilinear" else Image.Resampling.BICUBIC
    return np.asarray(part.resize((size[1], height), mode).resize((size[1], size[0]), mode))
