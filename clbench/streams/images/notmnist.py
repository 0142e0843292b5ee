"""notMNIST: the letters A to J in many fonts (Bulatov 2011), 28 x 28 grey, as it is divided for 5-datasets.

Ebrahimi et al., ECCV 2020, arXiv 2003.09553: <root>/notMNIST/Train/<letter>/*.png and <root>/notMNIST/Test/<letter>/*.png.
Two of the 18,726 files cannot be decoded, in every copy. Their names are known, and they are passed over.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.images.arrays import Pool, check_classes
from clbench.streams.images.class_folders import Listing
from clbench.streams.scenario import FileImages
from clbench.streams.splits import Share

FOLDERS = ("notMNIST", "notmnist")
PARTS = (("Train", "train"), ("Test", "test"))
LETTERS = tuple("ABCDEFGHIJ")
BROKEN = ("A/RGVtb2NyYXRpY2FCb2xkT2xkc3R5bGUgQm9sZC50dGY=.png", "F/Q3Jvc3NvdmVyIEJvbGRPYmxpcXVlLnR0Zg==.png")
IMAGES = 18_724
SOURCE = "https://github.com/facebookresearch/Adversarial-Continual-Learning (data/notMNIST.zip)"


def read(name: str, root: Path, share: Share | None) -> Pool:
    """Read the set below the data root; a missing folder or another number of images raises `UserError`."""
    assert share is None, "it has test images of its own"
    folder = next((root / name for name in FOLDERS if all(_parts(root / name))), None)
    if folder is None:
        looked = f"{root / FOLDERS[0]}/Train/<letter>/ and {root / FOLDERS[0]}/Test/<letter>/"
        raise UserError(f"data set {name} not found: looked for {root / f'{name}.npz'}, {looked}; get it from {SOURCE}")
    listing = Listing()
    paths, y, split, broken = [], [], [], 0
    for part, place in enumerate(_parts(folder)):
        assert place is not None
        if lone := sorted(set(listing.classes(place)) ^ set(LETTERS)):
            raise UserError(f"{place} must hold the folders A to J: {lone[0]} is missing or none of them")
        for c, letter in enumerate(LETTERS):
            found = listing.images(place / letter)
            kept = [path for path in found if f"{letter}/{path.name}" not in BROKEN]
            broken += len(found) - len(kept)
            paths += kept
            y += [c] * len(kept)
            split += [part] * len(kept)
    if len(paths) != IMAGES:
        raise UserError(f"{folder} is not notMNIST as divided for 5-datasets: {len(paths)} images found, {IMAGES} expected")
    ids, parts = np.array(y, np.int64), np.array(split, np.uint8)
    check_classes(ids, parts, LETTERS)
    said = [f"{broken} file(s) known to be broken"] if broken else []
    said += [listing.text()] if listing.text() else []
    files = [path.relative_to(folder).as_posix() for path in paths]
    return Pool(FileImages(paths), ids, parts, LETTERS, files=files, passed_over=", ".join(said))


def _parts(folder: Path) -> list[Path | None]:
    """The folders of training and test images, where they are."""
    return [next((folder / name for name in names if (folder / name).is_dir()), None) for names in PARTS]
