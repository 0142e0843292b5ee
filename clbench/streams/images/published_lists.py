"""Sets that are published as one folder of images with lists beside it: CUB-200-2011 and miniImageNet.

    CUB_200_2011/images.txt, train_test_split.txt, image_class_labels.txt   an image's number and its file, 1 for training or 0
        for test, its class from 1; images/<class>/<file> (Wah, Branson, Welinder, Perona & Belongie 2011)
    miniimagenet/split/train.csv, test.csv   file and class; images/<file>. 100 classes of 500 + 100 images, as published with
        CEC (Zhang et al., CVPR 2021, arXiv 2104.03047) for few-shot class-incremental learning

Samples, ids and identity are those of the same images in train/<class>/ and test/<class>/.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.images.arrays import Pool
from clbench.streams.scenario import FileImages

Row = tuple[Path, str, int]  # image, name of its class, 0 for training or 1 for test


def reader(folder: Path) -> Callable[[Path], Pool] | None:
    """What reads a folder of one of these forms; None for any other."""
    if (folder / "train_test_split.txt").is_file():
        return read_cub
    return read_mini_imagenet if (folder / "split" / "train.csv").is_file() else None


def read_cub(folder: Path) -> Pool:
    """CUB-200-2011 as published; a class's id is its number - 1. A flaw raises `UserError` with the file."""
    names = ("images.txt", "train_test_split.txt", "image_class_labels.txt")
    files, parts, labels = (_pairs(folder / name, " ") for name in names)
    for name, other in zip(names[1:], (parts, labels), strict=True):
        if lone := sorted(files.keys() ^ other.keys())[:1]:
            raise UserError(f"{folder}: image {lone[0]} stands in one of {names[0]} and {name} alone")
    classes: dict[int, str] = {}
    rows: list[Row] = []
    for number, file in files.items():
        if parts[number] not in ("0", "1") or not labels[number].isdecimal():
            raise UserError(f"{folder}: image {number} has the part {parts[number]!r} and the class {labels[number]!r}")
        name = file.split("/")[0]
        if classes.setdefault(int(labels[number]), name) != name:
            raise UserError(f"{folder}: class {labels[number]} is {classes[int(labels[number])]} and {name}")
        rows.append((folder / "images" / file, name, int(parts[number] == "0")))
    return _pool(folder, rows, [name for _, name in sorted(classes.items())])


def read_mini_imagenet(folder: Path) -> Pool:
    """MiniImageNet by CEC's lists; class ids are in the order in which train.csv first names them."""
    rows: list[Row] = []
    for part, name in enumerate(("train.csv", "test.csv")):
        listed = _pairs(folder / "split" / name, ",", heads=1)
        rows += [(folder / "images" / file, label, part) for file, label in listed.items()]
    return _pool(folder, rows, list(dict.fromkeys(label for _, label, part in rows if part == 0)))


def _pairs(path: Path, between: str, heads: int = 0) -> dict[str, str]:
    """First and second word of every line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines[heads:], heads + 1):
        first, _, second = line.strip().partition(between)
        if not first or not second or first in found:
            raise UserError(f"{path}, line {number}: expected two words, the first of them once, got {line!r}")
        found[first] = second
    return found


def _pool(folder: Path, rows: list[Row], classes: list[str]) -> Pool:
    """Samples by part, class and name, as a tree of folders has them."""
    ids = {name: i for i, name in enumerate(classes)}
    if unknown := sorted({name for _, name, _ in rows} - ids.keys()):
        raise UserError(f"{folder}: no training image is of class {unknown[0]}")
    if lost := next((path for path, _, _ in rows if not path.is_file()), None):
        raise UserError(f"{folder}: the lists name {lost}, which is missing")
    order = sorted(range(len(rows)), key=lambda i: (rows[i][2], ids[rows[i][1]], rows[i][0].name))
    paths, names, parts = zip(*(rows[i] for i in order), strict=True)
    files = [f"{('train', 'test')[part]}/{name}/{path.name}" for path, name, part in zip(paths, names, parts, strict=True)]
    y = np.array([ids[name] for name in names], np.int64)
    places = np.argsort(order)
    split = np.array(parts, np.uint8)
    return Pool(FileImages(list(paths)), y, split, tuple(classes), files=files, source_order=places[split[places] == 0])
