"""torchvision's classification sets as one declarative table. torchvision is imported inside the functions only."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.images.arrays import Pool, check_classes, rgb
from clbench.streams.scenario import ArrayImages, FileImages
from clbench.streams.splits import stratified


@dataclass(frozen=True)
class Vision:
    """How to read one set.

    cls           class in `torchvision.datasets`
    train, test   keyword arguments, one mapping per part (two where training and validation are merged); test empty: no
                  published split, 20 % per class are drawn once (seed 0)
    x, y          attributes that hold images or paths, and labels; y None: x is a list of (path, label)
    sizes         (classes, training images, test images), compared with what is found
    offset        subtracted from the labels
    by_hand       where the data comes from, if torchvision cannot download it
    """

    cls: str
    sizes: tuple[int, int, int]
    train: tuple[dict[str, Any], ...] = ({"train": True},)
    test: tuple[dict[str, Any], ...] = ({"train": False},)
    x: str = "data"
    y: str | None = "targets"
    offset: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    by_hand: str = ""


def _by_split(*names: str) -> tuple[dict[str, Any], ...]:
    return tuple({"split": name} for name in names)


_TRAIN, _TRAINVAL, _TEST = _by_split("train"), _by_split("train", "val"), _by_split("test")
_FILES: dict[str, Any] = {"x": "_image_files", "y": "_labels"}
_PAIRS: dict[str, Any] = {"x": "_samples", "y": None}
_CARS = "https://ai.stanford.edu/~jkrause/cars/car_dataset.html (no longer served: use a mirror)"
_IMAGENET = (
    "https://image-net.org/challenges/LSVRC/2012 (registration; ILSVRC2012_devkit_t12, _img_train and _img_val archives)"
)
_NONE: dict[str, Any] = {"train": ({},), "test": ()}

TABLE: dict[str, Vision] = {
    "cifar10": Vision("CIFAR10", (10, 50_000, 10_000)),
    "cifar100": Vision("CIFAR100", (100, 50_000, 10_000)),
    "mnist": Vision("MNIST", (10, 60_000, 10_000)),
    "fashion_mnist": Vision("FashionMNIST", (10, 60_000, 10_000)),
    "kmnist": Vision("KMNIST", (10, 60_000, 10_000)),
    "emnist@balanced": Vision("EMNIST", (47, 112_800, 18_800), options={"split": "balanced"}),
    "emnist@letters": Vision("EMNIST", (26, 124_800, 20_800), options={"split": "letters"}, offset=1),
    "emnist@digits": Vision("EMNIST", (10, 240_000, 40_000), options={"split": "digits"}),
    "usps": Vision("USPS", (10, 7_291, 2_007)),
    "svhn": Vision("SVHN", (10, 73_257, 26_032), _TRAIN, _TEST, y="labels"),
    "stl10": Vision("STL10", (10, 5_000, 8_000), _TRAIN, _TEST, y="labels"),
    "food101": Vision("Food101", (101, 75_750, 25_250), _TRAIN, _TEST, **_FILES),
    "flowers102": Vision("Flowers102", (102, 2_040, 6_149), _TRAINVAL, _TEST, **_FILES),
    "oxford_pets": Vision("OxfordIIITPet", (37, 3_680, 3_669), _by_split("trainval"), _TEST, x="_images", y="_labels"),
    "dtd": Vision("DTD", (47, 3_760, 1_880), _TRAINVAL, _TEST, **_FILES),
    "fgvc_aircraft": Vision("FGVCAircraft", (100, 6_667, 3_333), _by_split("trainval"), _TEST, **_FILES),
    "gtsrb": Vision("GTSRB", (43, 26_640, 12_630), _TRAIN, _TEST, **_PAIRS),
    "stanford_cars": Vision("StanfordCars", (196, 8_144, 8_041), _TRAIN, _TEST, **_PAIRS, by_hand=_CARS),
    "rendered_sst2": Vision("RenderedSST2", (2, 7_792, 1_821), _TRAINVAL, _TEST, **_PAIRS),
    "country211": Vision("Country211", (211, 42_200, 21_100), _by_split("train", "valid"), _TEST, x="samples", y=None),
    "imagenette": Vision("Imagenette", (10, 9_469, 3_925), _TRAIN, _by_split("val"), **_PAIRS),
    "imagenet": Vision("ImageNet", (1000, 1_281_167, 50_000), _TRAIN, _by_split("val"), "samples", None, by_hand=_IMAGENET),
    "places365": Vision(
        "Places365", (365, 1_803_460, 36_500), _by_split("train-standard"), _by_split("val"), "imgs", None, 0, {"small": True}
    ),
    "eurosat": Vision("EuroSAT", (10, 21_600, 5_400), **_NONE, x="samples", y=None),
    "sun397": Vision("SUN397", (397, 0, 0), **_NONE, **_FILES),
    "caltech101": Vision("Caltech101", (101, 0, 0), **_NONE, x="index", y="y"),
    "caltech256": Vision("Caltech256", (257, 0, 0), **_NONE, x="index", y="y"),
}


def read(name: str, root: Path, download: bool) -> Pool:
    """Read a torchvision set below `root`; where it is missing, `UserError` says where it comes from."""
    import torchvision.datasets

    entry = TABLE[name]
    cls = getattr(torchvision.datasets, entry.cls)
    parts: list[tuple[int, Any]] = []
    for part, variants in enumerate((entry.train, entry.test)):
        for arguments in variants:
            options = {**entry.options, **arguments} if entry.by_hand else {"download": download, **entry.options, **arguments}
            try:
                parts.append((part, cls(str(root), **options)))
            except Exception as error:  # torchvision raises RuntimeError, OSError, ValueError, URLError, ...
                raise _missing(name, root, cls, download, error) from None
    found = [_extract(entry, dataset) for _, dataset in parts]
    y = np.concatenate([labels for _, labels in found]) - entry.offset
    split = np.repeat(np.array([part for part, _ in parts], np.uint8), [len(labels) for _, labels in found])
    classes = _class_names(parts[0][1], int(y.max()) + 1, entry.offset)
    arrays = [images for images, _ in found if isinstance(images, np.ndarray)]
    if arrays:
        split = split if entry.test else stratified(y)
        pool = Pool(ArrayImages(rgb(np.concatenate(arrays), name)), y, split, classes, source_order=np.flatnonzero(split == 0))
    else:
        paths = [Path(path) for images, _ in found for path in images]
        pool = _sorted_files(paths, y, split, classes, root, drawn=not entry.test)
    check_classes(pool.y, pool.split, classes)
    return pool


def _missing(name: str, root: Path, cls: Any, download: bool, error: Exception) -> UserError:
    known = [str(getattr(cls, key)) for key in ("url", "_URL", "_DATASET_URL") if hasattr(cls, key)]
    source = TABLE[name].by_hand or (known or [*getattr(cls, "mirrors", ()), f"the source of torchvision's {cls.__name__}"])[0]
    md5 = next((f", MD5 {getattr(cls, key)}" for key in ("tgz_md5", "_MD5", "_DATASET_MD5") if hasattr(cls, key)), "")
    reason = " ".join(str(error).split()).replace(" You can use download=True to download it", "")[:200]  # torchvision's word
    if download and not TABLE[name].by_hand:
        return UserError(f"data set {name} could not be downloaded to {root} from {source}{md5}: {reason}")
    way = "it must be put there by hand" if TABLE[name].by_hand else "`download=true` gets it"
    looked = f"{root / name}.npz, {root / name}/train/<class>/ and torchvision's {cls.__name__} in {root}"
    return UserError(f"data set {name} not found: looked for {looked} ({reason}); it comes from {source}{md5}; {way}")


def _extract(entry: Vision, dataset: Any) -> tuple[np.ndarray | list[Path], np.ndarray]:
    """Images uint8 [N, H, W(, 3)] or paths, and labels [N]."""
    x = getattr(dataset, entry.x)
    if entry.y is None:
        return [Path(item[0]) for item in x], np.array([int(item[1]) for item in x], np.int64)
    y = np.asarray(getattr(dataset, entry.y)).astype(np.int64)
    if entry.cls == "Caltech101":
        folder = Path(dataset.root, "101_ObjectCategories")
        return [folder / dataset.categories[c] / f"image_{i:04d}.jpg" for i, c in zip(x, y, strict=True)], y
    if entry.cls == "Caltech256":
        folder = Path(dataset.root, "256_ObjectCategories")
        return [folder / dataset.categories[c] / f"{c + 1:03d}_{i:04d}.jpg" for i, c in zip(x, y, strict=True)], y
    if isinstance(x, list) and x and isinstance(x[0], str | os.PathLike):
        return [Path(path) for path in x], y
    images = np.asarray(x)
    if images.ndim == 4 and images.shape[1] == 3 and images.shape[3] != 3:
        images = images.transpose(0, 2, 3, 1)
    return images, y


def _class_names(dataset: Any, number: int, offset: int) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or []
    names = [" ".join(name) if isinstance(name, list) else name[0] if isinstance(name, tuple) else str(name) for name in names]
    return tuple(names[offset:]) if len(names) - offset == number else tuple(str(i) for i in range(number))


def _sorted_files(
    paths: list[Path], y: np.ndarray, split: np.ndarray, classes: tuple[str, ...], root: Path, drawn: bool
) -> Pool:
    """Order samples by (split, class, name): file systems list folders in any order."""
    names = [path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name for path in paths]
    rows = sorted(range(len(paths)), key=lambda i: (int(split[i]), int(y[i]), names[i]))
    y, split = y[rows], split[rows]
    if drawn:
        split = stratified(y)
    order = np.argsort(rows)  # of the row that an image as it was found has now
    return Pool(
        FileImages([paths[i] for i in rows]),
        y,
        split,
        classes,
        files=[names[i] for i in rows],
        source_order=order[split[order] == 0],
    )
