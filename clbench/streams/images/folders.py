"""Images in folders, one per class: <root>/{train,test}/<class>/..., of any size, decoded when asked for.

A class's id is its position among the folder names sorted as text (10 comes before 2), its name is the folder's. Without a test
folder, <root>/train/<class>/ or <root>/<class>/ is divided on request. Tiny-ImageNet as it is published is read as well: its
validation images lie in one folder beside val_annotations.txt, and are the test images here; its own have no labels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.images import published_lists
from clbench.streams.images.arrays import Pool, check_classes
from clbench.streams.images.class_folders import EXTENSIONS, Listing
from clbench.streams.scenario import FileImages
from clbench.streams.splits import FOLDERS, FolderSplit, Share, stratified

TEST_NAMES = ("test", "val", "valid", "validation")
ANNOTATIONS = "val/val_annotations.txt"  # of Tiny-ImageNet: file, class, box; separated by tabs


def is_tree(root: Path) -> bool:
    """Whether `root` has the train/ and test/ (or val/) folders."""
    return (root / "train").is_dir() and any((root / name).is_dir() for name in TEST_NAMES)


def read_tree(root: Path, share: Share | None = None) -> Pool:
    """Read the names below `root`; class ids are positions in the sorted folder names, samples are sorted by name.

    `share` of every class is drawn as test images where there is no test folder. What is no image is counted in
    `Pool.passed_over`. An empty or missing class raises `UserError`.
    """
    if not is_tree(root):
        return _undivided(root, share)
    if share is not None:
        raise UserError(f"scenario.test_share has no effect: {root} has test images of its own")
    listing = Listing()
    listed = _annotated(root) if (root / ANNOTATIONS).is_file() else None
    found = [root / name for name in TEST_NAMES if (root / name).is_dir()]
    test = found[0] if listed is None else root / "val"
    classes = listing.classes(root / "train")
    unknown = sorted(set(listing.classes(test) if listed is None else listed) - set(classes))
    if unknown:
        raise UserError(f"{test} has classes that {root / 'train'} lacks: {', '.join(unknown[:5])}")
    paths, y, split = [], [], []
    for part, folder in enumerate((root / "train", test)):
        for label, name in enumerate(classes):
            of_class = _of_class(listing, folder / name) if part == 0 or listed is None else listed.get(name, [])
            if not of_class:
                raise UserError(f"no image of class {name} in {root / ANNOTATIONS}")
            paths += of_class
            y += [label] * len(of_class)
            split += [part] * len(of_class)
    for other in found:
        if other != test:
            listing.passed_over[f"folder {other.name}/ (the test images are those of {test.name}/)"] += 1
    return _pool(root, paths, y, np.array(split, np.uint8), classes, listing)


def _undivided(root: Path, share: Share | None) -> Pool:
    """Class folders without a test folder; `share` of every class becomes test images."""
    top = root / "train" if (root / "train").is_dir() else root
    if share is None:
        needed = f"{root} must hold the folders train/<class>/ and test/<class>/ (or val/<class>/)"
        raise UserError(f"{needed}; without test images, scenario.test_share=0.2 draws a fifth of every class")
    listing = Listing()
    classes = listing.classes(top)
    found = [_of_class(listing, top / name) for name in classes]
    y = [label for label, paths in enumerate(found) for _ in paths]
    split = stratified(np.array(y, np.int64), None, share)
    return _pool(root, [path for paths in found for path in paths], y, split, classes, listing)


def _of_class(listing: Listing, folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"class folder {folder} is missing: every class needs training and test images")
    if not (found := listing.images(folder)):
        raise UserError(f"class folder {folder} holds no image ({' '.join(sorted(EXTENSIONS))})")
    return found


def _pool(root: Path, paths: list[Path], y: list[int], split: np.ndarray, classes: list[str], listing: Listing) -> Pool:
    files = [path.relative_to(root).as_posix() for path in paths]
    ids = np.array(y, np.int64)
    return Pool(FileImages(paths), ids, split, tuple(classes), files=files, passed_over=listing.text())


def _annotated(root: Path) -> dict[str, list[Path]]:
    """The validation images of Tiny-ImageNet by class, sorted by name."""
    found: dict[str, list[Path]] = {}
    for number, line in enumerate((root / ANNOTATIONS).read_text(encoding="utf-8").splitlines(), 1):
        file, *rest = line.split("\t")
        path = root / "val" / "images" / file
        if not rest or not path.is_file():
            raise UserError(f"{root / ANNOTATIONS}, line {number}: {path} is missing, or there is no class beside it")
        found.setdefault(rest[0], []).append(path)
    return {name: sorted(paths) for name, paths in found.items()}


def read_variant(root: Path, full: str) -> Pool:
    """Read a named variant below the data root and compare it with what is known of it."""
    split = FOLDERS[full]
    candidates = [root / full]
    if split.names_sha256:  # the list of names proves the variant, so the folder need not say it
        candidates.append(root / full.split("@")[0])
    candidates += [root / name for name in split.folders]
    folder = next((path for path in candidates if is_tree(path) or published_lists.reader(path)), None)
    if folder is None:
        also = f" (or {', '.join(split.folders)} as published)" if split.folders else ""
        raise UserError(
            f"data set {full} not found: looked for {candidates[0]}/train/<class>/ and test/<class>/{also} "
            f"({split.train} + {split.test} images, {split.classes} classes); get it from {split.source}"
        )
    pool = (published_lists.reader(folder) or read_tree)(folder)
    check_counts(full, pool, split.classes, split.train, split.test, str(folder))
    _check_names(full, pool, split, folder)
    return pool


def check_counts(name: str, pool: Pool, classes: int | None, train: int | None, test: int | None, where: str) -> None:
    """Compare the sizes with the declared ones (None: not known)."""
    check_classes(pool.y, pool.split, pool.class_names)
    found = {"classes": len(pool.class_names), "training": int((pool.split == 0).sum()), "test": int((pool.split == 1).sum())}
    for (what, number), expected in zip(found.items(), (classes, train, test), strict=True):
        if expected is not None and number != expected:
            unit = "" if what == "classes" else " images"
            raise UserError(f"{where} is not {name}: {number} {what}{unit} found, {expected} expected")


def names_sha256(pool: Pool) -> tuple[str, str]:
    """SHA-256 of the sorted "class/file" names joined by newlines, of the training and of the test images."""
    digests = []
    for part in (0, 1):
        names = sorted("/".join(pool.files[i].split("/")[-2:]) for i in np.flatnonzero(pool.split == part))
        digests.append(hashlib.sha256("\n".join(names).encode()).hexdigest())
    return digests[0], digests[1]


def _check_names(full: str, pool: Pool, split: FolderSplit, folder: Path) -> None:
    found = names_sha256(pool)
    for other, known in FOLDERS.items():
        if other != full and known.names_sha256 == found:
            raise UserError(f"{folder} holds the split {other}, not {full}")
    if split.names_sha256 and split.names_sha256 != found:
        raise UserError(
            f"{folder} is not {full}: the file names have SHA-256 {found[0][:12]}, {found[1][:12]}, "
            f"expected {split.names_sha256[0][:12]}, {split.names_sha256[1][:12]}"
        )
