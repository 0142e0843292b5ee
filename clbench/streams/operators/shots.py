"""Few-shot class-incremental streams: a base session, then sessions of a few new classes with a few samples each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import datasets
from clbench.streams.operators.copies import whole
from clbench.streams.operators.dealing import Pool, dealt, pool
from clbench.streams.scenario import Dataset, FileImages, Scenario


def shots(
    stream: Scenario,
    base: int = 60,
    way: int = 5,
    shot: int = 5,
    sessions: int | None = None,
    support: str = "seeded",
    seed: int = 0,
    data_root: str | None = None,
) -> Scenario:
    """Few-shot sessions: base classes with all samples, then a few new classes with a few samples each.

    FSCIL; Tao et al., CVPR 2020, arXiv 2004.10956.

    base, way, shot  60, 5, 5 on CIFAR-100 and miniImageNet; 100, 10, 5 on CUB-200
    sessions         so many after the base session; null: as many as the classes allow, the rest of them is left out
    support          seeded, or a folder with a text file for each session (session_2.txt, ...), or one file: a line for each
                     sample, its position among the training samples in the order in which the data set is published, or the
                     end of its file's path. The published index files are of this form (`data/index_list/<set>/` of
                     https://github.com/xyutao/fscil and of https://github.com/icoz69/CEC-CVPR2021)
    seed             of seeded supports; one draw says little, ten or more are needed

    Classes come in the stream's order (published protocols: natural). Test sets are whole.
    """
    for name, value in (("base", base), ("way", way), ("shot", shot)):
        whole(value, f"shots.{name}", 1)
    if sessions is not None:
        whole(sessions, "shots.sessions", 1)
    if not isinstance(support, str) or not support:
        raise UserError(f"shots.support must be seeded or a path, got {support!r}")
    if whole(seed, "shots.seed") and support != "seeded":
        raise UserError(f"shots.seed={seed} has no effect: supports are read from {support}")
    lines = None if support == "seeded" else _read(support, data_root)
    found = pool(stream, "shots")
    most = (len(found.classes) - base) // way
    wanted = most if sessions is None else sessions
    if base + way > len(found.classes):
        raise UserError(f"operator shots: {base} base classes and {way} more are more than the stream's {len(found.classes)}")
    if wanted > most:
        text = f"{base} base classes and {wanted} x {way} more"
        raise UserError(f"operator shots: {text} are more than the stream's {len(found.classes)}")
    if sessions is None and (rest := len(found.classes) - base - wanted * way):
        datasets.say(f"operator shots: {rest} of the classes are left out, too few for another session of {way}")
    listed = None if lines is None else _ids(stream.dataset, lines)
    parts = [np.sort(np.concatenate([found.train[c] for c in found.classes[:base]]))]
    for s in range(wanted):
        new = found.classes[base + s * way : base + (s + 1) * way]
        parts.append(np.sort(np.concatenate([_support(found, c, shot, seed, listed) for c in new])))
    names = ["base", *(f"session{s + 1}" for s in range(wanted))]
    return dealt(found, parts, names, "shots")


def _support(found: Pool, c: int, shot: int, seed: int, listed: list[int] | None) -> np.ndarray:
    """The samples of a class in its session."""
    if listed is None:
        ids = found.shuffled(c, "shots", seed)[:shot]
    else:
        ids = found.train[c][np.isin(found.train[c], listed)]
    if len(ids) != shot:
        where = "the stream has" if listed is None else "shots.support names"
        raise UserError(f"shots: {where} {len(ids)} training samples of class {found.stream.class_name(c)}, shots.shot={shot}")
    return ids


def _read(support: str, data_root: str | None) -> list[str]:
    """Lines of the index files."""
    places = [Path(support).expanduser(), *([Path(data_root).expanduser() / support] if data_root else [])]
    path = next((p for p in places if p.exists()), None)
    if path is None:
        raise UserError(f"shots.support: no such file or folder: {support}")
    files = [path]
    if path.is_dir():  # test_2.txt beside session_2.txt counts test samples
        files = sorted(path.glob("session_*.txt")) or sorted(path.glob("*.txt"))
    try:
        lines = [line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"shots.support: cannot read {path}: {error}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"shots.support: {path} holds no .txt file with a line")
    return lines


def _ids(data: Dataset, lines: Sequence[str]) -> list[int]:
    """The sample ids that the lines of index files name."""
    train = np.flatnonzero(data.split == 0)
    files: dict[str, list[int]] = {}
    images: Any = data.images
    if isinstance(images, FileImages) and not all(line.isdecimal() for line in lines):
        for i in train.tolist():
            path = images.paths[i]  # not every layout has a folder for each class
            for tail in {f"{path.parent.name}/{path.name}", f"{data.class_names[data.y[i]]}/{path.name}", path.name}:
                files.setdefault(tail, []).append(i)
    return [_position(data, line, len(train)) if line.isdecimal() else _file(data, line, files) for line in lines]


def _position(data: Dataset, line: str, number: int) -> int:
    """The training sample at a position of the published order."""
    if data.source_order is None:
        raise UserError(
            f"shots.support: line {line} counts {data.name} as published, and the copy that was read has an order of its own; "
            f"where the data set is read as published (torchvision's folder), the position is known"
        )
    if int(line) >= number:
        raise UserError(f"shots.support: {data.name} has {number} training samples, line {line} names a later one")
    return int(data.source_order[int(line)])


def _file(data: Dataset, line: str, files: Mapping[str, Sequence[int]]) -> int:
    """The training sample whose path ends like the line."""
    if not isinstance(data.images, FileImages):
        raise UserError(f"shots.support: line {line!r} is no whole number, and {data.name} does not lie in files")
    tail = "/".join(line.replace("\\", "/").lstrip("./").split("/")[-2:])
    hits = files.get(tail, ())
    if len(hits) != 1:
        raise UserError(f"shots.support: {len(hits)} training files of {data.name} end with {tail}")
    return hits[0]
