"""Summaries of records for tables: ten thousand of these fit where a few hundred records would.

`scan` reads a folder one file at a time; a filter sees the whole record before it is summarized.
"""

from __future__ import annotations

import fnmatch
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clbench.config.signatures import nearest
from clbench.evaluation import edit_metrics
from clbench.interfaces import UserError
from clbench.records import loss_facts, record
from clbench.records.variant import family, variant, weights_of
from clbench.report import costs, paired
from clbench.report.columns import ACCURACY, EDITS, LOSS, Leaderboard
from clbench.report.formats import plain


@dataclass(frozen=True, slots=True)
class Run:
    """One record, summarized. `family` is `variant` without the class order; `stream` the manifest's hash."""

    run_id: str
    status: str
    scenario: str
    learner: str
    model: str
    seed: int
    variant: str
    family: str
    stream: str
    marks: tuple[str, ...]
    legacy: bool
    values: Mapping[str, float]
    costs: Mapping[str, float]
    settings: Mapping[str, Any]
    trouble: str
    loss: Mapping[str, Any] | None = None  # of a pre-training run: what `loss_facts.numbers_of` adds
    edits: bool = False  # of a run of edits
    course: Sequence[Mapping[str, float]] = ()  # of a run of edits: its numbers after 1, 10, 100, ... of them

    @property
    def leaderboard(self) -> Leaderboard:
        """The one that it belongs to."""
        return EDITS if self.edits else ACCURACY if self.loss is None else LOSS

    @property
    def group(self) -> tuple[str, str, str, str, bool]:
        """What it shares with the other runs of its row."""
        return self.scenario, self.learner, self.model, self.variant, self.legacy

    @property
    def usable(self) -> bool:
        """Whether it is finished and its numbers can be read."""
        return self.status == "ok" if self.loss is None else self.loss["usable"]

    @property
    def options(self) -> dict[str, Any]:
        """Options of a pre-training learner that have columns of their own."""
        return {} if self.loss is None else self.loss["options"]

    @property
    def ledger(self) -> Mapping[str, float]:
        """What a usable pre-training run used."""
        return {} if self.loss is None else self.loss["ledger"]


def is_legacy(entry: Mapping[str, Any]) -> bool:
    """Whether other code than this made the numbers: another `numbers_version`, or a record that says so itself."""
    return entry["numbers_version"] != record.numbers_version(entry["config"]) or "legacy" in entry.get("marks", ())


def summarize(entry: Mapping[str, Any], known: dict[str, Any] | None = None) -> Run:
    """A record -> a run. `known` shares what the runs of one variant have in common."""
    name, legacy, done = variant(entry), is_legacy(entry), entry["status"] == "ok"
    known = {} if known is None else known
    if name not in known:
        settings = {key: value for key, value in flat(entry["config"]).items() if key != "seed"}
        settings |= {"numbers_version": entry["numbers_version"], "weights": str(weights_of(entry))[:8]}
        known[name] = (settings | {"plug-in": entry["learner"].get("plugin")}, family(entry))
    settings, of_family = known[name]
    found, losses = loss_facts.numbers_of(entry)
    values = {k: v for k, v in (found or {}).items() if math.isfinite(v)}
    error = entry.get("error") or {}
    trouble = f"{plain(error.get('type', ''))}: {plain(error.get('message', ''))[:160]}" if entry["status"] == "failed" else ""
    return Run(
        run_id=entry["run_id"],
        status=entry["status"],
        scenario=entry["scenario"]["name"],
        learner=entry["learner"]["name"],
        model=entry["model"]["name"],
        seed=entry["seed"],
        variant=name,
        family=of_family,
        stream=str(entry["scenario"].get("manifest_sha256", "")),
        marks=tuple(sorted({*entry.get("marks", ()), *(("legacy",) if legacy else ())})),
        legacy=legacy,
        values=values,
        costs=costs.of(entry) if done else {},
        settings=settings,
        trouble=trouble,
        loss=losses,
        edits=edit_metrics.is_edits(entry),
        course=edit_metrics.course(entry) if done and edit_metrics.is_edits(entry) else (),
    )


def joined(runs: Sequence[Run]) -> list[Run]:
    """The runs of a folder with the numbers that several of them give together."""
    return paired.join(loss_facts.join(runs))


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys; an empty mapping stays a value."""
    made: dict[str, Any] = {}
    for key, value in node.items():
        made |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return made


@dataclass
class Filter:
    """Which records to show: globs on names, `key=value` on settings. It remembers what it saw, to say what there is."""

    scenario: Sequence[str] = ()
    learner: Sequence[str] = ()
    model: Sequence[str] = ()
    where: Sequence[str] = ()
    _seen: dict[str, set[str]] = field(default_factory=dict)
    _keys: set[str] = field(default_factory=set)
    _matched: int = 0

    def __post_init__(self) -> None:
        for text in self.where:
            if "=" not in text or text.startswith("="):
                raise UserError(f"--where {text}: say KEY=VALUE, such as learner.lr=0.03 or seed=0")

    def __bool__(self) -> bool:
        return bool(self.scenario or self.learner or self.model or self.where)

    def __call__(self, entry: Mapping[str, Any]) -> bool:
        """Whether a record is wanted."""
        if not self:
            return True
        wanted = True
        for part in ("scenario", "learner", "model"):
            name = entry[part]["name"]
            self._seen.setdefault(f"--{part}", set()).add(plain(name))
            globs = getattr(self, part)
            wanted &= not globs or any(same_name(name, glob) for glob in globs)
        if self.where:
            facts = facts_of(entry)
            self._keys.update(facts)
            for text in self.where:
                key, _, glob = text.partition("=")
                if key in facts:
                    self._seen.setdefault(key, set()).add(_word(facts[key]))
                wanted &= key in facts and _alike(facts[key], glob)
        self._matched += wanted
        return wanted

    def check(self) -> None:
        """Raise `UserError` with what there is, if nothing matched."""
        if not self or self._matched or not self._seen:
            return
        for part in ("scenario", "learner", "model"):
            for glob in getattr(self, part):
                names = sorted(self._seen[f"--{part}"])
                if not any(same_name(name, glob) for name in names):
                    raise UserError(f"no {part} {glob!r}{nearest(glob, names)} (there are: {_listed(names)})")
        for text in self.where:
            key, _, glob = text.partition("=")
            if key not in self._keys:
                raise UserError(f"--where {text}: no record has {key!r}{nearest(key, self._keys)}")
            if not any(_alike(word, glob) for word in self._seen[key]):
                names = sorted(self._seen[key])
                raise UserError(f"--where {text}: {key} is never {glob}{nearest(glob, names)} (it is: {_listed(names)})")
        raise UserError("no record meets all of these filters together")


def facts_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What `--where` can name: settings as dotted keys, and a few facts of the record."""
    facts = flat(entry["config"])
    facts |= {"seed": entry["seed"], "status": entry["status"], "run_id": entry["run_id"]}
    facts |= {"variant": variant(entry), "manifest": str(entry["scenario"].get("manifest_sha256", ""))[:8]}
    marks = {*entry.get("marks", ()), *(("legacy",) if is_legacy(entry) else ())}
    facts["kind"] = entry["scenario"].get("kind")
    return facts | {"numbers_version": entry["numbers_version"], "marks": " ".join(sorted(marks))}


def same_name(name: str, glob: str) -> bool:
    """A name as it is, or as it is shown, against a glob; a name that holds the glob's own characters matches itself."""
    return glob in (name, plain(name)) or fnmatch.fnmatchcase(plain(name), glob)


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return plain(value)


def _alike(value: Any, glob: str) -> bool:
    word = _word(value)
    if same_name(word, glob):
        return True
    try:
        return not isinstance(value, bool) and math.isclose(float(word), float(glob), rel_tol=1e-12)
    except ValueError:
        return False


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


@dataclass
class Scan:
    """What a results folder holds, runs in the order of their ids; `dead` are run ids of runs whose process is gone."""

    runs: list[Run]
    dead: list[str]
    problems: list[str]


def scan(results: pathlib.Path, wanted: Filter | None = None, take: Callable[[Any, Run], None] | None = None) -> Scan:
    """Read a results folder; `take` sees every record that is shown. `UserError` if a filter lets nothing through."""
    keep = wanted or Filter()
    known: dict[str, Any] = {}
    found = Scan([], [], [])
    chosen: set[str] = set()
    for entry in record.entries(results / "records", found.problems):
        shown = True
        try:
            shown = keep(entry)
            run = summarize(entry, known)  # one that is not shown may be what another is compared with
            if shown and take is not None:
                take(entry, run)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            if shown:
                found.problems.append(f"record {entry['run_id']} cannot be summed up: {type(error).__name__}: {error}")
            continue
        found.runs.append(run)
        if shown:
            chosen.add(run.run_id)
            if record.is_dead(entry, results):
                found.dead.append(run.run_id)
    keep.check()
    found.runs = [run for run in joined(found.runs) if run.run_id in chosen]
    return found
