"""Recompute what can be recomputed, and refuse a record that contradicts itself."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clbench import metrics, record
from clbench.interfaces import UserError


@dataclass(frozen=True)
class Verdict:
    """One record: `verified`, `unfinished` or `failed`, with reasons; `notes` are worth knowing but not wrong."""

    name: str
    verdict: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def verify(path: str | pathlib.Path) -> tuple[str, int]:
    """Check a record or a results folder -> (text, exit code: 1 if a record is refused)."""
    found = verdicts(pathlib.Path(path).expanduser())
    lines = []
    for v in found:
        why = "; ".join([*v.reasons, *(f"note: {note}" for note in v.notes)])
        lines.append(f"{v.verdict:<10}  {v.name}" + (f"  {why}" if why else ""))
    bad = sum(v.verdict == "failed" for v in found)
    good = sum(v.verdict == "verified" for v in found)
    rest = len(found) - bad - good
    lines.append(f"{len(found)} records: {good} verified, {bad} refused" + (f", {rest} unfinished" if rest else ""))
    return "\n".join(lines), 1 if bad else 0


def verdicts(path: pathlib.Path) -> list[Verdict]:
    """A verdict for every record; `path` is a file, a folder of records, or a results folder."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    folder = path / "records" if (path / "records").is_dir() else path
    files = sorted(folder.glob("*.json")) if folder.is_dir() else [path]
    results = files[0].parent.parent if files else path
    made, read = [], []
    for file in files:
        try:
            entry = record.read(file)
        except UserError as error:
            made.append(Verdict(file.name, "failed", (str(error).split(": ", 1)[-1],)))
            continue
        read.append(entry)
        made.append(_one(file, entry, results))
    return made + list(_gaps(read))


def _one(file: pathlib.Path, entry: dict[str, Any], results: pathlib.Path) -> Verdict:
    try:
        reasons = [*_identity(file, entry), *_manifest(entry, results)]
        if entry["status"] == "ok":
            reasons += [*_counts(entry), *_budget(entry)]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reasons = [f"a part is missing or of the wrong kind: {type(error).__name__}: {error}"]
    notes = []
    sha = entry["scenario"].get("manifest_sha256", "")
    if not (results / "manifests" / f"{sha}.json").exists():
        notes.append("its manifest is not at hand")
    if reasons:
        return Verdict(file.name, "failed", tuple(reasons), tuple(notes))
    if entry["status"] != "ok":
        return Verdict(file.name, "unfinished", (f"status {entry['status']}",), tuple(notes))
    return Verdict(file.name, "verified", (), tuple(notes))


def _identity(file: pathlib.Path, entry: Mapping[str, Any]) -> Iterator[str]:
    if entry.get("checksum") != record.checksum(dict(entry)):
        yield "its checksum does not fit its content"
    if file.stem != entry["run_id"]:
        yield f"the file is named {file.stem}, the record says run {entry['run_id']}"
    if entry["numbers_version"] == record.NUMBERS_VERSION:
        plugin = entry["learner"].get("plugin")
        sha, weights = entry["scenario"]["manifest_sha256"], entry["model"]["state_sha256"]
        if record.run_id(entry["config"], sha, weights, plugin) != entry["run_id"]:
            yield "run_id is not the hash of its configuration, manifest and weights"
    if entry["config"].get("seed") != entry["seed"]:
        yield "seed differs from the configuration's"


def _counts(entry: Mapping[str, Any]) -> Iterator[str]:
    n, first = entry["n"], entry["first_seen"]
    rows, per_class, class_n = entry["correct"], entry["class_correct"], entry["class_n"]
    steps = entry["scenario"]["num_experiences"]
    if len(rows) != steps:
        yield f"{len(rows)} rows for {steps} experiences"
        return
    for j, sizes in enumerate(class_n):
        if sum(sizes) != n[j]:
            yield f"class_n of set {j} sums to {sum(sizes)}, n is {n[j]}"
    task_incremental = entry["scenario"].get("kind") == "task_incremental"
    for i, row in enumerate(rows):
        for j, count in enumerate(row):
            where = f"correct[{i}][{j}]"
            if count is None:
                if first[j] <= i:
                    yield f"{where} is missing although set {j} was seen"
                continue
            masked, top5 = entry["correct_masked"][i][j], entry["correct_top5"][i][j]
            classes = per_class[i][j]
            if not 0 <= count <= n[j]:
                yield f"{where} = {count} is outside 0..{n[j]}"
            if sum(classes) != count or len(classes) != len(class_n[j]):
                yield f"class_correct[{i}][{j}] sums to {sum(classes)}, correct is {count}"
            if any(not 0 <= c <= m for c, m in zip(classes, class_n[j], strict=False)):
                yield f"class_correct[{i}][{j}] is outside the class sizes"
            if not count <= masked <= n[j] or (task_incremental and masked != count):
                yield f"correct_masked[{i}][{j}] = {masked} does not fit correct = {count}"
            if not task_incremental and not count <= top5 <= n[j]:
                yield f"correct_top5[{i}][{j}] = {top5} does not fit correct = {count}"
    values = metrics.summary(entry)
    if any(v < -1 - 1e-9 or v > 1 + 1e-9 for v in values.values() if v == v):
        yield "a derived number is outside -1..1"


def _budget(entry: Mapping[str, Any]) -> Iterator[str]:
    budget = entry["scenario"]["budget"]
    for name in ("exemplars", "exemplar_bytes", "stored_bytes"):
        limit, used = budget.get(name), entry[name]
        if limit is not None and used > limit:
            yield f"{name} = {used}, the budget allows {limit}"
    if "reference" in entry.get("marks", ()):
        return
    sizes = [e["num_train"] for e in entry["scenario"]["experiences"]]
    if entry["visits"]["new"] > budget["epochs"] * sum(sizes):
        yield f"{entry['visits']['new']} visits to new samples, the budget allows {budget['epochs'] * sum(sizes)}"
    limit = budget.get("sample_visits")
    if limit is not None and sum(entry["visits"].values()) > limit * len(sizes):
        yield f"{sum(entry['visits'].values())} sample visits, the budget allows {limit} in each experience"


def _manifest(entry: Mapping[str, Any], results: pathlib.Path) -> Iterator[str]:
    sha = entry["scenario"]["manifest_sha256"]
    path = results / "manifests" / f"{sha}.json"
    if not path.exists():
        return
    from clbench.streams.manifest import Manifest

    try:
        manifest = Manifest.load(path)
    except UserError as error:
        yield str(error)
        return
    if manifest.sha256 != sha:
        yield f"{path.name} holds another stream"
    if [len(e.ids) for e in manifest.evals] != entry["n"]:
        yield "n differs from the manifest"
    if list(manifest.class_order) != list(entry["scenario"]["class_order"]):
        yield "class_order differs from the manifest"
    if [e.first_seen for e in manifest.evals] != list(entry["first_seen"]):
        yield "first_seen differs from the manifest"


def _gaps(entries: Sequence[Mapping[str, Any]]) -> Iterator[Verdict]:
    from clbench.report.table import variant

    seeds: dict[str, list[int]] = {}
    for entry in entries:
        seeds.setdefault(f"{entry['scenario']['name']} {entry['learner']['name']} {variant(entry)}", []).append(entry["seed"])
    for name, found in sorted(seeds.items()):
        if len(found) != len(set(found)):
            yield Verdict(name, "failed", (f"a seed occurs twice: {sorted(found)}",))
