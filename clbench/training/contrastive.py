"""Supervised contrastive learning: the loss, and the random views that its pairs are made with. See `learners/scr.py`
and `learners/onpro.py`.

Legend: N samples, B images, C channels, S the side of an image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.streams import rng
from clbench.streams.images.pixels import Profile, random_boxes

GREY = (0.299, 0.587, 0.114)


def supervised_contrastive(f: Tensor, y: Tensor, temperature: float) -> Tensor:
    """-mean over anchors i of the mean over positives p of log softmax over all others (Khosla et al. 2020, eq. 2) -> scalar.

    f [N, D] of unit length, y [N]; positives are the others of the anchor's class, an anchor without any counts as 0.
    """
    own = torch.eye(len(y), dtype=torch.bool, device=y.device)
    logits = (f @ f.T / temperature).masked_fill(own, -torch.inf)
    log_p = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(own, 0.0)
    positive = (y[:, None] == y) & ~own
    return -((log_p * positive).sum(1) / positive.sum(1).clamp_min(1)).mean()


def instance_loss(s: Tensor, y: Tensor, alone: bool) -> Tensor:
    """OnPro's I of logits s [2N, 2N], first all plain views, then all random ones, of images of classes y [N] -> scalar.

    `alone`: twice the mean over the others of the anchor's class, plus its other view, self in no softmax. Else the mean over
    the class, self included.
    """
    own, same = torch.eye(len(s), dtype=torch.bool, device=s.device), torch.cat([y, y])[:, None] == torch.cat([y, y])
    if not alone:
        log_p = s.log_softmax(1)
        return -((log_p * same).sum(1) / same.sum(1)).mean()
    log_p, same = s.masked_fill(own, -torch.inf).log_softmax(1).masked_fill(own, 0.0), same & ~own
    pair = log_p.diagonal(len(y)).sum() + log_p.diagonal(-len(y)).sum()
    return -2 * ((log_p * same).sum(1) / same.sum(1)).mean() - pair / len(s)


def equilibrium(views: tuple[Tensor, Tensor], y: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """OnPro's E of projections [B, P] of two views -> the loss, the classes [C], their mean prototypes [C, P] (no gradient)."""
    classes = y.unique()
    share_CB = (classes[:, None] == y).to(views[0])
    share_CB = share_CB / share_CB.sum(1, keepdim=True)
    first, second = (share_CB @ view for view in views)
    z = F.normalize(torch.cat([first, second]), dim=1)
    own, other = torch.eye(len(z), dtype=torch.bool, device=z.device), torch.arange(len(z), device=z.device).roll(len(classes))
    loss = F.cross_entropy((z @ z.T / temperature).masked_fill(own, -torch.inf), other)
    return loss, classes, ((first + second) / 2).detach()


def strong_view(x: Tensor, key: int, profile: Profile, mirror: bool = True) -> Tensor:
    """Random resized crop (area share 0.2 to 1), flip, colour jitter (0.4, 0.4, 0.4, hue 0.1; probability 0.8), grey (0.2).

    x [B, 3, S, S] normalised as `profile` says -> the same; no flip without `mirror`. Image i has its own draws, functions of
    `key` and i.
    """
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (profile.mean, profile.std))
    pictures = cropped(x * std + mean, key)

    def drawn(word: str) -> Tensor:
        return torch.from_numpy(rng.uniform(rng.key(key, word), np.arange(len(x)))).to(x)[:, None, None, None]

    if mirror:
        pictures = torch.where(drawn("flip") < 0.5, pictures.flip(3), pictures)
    jittered = pictures
    for word in ("brightness", "contrast", "saturation"):
        jittered = blended(jittered, word, 0.6 + 0.8 * drawn(word))
    jittered = hue_shifted(jittered, 0.2 * drawn("hue") - 0.1)
    pictures = torch.where(drawn("jitter") < 0.8, jittered, pictures)
    pictures = torch.where(drawn("grey") < 0.2, grey(pictures).expand_as(pictures), pictures)
    return (pictures - mean) / std


def mild_view(x: Tensor, key: int, profile: Profile, mirror: bool = True) -> Tensor:
    """Flip, grey (probability 0.25), random resized crop (area share 0.3 to 1); shapes and draws as in `strong_view`."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (profile.mean, profile.std))
    pictures = x * std + mean
    flipped, greyed = (
        torch.from_numpy(rng.uniform(rng.key(key, word), np.arange(len(x)))).to(x)[:, None, None, None] < chance
        for word, chance in (("flip", 0.5 if mirror else 0.0), ("grey", 0.25))
    )
    pictures = torch.where(flipped, pictures.flip(3), pictures)
    pictures = torch.where(greyed, grey(pictures).expand_as(pictures), pictures)
    return (cropped(pictures, key, (0.3, 1.0)) - mean) / std


def cropped(x: Tensor, key: int, scale: tuple[float, float] = (0.2, 1.0)) -> Tensor:
    """Each image's random box of an area share in `scale`, bilinear, at the old size: x [B, 3, S, S] -> the same."""
    side = x.shape[-1]
    boxes = random_boxes(key, np.arange(len(x)), np.full((len(x), 2), side), scale)
    top, left, height, width = (torch.from_numpy(boxes[:, i]).to(x) for i in range(4))
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width / side, height / side
    theta[:, 0, 2], theta[:, 1, 2] = (2 * left + width) / side - 1, (2 * top + height) / side - 1
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def grey(x: Tensor) -> Tensor:
    """Luma [B, 1, S, S] of x [B, 3, S, S]."""
    return (x * x.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)


def blended(x: Tensor, what: str, factor: Tensor) -> Tensor:
    """Brightness, contrast or saturation times `factor` [B, 1, 1, 1]: away from black, the mean grey, or the own grey."""
    other = {"brightness": torch.zeros_like, "contrast": lambda x: grey(x).mean((2, 3), keepdim=True), "saturation": grey}
    return (factor * x + (1 - factor) * other[what](x)).clamp(0, 1)


def hue_shifted(x: Tensor, shift: Tensor) -> Tensor:
    """Hue turned by `shift` [B, 1, 1, 1] of a whole circle: x [B, 3, S, S] in 0..1 -> the same."""
    top, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = top - low
    r, g, b = ((top - x) / spread.clamp_min(1e-12)).split(1, dim=1)
    red, green = x[:, :1] == top, x[:, 1:2] == top
    hue = torch.where(red, b - g, torch.where(green, 2 + r - b, 4 + g - r)) / 6
    places = (x.new_tensor([5.0, 3.0, 1.0])[:, None, None] + (hue + shift) * 6) % 6
    return top - spread * torch.minimum(places, 4 - places).clamp(0, 1)
