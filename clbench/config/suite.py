"""A suite: frozen streams in several orders, the learners that fit each with their options, and the jobs these make.

Three files of `conf/suite/` under one name. NAME.yaml says what the streams are, NAME.json what each order is and the SHA-256
of its manifest, NAME_learners.json who runs where with which options and what the choice of them cost. Imports neither torch
nor Hydra.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clbench.config.overrides import word
from clbench.config.registry import conf_dir
from clbench.config.signatures import nearest
from clbench.interfaces import UserError

FILTERS = ("streams", "learners", "orders")
GROUP = "core"  # options of the sweep itself: core.streams=..., core.learners=..., core.orders=...


@dataclass(frozen=True)
class Order:
    """An order of a stream: its name, the seed of its run, the options that make it, the hash that its manifest must have."""

    name: str
    seed: int
    overrides: Mapping[str, Any]
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A learner on a stream: its options, how they were chosen (None: defaults, not tuned), and seconds of one core a run."""

    learner: str
    overrides: Mapping[str, Any]
    tuning: Mapping[str, Any] | None
    seconds: float


@dataclass(frozen=True)
class Stream:
    """One stream of a suite. `left_out`: learner -> why it does not fit."""

    name: str
    about: str
    scenario: str
    model: str
    precision: str
    options: Mapping[str, Any]
    metric: str
    lower: bool
    orders: tuple[Order, ...]
    entries: Mapping[str, Entry]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """One run of a suite."""

    stream: Stream
    entry: Entry
    order: Order

    def overrides(self) -> list[str]:
        """What Hydra is given: names, options of stream, order and learner, the seed, the hash of the manifest."""
        stream = self.stream
        words = [f"scenario={stream.scenario}", f"model={stream.model}", f"learner={self.entry.learner}"]
        given = {**stream.options, **self.order.overrides, **self.entry.overrides}
        words += [f"precision={stream.precision}", *(f"{key}={word(value)}" for key, value in given.items())]
        return [*words, f"seed={self.order.seed}", f"manifest_sha256={self.order.sha256}"]

    @property
    def label(self) -> str:
        """How a person names it."""
        return f"{self.stream.name} {self.entry.learner} {self.order.name}"


@dataclass(frozen=True)
class Suite:
    """A version of a suite: streams by name."""

    version: str
    streams: Mapping[str, Stream]

    @property
    def learners(self) -> list[str]:
        """All that fit some stream."""
        return sorted({name for stream in self.streams.values() for name in stream.entries})


def names() -> list[str]:
    """Every suite there is."""
    return sorted(path.stem for path in (conf_dir() / "suite").glob("*.yaml"))


@functools.cache
def load(name: str) -> Suite:
    """Read a suite; `UserError` where there is none of that name, or where a file of it is missing."""
    import yaml

    if name not in names():
        raise UserError(f"no suite '{name}'{nearest(name, names())} (one of: {', '.join(names())})")
    folder = conf_dir() / "suite"
    said = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    try:
        frozen = json.loads((folder / f"{name}.json").read_text(encoding="ascii"))
        fits = json.loads((folder / f"{name}_learners.json").read_text(encoding="ascii"))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: python -m clbench.studies.core {name} makes it") from None
    streams = {key: _stream(key, node, frozen[key], fits[key]) for key, node in said["streams"].items()}
    return Suite(str(said["version"]), streams)


def _stream(name: str, node: Mapping[str, Any], frozen: Mapping[str, Any], fits: Mapping[str, Any]) -> Stream:
    orders = tuple(Order(key, k, one["overrides"], one["sha256"]) for k, (key, one) in enumerate(frozen.items()))
    entries = {key: Entry(key, one["overrides"], one["tuning"], one["seconds"]) for key, one in fits["fit"].items()}
    return Stream(
        name,
        node["about"],
        node["scenario"],
        node["model"],
        node.get("precision", "fp32"),
        node.get("options") or {},
        node["metric"],
        bool(node.get("lower")),
        orders,
        entries,
        fits["left_out"],
    )


def jobs(suite: Suite, wanted: Mapping[str, Sequence[str]] | None = None, shard: str | None = None) -> list[Job]:
    """The jobs of a suite, stream by stream, all orders of a learner one after another; filters are names or globs.

    `shard`: K/N, every N-th job from the K-th on (1 <= K <= N). `UserError` for a filter that fits nothing.
    """
    wanted = wanted or {}
    known = {"streams": list(suite.streams), "learners": suite.learners}
    known["orders"] = list(dict.fromkeys(order.name for stream in suite.streams.values() for order in stream.orders))
    keep = {part: _fitting(part, wanted.get(part) or ["*"], known[part]) for part in FILTERS}
    made = [
        Job(stream, entry, order)
        for stream in suite.streams.values()
        if stream.name in keep["streams"]
        for entry in stream.entries.values()
        if entry.learner in keep["learners"]
        for order in stream.orders
        if order.name in keep["orders"]
    ]
    if not made:
        raise UserError(f"{suite.version}: none of these learners fits these streams (clbench plan sweep=core shows who fits)")
    first, step = (0, 1) if shard is None else shard_of(shard)
    return made[first::step]


def _fitting(part: str, globs: Sequence[str], known: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for glob in globs:
        fits = [name for name in known if fnmatch.fnmatchcase(name, glob)]
        if not fits:
            raise UserError(
                f"{GROUP}.{part}: no {part.removesuffix('s')} '{glob}'{nearest(glob, known)} (of: {', '.join(known)})"
            )
        found |= set(fits)
    return found


def shard_of(text: str) -> tuple[int, int]:
    """'3/40' -> (2, 40): the place of the first job and the step to the next one."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"shard must be K/N with 1 <= K <= N, such as 3/40, got {text!r}")
    return int(found[1]) - 1, int(found[2])


@dataclass(frozen=True)
class Asked:
    """What a command asks of a suite: its jobs, and the overrides that every one of them gets (of the machine alone)."""

    suite: Suite
    jobs: list[Job]
    machine: list[str]

    def words(self) -> Iterator[list[str]]:
        """Overrides of each job."""
        for job in self.jobs:
            yield [*job.overrides(), *self.machine]


def asked(name: str, given: Sequence[tuple[str, str, Sequence[str]]], machine: Sequence[str]) -> Asked:
    """A suite by name and parsed overrides (key, the override as typed, its values) -> its jobs.

    `machine` names the options that may differ from machine to machine; all others are part of the suite and refused.
    """
    wanted: dict[str, Sequence[str]] = {}
    shard, kept = None, []
    for key, line, values in given:
        part = key.removeprefix(f"{GROUP}.")
        if key == "sweep":
            continue
        if key == "shard":
            shard = values[0]
        elif part != key and part in FILTERS:
            wanted[part] = values
        elif part != key:
            raise UserError(f"no option '{key}'{nearest(key, [f'{GROUP}.{one}' for one in FILTERS])}")
        elif key.partition(".")[0] == "hydra" or key == "machine":
            continue
        elif key in machine:
            kept.append(line)
        else:
            raise UserError(
                f"{line}: what {name} runs is frozen; besides {GROUP}.streams, {GROUP}.learners, {GROUP}.orders "
                "and shard it takes options of the machine alone, such as num_threads, device and results_dir"
            )
    suite = load(name)
    return Asked(suite, jobs(suite, wanted, shard), kept)
