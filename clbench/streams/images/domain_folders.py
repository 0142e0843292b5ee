"""Images in folders by domain and class: <root>/<domain>/<class>/..., and published sets of that form, checked by their counts.

A domain is divided into training and test images by lists beside it (<domain>_train.txt and <domain>_test.txt, in <root> or
<root>/splits: a path below <root> and a class id on every line, as of DomainNet), by folders <domain>/train/<class>/ and
<domain>/test/<class>/, or, on request, by a drawn share of every class. All domains have the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.images.arrays import Pool, check_classes
from clbench.streams.images.class_folders import Listing
from clbench.streams.images.folders import TEST_NAMES
from clbench.streams.scenario import FileImages
from clbench.streams.splits import FIFTH, Share, stratified


@dataclass(frozen=True)
class DomainSet:
    """A published set: its folder's names, and what must be found there.

    domains  name -> (training images, test images); without lists, where a fifth is drawn: (all images, 0)
    classes  their number; `class_names` where their order is not that of text
    tested   domains whose images are test images, all of them; then the others have none
    total    (training images, test images) of all domains together, where the single counts are not known
    """

    folders: tuple[str, ...]
    domains: dict[str, tuple[int, int] | None]
    classes: int
    source: str
    class_names: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()
    total: tuple[int, int] | None = None


SETS: dict[str, DomainSet] = {
    # Peng et al., ICCV 2019 (arXiv 1812.01754), cleaned version: 586,575 images
    "domainnet": DomainSet(
        ("domainnet", "DomainNet"),
        {
            "clipart": (33_525, 14_604),
            "infograph": (36_023, 15_582),
            "painting": (50_416, 21_850),
            "quickdraw": (120_750, 51_750),
            "real": (120_906, 52_041),
            "sketch": (48_212, 20_916),
        },
        345,
        "http://ai.bu.edu/M3SDA (cleaned version: an archive and two lists for each domain)",
    ),
    # Venkateswara et al., CVPR 2017 (arXiv 1706.07522): 15,588 images, no published division
    "office_home": DomainSet(
        ("office_home", "OfficeHome", "OfficeHomeDataset_10072016"),
        {"Art": (2_427, 0), "Clipart": (4_365, 0), "Product": (4_439, 0), "Real World": (4_357, 0)},
        65,
        "https://www.hemanthdv.org/officeHomeDataset.html",
    ),
    # Lomonaco & Maltoni, CoRL 2017 (arXiv 1705.03550): 11 sessions of 50 objects; sessions 3, 7 and 10 are for testing
    "core50": DomainSet(
        ("core50", "core50_128x128"),
        {f"s{i}": None for i in range(1, 12)},
        50,
        "https://vlomonaco.github.io/core50 (core50_128x128.zip)",
        tuple(f"o{i}" for i in range(1, 51)),
        ("s3", "s7", "s10"),
        (119_894, 44_972),
    ),
}


@dataclass
class _Found:
    """Images as they are found: path, name of the class, position of the domain, 0 training and 1 test."""

    paths: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    domain: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # of classes, where lists say them

    def add(self, paths: Sequence[Path], name: str, domain: int, part: int) -> None:
        self.paths += paths
        self.names += [name] * len(paths)
        self.domain += [domain] * len(paths)
        self.split += [part] * len(paths)


def read_set(name: str, root: Path, share: Share | None) -> Pool:
    """Read a published set below the data root and compare it with what is known of it."""
    known = SETS[name]
    places = [root / one for one in known.folders]
    inner = [place / one for place in places for one in known.folders if (place / one).is_dir()]
    folder = next((place for place in [*inner, *places] if place.is_dir()), None)
    if folder is None:
        looked = " and ".join(f"{place}/<domain>/<class>/" for place in places)
        raise UserError(f"data set {name} not found: looked for {looked}; get it from {known.source}")
    pool = read_domains(folder, share, tuple(known.domains), known.class_names, known.tested, fallback=FIFTH)
    _check_counts(name, pool, known, folder)
    return pool


def _check_counts(name: str, pool: Pool, known: DomainSet, folder: Path) -> None:
    assert pool.domain is not None
    if len(pool.class_names) != known.classes:
        raise UserError(f"{folder} is not {name}: {len(pool.class_names)} classes found, {known.classes} expected")
    cases = [(f"domain {d}", pool.domain == i, counts) for i, (d, counts) in enumerate(known.domains.items())]
    for where, rows, counts in [*cases, ("all domains", np.ones(len(pool.y), bool), known.total)]:
        if counts is None:
            continue
        split = pool.split[rows]
        found = (int((split == 0).sum()), int((split == 1).sum())) if counts[1] else (len(split), 0)
        if found != counts:
            words = "{} + {} images" if counts[1] else "{} images"
            raise UserError(f"{folder} is not {name}: {where}: {words.format(*found)} found, {words.format(*counts)} expected")


def read_domains(
    root: Path,
    share: Share | None,
    domains: Sequence[str] = (),
    classes: Sequence[str] = (),
    tested: Sequence[str] = (),
    fallback: Share | None = None,
) -> Pool:
    """Read <root>/<domain>/<class>/...; domains and class ids are sorted as text unless they are given or lists say them.

    `fallback` is the share that is drawn where none is asked for. Every flaw raises `UserError` with a path.
    """
    listing, found = Listing(), _Found()
    domains = list(domains) or [d for d in listing.classes(root) if d != "splits"]
    lists = [_lists(root, d) for d in domains]
    if any(lists) and not all(lists):
        lone = domains[lists.index(None)]
        raise UserError(f"{root}: no {lone}_train.txt and {lone}_test.txt beside the lists of other domains")
    divided = bool(lists) and lists[0] is None and (_folder(root, domains[0]) / "train").is_dir()
    for i, domain in enumerate(domains):
        if pair := lists[i]:
            for part, path in enumerate(pair):
                _add_listed(found, root, path, i, part)
        elif divided:
            _add_divided(found, listing, _folder(root, domain), i)
        else:
            _add_classes(found, listing, _folder(root, domain), i, int(domain in tested))
    drawn = not (any(lists) or divided or tested)
    if share is not None and not drawn:
        raise UserError(f"scenario.test_share has no effect: {root} has test images of its own")
    if drawn and share is None and fallback is None:
        raise UserError(f"{root} has domains without test images: scenario.test_share=0.2 draws a fifth of every class")
    return _pool(found, root, domains, classes, listing, (share or fallback) if drawn else None)


def _pool(
    found: _Found, root: Path, domains: Sequence[str], classes: Sequence[str], listing: Listing, share: Share | None
) -> Pool:
    names = tuple(classes) or tuple(sorted(set(found.names), key=lambda name: (found.ids.get(name, 0), name)))
    if unknown := sorted(set(found.names) - set(names)):
        raise UserError(f"{root} holds a class {unknown[0]} that is none of {names[0]}..{names[-1]}")
    ids = {name: i for i, name in enumerate(names)}
    y, domain = np.array([ids[name] for name in found.names], np.int64), np.array(found.domain, np.int64)
    split = np.array(found.split, np.uint8) if share is None else stratified(y, domain, share)
    try:
        check_classes(y, split, names)
    except UserError as error:
        raise UserError(f"{root}: {error}") from None
    files = [path.relative_to(root).as_posix() for path in found.paths]
    return Pool(FileImages(found.paths), y, split, names, domain, tuple(domains), files, listing.text())


def _folder(root: Path, domain: str) -> Path:
    """The folder of a domain; some copies have underscores for spaces."""
    places = [root / domain, root / domain.replace(" ", "_")]
    if (place := next((place for place in places if place.is_dir()), None)) is None:
        raise UserError(f"{root} has no folder of the domain {domain}")
    return place


def _lists(root: Path, domain: str) -> tuple[Path, Path] | None:
    for place in (root, root / "splits"):
        pair = (place / f"{domain}_train.txt", place / f"{domain}_test.txt")
        if all(path.is_file() for path in pair):
            return pair
    return None


def _add_classes(found: _Found, listing: Listing, folder: Path, domain: int, part: int) -> None:
    for name in listing.classes(folder):
        if not (paths := listing.images(folder / name)):
            raise UserError(f"class folder {folder / name} holds no image")
        found.add(paths, name, domain, part)


def _add_divided(found: _Found, listing: Listing, folder: Path, domain: int) -> None:
    test = next((folder / name for name in TEST_NAMES if (folder / name).is_dir()), None)
    if test is None or not (folder / "train").is_dir():
        raise UserError(f"{folder} must hold the folders train/<class>/ and test/<class>/")
    for part, place in enumerate((folder / "train", test)):
        _add_classes(found, listing, place, domain, part)


def _add_listed(found: _Found, root: Path, path: Path, domain: int, part: int) -> None:
    """Images of a list; every class has one id, every id one class, in all lists."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    names = {number: name for name, number in found.ids.items()}
    for row, line in enumerate(lines, 1):
        file, _, number = line.strip().rpartition(" ")
        if not file or not number.isdecimal() or len(Path(file).parts) < 2:
            raise UserError(f"{path}, line {row}: expected a path and a class id, got {line!r}")
        name = Path(file).parts[-2]
        if found.ids.setdefault(name, int(number)) != int(number) or names.setdefault(int(number), name) != name:
            raise UserError(f"{path}, line {row}: class {name} has the id {number}, elsewhere another")
        found.add([root / file], name, domain, part)
