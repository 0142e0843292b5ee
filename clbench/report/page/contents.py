"""Content of the page as plain values: rows of the leaderboard by column, their streams, runs, settings and details.

Texts are `plain` (one line, nothing that turns text around) and cut at `LONGEST` characters; numbers are finite or None.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clbench.evaluation import metrics
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import cards, table
from clbench.report.columns import ABOUT, about, extra
from clbench.report.formats import plain
from clbench.report.page import detail, loss_contents
from clbench.report.runs import Run, entries, summarize

LONGEST = 300
LONGEST_DIFFERENCE = 160
LONGEST_COMMAND = 4000
LARGEST = 2_800_000  # characters of data: with script and style the page stays under 3 MB
LEAST_ROOM = 100_000  # for details, however large the table itself is
LARGEST_POOL = 500_000  # characters of different settings; beyond, the page has none but those in commands
MOST_LINES = 200  # of failed runs and of files that are no records; all are counted
_WORDS = ("scenario", "learner", "model", "variant", "manifest", "marks", "seeds", "n_seeds")
_RUN = ("last_macro", "step_macro", "forgetting", "last_micro")
_COST = ("seconds", "peak_memory_mb")
Key = tuple[str, str, str, str, bool]


class _Folder:
    """The records of a folder, read one at a time and summarized to what the page needs."""

    def __init__(self, results: pathlib.Path):
        self.runs: list[Run] = []
        self.dead: list[str] = []
        self.problems: list[str] = []
        self.groups: dict[Key, list[Run]] = {}
        self.details: dict[str, detail.Detail] = {}
        self.first: dict[Key, dict[str, Any]] = {}  # the record that stands for a row
        self.streams: dict[tuple[str, str], dict[str, Any]] = {}
        self.newest = ""
        self.losses, self.others = loss_contents.Losses(), []
        known: dict[str, Mapping[str, Any]] = {}
        for entry in entries(results / "records", self.problems):
            run = summarize(entry, known)
            if run.loss is not None:
                self._loss(entry, run, results)
                continue
            key = (run.scenario, run.learner, run.model, run.variant, run.legacy)
            self.runs.append(run)
            self.groups.setdefault(key, []).append(run)
            if key not in self.first or (entry["status"] == "ok" and self.first[key]["status"] != "ok"):
                names = {part: {"name": entry[part]["name"]} for part in ("learner", "scenario", "model")}
                self.first[key] = names | {name: entry[name] for name in ("config", "status")}
            if run.status == "ok":
                self.details[run.run_id] = detail.of(entry)
                self.newest = max(self.newest, _day(entry.get("finished")))
            self.streams.setdefault((run.scenario, run.stream), _stream(entry))
            if record.is_dead(entry, results):
                self.dead.append(run.run_id)

    def _loss(self, entry: dict[str, Any], run: Run, results: pathlib.Path) -> None:
        """A record of pre-training has tables of its own; lost runs are counted with the others."""
        self.losses.add(entry, run)
        self.others.append(run)
        if run.status == "ok":
            self.newest = max(self.newest, _day(entry.get("finished")))
        if record.is_dead(entry, results):
            self.dead.append(run.run_id)


def collect(results: pathlib.Path, beside: bool = False) -> dict[str, Any]:
    """A results folder -> the data of its page. `beside`: the page lies in the folder, so it can link to records."""
    folder = _Folder(results)
    board = table.board(folder.runs, folder.dead)
    keys = [_key(row, folder.groups) for row in board]
    groups = [sorted(folder.groups[key], key=lambda r: (r.seed, r.run_id)) for key in keys]
    done = [[run for run in group if run.status == "ok"] for group in groups]
    names = sorted({name for group in done for run in group for name in run.values if "/" not in name})
    pool: dict[str, int] = {}
    settings: list[Any] = [_settings(group, pool) for group in groups]
    if sum(map(len, pool)) > LARGEST_POOL:
        pool, settings = {}, [None] * len(groups)
    conf = _conf()
    made = {
        "losses": folder.losses.collect(lambda first, group: _command(first, group, conf)),
        "links": beside,
        "keys": _ids(board),
        "differs": _differs(board, groups),
        "lines": [_lines(row, key) for row, key in zip(board, keys, strict=True)],
        "columns": _columns(board),
        "about": {name: ABOUT[name] for name in table.COLUMNS} | about(extra(board)),
        "formulas": {n: metrics.FORMULAS[n].text for n in names if n in metrics.FORMULAS} | _detailed(names),
        "names": names,
        "runs": [[_run(run) for run in group] for group in done],
        "commands": [_command(folder.first[key], group, conf) for key, group in zip(keys, groups, strict=True)],
        "pool": list(pool),
        **_whole(folder, groups),
    }
    details = [
        detail.levels([folder.details[run.run_id] for run in group], _values(group, names), chosen)
        for group, chosen in zip(done, settings, strict=True)
    ]
    room = LARGEST - len(json.dumps(made, separators=(",", ":")))
    kept, left = detail.fit(details, max(LEAST_ROOM, room))
    return made | {"details": kept, "left": left}


def _whole(folder: _Folder, groups: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """What is said of the folder and its streams."""
    dead, runs = set(folder.dead), [*folder.runs, *folder.others]
    streams = {name: i for i, name in enumerate(sorted(folder.streams))}
    return {
        "counts": dict(sorted(Counter("dead" if run.run_id in dead else run.status for run in runs).items())),
        "newest": folder.newest,
        "streams": [folder.streams[name] for name in streams],
        "stream": [streams[group[0].scenario, group[0].stream] for group in groups],
        "lost": _lost(folder, dead),
        "problems": [_cut(line) for line in folder.problems[:MOST_LINES]],
        "num_problems": len(folder.problems),
    }


def _key(row: Mapping[str, Any], groups: Mapping[Key, Any]) -> Key:
    """The group that a row was made of; of two that differ only in being legacy, the marks decide."""
    known = (row["scenario"], row["learner"], row["model"], row["variant"])
    found = [key for flag in (False, True) if (key := (*known, flag)) in groups]
    return found[-1] if "legacy" in row["marks"].split() else found[0]


def _ids(board: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `#row=` names: the variant, with a number where two rows share it."""
    seen: Counter[str] = Counter()
    made = []
    for row in board:
        seen[row["variant"]] += 1
        made.append(row["variant"] + (f"-{seen[row['variant']]}" if seen[row["variant"]] > 1 else ""))
    return made


def _lines(row: Mapping[str, Any], key: Key) -> list[Any]:
    """The texts of a row, and its flags: reference, legacy, marked in any way."""
    marks = row["marks"].split()
    return [*(_cut(row[name]) for name in _WORDS[:-1]), "reference" in marks, key[-1], bool(marks)]


def _columns(board: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The other columns of the leaderboard that any row has."""
    made = {}
    for name in (*table.COLUMNS, *extra(board)):
        if name not in _WORDS[:-1]:
            values = [number(row.get(name)) for row in board]
            if any(value is not None for value in values):
                made[name] = values
    return made


def number(value: Any) -> Any:
    """Six digits are enough to look at; what is not finite is no value."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    short = float(f"{value:.6g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def _run(run: Run) -> list[Any]:
    values = [number(run.values.get(name)) for name in _RUN]
    return [run.seed, run.run_id, *values, *(number(run.costs.get(name)) for name in _COST)]


def _values(runs: Sequence[Run], names: Sequence[str]) -> list[Any]:
    """Mean and standard deviation of every number of the runs, in the order of the names."""
    found = [table.mean_std([run.values[name] for run in runs if name in run.values]) for name in names]
    return [[number(mean), number(std)] for mean, std in found]


def _settings(runs: Sequence[Run], pool: dict[str, int]) -> list[int]:
    """Settings of a row as places in the pool of `key=value` that all rows share."""
    return [pool.setdefault(text, len(pool)) for text in (_setting(k, v) for k, v in runs[0].settings.items())]


def _setting(key: str, value: Any) -> str:
    return f"{_cut(key)}={_cut(value if isinstance(value, str) else json.dumps(value, default=str))}"


def _differs(board: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Run]]) -> list[str]:
    """Per row the settings in which it differs from other rows of the same learner on the same stream and model."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, (row, group) in enumerate(zip(board, groups, strict=True)):
        alike.setdefault((row["learner"], row["model"], row["scenario"], group[0].stream), []).append(i)
    made = [""] * len(board)
    for places in alike.values():
        if len(places) > 1:
            texts = [{_setting(k, v) for k, v in groups[i][0].settings.items()} for i in places]
            shared = set.intersection(*texts)
            for i, own in zip(places, texts, strict=True):
                made[i] = _cut(", ".join(text.removeprefix("learner.") for text in sorted(own - shared)), LONGEST_DIFFERENCE)
    return made


def _stream(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a stream; whatever a record does not say, or says in another way, is left out."""
    scenario = entry["scenario"]
    names = scenario.get("eval_names") or range(1, len(entry["n"]) + 1)
    classes = [
        len(part["classes"])
        for part in scenario.get("experiences") or ()
        if isinstance(part, Mapping) and isinstance(part.get("classes"), list)
    ]
    order = scenario.get("class_order")
    made = {"scenario": _cut(scenario["name"]), "manifest": _cut(str(scenario.get("manifest_sha256", ""))[:8])}
    made |= {"kind": _cut(scenario.get("kind", "")), "sets": [_cut(name, 60) for name in names]}
    made |= {"n": entry["n"], "first": entry["first_seen"], "classes": classes}
    return made | {"order": len(order) if isinstance(order, list) else None}


def _command(first: Mapping[str, Any], runs: Sequence[Run], conf: pathlib.Path) -> str:
    """The command that makes a row; '' where it would be too long, or hides characters that are not shown."""
    done = [run for run in runs if run.status == "ok"] or runs
    try:
        text = cards.command(first, [str(seed) for seed in dict.fromkeys(run.seed for run in done)], conf)
    except (TypeError, ValueError, AttributeError, OSError, UserError):  # a configuration of another shape, a name no file has
        return ""
    return text if plain(text) == " ".join(text.split()) and len(text) <= LONGEST_COMMAND else ""


def _conf() -> pathlib.Path:
    """The configuration files: in the package where clbench was installed from a wheel, else beside it."""
    here = pathlib.Path(record.__file__).resolve().parent.parent
    return here / "conf" if (here / "conf" / "run.yaml").is_file() else here.parent / "conf"


def _detailed(names: Sequence[str]) -> dict[str, str]:
    stems = {name: name.removeprefix("last_").removeprefix("step_") for name in names}
    return {name: metrics.DETAILS[stem] for name, stem in stems.items() if stem in metrics.DETAILS}


def _lost(folder: _Folder, dead: set[str]) -> list[list[Any]]:
    """Runs without a result: status, run, names, seed, why."""
    lost = [run for run in (*folder.runs, *folder.others) if run.status != "ok"]
    return [
        ["dead" if r.run_id in dead else r.status, r.run_id, *map(_cut, (r.scenario, r.learner)), r.seed, _cut(r.trouble)]
        for r in lost[:MOST_LINES]
    ]


def _day(value: Any) -> str:
    return plain(value)[:10] if isinstance(value, str) and value[:4].isdigit() else ""


def _cut(text: Any, longest: int = LONGEST) -> str:
    word = plain(str(text)[: 4 * longest])
    return word if len(word) <= longest else word[: longest - 1] + "\u2026"
