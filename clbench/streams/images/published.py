"""Corrupted test sets in the files in which their makers publish them: CIFAR-10-C, CIFAR-100-C, ImageNet-C, and sets like them.

Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261. A data set is the test images under one corruption at one severity, and
its name says which: cifar10_c@fog5. All its samples are test samples, in the order of the files.

    arrays   <set>/<corruption>.npy, uint8 [5 N, H, W, 3]: the N test images at severity 1, then at 2, ...; <set>/labels.npy
    folders  <set>/<corruption>/<severity>/<class>/*, or <set>/<group>/<corruption>/... as the archives of ImageNet-C are

The rows of CIFAR-C are in torchvision's order of the test images, not in that in which clbench keeps CIFAR: labels are those
of labels.npy, and no row is ever matched with a clean image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.images.arrays import Pool, labels
from clbench.streams.images.class_folders import Listing
from clbench.streams.scenario import ArrayImages, FileImages
from clbench.streams.transforms import CORRUPTIONS

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # meant for tuning: not among the fifteen
KINDS = (*CORRUPTIONS, *EXTRA)
GROUPS = ("noise", "blur", "weather", "digital", "extra")
SEVERITIES = 5


@dataclass(frozen=True)
class Published:
    """A published set: whose test images it shows, the name of its folder, and what must be found there.

    images  of one corruption at one severity, the same number of each class
    begins  the first labels, in torchvision's order of the test images
    """

    of: str
    folder: str
    classes: int
    images: int
    source: str
    begins: tuple[int, ...] = ()


_ZENODO = "https://zenodo.org/records"
SETS: dict[str, Published] = {
    "cifar10_c": Published(
        "cifar10", "CIFAR-10-C", 10, 10_000, f"{_ZENODO}/2535967 (CIFAR-10-C.tar)", (3, 8, 8, 0, 6, 6, 1, 6, 3, 1)
    ),
    "cifar100_c": Published(
        "cifar100", "CIFAR-100-C", 100, 10_000, f"{_ZENODO}/3555552 (CIFAR-100-C.tar)", (49, 33, 72, 51, 71, 92, 15, 14, 23, 0)
    ),
    "imagenet_c": Published(
        "imagenet", "ImageNet-C", 1000, 50_000, f"{_ZENODO}/2235448 (noise.tar, blur.tar, weather.tar, digital.tar, extra.tar)"
    ),
}


def parsed(name: str) -> tuple[str, str, int] | None:
    """The set (or its folder), the corruption and the severity of a name such as cifar10_c@fog5; None for other names."""
    where, _, rest = name.rpartition("@")
    kind, level = rest[:-1], rest[-1:]
    if not where or kind not in KINDS or level not in tuple("12345"):
        return None
    return where, kind, int(level)


def read(where: str, kind: str, severity: int, root: Path | None) -> Pool:
    """The test images of a set (a name of `SETS`, or a folder) under one corruption; `UserError` says what is missing."""
    known, folder = SETS.get(where), _folder(where, root)
    if (folder / "labels.npy").is_file() or any(folder.glob("*.npy")):
        pool = _arrays(folder, kind, severity, known)
    else:
        pool = _tree(folder, kind, severity, known)
    if known is not None:
        sizes = np.bincount(pool.y, minlength=known.classes).tolist()
        if sizes != [known.images // known.classes] * known.classes:
            each = f"{len(sizes)} classes of {min(sizes)} to {max(sizes)} images found"
            wanted = f"{known.classes} classes of {known.images // known.classes} expected"
            raise UserError(f"{folder} is not {known.folder}: {kind} at severity {severity}: {each}, {wanted}")
    return pool


def _folder(where: str, root: Path | None) -> Path:
    known = SETS.get(where)
    names = (known.folder, where) if known else (where,)
    places = [root / name for name in names] if root is not None else []
    places = places if known else [Path(where), *places]
    if (found := next((place for place in places if place.is_dir()), None)) is not None:
        return found
    if known is None:
        also = f" or in {root}" if root is not None else ""
        raise UserError(f"no published set at {where}{also}: give one of {', '.join(SETS)}, or a folder in their layout")
    if root is None:
        raise UserError(f"{known.folder}: no data root; set data_root=PATH or the environment variable CLBENCH_DATA")
    raise UserError(f"{known.folder} not found: looked for {' and '.join(map(str, places))}; get it from {known.source}")


def _missing(what: Path, known: Published | None) -> UserError:
    return UserError(f"{what} is missing" + (f"; it comes with {known.folder} from {known.source}" if known else ""))


def _loaded(path: Path, known: Published | None) -> np.ndarray:
    """A mapped array: what is not looked at is not read."""
    if not path.is_file():
        raise _missing(path, known)
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _arrays(folder: Path, kind: str, severity: int, known: Published | None) -> Pool:
    path = folder / f"{kind}.npy"
    x, y = _loaded(path, known), _loaded(folder / "labels.npy", known)
    number = len(x) // SEVERITIES if x.ndim else 0
    shape = (SEVERITIES * known.images, 32, 32, 3) if known else (SEVERITIES * max(number, 1), *x.shape[1:])
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or x.shape != shape or 0 in x.shape:
        expected = f"uint8 {list(shape)}" if known else "uint8 [5 N, H, W, 3]"
        raise UserError(f"{path} must be {expected}, five severities of the test images; got {x.dtype} {list(x.shape)}")
    y = labels(y, len(x), str(folder / "labels.npy"))
    if not (y.reshape(SEVERITIES, number) == y[:number]).all():
        raise UserError(f"{folder / 'labels.npy'} must hold the labels of the {number} test images five times")
    y = y[:number]
    if known and tuple(y[: len(known.begins)].tolist()) != known.begins:
        found = y[: len(known.begins)].tolist()
        raise UserError(f"{folder / 'labels.npy'} begins with {found}, that of {known.folder} with {list(known.begins)}")
    names = tuple(map(str, range(known.classes if known else int(y.max()) + 1)))
    images = ArrayImages(x[(severity - 1) * number : severity * number])
    return Pool(images, y, np.ones(number, np.uint8), names)


def _tree(folder: Path, kind: str, severity: int, known: Published | None) -> Pool:
    places = [folder / kind, *(folder / group / kind for group in GROUPS)]
    place = next((one for one in places if one.is_dir()), places[0]) / str(severity)
    if not place.is_dir():
        raise _missing(place, known)
    listing = Listing()
    names = listing.classes(place)
    paths = {name: listing.images(place / name) for name in names}
    if empty := [name for name in names if not paths[name]]:
        raise UserError(f"class folder {place / empty[0]} holds no image")
    listed = [path for name in names for path in paths[name]]
    y = np.repeat(np.arange(len(names)), [len(paths[name]) for name in names]).astype(np.int64)
    files = [path.relative_to(place).as_posix() for path in listed]
    return Pool(FileImages(listed), y, np.ones(len(y), np.uint8), tuple(names), files=files, passed_over=listing.text())
