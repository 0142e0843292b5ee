"""Which images are training and which are test: named variants of folder data sets, and a split of our own where none exists.

The sizes are those of peers.md 4c (counted there only for ImageNet-R@coda; the others as published). Papers mix these
variants under one name, so a plain name is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng

_REVISITING = "https://github.com/LAMDA-CL/RevisitingCIL (section 'Datasets': ready-made archive)"
_IMAGENET_R = "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"
_CUB = "https://data.caltech.edu/records/65de6-vp158"


@dataclass(frozen=True)
class FolderSplit:
    """A data set of folders, <root>/<name@variant>/{train,test}/<class>/<image>, with what must be found there.

    names_sha256  SHA-256 of the sorted "class/file" names joined by newlines, (train, test), where known
    folders       names of its folder as published, where they are others; counts and names have to fit all the same
    """

    classes: int
    train: int
    test: int
    source: str
    names_sha256: tuple[str, str] | None = None
    folders: tuple[str, ...] = ()


FOLDERS: dict[str, FolderSplit] = {
    "imagenet_r@coda": FolderSplit(
        200,
        24_000,
        6_000,
        f"{_IMAGENET_R}, divided by the lists dataloaders/splits/imagenet-r_*.yaml of https://github.com/GT-RIPL/CODA-Prompt",
        (
            "6b6014a06e97012adb968b55172d2f672d93ed2e36ce82b45e038ef23886321d",
            "9e7f6243e605e2223739b158f26e442480eb940f9e24508bf6c02c939efdcc26",
        ),
    ),
    "imagenet_r@l2p": FolderSplit(
        200, 24_000, 6_000, f"{_IMAGENET_R}, divided by L2P's list, which https://github.com/gqk/LAE documents"
    ),
    "imagenet_r@revisiting": FolderSplit(200, 24_000, 6_000, _REVISITING),
    "cub@official": FolderSplit(200, 5_994, 5_794, f"{_CUB}, divided by its train_test_split.txt", folders=("CUB_200_2011",)),
    "cub@revisiting": FolderSplit(200, 9_430, 2_358, _REVISITING),
    "imagenet_a@revisiting": FolderSplit(200, 5_981, 1_519, _REVISITING),
    "mini_imagenet@fscil": FolderSplit(
        100,
        50_000,
        10_000,
        "https://github.com/icoz69/CEC-CVPR2021 (section 'Datasets': images, and lists for 500 + 100 images a class)",
        folders=("miniimagenet",),
    ),
    "objectnet@revisiting": FolderSplit(200, 26_509, 6_628, _REVISITING, folders=("objectnet",)),
    "omnibenchmark@revisiting": FolderSplit(300, 89_697, 5_985, _REVISITING, folders=("omnibenchmark",)),
    "tiny_imagenet@official": FolderSplit(
        200, 100_000, 10_000, "http://cs231n.stanford.edu/tiny-imagenet-200.zip", folders=("tiny-imagenet-200",)
    ),
    "vtab@revisiting": FolderSplit(50, 1_796, 8_619, _REVISITING, folders=("vtab-cil/vtab", "vtab")),
}


def variants(name: str) -> list[str]:
    """The named variants of a plain name: "cub" -> ["cub@official", "cub@revisiting"]."""
    return [full for full in FOLDERS if full.split("@")[0] == name]


@dataclass(frozen=True)
class Share:
    """The share of every class that becomes test samples where a data set has none of its own, and the seed it is drawn by."""

    ten_thousandths: int = 2_000
    seed: int = 0

    @staticmethod
    def of(share: float | None, seed: int) -> Share | None:
        """The options scenario.test_share and scenario.test_seed, checked; None where no share is asked for."""
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise UserError(f"scenario.test_seed must be a whole number from 0, got {seed!r}")
        if share is None:
            if seed:
                raise UserError(f"scenario.test_seed={seed} has no effect without scenario.test_share")
            return None
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0001 <= share < 1:
            raise UserError(f"scenario.test_share must be a share in 0.0001..1 (1 excluded), got {share!r}")
        return Share(round(share * 10_000), seed)

    def options(self) -> dict[str, float | int]:
        """The options that ask for it."""
        return {"test_share": self.ten_thousandths / 10_000, "test_seed": self.seed}


FIFTH = Share()


def stratified(y: np.ndarray, domain: np.ndarray | None = None, share: Share = FIFTH) -> np.ndarray:
    """Draw a share of every class (of every domain) as test samples: y [N], domain [N] -> split [N] uint8, 1 is test.

    Counts are rounded half up; a group of two or more gives at least one sample to each side. Integer arithmetic only.
    """
    split = np.zeros(len(y), np.uint8)
    groups = np.zeros_like(y) if domain is None else domain
    for d in np.unique(groups).tolist():
        for c in np.unique(y[groups == d]).tolist():
            ids = np.flatnonzero((groups == d) & (y == c))
            split[drawn(ids, share.ten_thousandths, "split", share.seed, d, c)] = 1
    return split


def drawn(ids: np.ndarray, share: int, *key: int | str) -> np.ndarray:
    """Draw `share` ten-thousandths of ids [N] by a counter-based permutation -> [n] sorted, 1 <= n < N where N > 1."""
    number = len(ids)
    take = max(1, min(number - 1, (number * share + 5_000) // 10_000)) if number > 1 and share > 0 else 0
    return np.sort(ids[rng.permutation(rng.key(*key), number)[:take]])
