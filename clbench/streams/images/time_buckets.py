"""CLEAR: photographs by the time of their upload, in ten buckets with the same classes, as two archives are published.

Lin et al., "The CLEAR benchmark", NeurIPS data sets and benchmarks 2021, arXiv 2201.06289.

    <set>/train_image_only/labeled_images/<bucket>/<class>/*   (or train/labeled_images/..., from the archive with metadata)
    <set>/test/labeled_images/<bucket>/<class>/*               the test images of the same time spans, published later

A bucket is a domain. Classes have the order of class_names.txt, where it lies beside the images, else that of text. Without
the test archive a share of every class of every bucket is drawn on request (0.3 in the paper). Of the paper's two protocols,
iid is the diagonal of the accuracy matrix over all test sets (`in_domain`), streaming the cells beside it (`next_domain`). In
the paper, streaming trains on the images that were tests one step before; here no image is both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.images.arrays import Pool, check_classes
from clbench.streams.images.class_folders import Listing
from clbench.streams.scenario import FileImages
from clbench.streams.splits import Share, stratified

TRAIN = ("train_image_only", "train")
BUCKETS = tuple(str(i) for i in range(1, 11))
_FILES = "https://huggingface.co/datasets/elvishelvis6/CLEAR-Continual_Learning_Benchmark"


@dataclass(frozen=True)
class Buckets:
    """A published set: the names of its folder, the number of its classes, and their names where few enough to be stated."""

    folders: tuple[str, ...]
    classes: int
    source: str
    names: tuple[str, ...] = ()


_NAMES = "BACKGROUND baseball bus camera cosplay dress hockey laptop racing soccer sweater"
SETS: dict[str, Buckets] = {
    "clear10": Buckets(
        ("clear10", "CLEAR-10", "CLEAR10"),
        11,
        f"{_FILES} (clear10-train-image-only.zip and clear10-test.zip)",
        tuple(_NAMES.split()),
    ),
    "clear100": Buckets(
        ("clear100", "CLEAR-100", "CLEAR100"), 100, f"{_FILES} (clear100-train-image-only.zip and clear100-test.zip)"
    ),
}


def read(name: str, root: Path, share: Share | None) -> Pool:
    """Read a set below the data root; `share` is drawn where there is no test archive. Flaws raise `UserError`."""
    known = SETS[name]
    tops = [root / one for one in known.folders]
    found = [top / part for top in tops for part in TRAIN if (top / part / "labeled_images").is_dir()]
    if not found:
        looked = " and ".join(f"{top}/{TRAIN[0]}/labeled_images/<bucket>/<class>/" for top in tops)
        raise UserError(f"data set {name} not found: looked for {looked}; get it from {known.source}")
    train = found[0]
    folder, test = train.parent, train.parent / "test" / "labeled_images"
    if test.is_dir() and share is not None:
        raise UserError(f"scenario.test_share has no effect: {folder} has test images of its own")
    if not test.is_dir() and share is None:
        way = "or scenario.test_share=0.3 draws a part of every class of every bucket"
        raise UserError(f"{test} is missing: get it from {known.source}, {way}")
    listing = Listing()
    buckets = _buckets(listing, train / "labeled_images", name)
    names = _class_names(listing, train, buckets[0], known, name)
    paths, y, domain, split = [], [], [], []
    places = [train / "labeled_images"] + ([test] if test.is_dir() else [])
    for part, place in enumerate(places):
        for d, bucket in enumerate(buckets):
            for c, of_class in enumerate(_of_bucket(listing, place / bucket, names)):
                number = len(of_class)
                paths += of_class
                y += [c] * number
                domain += [d] * number
                split += [part] * number
    ids, domains = np.array(y, np.int64), np.array(domain, np.int64)
    parts = np.array(split, np.uint8) if share is None else stratified(ids, domains, share)
    check_classes(ids, parts, names)
    files = [path.relative_to(folder).as_posix() for path in paths]
    return Pool(FileImages(paths), ids, parts, names, domains, buckets, files, listing.text())


def _buckets(listing: Listing, place: Path, name: str) -> tuple[str, ...]:
    """The buckets there are, as numbers: 1 to 10, and 0 where it has labels, too."""
    found = listing.classes(place)
    if missing := [bucket for bucket in BUCKETS if bucket not in found]:
        raise UserError(f"{place} is not {name}: bucket {missing[0]} of {BUCKETS[0]}..{BUCKETS[-1]} is missing")
    if unknown := sorted(set(found) - {"0", *BUCKETS}):
        raise UserError(f"{place} is not {name}: it has no bucket {unknown[0]}")
    return tuple(sorted(found, key=int))


def _class_names(listing: Listing, train: Path, bucket: str, known: Buckets, name: str) -> tuple[str, ...]:
    found = listing.classes(train / "labeled_images" / bucket)
    try:
        text = (train / "class_names.txt").read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
    listed = tuple(line.strip() for line in text.splitlines() if line.strip()) or tuple(found)
    if sorted(listed) != found:
        lone = sorted(set(listed) ^ set(found))[:3]
        raise UserError(f"{train / 'class_names.txt'} and the folders of bucket {bucket} differ in {', '.join(lone)}")
    if len(listed) != known.classes or (known.names and sorted(listed) != sorted(known.names)):
        expected = f"{known.classes} classes" + (f" ({', '.join(known.names)})" if known.names else "")
        raise UserError(f"{train} is not {name}: {len(listed)} classes found ({', '.join(listed[:11])}), {expected} expected")
    return listed


def _of_bucket(listing: Listing, place: Path, names: tuple[str, ...]) -> list[list[Path]]:
    """Images of every class of a bucket."""
    if not place.is_dir():
        raise UserError(f"{place} is missing: every bucket has training and test images")
    if lone := sorted(set(listing.classes(place)) ^ set(names)):
        raise UserError(f"{place} has other classes than the first bucket: {', '.join(lone[:3])}")
    found = [listing.images(place / name) for name in names]
    if (empty := next((name for name, paths in zip(names, found, strict=True) if not paths), None)) is not None:
        raise UserError(f"class folder {place / empty} holds no image")
    return found
