"""Recompute what can be recomputed, and refuse a record that contradicts itself."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clbench import metrics, record
from clbench.interfaces import UserError
from clbench.report import losses, verify_losses


@dataclass(frozen=True)
class Verdict:
    """One record: `verified`, `unfinished` or `failed`, with reasons; `notes` are worth knowing but not wrong.

    A verdict on several records together carries their names and says `failed` or `note`.
    """

    name: str
    verdict: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def verify(path: str | pathlib.Path) -> tuple[str, int]:
    """Check a record or a results folder -> (text, exit code: 1 if a record is refused)."""
    from clbench.report.table import plain

    made, general = _look(pathlib.Path(path).expanduser())
    lines = []
    for v in [*made, *general]:
        why = "; ".join([*v.reasons, *(f"note: {note}" for note in v.notes)])
        lines.append(f"{v.verdict:<10}  {plain(v.name)}" + (f"  {plain(why)}" if why else ""))
    bad = sum(v.verdict == "failed" for v in made)
    good = sum(v.verdict == "verified" for v in made)
    rest = len(made) - bad - good
    lines.append(f"{len(made)} records: {good} verified, {bad} refused" + (f", {rest} unfinished" if rest else ""))
    return "\n".join(lines), 1 if any(v.verdict == "failed" for v in [*made, *general]) else 0


def verdicts(path: pathlib.Path) -> list[Verdict]:
    """A verdict for every record, then one for each group of records that do not fit together."""
    made, general = _look(path)
    return made + general


def _look(path: pathlib.Path) -> tuple[list[Verdict], list[Verdict]]:
    """`path` is a file, a folder of records, or a results folder -> (verdicts on files, verdicts on groups)."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    folder = path / "records" if (path / "records").is_dir() else path
    files = sorted(folder.glob("*.json")) if folder.is_dir() else [path]
    results = files[0].resolve().parent.parent if files else path
    made, read = [], []
    manifests: dict[str, Any] = {}
    for file in files:
        try:
            entry = record.read(file)
        except UserError as error:
            made.append(Verdict(file.name, "failed", (str(error).removeprefix(f"{file} "),)))
            continue
        read.append(entry)
        made.append(_one(file, entry, results, manifests))
    return made, list(_groups(read))


def _one(file: pathlib.Path, entry: dict[str, Any], results: pathlib.Path, manifests: dict[str, Any]) -> Verdict:
    reasons: list[str] = []
    notes: list[str] = []
    try:
        reasons += [*_identity(file, entry), *_manifest(entry, results, manifests, notes)]
        if entry["status"] == "ok":
            if entry["error"] is not None:
                reasons.append("status ok with an error")
            if isinstance(entry.get("correct"), list):
                reasons += [*_sizes(entry), *_counts(entry)]
            if losses.is_loss(entry):
                reasons += verify_losses.check(entry)
            elif isinstance(entry.get("correct"), list):
                reasons += _budget(entry)
            else:
                notes.append("it holds losses of another kind of stream, which are not checked")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, ArithmeticError) as error:
        reasons.append(f"a part is missing or of the wrong kind: {type(error).__name__}: {error}")
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


def _sizes(entry: Mapping[str, Any]) -> Iterator[str]:
    """Every part of the record speaks of the same experiences, sets and classes."""
    steps, scenario = entry["scenario"]["num_experiences"], entry["scenario"]
    for key in ("correct", "correct_masked", "correct_top5", "class_correct"):
        if len(entry[key]) != steps:
            yield f"key {key!r} has {len(entry[key])} rows for {steps} experiences"
    if len(scenario["experiences"]) != steps:
        yield f"{len(scenario['experiences'])} experiences are described, num_experiences is {steps}"
    order = dict.fromkeys(c for e in scenario["experiences"] for c in e["classes"])
    if list(order) != scenario["class_order"]:
        yield "class_order is not the order in which the experiences bring classes"
    for j, (sizes, classes) in enumerate(zip(entry["class_n"], entry["eval_classes"], strict=True)):
        if len(sizes) != len(classes) or len(set(classes)) != len(classes) or any(type(c) is not int for c in classes):
            yield f"set {j} must have a size for each of its classes, got classes {classes} and sizes {sizes}"
        if sum(sizes) != entry["n"][j] or any(type(size) is not int or size < 0 for size in sizes):
            yield f"class_n of set {j} sums to {sum(sizes)}, n is {entry['n'][j]}"


def _counts(entry: Mapping[str, Any]) -> Iterator[str]:
    """Counts lie within sizes and do not contradict each other; sets are evaluated from the moment their classes are known."""
    seen: set[int] = set()
    for i, (row, experience) in enumerate(zip(entry["correct"], entry["scenario"]["experiences"], strict=False)):
        seen |= set(experience["classes"])
        for j, count in enumerate(row):
            known = set(entry["eval_classes"][j]) <= seen
            if (count is not None) != known:
                yield f"correct[{i}][{j}] is {count}, and the classes of set {j} are {'' if known else 'not '}all seen"
            if entry["first_seen"][j] <= i and not known:
                yield f"first_seen of set {j} is {entry['first_seen'][j]}, before its classes are all seen"
            others = [entry[key][i][j] for key in ("correct_masked", "correct_top5", "class_correct")]
            others += [table[i][j] for table in entry.get("heads", {}).values()]
            if count is not None:
                yield from _cell(entry, i, j)
            elif any(other is not None for other in others):
                yield f"correct[{i}][{j}] is null, the other counts of this cell are not"
    values = metrics.summary(entry)
    if any(v < -1 - 1e-9 or v > 1 + 1e-9 for v in values.values() if v == v):
        yield "a derived number is outside -1..1"


def _cell(entry: Mapping[str, Any], i: int, j: int) -> Iterator[str]:
    """One evaluated cell. Masking cannot hurt: who is right among all classes is right among the set's own."""
    count, n, sizes = entry["correct"][i][j], entry["n"][j], entry["class_n"][j]
    masked, top5, classes = entry["correct_masked"][i][j], entry["correct_top5"][i][j], entry["class_correct"][i][j]
    disclosed = entry["scenario"].get("kind") == "task_incremental"
    if not 0 <= count <= n:
        yield f"correct[{i}][{j}] = {count} is outside 0..{n}"
    if sum(classes) != count or len(classes) != len(sizes):
        yield f"class_correct[{i}][{j}] sums to {sum(classes)}, correct is {count}"
    if any(type(c) is not int or not 0 <= c <= m for c, m in zip(classes, sizes, strict=False)):
        yield f"class_correct[{i}][{j}] is outside the class sizes"
    if not count <= masked <= n or (disclosed and masked != count):
        yield f"correct_masked[{i}][{j}] = {masked} does not fit correct = {count}"
    if not (0 if disclosed else count) <= top5 <= n:
        yield f"correct_top5[{i}][{j}] = {top5} does not fit correct = {count}"
    heads = {name: table[i][j] for name, table in entry.get("heads", {}).items()}
    for name, value in heads.items():
        if type(value) is not int or not 0 <= value <= n:
            yield f"heads.{name}[{i}][{j}] = {value} is outside 0..{n}"
    if heads and count not in heads.values():
        yield f"correct[{i}][{j}] = {count} is the count of no head"


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


def _manifest(entry: Mapping[str, Any], results: pathlib.Path, known: dict[str, Any], notes: list[str]) -> Iterator[str]:
    """The stream lies beside the records: its hash is recomputed, and the record must describe it. Read once per stream."""
    sha, scenario = entry["scenario"]["manifest_sha256"], entry["scenario"]
    path = results / "manifests" / f"{sha}.json"
    if not isinstance(sha, str) or not re.fullmatch(r"[0-9a-f]{64}", sha) or not path.exists():
        notes.append("its manifest is not at hand")
        return
    if losses.is_loss(entry):
        yield from verify_losses.manifest(entry, path, sha, known)
        return
    if sha not in known:
        from clbench.streams.manifest import Manifest

        try:
            known[sha] = Manifest.load(path)
        except UserError as error:
            known[sha] = str(error)
    manifest = known[sha]
    if isinstance(manifest, str):
        yield manifest
        return
    if manifest.sha256 != sha:
        yield f"{path.name} holds another stream"
    steps = [(e.name, list(e.classes), e.task, len(e.train)) for e in manifest.experiences]
    pairs = {
        "n": (entry["n"], [len(e.ids) for e in manifest.evals]),
        "first_seen": (entry["first_seen"], [e.first_seen for e in manifest.evals]),
        "eval_classes": (entry.get("eval_classes"), [list(e.classes) for e in manifest.evals]),
        "kind": (scenario["kind"], manifest.kind),
        "class_order": (scenario["class_order"], list(manifest.class_order)),
        "budget": (scenario["budget"], dict(manifest.budget)),
        "experiences": ([(e["name"], e["classes"], e["task"], e["num_train"]) for e in scenario["experiences"]], steps),
    }
    yield from (f"{name} differs from the manifest" for name, (said, true) in pairs.items() if said != true)


def _groups(entries: Sequence[Mapping[str, Any]]) -> Iterator[Verdict]:
    """Records of one row of the leaderboard: no seed twice; a missing seed is noted."""
    from clbench.report.table import variant

    seeds: dict[str, list[int]] = {}
    for entry in entries:
        name = f"{entry['scenario']['name']} {entry['learner']['name']} {entry['model']['name']} {variant(entry)}"
        seeds.setdefault(name, []).append(entry["seed"])
    for name, found in sorted(seeds.items()):
        if len(found) != len(set(found)):
            yield Verdict(name, "failed", (f"a seed occurs twice: {sorted(found)}",))
        missing = sorted(set(range(max(found) + 1)) - set(found)) if len(found) > 1 and max(found) < 1000 else []
        if missing:
            yield Verdict(name, "note", (), (f"seeds {sorted(set(found))} are here, {missing} are not",))
