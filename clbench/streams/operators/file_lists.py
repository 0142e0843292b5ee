"""Experiences as they are published in lists of files: CORe50's small batches of new instances and classes (NICv2).

Lomonaco, Maltoni & Pellegrini, "Rehearsal-free continual learning over small non-i.i.d. batches", arXiv 1907.03799. The lists
come in batches_filelists_NICv2.zip: <lists>/run<r>/train_batch_<b>_filelist.txt and test_filelist.txt, a path below the images
and a label on every line ("s11/o1/C_11_01_000.png 0"). Other lists of CORe50 (NI_inc, NC_inc, NIC_inc) have the same form.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.operators import dealing
from clbench.streams.operators.copies import whole
from clbench.streams.scenario import Dataset, FileImages, Scenario

SOURCE = "https://vlomonaco.github.io/core50 (batches_filelists_NICv2.zip)"
ARCHIVES = (".", "batches_filelists_NICv2", "batches_filelists")
PLACES = (*ARCHIVES, *(f"core50/{archive}" for archive in ARCHIVES))
TEST = "test_filelist.txt"
_BATCH = re.compile(r"train_batch_(\d+)_filelist\.txt")
DEPTH = 3  # the parts of a listed path: session, object, image


def file_lists(stream: Scenario, folder: str = "NIC_v2_79", run: int = 0, data_root: str | None = None) -> Scenario:
    """An experience for each list of training images, in the order of the lists; classes come again beside new ones.

    folder  NIC_v2_79, NIC_v2_196 or NIC_v2_391, or another one, below the data root or below core50/; or a path
    run     which of its runs: another order of the batches

    Samples that the stream lacks, by its limits, are passed over, and an experience without samples is left out. An evaluation
    set holds the listed test images of the classes that appear first in its experience: together the common test set. Raises
    `UserError` for a list that names what the data set lacks, or that calls one class by two labels.
    """
    if not isinstance(folder, str) or not folder.strip():
        raise UserError(f"file_lists.folder must be a name or a path, got {folder!r}")
    whole(run, "file_lists.run")
    dealing.without_tasks(stream, "file_lists")
    found, data = dealing.pool(stream, "file_lists"), stream.dataset
    place = _folder(folder, run, data_root)
    batches, known, called = _batches(place, folder), _known(data), {}
    parts = [_listed(path, known, data, 0, called) for path in batches]
    _check_once(batches, parts, data)
    tested = _listed(place / TEST, known, data, 1, called)
    held_out = {c: ids[(data.split[ids] == 0) | np.isin(ids, tested)] for c, ids in found.test.items()}
    kept = np.concatenate(list(found.train.values()))
    parts = [ids[np.isin(ids, kept)] for ids in parts]
    return dealing.dealt(replace(found, test=held_out), parts, [f"batch{i}" for i in range(len(parts))], "file_lists")


def _folder(name: str, run: int, data_root: str | None) -> Path:
    """The folder of a run's lists."""
    root = data_root or os.environ.get("CLBENCH_DATA")
    places = [Path(name), *(Path(root) / place / name for place in PLACES if root)]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        looked = f"{name} or below {root}, {root}/core50" if root else name
        raise UserError(f"file_lists.folder: no lists of batches at {looked}; they come from {SOURCE}")
    if not (folder / f"run{run}").is_dir():
        runs = sorted(int(path.name[3:]) for path in folder.glob("run*") if path.name[3:].isdecimal())
        raise UserError(f"file_lists.run={run}: {folder} has the runs {', '.join(map(str, runs)) or 'none'}")
    return folder / f"run{run}"


def _batches(folder: Path, name: str) -> list[Path]:
    """The lists of training images in the order of their numbers, which are 0, 1, 2, ..."""
    found = {int(m[1]): path for path in folder.iterdir() if (m := _BATCH.fullmatch(path.name))}
    promised = re.fullmatch(r"NIC_v2_(\d+)", Path(name).name)
    number = int(promised[1]) if promised else max(found, default=0) + 1
    if missing := [i for i in range(number) if i not in found]:
        raise UserError(f"{folder}: train_batch_{missing[0]:02d}_filelist.txt is missing, {number} lists expected")
    if len(found) > number:
        raise UserError(f"{folder} has {len(found)} lists of training images, {number} expected")
    return [found[i] for i in range(number)]


def _known(data: Dataset) -> dict[str, int]:
    """Sample ids by the last parts of their paths."""
    if not isinstance(data.images, FileImages):
        raise UserError(f"operator file_lists: lists name files, and data set {data.name} is no folder of images")
    return {"/".join(path.parts[-DEPTH:]): i for i, path in enumerate(data.images.paths)}


def _listed(path: Path, known: Mapping[str, int], data: Dataset, part: int, called: dict[int, int]) -> np.ndarray:
    """Sample ids of a list, in its order. `called` is what classes are called so far, by class."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    ids = []
    for row, line in enumerate(lines, 1):
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.isdecimal():
            raise UserError(f"{path}, line {row}: expected a path and a label, got {line!r}")
        i = known.get(file)
        if i is None or data.split[i] != part:
            kind = "test" if part else "training"
            raise UserError(f"{path}, line {row}: {file} is no {kind} image of data set {data.name}")
        c = int(data.y[i])
        if called.setdefault(c, int(label)) != int(label):
            name = data.class_names[c]
            raise UserError(f"{path}, line {row}: class {name} has the label {label}, elsewhere {called[c]}")
        ids.append(i)
    if len(set(called.values())) != len(called):
        raise UserError(f"{path}: two classes have the same label, as in lists of categories; lists of objects are read")
    if not ids:
        raise UserError(f"{path} is empty")
    return np.array(ids, np.int64)


def _check_once(batches: Sequence[Path], parts: Sequence[np.ndarray], data: Dataset) -> None:
    """Every training image comes once: lists that add up (NIC_cum) are not batches."""
    seen = np.zeros(len(data), bool)
    for path, ids in zip(batches, parts, strict=True):
        if seen[ids].any() or len(np.unique(ids)) < len(ids):
            raise UserError(f"{path} names images that were listed before: lists that add up are no batches, choose NIC_v2_79")
        seen[ids] = True
