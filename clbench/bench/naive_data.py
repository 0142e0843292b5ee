"""The data path of published code: PIL for each image, torchvision's transforms, a new loader in every pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T

from clbench.streams import rng
from clbench.streams.images.pixels import Profile

KERNELS = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}


class PilImages(Dataset):
    """Item: position in the set, image [3, S, S] float, class (renumbered)."""

    def __init__(self, source: Any, ids: np.ndarray, y: np.ndarray, transform: Any):
        self.source, self.ids, self.y, self.transform = source, ids, y, transform

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor, int]:
        image = Image.fromarray(self.source.raw(self.ids[i : i + 1])[0])
        return i, self.transform(image), int(self.y[i])


def transform(profile: Profile, train: bool) -> Any:
    """What torchvision has for a profile's training or test view."""
    p = profile
    kind = p.train if train else "test"
    margin = (p.resize, p.resize) if p.squash else p.resize
    view = [T.Resize(margin, KERNELS[p.test_kernel]), T.CenterCrop(p.size)]
    first: dict[str, list[Any]] = {
        "rrc": [T.RandomResizedCrop(p.size, p.scale, interpolation=KERNELS[p.train_kernel])],
        "pad": [*view, T.RandomCrop(p.size, padding=p.size // 8)],
        "resize_crop": [T.Resize((p.train_resize,) * 2, KERNELS[p.train_kernel]), T.RandomCrop(p.size)],
        "test": view,
    }
    steps = first[kind]
    if train and p.flip:
        steps = [*steps, T.RandomHorizontalFlip()]
    if train and p.brightness:
        steps = [*steps, T.ColorJitter(brightness=p.brightness)]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(p.mean, p.std)])


class Order(Sampler):
    """The order in which clbench's own learners see an experience, so that both train on the same batches."""

    def __init__(self, key: int, length: int):
        self.key, self.length, self.epoch = key, length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(rng.permutation(rng.key(self.key, "order", self.epoch), self.length).tolist())


def loader(
    source: Any, ids: np.ndarray, y: np.ndarray, how: Any, batch: int, workers: int, key: int | None, drop_last: bool = False
) -> DataLoader:
    """A loader as published code makes one, in the order of `key`, or as the data lies."""
    data = PilImages(source, ids, y, how)
    order = None if key is None else Order(key, len(data))
    return DataLoader(data, batch, sampler=order, num_workers=workers, drop_last=drop_last and len(data) >= batch)
