"""Images in memory: the user's own `.npz` files, checked before anything is computed from them, and scikit-learn's digits."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.scenario import ArrayImages, ImageSource
from clbench.streams.splits import FIFTH, Share, stratified

SPLIT_KEYS = ("train_x", "train_y", "test_x", "test_y")
LAYOUT = "train_x, train_y, test_x, test_y (or x, y and perhaps split, domain)"


@dataclass
class Pool:
    """What a reader found: N samples before they are named and hashed.

    files        relative names, where images lie in files
    passed_over  what a folder or a table holds besides, counted, in a few words
    source_order rows of the training images in the order of the source's own list, where the reader knows it
    """

    images: ImageSource
    y: np.ndarray
    split: np.ndarray
    class_names: tuple[str, ...]
    domain: np.ndarray | None = None
    domain_names: tuple[str, ...] = ()
    files: list[str] = field(default_factory=list)
    passed_over: str = ""
    source_order: np.ndarray | None = None


def digits() -> Pool:
    """scikit-learn's 1,797 grey 8x8 digits (values 0..16 -> 0..255); 20 % of each class are the test set, drawn once."""
    from sklearn.datasets import load_digits

    flat, target = load_digits(return_X_y=True)
    x = np.rint(np.asarray(flat).reshape(-1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)
    y = np.asarray(target, dtype=np.int64)
    return Pool(ArrayImages(rgb(x, "digits")), y, stratified(y), tuple(str(c) for c in range(10)))


def rgb(x: np.ndarray, where: str) -> np.ndarray:
    """Grey or colour images -> uint8 [N, H, W, 3]. uint8 stays; floats must lie in 0..1 and are rounded to 0..255."""
    if x.dtype.kind == "f":
        _check_floats(x, where)
        x = np.rint(x.astype(np.float64) * 255.0).astype(np.uint8)
    elif x.dtype != np.uint8:
        raise UserError(f"{where} must be uint8 (0..255) or float (0..1), got {x.dtype}")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise UserError(f"{where} must have shape [N, H, W], [N, H, W, 1] or [N, H, W, 3], got {list(x.shape)}")
    if 0 in x.shape:
        raise UserError(f"{where} is empty: its shape is {list(x.shape)}")
    return np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:3], 3)))


def _check_floats(x: np.ndarray, where: str) -> None:
    for name, bad in (("NaN or infinite", ~np.isfinite(x)), ("outside 0..1", (x < 0) | (x > 1))):
        if bad.any():
            index = ", ".join(str(int(i)) for i in np.unravel_index(int(bad.argmax()), x.shape))
            raise UserError(f"{where}[{index}] is {x.reshape(-1)[int(bad.argmax())]}: {name} (float images must lie in 0..1)")


def labels(y: np.ndarray, num: int, where: str) -> np.ndarray:
    """Class or domain ids -> [num] int64, checked: whole, not negative, one per image."""
    if y.ndim != 1:
        raise UserError(f"{where} must have shape [N], got {list(y.shape)}")
    if y.dtype.kind not in "iu":
        raise UserError(f"{where} must hold whole numbers, got {y.dtype}")
    if len(y) != num:
        raise UserError(f"{where} has {len(y)} entries for {num} images")
    if (y < 0).any():
        raise UserError(f"{where}[{int((y < 0).argmax())}] is {int(y.min())}: ids start at 0")
    return y.astype(np.int64)


def missing_ids(present: np.ndarray) -> list[int]:
    """The first five ids below the largest one that do not occur."""
    found = {int(c) for c in np.unique(present)}
    gaps = max(found, default=-1) + 1 - len(found)
    return list(islice((c for c in count() if c not in found), min(gaps, 5)))


def read_npz(path: Path, share: Share | None = None) -> Pool:
    """Read and check one `.npz` file. Every flaw raises a one-line `UserError` that names the file and the array.

    Where it has x and y without split, a fifth of every class is drawn as test images, or `share`.
    """
    stored = _read(path)
    try:
        two = "train_x" in stored or "test_x" in stored
        if share is not None and (two or "split" in stored):
            raise UserError("scenario.test_share has no effect: the file has test images of its own")
        return _two_parts(stored) if two else _one_part(stored, share or FIFTH)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except MemoryError:
        raise UserError(f"{path}: its arrays do not fit into memory") from None


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:  # numpy leaks a file that it opened itself, when that file is damaged
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is a single array, not an .npz file with {LAYOUT}")
            with archive:
                return {name: archive[name] for name in archive.files}
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError, NotImplementedError, MemoryError) as error:
        reason = "it holds Python objects, which are never unpickled" if "allow_pickle" in str(error) else str(error)
        raise UserError(f"cannot read {path}: damaged, or not an .npz file ({reason})") from None


def _need(stored: dict[str, np.ndarray], names: tuple[str, ...]) -> list[np.ndarray]:
    missing = [name for name in names if name not in stored]
    if missing:
        raise UserError(f"arrays missing: {', '.join(missing)}; needed are {LAYOUT}, found {', '.join(stored) or 'none'}")
    return [stored[name] for name in names]


def _two_parts(stored: dict[str, np.ndarray]) -> Pool:
    train_x, train_y, test_x, test_y = _need(stored, SPLIT_KEYS)
    parts = [rgb(train_x, "train_x"), rgb(test_x, "test_x")]
    ys = [labels(train_y, len(parts[0]), "train_y"), labels(test_y, len(parts[1]), "test_y")]
    if parts[0].shape[1:] != parts[1].shape[1:]:
        raise UserError(f"train_x holds images of {parts[0].shape[1:3]} pixels, test_x of {parts[1].shape[1:3]}")
    split = np.repeat(np.array([0, 1], np.uint8), [len(ys[0]), len(ys[1])])
    domain = None
    if "domain_train" in stored or "domain_test" in stored:
        names = ("domain_train", "domain_test")
        found = _need(stored, names)
        domain = np.concatenate([labels(d, len(y), n) for d, y, n in zip(found, ys, names, strict=True)])
    return _pool(stored, np.concatenate(parts), np.concatenate(ys), split, domain)


def _one_part(stored: dict[str, np.ndarray], share: Share) -> Pool:
    x, y = _need(stored, ("x", "y")) if {"x", "y"} & set(stored) else _need(stored, SPLIT_KEYS)[:2]
    x = rgb(x, "x")
    y = labels(y, len(x), "y")
    domain = labels(stored["domain"], len(x), "domain") if "domain" in stored else None
    if "split" not in stored:
        return _pool(stored, x, y, stratified(y, domain, share), domain)
    split = labels(stored["split"], len(x), "split")
    if split.max() > 1:
        raise UserError(f"split must hold 0 (training) and 1 (test), got {int(split.max())}")
    return _pool(stored, x, y, split.astype(np.uint8), domain)


def _pool(stored: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray, split: np.ndarray, domain: np.ndarray | None) -> Pool:
    check_classes(y, split)
    classes = _names(stored.get("classes", stored.get("names")), y, "classes")
    if domain is None:
        return Pool(ArrayImages(x), y, split, classes)
    gaps = missing_ids(domain)
    if gaps:
        raise UserError(f"domain ids {gaps} do not occur: domains are numbered 0..D-1 without gaps")
    return Pool(ArrayImages(x), y, split, classes, domain, _names(stored.get("domains"), domain, "domains"))


def check_classes(y: np.ndarray, split: np.ndarray, names: tuple[str, ...] = ()) -> None:
    """Classes must be 0..K-1, each with training and test samples."""
    train, test = np.unique(y[split == 0]), np.unique(y[split == 1])
    for part, found, other in (("training", train, test), ("test", test, train)):
        lone = [names[c] if names else int(c) for c in np.setdiff1d(other, found)[:5]]
        if len(found) == 0 or lone:
            raise UserError(f"no {part} samples of classes {lone}" if lone else f"no {part} samples at all")
    gaps = missing_ids(y)
    if gaps:
        raise UserError(f"classes {gaps} have no samples: class ids must be 0..{int(y.max())} without gaps")


def _names(stored: np.ndarray | None, ids: np.ndarray, where: str) -> tuple[str, ...]:
    number = int(ids.max()) + 1
    if stored is None:
        return tuple(str(i) for i in range(number))
    if stored.ndim != 1 or len(stored) != number:
        raise UserError(f"{where} must name {number} ids, got an array of shape {list(stored.shape)}")
    return tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in stored.tolist())
