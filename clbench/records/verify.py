"""Recompute what can be recomputed, and say of every record how far it can be believed.

`failed`         it contradicts itself, the stream beside it, or the weights and learners that clbench knows
`self-reported`  consistent, but something that it names could not be looked at here: each reason says what
`verified`       everything that can be checked without running it again is right
`unfinished`     running, or failed with an error: it claims no result
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clbench.evaluation import edit_metrics
from clbench.interfaces import UserError
from clbench.records import (
    loss_facts,
    record,
    verify_artifacts,
    verify_counts,
    verify_edits,
    verify_losses,
    verify_rows,
    verify_texts,
)
from clbench.records.safe_text import plain
from clbench.records.variant import outside_of, variant
from clbench.records.verify_artifacts import Place


@dataclass(frozen=True)
class Verdict:
    """One record: `verified`, `self-reported`, `failed` or `unfinished`, with reasons; `notes` are worth knowing, not wrong.

    A verdict on several records together carries their names and says `failed` or `note`.
    """

    name: str
    verdict: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def verify(
    path: str | pathlib.Path, data_root: str | None = None, targets: Mapping[str, Sequence[str]] | None = None
) -> tuple[str, int]:
    """Check a record or a results folder -> (text, exit code: 1 if a record failed).

    `data_root` (else CLBENCH_DATA) is where weights files may lie; `targets` are the classes of the learners' names.
    """
    made, general, dirty = _look(pathlib.Path(path).expanduser(), data_root, targets or {})
    bad = any(v.verdict == "failed" for v in [*made, *general])
    return "\n".join([*(line(v) for v in [*made, *general]), *_summary(made, dirty)]), 1 if bad else 0


def line(v: Verdict) -> str:
    """A verdict as one line."""
    why = "; ".join([*v.reasons, *(f"note: {note}" for note in v.notes)])
    return f"{v.verdict:<13}  {plain(v.name)}" + (f"  {plain(why)}" if why else "")


def _summary(made: Sequence[Verdict], dirty: int) -> Iterator[str]:
    kinds = ("verified", "self-reported", "failed", "unfinished")
    counts = {kind: sum(v.verdict == kind for v in made) for kind in kinds}
    shown = [f"{n} {kind}" for kind, n in counts.items() if n or kind != "unfinished"]
    yield f"{len(made)} records: {', '.join(shown)}"
    if dirty:
        yield f"{dirty} of them say that clbench had changes that were not committed when they ran"


def verdicts(path: pathlib.Path, data_root: str | None = None) -> list[Verdict]:
    """A verdict for every record, then one for each group of records that do not fit together."""
    made, general, _ = _look(path, data_root, {})
    return made + general


def _look(
    path: pathlib.Path, data_root: str | None, targets: Mapping[str, Sequence[str]]
) -> tuple[list[Verdict], list[Verdict], int]:
    """`path` is a file, a folder of records, or a results folder -> (verdicts on files, on groups, records of changed code)."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    folder = path / "records" if (path / "records").is_dir() else path
    files = record.files(folder) if folder.is_dir() else [path]
    place = Place(files[0].resolve().parent.parent if files else path, verify_artifacts.data_folder(data_root), targets)
    made, groups, dirty = [], _Groups(), 0
    for file in files:
        try:
            found = record.load(file)
            entry = record.checked(found, file)
        except UserError as error:
            made.append(Verdict(file.name, "failed", (str(error).removeprefix(f"{file} "),)))
            continue
        made.append(_one(file, found, entry, place))
        groups.add(entry)
        git = entry.get("git")
        dirty += isinstance(git, dict) and bool(git.get("dirty"))
    return made, list(groups.verdicts()), dirty


def _one(file: pathlib.Path, found: dict[str, Any], entry: dict[str, Any], place: Place) -> Verdict:
    """`found` is what lies on disk, `entry` the same in today's schema."""
    reasons: list[str] = []
    gaps: list[str] = []
    notes: list[str] = []
    try:
        if found.get("checksum") != record.checksum(found):
            reasons.append("its checksum does not fit its content")
        reasons += [*_identity(file, entry), *verify_artifacts.look(entry, place, gaps)]
        if entry["status"] == "ok":
            if entry["error"] is not None:
                reasons.append("status ok with an error")
            reasons += _sums(entry, gaps, notes)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, ArithmeticError) as error:
        reasons.append(f"a part is missing or of the wrong kind: {type(error).__name__}: {error}")
    if reasons:
        return Verdict(file.name, "failed", tuple(reasons), tuple([*gaps, *notes]))
    if entry["status"] != "ok":
        return Verdict(file.name, "unfinished", (f"status {entry['status']}",), tuple([*gaps, *notes]))
    return Verdict(file.name, "self-reported" if gaps else "verified", tuple(gaps), tuple(notes))


def _sums(entry: Mapping[str, Any], gaps: list[str], notes: list[str]) -> Iterator[str]:
    """The checks of every family of evaluators that a finished record holds."""
    counts, losses = isinstance(entry.get("correct"), list), loss_facts.is_loss(entry)
    yield from verify_rows.check(entry)
    if verify_texts.is_texts(entry):
        yield from verify_texts.check(entry)
        return
    if counts:
        yield from verify_counts.check(entry)
        notes += verify_counts.notes(entry)
    if losses:
        yield from verify_losses.check(entry)
    elif edit_metrics.is_edits(entry):
        yield from verify_edits.check(entry)
    elif "sum_loss" in entry:
        gaps.append("it holds losses of another kind of stream, which are not checked")
    elif not counts:
        gaps.append("it holds no accuracies and no losses: of other evaluators only the sizes are checked")


def _identity(file: pathlib.Path, entry: Mapping[str, Any]) -> Iterator[str]:
    if file.stem != entry["run_id"]:
        yield f"the file is named {file.stem}, the record says run {entry['run_id']}"
    plugin, version = entry["learner"].get("plugin"), entry["numbers_version"]
    sha, weights = entry["scenario"]["manifest_sha256"], entry["model"]["state_sha256"]
    if record.run_id(entry["config"], sha, weights, plugin, version, outside_of(entry)) != entry["run_id"]:
        yield "run_id is not the hash of its configuration, manifest and weights"
    if entry["config"].get("seed") != entry["seed"]:
        yield "seed differs from the configuration's"


class _Groups:
    """Seeds of the records of each row of the leaderboard: none twice; a missing one is noted."""

    def __init__(self) -> None:
        self.seeds: dict[str, list[int]] = {}

    def add(self, entry: Mapping[str, Any]) -> None:
        name = f"{entry['scenario']['name']} {entry['learner']['name']} {entry['model']['name']} {variant(entry)}"
        self.seeds.setdefault(name, []).append(entry["seed"])

    def verdicts(self) -> Iterator[Verdict]:
        for name, found in sorted(self.seeds.items()):
            if len(found) != len(set(found)):
                yield Verdict(name, "failed", (f"a seed occurs twice: {sorted(found)}",))
            missing = sorted(set(range(max(found) + 1)) - set(found)) if len(found) > 1 and max(found) < 1000 else []
            if missing:
                yield Verdict(name, "note", (), (f"seeds {sorted(set(found))} are here, {missing} are not",))
