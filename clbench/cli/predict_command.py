"""`clbench predict`: what the learner of a finished run answers for new images, as CSV."""

from __future__ import annotations

import csv
import io
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from clbench.interfaces import UserError
from clbench.streams.images.class_folders import EXTENSIONS, Listing


def add_arguments(parser: ArgumentParser) -> None:
    """RECORD, FOLDER and options."""
    parser.add_argument(
        "record", metavar="RECORD", help="a record whose run had save_model=true: results/records/<run id>.json"
    )
    parser.add_argument("images", metavar="FOLDER", help="a folder with image files at any depth, or one image file")
    parser.add_argument(
        "--task", metavar="NAME", help="the experience whose classes are asked for, where the stream discloses tasks"
    )
    parser.add_argument("--top", type=int, default=1, metavar="N", help="the N best classes of each image (1)")
    parser.add_argument("--out", metavar="FILE", help="write the CSV here rather than to the terminal")
    parser.add_argument("--data-root", metavar="DIR", help="where data and weights lie (the environment's CLBENCH_DATA)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")


def run(args: Namespace) -> int:
    """Answer and print, or write -> exit code."""
    if args.top < 1:
        raise UserError(f"--top must be at least 1, got {args.top}")
    folder, files = listed(Path(args.images).expanduser())
    out = None if args.out is None else Path(args.out).expanduser()
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out: {out.parent} is no folder")
    from clbench.run.saved_learner import load

    found = load(Path(args.record).expanduser(), args.data_root, args.device)
    z = found.predict(files, args.task)
    top = min(args.top, len(found.classes if args.task is None else found.tasks[args.task]))
    shares, places = z.softmax(1).sort(dim=1, descending=True, stable=True)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    endings = ["", *(f"_{k}" for k in range(2, top + 1))]
    table.writerow(["file", *(f"{name}{ending}" for ending in endings for name in ("prediction", "confidence"))])
    for file, p, c in zip(files, shares[:, :top].tolist(), places[:, :top].tolist(), strict=True):
        cells = [cell for share, k in zip(p, c, strict=True) for cell in (found.classes[k], f"{share:.4f}")]
        table.writerow([file.relative_to(folder).as_posix(), *cells])
    if out is None:
        print(text.getvalue(), end="")
        return 0
    try:
        out.write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    print(f"{len(files)} images: {out}", file=sys.stderr)
    return 0


def listed(place: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the sorted image files at or below it. `UserError` where there is none."""
    if place.is_file():
        return place.parent, [place]
    if not place.is_dir():
        raise UserError(f"{place} does not exist")
    if not (files := Listing().images(place)):
        raise UserError(f"{place} holds no image files ({' '.join(sorted(EXTENSIONS))})")
    return place, files
