"""Crop and resize a batch, every image with its own box, by two small matrix products per image.

The kernels are Pillow's: triangle (bilinear) and Keys' cubic with a = -0.5 (bicubic), widened by the scale when shrinking
(antialias), taps inside the crop only, weights normalised. Legend: B batch, C channels, H W stored size, S output size.
"""

from __future__ import annotations

import torch
from torch import Tensor

KERNELS = ("bilinear", "bicubic")


def kernel(x: Tensor, name: str) -> Tensor:
    """Kernel value at signed distance x [...] (in units of the kernel's own pixel)."""
    x = x.abs()
    if name == "bilinear":
        return (1 - x).clamp_min(0)
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def matrices(start: Tensor, length: Tensor, stored: int, size: int, name: str) -> Tensor:
    """Weights that take `stored` pixels to `size`, for crops [start, start + length): start, length [B] whole numbers -> [B, S, stored]."""
    start, length = start.double()[:, None, None], length.double()[:, None, None]
    scale = length / size
    widened = scale.clamp_min(1.0)
    support = {"bilinear": 1.0, "bicubic": 2.0}[name] * widened
    centre = (torch.arange(size, dtype=torch.float64)[None, :, None] + 0.5) * scale
    pixel = torch.arange(stored, dtype=torch.float64)[None, None, :] - start
    low = torch.floor(centre - support + 0.5).clamp_min(0)
    high = torch.minimum(torch.floor(centre + support + 0.5), length)
    weight = kernel((pixel + 0.5 - centre) / widened, name) * ((pixel >= low) & (pixel < high))
    return (weight / weight.sum(2, keepdim=True)).float()


def crop_resize(x_u8: Tensor, boxes: Tensor, size: int, name: str) -> Tensor:
    """Crop each image to its box and resize it to S x S.

    x_u8 [B, C, H, W] uint8, boxes [B, 4] whole numbers (top, left, height, width) -> [B, C, S, S] float in 0..1.
    """
    down = matrices(boxes[:, 0], boxes[:, 2], x_u8.shape[2], size, name).to(x_u8.device)
    across = matrices(boxes[:, 1], boxes[:, 3], x_u8.shape[3], size, name).to(x_u8.device)
    x = x_u8.float()
    x = torch.matmul(x, across.transpose(1, 2)[:, None]).clamp_(0, 255)
    x = torch.matmul(down[:, None], x).clamp_(0, 255)
    return x / 255
