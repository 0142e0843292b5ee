"""Tables of images: `.csv`, `.tsv` or `.parquet` files with a column of paths and one of labels, perhaps of splits and domains.

    path    path, file, filename, file_name, filepath, image, image_path   relative to the table's folder, or absolute; in Arrow
                                                                           tables also the image itself
    label   label, class, class_name, category, target, y                  numbers or names
    split   split, subset, partition, set                                  train or training; test or testing; val, valid or
                                                                           validation; 0 for training and 1 for test
    domain  domain, session, environment                                   domains in order of their first row

Column names are compared without case. Class ids are positions among the labels: in numerical order where all are whole
numbers, else sorted as text; the labels are the classes' names. Samples keep the order of the rows. Validation rows are test
samples where there are no others, and are passed over (and counted) where there are.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.images.arrays import Pool, check_classes
from clbench.streams.scenario import FileImages, ImageSource
from clbench.streams.splits import Share, stratified

SUFFIXES = (".csv", ".tsv", ".parquet")
COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "image", "image_path"),
    "label": ("label", "class", "class_name", "category", "target", "y"),
    "split": ("split", "subset", "partition", "set"),
    "domain": ("domain", "session", "environment"),
}
_PARTS = {"train": 0, "training": 0, "0": 0, "test": 1, "testing": 1, "1": 1, "val": 2, "valid": 2, "validation": 2}
_NEEDED = "a table of images needs a column of paths (path, file, ...) and one of labels (label, class, ...)"


def read_table(path: Path, share: Share | None = None) -> Pool:
    """Read a table of paths and labels. Every flaw raises a one-line `UserError` that names the file and the row."""
    if path.suffix.lower() == ".parquet":
        from clbench.streams.images import arrow

        return arrow.read_parquet(path, share)
    columns = _read_csv(path)
    found = chosen_columns(list(columns), str(path))
    paths = columns[found["path"]]

    def images(rows: np.ndarray) -> tuple[ImageSource, list[str]]:
        return files_of(path, [paths[i] for i in rows.tolist()])

    texts = {role: columns[name] for role, name in found.items() if role != "path"}
    return pool_of(texts, images, share, str(path), paths)


def _read_csv(path: Path) -> dict[str, list[str]]:
    """Columns of a table as text. The first line names them."""
    import pandas

    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # rows longer than the first
            frame = pandas.read_csv(
                path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False
            )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # pandas raises ParserError, EmptyDataError, UnicodeDecodeError, ...
        raise UserError(f"cannot read {path} as a table of text: {' '.join(str(error).split())}") from None
    return {str(name): [str(value) for value in frame[name]] for name in frame.columns}


def chosen_columns(names: Sequence[str], where: str) -> dict[str, str]:
    """Role -> name of the column that has it."""
    found = {}
    for role, known in COLUMNS.items():
        fitting = [name for name in names if name.strip().lower() in known]
        if len(fitting) > 1:
            raise UserError(f"{where}: columns {' and '.join(fitting)} could both be the {role}; rename or remove all but one")
        if fitting:
            found[role] = fitting[0]
    if "path" not in found or "label" not in found:
        raise UserError(f"{where}: {_NEEDED}; it has {', '.join(names) or 'none'}")
    return found


def files_of(table: Path, paths: Sequence[str]) -> tuple[ImageSource, list[str]]:
    """Images at paths relative to the table's folder, and their names."""
    for row, text in enumerate(paths):
        if not text.strip():
            raise UserError(f"{table}, row {row + 1}: no path")
    return FileImages([table.parent / text for text in paths]), [Path(text).as_posix() for text in paths]


Reader = Callable[[np.ndarray], tuple[ImageSource, list[str]]]


def pool_of(
    texts: dict[str, list[str]],
    images: Reader,
    share: Share | None,
    where: str,
    paths: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Pool:
    """Columns of text (label, perhaps split and domain) -> samples; `images` makes the source of the rows that are used.

    paths  of the images, to find those that stand in several rows
    names  of the classes, where the labels are their positions; those without a sample are left out
    """
    labels = [text.strip() for text in texts["label"]]
    if not labels:
        raise UserError(f"{where} has no rows")
    if "" in labels:
        raise UserError(f"{where}, row {labels.index('') + 1}: no label")
    parts = _parts(texts["split"], where) if "split" in texts else None
    if parts is not None and share is not None:
        raise UserError(f"scenario.test_share has no effect: {where} has test images of its own")
    if parts is None and share is None:
        raise UserError(f"{where} has no column split (train, test); scenario.test_share=0.2 draws a fifth of every class")
    _check_once(paths, labels, parts, where)
    passed = 0 if parts is None else int((parts == 2).sum())
    rows = np.flatnonzero(parts != 2) if parts is not None else np.arange(len(labels))
    y, found = numbered([labels[i] for i in rows.tolist()])
    classes = tuple(names[int(label)] for label in found) if names else tuple(found)
    domain, domains = None, ()
    if "domain" in texts:
        of_rows = [texts["domain"][i].strip() for i in rows.tolist()]
        domains = tuple(dict.fromkeys(of_rows))
        domain = np.array([domains.index(text) for text in of_rows], np.int64)
    split = stratified(y, domain, share) if parts is None and share is not None else np.asarray(parts)[rows].astype(np.uint8)
    try:
        check_classes(y, split, classes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    source, files = images(rows)
    words = f"{passed} validation rows (there are test rows)" if passed else ""
    return Pool(source, y, split, classes, domain, domains, files, words)


def _parts(texts: Sequence[str], where: str) -> np.ndarray:
    """0 training, 1 test, 2 validation beside test rows [N]."""
    found = [_PARTS.get(text.strip().lower(), -1) for text in texts]
    if -1 in found:
        row = found.index(-1)
        raise UserError(f"{where}, row {row + 1}: split {texts[row]!r} is none of {', '.join(_PARTS)}")
    parts = np.array(found, np.uint8)
    return parts if 1 in found else np.where(parts == 2, 1, parts).astype(np.uint8)


def _check_once(paths: Sequence[str], labels: Sequence[str], parts: np.ndarray | None, where: str) -> None:
    """No image is listed twice: it could be trained and tested on, or have two labels."""
    if len(set(paths)) == len(paths):
        return
    twice = next(path for path, number in Counter(paths).items() if number > 1)
    rows = [i for i, path in enumerate(paths) if path == twice][:2]
    what = [labels[i] + ("" if parts is None else f" ({('training', 'test', 'validation')[parts[i]]})") for i in rows]
    raise UserError(f"{where}: {twice} stands in rows {rows[0] + 1} and {rows[1] + 1}, as {' and '.join(what)}")


def numbered(labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Labels as text -> class ids [N] int64 and the distinct labels in the order of their ids."""
    distinct = sorted(set(labels))
    if all(label.removeprefix("-").isdecimal() and label.isascii() for label in distinct):
        distinct.sort(key=lambda label: (int(label), label))
    ids: dict[Any, int] = {label: i for i, label in enumerate(distinct)}
    return np.array([ids[label] for label in labels], np.int64), distinct
