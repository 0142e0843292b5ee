"""What lies outside a record and speaks for it: the stream, the weights, the code. Nothing of a record is imported or run.

Each check yields reasons to call a record `failed` (what lies here contradicts it) and appends to `gaps` what could not be
looked at here: a record with gaps is `self-reported`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clbench.config.moved import current
from clbench.config.registry import operators_after
from clbench.config.signatures import problems, split_target
from clbench.interfaces import UserError
from clbench.records import record

HERE = pathlib.Path(__file__).resolve().parent
MODELS = HERE.parent / "models"
_HEADS = ("head.", "head_drop.", "fc.", "classifier.", "head_dist.", "pre_logits.")  # as `models.weights` leaves them out
Entry = Mapping[str, Any]


@dataclass
class Place:
    """Where the checks look: the results folder, the folder of data and weights, names of learners with their classes."""

    results: pathlib.Path
    data_root: pathlib.Path | None = None
    targets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _manifests: dict[str, Any] = field(default_factory=dict)
    _configs: dict[str, list[str]] = field(default_factory=dict)

    def manifest(self, sha: str, path: pathlib.Path) -> Any:
        """A manifest of images or of texts, or why it is none; each file is read once."""
        if sha not in self._manifests:
            from clbench.streams.manifest import Manifest

            try:
                self._manifests[sha] = Manifest.load(path)
            except UserError as error:
                self._manifests[sha] = str(error)
        return self._manifests[sha]

    def unresolved(self, config: Entry) -> list[str]:
        """Why a configuration no longer fits the classes that it names; looked up once for each set of options."""
        parts = {group: config.get(group) for group in ("scenario", "learner", "model")}
        key = record.digest(parts)
        if key not in self._configs:
            self._configs[key] = [line for group, node in parts.items() for line in _unresolved(group, node)]
        return self._configs[key]


def _unresolved(group: str, node: Any) -> list[str]:
    if not isinstance(node, Mapping) or "_target_" not in node:
        return [f"{group} names no _target_"]
    try:
        plain = node if operators_after(node) is None else {key: node[key] for key in node if key != "operators"}
        found = problems(plain, group, ("model", "runtime") if group == "learner" else ())
        return [line for line in found if not line.startswith("scenario.path is missing")]  # which no record has
    except (UserError, OSError, ValueError) as error:
        return [f"{group}: {error}"]


def look(entry: Entry, place: Place, gaps: list[str]) -> Iterator[str]:
    """Everything below."""
    yield from _manifest(entry, place, gaps)
    yield from _weights(entry, place, gaps)
    yield from _code(entry, place, gaps)
    yield from _predictions(entry, place)


def _predictions(entry: Entry, place: Place) -> Iterator[str]:
    """Answers that lie beside the records are those that the record names, and counting them again gives its counts."""
    from clbench.records import predictions

    path, said = predictions.path_of(place.results, str(entry["run_id"])), entry.get("predictions_sha256")
    if said is None or not path.exists():
        return
    if predictions.sha256(path) != said:
        yield f"{path.name} does not hold the predictions that the record names"
        return
    try:
        found = predictions.read(path)
    except UserError as error:
        yield str(error)
        return
    for i, row in enumerate(entry["correct"] or ()):
        for j, count in enumerate(row):
            right = found.right(i, j)
            if (None if right is None else int(right.sum())) != count:
                yield f"its predictions of set {j} after experience {i + 1} do not give the {count} right answers of the record"
                return


def _manifest(entry: Entry, place: Place, gaps: list[str]) -> Iterator[str]:
    """The stream lies beside the records: its hash is recomputed, and the record must describe it."""
    scenario = entry["scenario"]
    sha = scenario["manifest_sha256"]
    path = place.results / "manifests" / f"{sha}.json"
    if not isinstance(sha, str) or not re.fullmatch(r"[0-9a-f]{64}", sha) or not path.exists():
        gaps.append("its manifest is not at hand")
        return
    manifest = place.manifest(sha, path)
    if isinstance(manifest, str):
        yield manifest
        return
    if manifest.sha256 != sha:
        yield f"{path.name} holds another stream"
    if scenario["kind"] != manifest.kind:
        yield "kind differs from the manifest"
        return
    yield from (f"{name} differs from the manifest" for name, (said, true) in _told(entry, manifest).items() if said != true)


def _told(entry: Entry, manifest: Any) -> dict[str, tuple[Any, Any]]:
    """What a record says of its stream, by name, and what the manifest says."""
    from clbench.streams.manifest_text import described

    found = described(manifest)
    about = found.pop("scenario")
    pairs = {name: (entry["scenario"][name], value) for name, value in about.items() if name in entry["scenario"]}
    return pairs | {name: (entry.get(name), value) for name, value in found.items()}


def _weights(entry: Entry, place: Place, gaps: list[str]) -> Iterator[str]:
    """Weights that clbench ships or knows, or that lie here, have the hashes that the record names; random ones have none."""
    model = entry["model"]
    source, sha = model.get("source"), model.get("file_sha256")
    pinned = entry["config"].get("model", {}).get("sha256")
    if pinned is not None and str(pinned).lower() != sha:
        yield f"its weights have SHA-256 {str(sha)[:12]}, its configuration asks for {str(pinned)[:12]}"
    if source == "none":
        if sha is not None:
            yield "random weights have no file, and a hash of one is given"
        return
    if not isinstance(source, str) or not isinstance(sha, str):
        gaps.append(f"no file and hash of its weights are given (source {source})")
        return
    name = source.removeprefix("package:")
    inside = MODELS / name
    here = None if place.data_root is None else place.data_root / name
    if source.startswith("package:") and pathlib.PurePath(name).name == name and inside.is_file():
        found = _hashes(inside)
        if found[0] != sha:
            said = f"{source} has SHA-256 {found[0][:12]}, the record says {sha[:12]}"
            if entry["numbers_version"] == record.numbers_version(entry["config"]):
                yield said
            gaps.append(said)
            return
        states = [found[1]]
    elif (known := _known().get(sha)) is not None:
        if known["timm"] != model.get("timm"):
            yield f"weights {sha[:12]} are timm's {known['timm']}, the record says {model.get('timm')}"
        states = known["state_sha256"]
    elif pathlib.PurePath(name).name == name and here is not None and here.is_file():
        found = _hashes(here)
        if found[0] != sha:
            gaps.append(f"weights {name} here have SHA-256 {found[0][:12]}, the record says {sha[:12]}")
            return
        states = [found[1]]
    else:
        gaps.append(f"weights {source} ({sha[:12]}) are not at hand")
        return
    if model.get("state_sha256") not in states:
        gaps.append("the state that its weights gave cannot be compared without building the model (--rerun builds it)")


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    """Weights files that clbench knows without having them: SHA-256 -> timm tag, and the states that models in conf get."""
    return json.loads((HERE / "known_weights.json").read_text(encoding="ascii"))


@functools.cache
def _hashes(path: pathlib.Path) -> tuple[str, str | None]:
    """SHA-256 of a weights file, and of the state that it gives (`weights.state_sha256`), which only safetensors tell."""
    with path.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    if path.suffix != ".safetensors":
        return whole, None
    import numpy as np
    from safetensors.numpy import load_file

    try:
        state = {name: value for name, value in load_file(path).items() if not name.startswith(_HEADS)}
    except Exception:  # a kind of number that NumPy lacks, or a damaged file
        return whole, None
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].astype(np.float32) if state[name].dtype.kind == "f" else state[name]
        digest.update(f"{name} torch.{value.dtype} {tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return whole, digest.hexdigest()


def _code(entry: Entry, place: Place, gaps: list[str]) -> Iterator[str]:
    """The names are those of the configuration; its classes still take its options; a plug-in is the one that lies here."""
    config, learner = entry["config"], entry["learner"]
    for part in ("scenario", "model"):
        node = config.get(part)
        if isinstance(node, Mapping) and isinstance(node.get("name"), str) and node["name"] != entry[part]["name"]:
            yield f"{part}.name is {entry[part]['name']}, its configuration says {node['name']}"
    target = config["learner"].get("_target_")
    if target is not None and learner.get("target", target) != target:
        yield f"learner.target is {learner.get('target')}, its configuration says {target}"
    can, tuning = learner.get("capabilities") or {}, entry.get("tuning") or {}
    wanted = [name for name in ("transductive", "adapts_at_test") if can.get(name)]
    wanted += [*(["reference"] if can.get("stores_all_data") else []), *tuning.get("marks", ())]
    if missing := [mark for mark in wanted if mark not in entry.get("marks", ())]:
        yield f"it lacks the mark {missing[0]}, which its capabilities or its tuning ask for"
    known = place.targets.get(learner["name"], ())
    if known and target is not None and current(target) not in known:
        yield f"it calls itself {learner['name']}, which is {known[0]}; its configuration says {target}"
    version = record.numbers_version(config)
    if entry["numbers_version"] != version or "legacy" in entry.get("marks", ()):
        gaps.append(f"other code made its numbers (numbers_version {entry['numbers_version']}, here {version})")
        return
    plugin = learner.get("plugin")
    model = (config.get("model") or {}).get("_target_")
    outside = [str(one) for one in (target, model) if one is not None and str(one).partition(".")[0] != "clbench"]
    if plugin is not None and plugin != "; ".join(str(_plugin(one)) for one in outside):
        gaps.append(f"plug-in {plugin} is not installed here")
    elif lines := place.unresolved(config):
        gaps.append(f"its configuration no longer resolves: {lines[0]}")


@functools.cache
def _plugin(target: str) -> str | None:
    """What `provenance.plugin_version` says of a target, without importing it; None where nothing is there."""
    try:
        path, _ = split_target(target)
    except (UserError, OSError, ValueError):
        return None
    if path is None or not path.is_file():
        return None
    package = target.split(".", 1)[0]
    found = importlib.metadata.packages_distributions().get(package)
    name = f"{found[0]} {importlib.metadata.version(found[0])}" if found else target
    return f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def data_folder(given: str | None) -> pathlib.Path | None:
    """The folder of data and weights: as given, else CLBENCH_DATA."""
    root = given or os.environ.get("CLBENCH_DATA")
    return pathlib.Path(root).expanduser() if root else None
