"""Find a data set by name or path, check it, and give it an identity. Imports no torch, unless torchvision has to read it."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import splits
from clbench.streams.images import (
    arrays,
    arrow,
    domain_folders,
    folders,
    foreign_files,
    notmnist,
    published,
    tables,
    time_buckets,
    vision,
)
from clbench.streams.images.arrays import Pool
from clbench.streams.images.class_folders import EXTENSIONS
from clbench.streams.scenario import ArrayImages, Dataset, FileImages, ImageSource
from clbench.streams.splits import Share

log = logging.getLogger("clbench")

HASHED_CONTENT = 256 << 20  # bytes of image files up to which the contents are hashed, not only names and sizes
_READERS: dict[str, Callable[[str, Path, Share | None], Pool]] = {  # of sets in the folders of their makers
    **dict.fromkeys(domain_folders.SETS, domain_folders.read_set),
    **dict.fromkeys(time_buckets.SETS, time_buckets.read),
    "notmnist": notmnist.read,
}
_SIZES = {"digits": (10, 1_438, 359), "pacs": (7, None, None)}
_SOURCES = {
    "pacs": "https://huggingface.co/datasets/flwrlabs/pacs (9,991 images), stored as arrays x, y, domain, classes, domains"
}


def names() -> tuple[str, ...]:
    """All names that `load` knows (a path works as well)."""
    return ("digits", "pacs", *_READERS, *vision.TABLE, *splits.FOLDERS)


def load(
    name: str,
    data_root: str | None = None,
    download: bool = False,
    sha256: str | None = None,
    test_share: float | None = None,
    test_seed: int = 0,
    by_domain: bool = False,
) -> Dataset:
    """Load a data set.

    Args:
        name: one of `names()`, the name of <data_root>/<name>.npz or of a folder <data_root>/<name>/ with train/ and test/,
            or a path (with a slash, or ending in .npz, .csv, .tsv or .parquet). cifar10_c@fog5 are test images alone, see
            `images.published`.
        data_root: where data lies; None means the environment variable CLBENCH_DATA.
        download: let torchvision fetch what is missing.
        sha256: expected identity of the content (`Dataset.sha256`) or of the .npz file.
        test_share: the share of every class (of every domain) that is drawn as test samples, for folders, tables and arrays
            without test samples of their own.
        test_seed: what it is drawn by.
        by_domain: a folder that is given holds <domain>/<class>/, not train/<class>/ and test/<class>/.

    Raises:
        UserError: what is missing, where it was looked for and where it comes from; or what is wrong with the data.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"scenario.dataset must be a name or a path, got {name!r}")
    share = Share.of(test_share, test_seed)
    place = data_root or os.environ.get("CLBENCH_DATA")
    root = _path(place) if place else None
    dataset = _load(name, root, download, share, by_domain)
    if sha256 is not None:
        _check_sha256(dataset, name, root, sha256)
    return dataset


def _path(text: str) -> Path:
    """A path as typed; only a leading ~ is the home folder."""
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:  # no such user
        return Path(text)


def _load(name: str, root: Path | None, download: bool, share: Share | None, by_domain: bool = False) -> Dataset:
    if (one := published.parsed(name)) is not None:
        place = _path(one[0])
        return _dataset(f"{place.name}@{one[1]}{one[2]}", published.read(str(place), *one[1:], root), str(place))
    folder = name not in names() and not splits.variants(name) and _path(name).is_dir()
    if folder or name.lower().endswith((".npz", *tables.SUFFIXES)) or "/" in name or os.sep in name:
        return _from_path(name, root, share, by_domain)
    if splits.variants(name):
        raise UserError(
            f"data set {name} has several splits with different results; choose {' or '.join(splits.variants(name))}"
        )
    if share is not None and name in names() and name not in domain_folders.SETS | time_buckets.SETS:
        raise UserError(f"scenario.test_share has no effect: data set {name} has test images of its own")
    if name == "digits":
        return _digits()
    if root is None:
        _refuse_unknown(name)
        raise UserError(f"data set {name}: no data root; set data_root=PATH or the environment variable CLBENCH_DATA")
    if name in splits.FOLDERS:
        return _finish(name, folders.read_variant(root, name))
    if (root / f"{name}.npz").is_file():
        return _npz(name, root / f"{name}.npz", share)
    if name in _READERS:
        return _finish(name, _READERS[name](name, root, share), str(root), share)
    if folders.is_tree(root / name) or arrow.is_saved(root / name) or (share is not None and (root / name).is_dir()):
        return _folder(name, root / name, share, by_domain)
    if name in vision.TABLE:
        return _finish(name, vision.read(name, root, download), str(root))
    _refuse_unknown(name, root)
    raise UserError(
        f"data set {name} not found: looked for {root / name}.npz; it comes from {_SOURCES[name]}; it cannot be downloaded"
    )


def _refuse_unknown(name: str, root: Path | None = None) -> None:
    if name in names():
        return
    if name in published.SETS:
        raise UserError(f"{name} has no training images: scenario.operators=[{{corrupt: {{published: {name}}}}}] tests on them")
    if _path(name).is_file():
        raise foreign_files.refusal(_path(name), EXTENSIONS)
    family = [known for known in names() if known.split("@")[0] == name.split("@")[0]]
    near = difflib.get_close_matches(name, names(), 1, 0.0)[0]
    hint = f"choose {' or '.join(family)}" if family else f"did you mean {near}?"
    looked = f"; there is no {root / name}.npz or {root / name}/train either" if root else ""
    raise UserError(f"unknown data set {name!r}; {hint}{looked} (a path needs a slash or .npz)")


def _from_path(name: str, root: Path | None, share: Share | None, by_domain: bool) -> Dataset:
    path = _path(name)
    if not path.exists() and not path.is_absolute() and root is not None and (root / path).exists():
        path = root / path
    if path.is_dir():
        return _folder(path.resolve().name, path, share, by_domain)
    if not path.exists():
        also = f" or in {root}" if root is not None and not path.is_absolute() else ""
        raise UserError(
            f"no data set at {path}{also}: expected an .npz file with {arrays.LAYOUT}, a folder with train/ and test/, "
            "or a table (.csv, .parquet) of paths and labels"
        )
    suffix = path.suffix.lower()
    if suffix in tables.SUFFIXES:
        return _finish(path.stem, tables.read_table(path, share), str(path), share)
    if suffix != ".npz":
        raise foreign_files.refusal(path, EXTENSIONS)
    return _npz(path.stem, path, share)


def _folder(name: str, path: Path, share: Share | None, by_domain: bool) -> Dataset:
    read = arrow.read_saved if arrow.is_saved(path) else domain_folders.read_domains if by_domain else folders.read_tree
    return _finish(name, read(path, share), str(path), share)


@lru_cache(maxsize=1)
def _digits() -> Dataset:
    return _finish("digits", arrays.digits())


def _npz(name: str, path: Path, share: Share | None) -> Dataset:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return _npz_at(name, path.resolve(), status.st_size, status.st_mtime_ns, share)


@lru_cache(maxsize=1)  # a sweep in one process reads its data once
def _npz_at(name: str, path: Path, size: int, mtime_ns: int, share: Share | None) -> Dataset:
    return _finish(name, arrays.read_npz(path, share), str(path), share)


@cache
def say(line: str) -> None:
    """A line for the user, once a process."""
    log.warning(line)


def _finish(name: str, pool: Pool, where: str = "", share: Share | None = None) -> Dataset:
    """Compare with the declared sizes and bring into canonical order.

    A set that somebody else has published keeps its order only where it is read as published: a copy may have another.
    """
    entry = vision.TABLE.get(name)
    classes, train, test = entry.sizes if entry else _SIZES.get(name, (None, None, None))
    folders.check_counts(name, pool, classes, train or None, test or None, where)
    if pool.source_order is None and entry is None:
        pool = replace(pool, source_order=np.flatnonzero(pool.split == 0))
    if entry and entry.cls.startswith("CIFAR") and isinstance(pool.images, ArrayImages):
        pool = _canonical(pool, pool.images.array)
    return _dataset(name, pool, where, share)


def _dataset(name: str, pool: Pool, where: str = "", share: Share | None = None) -> Dataset:
    """Hash a pool and make it read-only."""
    if pool.passed_over:
        say(f"{where or name}: passed over {pool.passed_over}")
    for array in (pool.y, pool.split, pool.domain, pool.source_order):
        if array is not None:
            array.flags.writeable = False
    return Dataset(
        name=name,
        images=pool.images,
        y=pool.y,
        split=pool.split,
        class_names=pool.class_names,
        sha256=content_sha256(pool),
        domain=pool.domain,
        domain_names=pool.domain_names,
        drawn=share.options() if share is not None else {},
        source_order=pool.source_order,
    )


def _canonical(pool: Pool, x: np.ndarray) -> Pool:
    """Order samples by (split, class, SHA-256 of the pixels), so that every way of storing CIFAR gives the same sample ids."""
    digests = [hashlib.sha256(row.tobytes()).digest() for row in x]
    rows = sorted(range(len(x)), key=lambda i: (int(pool.split[i]), int(pool.y[i]), digests[i]))
    places = None if pool.source_order is None else np.argsort(rows)[pool.source_order]
    return replace(pool, images=ArrayImages(x[rows]), y=pool.y[rows], split=pool.split[rows], source_order=places)


def content_sha256(pool: Pool) -> str:
    """Identity of the content: shapes, labels, split, domains, and the pixels.

    Images in memory: all bytes. Images in files: relative names and sizes in order, and the SHA-256 of every file where all
    of them together have at most 256 MiB. For larger sets (where reading everything would cost more than a short run) a
    file whose content changed but not its size is not noticed.
    """
    digest = hashlib.sha256(f"clbench data 1 {len(pool.y)} {len(pool.class_names)}".encode())
    columns = [pool.y.astype("<i8"), pool.split.astype("u1")]
    if pool.domain is not None:
        columns.append(pool.domain.astype("<i8"))
    for column in columns:
        digest.update(column.tobytes())
    if isinstance(pool.images, ArrayImages):
        digest.update(str(pool.images.array.shape).encode())
        digest.update(np.ascontiguousarray(pool.images.array).data)
        return digest.hexdigest()
    sizes = _sizes(pool.images)
    with_content = sum(sizes) <= HASHED_CONTENT
    for i, (name, size) in enumerate(zip(pool.files, sizes, strict=True)):
        content = hashlib.sha256(_content(pool.images, i)).hexdigest() if with_content else ""
        digest.update(f"{name}\0{size}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _sizes(images: ImageSource) -> list[int]:
    """Bytes of every encoded image."""
    if isinstance(images, arrow.EncodedImages):
        return images.sizes()
    assert isinstance(images, FileImages)
    try:
        return [path.stat().st_size for path in images.paths]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror or error}") from None


def _content(images: Any, i: int) -> bytes:
    try:
        file, _ = images.opened(i)
        with file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror or error}") from None


def _check_sha256(dataset: Dataset, name: str, root: Path | None, expected: str) -> None:
    expected = str(expected).lower().removeprefix("sha256:")
    found = [dataset.sha256]
    candidates = [_path(name)] + ([root / name, root / f"{name}.npz"] if root else [])
    path = next((p for p in candidates if p.suffix == ".npz" and p.is_file()), None)
    if path is not None and expected not in found:
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    if expected not in found:
        of_file = f" (file {path}: {found[1]})" if len(found) > 1 else ""
        raise UserError(f"data set {dataset.name} has SHA-256 {found[0]}{of_file}, expected {expected}")
