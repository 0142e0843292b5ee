"""Content of the page as plain values: rows of the leaderboard by column, their streams, runs, settings and details.

Texts are `plain` (one line, nothing that turns text around) and cut at `LONGEST` characters; numbers are finite or None.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clbench.evaluation import edit_metrics, loss_metrics, metrics, row_metrics, setting_metrics
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import answers, cards
from clbench.report.board import Group, rank
from clbench.report.columns import ABOUT, ACCURACY, EDITS, LEADERBOARDS, LOSS, extra, extra_numbers
from clbench.report.figures import data, grids, style
from clbench.report.formats import plain
from clbench.report.page import detail, pictures
from clbench.report.page.detail import short
from clbench.report.runs import Run, scan
from clbench.report.statistics import mean_std

LONGEST = 300
LONGEST_DIFFERENCE = 160
LONGEST_COMMAND = 4000
LARGEST = 1_850_000  # characters of data: with Vega, script and style the page stays under 3 MB
LARGEST_LOSSES = 600_000  # of these, details of pre-training
LEAST_ROOM = 100_000  # for details, however large the table itself is
LARGEST_POOL = 300_000  # characters of different settings; beyond, the page has none but those in commands
MOST_PAIRS = 4000  # pairs of rows that the page compares
MOST_LINES = 200  # of failed runs and of files that are no records; all are counted
_WORDS = ("scenario", "learner", "model", "variant", "manifest", "marks", "seeds", "n_seeds")
_RUN = ("last_macro", "step_macro", "forgetting", "last_micro")
_LOSS_RUN = ("final_loss", "retained_loss", "newest_loss", "forgetting_after", "gap_depth")
_COST = ("seconds", "peak_memory_mb")


class _Folder:
    """The records of a folder, read one at a time and summarized to what the page needs."""

    def __init__(self, results: pathlib.Path):
        self.traces: dict[str, data.Trace] = {}
        self.first: dict[Any, dict[str, Any]] = {}  # the record that stands for a row
        self.streams: dict[tuple[str, str], dict[str, Any]] = {}
        self.newest = ""
        found = scan(results, None, self._take)
        self.runs, self.dead, self.problems = found.runs, found.dead, found.problems
        self.boards = {board: rank(self.runs, board, self.dead) for board in LEADERBOARDS}

    def _take(self, entry: Mapping[str, Any], run: Run) -> None:
        if run.group not in self.first or (run.usable and not self.first[run.group]["usable"]):
            names = {part: {"name": entry[part]["name"]} for part in ("learner", "scenario", "model")}
            self.first[run.group] = names | {"config": entry["config"], "usable": run.usable}
        if run.status == "ok":
            self.newest = max(self.newest, _day(entry.get("finished")))
        if run.leaderboard is ACCURACY:
            self.streams.setdefault((run.scenario, run.stream), _stream(entry))
        if (trace := data.trace_of(entry, run)) is not None:
            plain_enough = run.leaderboard is not ACCURACY or not trace.extra
            self.traces[run.run_id] = trace if plain_enough else dataclasses.replace(trace, extra=detail.extra(entry))


def collect(results: pathlib.Path, beside: bool = False, since: pathlib.Path | None = None) -> dict[str, Any]:
    """A results folder -> the data of its page. `beside`: the page lies in the folder, so it can link to records.

    `since`: an earlier leaderboard.csv, or the folder that holds it; the page then says what changed.
    """
    folder, conf = _Folder(results), _conf()
    groups = folder.boards[ACCURACY]
    board, runs = [group.row for group in groups], [group.runs for group in groups]
    fields, keys = data.fields(groups, ACCURACY, folder.traces), _ids(board)
    done = [[run for run in group if run.usable] for group in runs]
    names = sorted({name for group in done for run in group for name in run.values if "/" not in name})
    pool: dict[str, int] = {}
    settings: list[Any] = [_settings(group, pool) for group in runs]
    if sum(map(len, pool)) > LARGEST_POOL:
        pool, settings = {}, [None] * len(groups)
    made = {
        **_drawing(),
        "losses": _losses(folder, conf),
        "edits": _edits(folder, conf),
        "links": beside,
        "keys": keys,
        "differs": _differs(board, runs),
        "lines": [_lines(row, group[0].legacy) for row, group in zip(board, runs, strict=True)],
        "columns": _columns(board) | _answered(groups),
        "about": ABOUT | extra(board) | ANSWERS,
        "formulas": {n: metrics.FORMULAS[n].text for n in names if n in metrics.FORMULAS} | _detailed(names),
        "names": names,
        "runs": [[_run(run) for run in group] for group in done],
        "commands": [_command(folder.first[group[0].group], group, conf) for group in runs],
        "pool": list(pool),
        "pairs": [[number(v) for v in pair] for pair in answers.pairs(groups, MOST_PAIRS)],
        "wins": _wins(groups),
        "changes": [_change(one) for one in answers.changes(groups, since)] if since else None,
        **_whole(folder, runs),
        **_shown(folder, fields, {id(row): key for row, key in zip(board, keys, strict=True)}),
    }
    lines = pictures.lines_by_row(fields)
    details = [
        detail.levels(lines.get(id(row)), _values(group, names), chosen)
        for row, group, chosen in zip(board, done, settings, strict=True)
    ]
    room = LARGEST - len(json.dumps(made, separators=(",", ":")))
    kept, left = detail.fit(details, max(LEAST_ROOM, room))
    return made | {"details": kept, "left": left}


def _drawing() -> dict[str, Any]:
    """What all figures share: specifications, themes, and how their numbers unfold."""
    return {"pictures": pictures.specifications(), "themes": style.themes(), "over": grids.OVER, "phases": grids.PHASES}


def _shown(folder: _Folder, fields: Sequence[data.Field], keys: Mapping[int, str]) -> dict[str, Any]:
    """The figures of the streams, by the place of the stream."""
    places = {(_cut(scenario), stream[:8]): i for i, (scenario, stream) in enumerate(sorted(folder.streams))}
    found = zip(fields, pictures.of_streams(fields, keys), strict=True)
    return {"shown": {places[_cut(field.scenario), field.manifest]: shown for field, shown in found}}


ANSWERS = {
    "rank": (
        "places on its stream among contenders that its results allow: 1 + those better than it, to all - those worse than it; "
        "better is said by paired t-tests on shared seeds against all others, adjusted by Holm"
    ),
    "worst_order": "lowest mean over the class orders of these settings, with the 95 % bootstrap interval of that order",
    "orders": "class orders that these settings ran on",
    "shared": "seeds shared with the best of the stream",
}


def _answered(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Columns beyond the leaderboard's: ranks, shared seeds, class orders, and further Pareto fronts."""
    ranks, orders = answers.ranks(groups), answers.orders(groups)
    made: dict[str, list[Any]] = {"rank": [rank and list(rank) for rank in ranks], "shared": answers.shared_with_best(groups)}
    for name in ("orders", "mean", "low", "high", "worst", "worst_low", "worst_high", "worst_order"):
        made[name if "order" in name else f"order_{name}"] = [one and number(one[name]) for one in orders]
    return {name: values for name, values in made.items() if any(value is not None for value in values)}


def _wins(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [{k: _cut(v) if isinstance(v, str) else number(v) for k, v in one.items()} for one in answers.win_rates(groups)]


def _change(one: Mapping[str, Any]) -> list[Any]:
    texts = [one["what"], *(_cut(one[name]) for name in ("scenario", "learner", "model", "variant", "manifest"))]
    return [*texts, number(one["before"]), number(one["after"]), *one["seeds"]]


def _losses(folder: _Folder, conf: pathlib.Path) -> dict[str, Any]:
    """Rows of the leaderboard of losses with their streams, matrices and courses."""
    fields = data.fields(folder.boards[LOSS], LOSS, folder.traces)
    lines = [(place, line) for place, field in enumerate(fields) for line in field.lines]
    board = [line.row for _, line in lines]
    keys = {id(row): key for row, key in zip(board, _ids(board), strict=True)}
    details, _ = detail.fit([detail.loss_levels(line) for _, line in lines], LARGEST_LOSSES + len(lines))
    return {
        "streams": [_loss_stream(field) | {"shown": pictures.of_losses(field, keys)} for field in fields],
        "rows": [_loss_row(line, i, key, folder, conf) for (i, line), key in zip(lines, _ids(board), strict=True)],
        "about": loss_metrics.ABOUT | dict.fromkeys(extra_numbers(board), row_metrics.ABOUT),
        "details": details,
    }


def _edits(folder: _Folder, conf: pathlib.Path) -> dict[str, Any]:
    """Rows of the leaderboard of edits with their streams and their numbers over the stream."""
    fields = data.fields(folder.boards[EDITS], EDITS, folder.traces)
    lines = [(place, line) for place, field in enumerate(fields) for line in field.lines]
    keys = _ids([line.row for _, line in lines])
    rows = [_edit_row(line, i, key, folder, conf) for (i, line), key in zip(lines, keys, strict=True)]
    return {
        "streams": [_edit_stream(field) | {"shown": pictures.of_edits(field)} for field in fields],
        "rows": rows,
        "about": edit_metrics.ABOUT,
    }


def _edit_stream(field: data.Field) -> dict[str, Any]:
    looks = [int(step["edits"]) for step in field.lines[0].traces[0].extra["course"]]
    return {"scenario": _cut(field.scenario), "manifest": field.manifest, "looks": looks, "edits": max(looks, default=0)}


def _edit_row(line: data.Line, stream: int, key: str, folder: _Folder, conf: pathlib.Path) -> dict[str, Any]:
    row, runs = line.row, [trace.run for trace in line.traces]
    known = {name: _cut(row[name]) for name in ("learner", "model", "variant", "marks")}
    known |= {"stream": stream, "key": key, "label": _cut(line.label), "vs": row["vs_best"], "p": short(row["vs_best_p"])}
    known |= {"seconds": short(row["seconds_mean"]), "runs": [[run.seed, run.run_id] for run in runs]}
    held = [n for n in EDITS.spread if row[f"{n}_mean"] is not None]
    known["numbers"] = {n: [short(row[f"{n}_mean"]), short(row[f"{n}_std"])] for n in held}
    courses = [trace.extra["course"] for trace in line.traces]
    same = [course for course in courses if len(course) == len(courses[0])]
    known["course"] = [_mean_step(steps) for steps in zip(*same, strict=True)]
    return known | {"command": _command(folder.first[runs[0].group], runs, conf)}


def _mean_step(steps: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean over runs of their numbers after so many edits."""
    return {name: short(sum(step[name] for step in steps) / len(steps)) for name in steps[0] if all(name in s for s in steps)}


def _loss_stream(field: data.Field) -> dict[str, Any]:
    sets = field.sets
    made = {"scenario": _cut(field.scenario), "manifest": field.manifest, "sets": [_cut(name, 60) for name in sets.names]}
    floors = [floor for floor in sets.floors if floor is not None]
    made |= {"n": sets.n, "first": sets.first_seen.tolist(), "floors": [short(floor) for floor in sets.floors]}
    made |= {"floor": short(sum(floors) / len(floors)) if floors else None}
    return made | {"measure": sets.measure, "unit": sets.unit}


def _loss_row(line: data.Line, stream: int, key: str, folder: _Folder, conf: pathlib.Path) -> dict[str, Any]:
    row, runs = line.row, [trace.run for trace in line.traces]
    names = [n for n in (*LOSS.spread, *extra_numbers([row])) if row[f"{n}_mean"] is not None]
    known = {name: _cut(row[name]) for name in ("learner", "model", "variant", "marks")}
    known |= {"stream": stream, "key": key, "label": _cut(line.label), "replay": row["replay"], "reference": line.reference}
    known |= {"low": short(row["final_loss_low"]), "high": short(row["final_loss_high"]), "vs": row["vs_best"]}
    known |= {"p": short(row["vs_best_p"]), "seconds": short(row["seconds_mean"])}
    known["numbers"] = {n: [short(row[f"{n}_mean"]), short(row[f"{n}_std"])] for n in names}
    known["ledger"] = {name: row[column] for column, name in LOSS.ledger.items()} | {"flops": short(row["flops"])}
    values = [[*(short(run.values.get(name)) for name in _LOSS_RUN), short(run.costs.get("seconds"))] for run in runs]
    known["runs"] = [[run.seed, run.run_id, *v] for run, v in zip(runs, values, strict=True)]
    known["command"] = _command(folder.first[runs[0].group], runs, conf)
    lost = Counter(run.status for run in folder.runs if run.variant == row["variant"] and run.status != "ok")
    return known | {"lost": dict(sorted(lost.items()))}


def _whole(folder: _Folder, groups: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """What is said of the folder and its streams."""
    dead = set(folder.dead)
    streams = {name: i for i, name in enumerate(sorted(folder.streams))}
    return {
        "counts": dict(sorted(Counter("dead" if run.run_id in dead else run.status for run in folder.runs).items())),
        "newest": folder.newest,
        "streams": [folder.streams[name] for name in streams],
        "stream": [streams[group[0].scenario, group[0].stream] for group in groups],
        "lost": _lost(folder, dead),
        "problems": [_cut(line) for line in folder.problems[:MOST_LINES]],
        "num_problems": len(folder.problems),
    }


def _ids(board: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `#row=` names: the variant, with a number where two rows share it."""
    seen: Counter[str] = Counter()
    made = []
    for row in board:
        seen[row["variant"]] += 1
        made.append(row["variant"] + (f"-{seen[row['variant']]}" if seen[row["variant"]] > 1 else ""))
    return made


def _lines(row: Mapping[str, Any], legacy: bool) -> list[Any]:
    """The texts of a row, and its flags: reference, legacy, marked in any way."""
    marks = row["marks"].split()
    return [*(_cut(row[name]) for name in _WORDS[:-1]), "reference" in marks, legacy, bool(marks)]


def _columns(board: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The other columns of the leaderboard that any row has."""
    made = {}
    for name in (*ACCURACY.columns, *extra(board)):
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
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


def _run(run: Run) -> list[Any]:
    values = [number(run.values.get(name)) for name in _RUN]
    return [run.seed, run.run_id, *values, *(number(run.costs.get(name)) for name in _COST)]


def _values(runs: Sequence[Run], names: Sequence[str]) -> list[Any]:
    """Mean and standard deviation of every number of the runs, in the order of the names."""
    found = [mean_std([run.values[name] for run in runs if name in run.values]) for name in names]
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
    made |= {"operators": [_cut(str(name), 60) for name in scenario.get("operators", ())]}
    made |= {"brings": _brings(scenario)} if isinstance(scenario.get("class_names"), list) else {}
    return made | {"order": len(order) if isinstance(order, list) else None}


def _brings(scenario: Mapping[str, Any]) -> list[str]:
    """The names of the classes of each experience."""
    order, names = scenario.get("class_order") or (), map(str, scenario["class_names"])
    known = dict(zip(map(str, order), names, strict=False))
    parts = [part for part in scenario.get("experiences") or () if isinstance(part, Mapping)]
    classes = [part["classes"] if isinstance(part.get("classes"), list) else [] for part in parts]
    return [_cut(", ".join(known.get(str(c), str(c)) for c in one)) for one in classes]


def _command(first: Mapping[str, Any], runs: Sequence[Run], conf: pathlib.Path) -> str:
    """The command that makes a row; '' where it would be too long, or hides characters that are not shown."""
    done = [run for run in runs if run.usable] or runs
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
    stems, about = {name: name.removeprefix("last_").removeprefix("step_") for name in names}, setting_metrics.ABOUT
    made = {name: metrics.DETAILS[stem] for name, stem in stems.items() if stem in metrics.DETAILS}
    return made | {name: about[name] for name in names if name in about}


def _lost(folder: _Folder, dead: set[str]) -> list[list[Any]]:
    """Runs without a result: status, run, names, seed, why."""
    lost = [run for board in LEADERBOARDS for run in folder.runs if run.leaderboard is board and run.status != "ok"]
    return [
        ["dead" if r.run_id in dead else r.status, r.run_id, *map(_cut, (r.scenario, r.learner)), r.seed, _cut(r.trouble)]
        for r in lost[:MOST_LINES]
    ]


def _day(value: Any) -> str:
    return plain(value)[:10] if isinstance(value, str) and value[:4].isdigit() else ""


def _cut(text: Any, longest: int = LONGEST) -> str:
    word = plain(str(text)[: 4 * longest])
    return word if len(word) <= longest else word[: longest - 1] + "\u2026"
