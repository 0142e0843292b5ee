"""The table of a suite: learners by streams, mean over the orders with interval and rank, and everything that is missing.

A record belongs to a job of the suite if its manifest has the frozen hash, seed, precision and names are the job's, and its
learner and model have the options of the job, in all else those of their configuration files. A row with fewer runs than orders
is shown as what it is: how many there are, no mean, no rank.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clbench.config import registry, suite
from clbench.config.overrides import word
from clbench.config.suite import Job, Stream, Suite
from clbench.records import record
from clbench.report import cards, statistics
from clbench.report.formats import Table, csv_text, fraction, to_markdown
from clbench.report.runs import is_legacy, summarize

Key = tuple[str, str]  # stream, learner
ASKS = ("predict", "loss")  # what its streams ask
FOLDER = "core"  # in a results folder: orders would be rows of one run each in its leaderboard
_PLACES = ("scenario.augment",)  # options of a stream that its manifest does not hold


@dataclass
class Row:
    """A learner on a stream: values by order, and the orders whose runs failed."""

    stream: Stream
    learner: str
    values: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    reference: bool = False
    rank: tuple[int, int] | None = None
    word: str = ""

    @property
    def whole(self) -> bool:
        """Whether every order has a result."""
        return len(self.values) == len(self.stream.orders)

    @property
    def missing(self) -> list[str]:
        """Orders without a result."""
        return [order.name for order in self.stream.orders if order.name not in self.values]


def rows(of: Suite, found_entries: Iterable[Mapping[str, Any]]) -> dict[Key, Row]:
    """Every row of the suite, filled from records."""
    made = {(s.name, name): Row(s, name) for s in of.streams.values() for name in s.entries}
    places = {(order.sha256, order.seed): (s, order) for s in of.streams.values() for order in s.orders}
    for entry in found_entries:
        found = places.get((str(entry["scenario"].get("manifest_sha256")), entry["seed"]))
        if found is None or not belongs(entry, *found):
            continue
        stream, order = found
        row = made[stream.name, entry["learner"]["name"]]
        if entry["status"] == "failed":
            row.failed[order.name] = str((entry.get("error") or {}).get("type"))
        if entry["status"] != "ok" or is_legacy(entry):
            continue
        value = summarize(entry).values.get(stream.metric)
        if value is not None:
            row.values[order.name], row.seconds[order.name] = value, core_seconds(entry)
            row.reference |= "reference" in entry.get("marks", ())
    for stream in of.streams.values():
        rank([row for row in made.values() if row.stream is stream])
    return made


def core_seconds(entry: Mapping[str, Any]) -> float:
    """Seconds of a record times its threads: an upper bound of what it took of the cores."""
    threads = ((entry.get("machine") or {}).get("flags") or {}).get("num_threads") or 1
    return float(entry["seconds"]["total"]) * int(threads)


def belongs(entry: Mapping[str, Any], stream: Stream, order: suite.Order) -> bool:
    """Whether a record of the order's manifest and seed was made with the options of the suite."""
    name, config = entry["learner"]["name"], entry["config"]
    names = (entry["scenario"]["name"], entry["model"]["name"], config.get("precision", "fp32"))
    if name not in stream.entries or names != (stream.scenario, stream.model, stream.precision):
        return False
    if config.get("optimizer_state", "fresh") != "fresh" or "continues" in config:
        return False
    given = {**stream.options, **order.overrides, **stream.entries[name].overrides}
    return (
        _same_options(config["learner"], "learner", name, given)
        and _same_options(config["model"], "model", stream.model, given)
        and _same_options(config["scenario"], "scenario", stream.scenario, given, _PLACES)
    )


def _same_options(
    node: Mapping[str, Any], part: str, name: str, given: Mapping[str, Any], only: Sequence[str] | None = None
) -> bool:
    """Whether a node of a record holds what a configuration file and the given options make; what it leaves out is default."""
    default = cards.options_of(registry.conf_dir(), part, name)
    wanted = {f"{part}.{key}": value for key, value in default.items()}
    wanted |= cards.flat({key: value for key, value in given.items() if key.startswith(f"{part}.")})
    held = cards.flat({part: node})
    changed = [key for key in given if key.startswith(f"{part}.") and key not in held and only is None]
    if any(not cards.same(given[key], default.get(key.partition(".")[2])) for key in changed):
        return False
    return all(key in wanted and cards.same(value, wanted[key]) for key, value in held.items() if only is None or key in only)


def rank(field_: Sequence[Row]) -> None:
    """Fill the ranks of whole rows of one stream that are no references, with ties, and how each compares with the best.

    A rank is (1 + rows better, rows - rows worse): better by a paired t-test over the orders, adjusted by Holm over all others.
    """
    whole = [row for row in field_ if row.whole and not row.reference]
    if not whole:
        return
    sign = -1.0 if whole[0].stream.lower else 1.0
    names = [order.name for order in whole[0].stream.orders]
    values = [[sign * row.values[name] for name in names] for row in whole]
    better, worse = [0] * len(whole), [0] * len(whole)
    best = max(range(len(whole)), key=lambda i: sum(values[i]))
    for y, mine in enumerate(values):
        others = [x for x in range(len(whole)) if x != y]
        differences = [[a - b for a, b in zip(mine, values[x], strict=True)] for x in others]
        tests = statistics.t_tests(differences)
        adjusted = statistics.holm([p for _, p in tests])
        for x, d, (mean, _), p in zip(others, differences, tests, adjusted, strict=True):
            said = statistics.verdict(mean, p, statistics.is_level(d))
            if said == "better":
                better[x] += 1
                worse[y] += 1
            if y == best:
                whole[x].word = {"better": "worse", "worse": "better"}.get(said, said)
    whole[best].word = "best"
    for i, row in enumerate(whole):
        row.rank = (1 + better[i], len(whole) - worse[i])


def open_of(jobs: Sequence[Job], made: Mapping[Key, Row]) -> list[Job]:
    """Those jobs that have no result yet."""
    return [job for job in jobs if job.order.name in made[job.stream.name, job.entry.learner].missing]


def tables(of: Suite, made: Mapping[Key, Row]) -> list[Table]:
    """The matrix, all rows, what is missing, and a sentence for each stream."""
    return [_matrix(of, made), _rows(of, made), _missing(of, made)]


def shown(of: Suite, made: Mapping[Key, Row]) -> Table:
    """The matrix with a note of how much is missing, for the page."""
    matrix = _matrix(of, made)
    return replace(matrix, notes=(*matrix.notes, *_missing(of, made).notes))


def _matrix(of: Suite, made: Mapping[Key, Row]) -> Table:
    streams = list(of.streams)
    total: dict[str, list[float]] = {}
    for (_, learner), row in made.items():
        if row.rank is not None:
            total.setdefault(learner, []).append(sum(row.rank) / 2)
    ordered = sorted(of.learners, key=lambda name: (-len(total.get(name, ())), _mean(total.get(name, ())) or 0.0, name))
    lines = []
    for learner in ordered:
        line: dict[str, Any] = {"learner": learner}
        for name in streams:
            line[name] = _cell(row) if (row := made.get((name, learner))) else None
        ranked = total.get(learner, ())
        line["streams"] = f"{len(ranked)}/{sum((name, learner) in made for name in streams)}"
        line["mean rank"] = _mean(ranked)
        lines.append(line)
    columns = ("learner", *streams, "streams", "mean rank")
    notes = (
        "a cell: mean over the orders +- half the 95 % t interval, and the rank with its ties; k/n: runs so far, no result;",
        "-: does not fit; ref: keeps all data, is not ranked; streams: how many have a rank, of those it fits",
        *_sentences(of, made),
    )
    title = f"{of.version}: {', '.join(_unit(stream) for stream in of.streams.values())}"
    return Table("core", title, columns, lines, notes, {"mean rank": 1})


def _unit(stream: Stream) -> str:
    return f"{stream.name} {stream.metric}{' (lower is better)' if stream.lower else ''}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _cell(row: Row) -> str:
    if not row.whole:
        return f"{len(row.values)}/{len(row.stream.orders)}"
    values = list(row.values.values())
    per_cent = not row.stream.lower
    scale, digits = (100, 1) if per_cent else (1, 3)
    (interval,) = statistics.t_intervals([values])
    half = "" if interval is None else f" +-{fraction(scale * (interval[1] - interval[0]) / 2, digits)}"
    ranks = "ref" if row.rank is None else "-".join(str(v) for v in dict.fromkeys(row.rank))
    return f"{fraction(scale * sum(values) / len(values), digits)}{half} [{ranks}]"


def _sentences(of: Suite, made: Mapping[Key, Row]) -> list[str]:
    """For each stream with ranks: the best, who cannot be told from it, and how many rows are not whole."""
    said = []
    for stream in of.streams.values():
        field_ = [row for (name, _), row in made.items() if name == stream.name]
        ranked = [row for row in field_ if row.rank is not None]
        left = sum(not row.whole for row in field_)
        if not ranked:
            said.append(f"{stream.name}: no learner has all {len(stream.orders)} orders yet")
            continue
        best = next(row for row in ranked if row.word == "best")
        like = [row.learner for row in ranked if row.word in ("not distinguishable", "no spread", "too few seeds")]
        told = "every other ranked learner is worse" if not like else f"cannot be told from it: {', '.join(sorted(like))}"
        if len(ranked) == 1:
            told = "nothing to compare it with yet"
        said.append(f"{stream.name}: {best.learner} has the best mean of {len(ranked)}; {told}; {left} rows are not whole")
    return said


_COLUMNS = ("stream", "learner", "metric", "runs", "orders", "mean", "std", "low", "high", "worst", "worst_order", "rank_from")
COLUMNS = (*_COLUMNS, "rank_to", "vs_best", "reference", "options", "tuned_on", "tuning_runs", "tuning_seconds", "core_seconds")
COLUMNS = (*COLUMNS, "missing", "failed")


def _rows(of: Suite, made: Mapping[Key, Row]) -> Table:
    """One line for each row of the suite; means of whole rows alone."""
    lines = []
    for (name, learner), row in made.items():
        stream, entry = row.stream, row.stream.entries[learner]
        tuning = entry.tuning or {}
        line: dict[str, Any] = {"stream": name, "learner": learner, "metric": stream.metric, "runs": len(row.values)}
        line |= {"orders": len(stream.orders), "reference": row.reference, "vs_best": row.word or None}
        options = " ".join(f"{key.partition('.')[2]}={word(value)}" for key, value in entry.overrides.items())
        line |= {"options": options or "defaults"}
        line |= {"tuned_on": tuning.get("on", "not tuned"), "tuning_runs": tuning.get("runs", 0)}
        line |= {"tuning_seconds": tuning.get("seconds", 0), "core_seconds": _mean(list(row.seconds.values()))}
        line |= {"missing": " ".join(row.missing) or None, "failed": " ".join(row.failed) or None}
        if row.whole:
            values = list(row.values.values())
            (interval,) = statistics.t_intervals([values])
            mean, std = statistics.mean_std(values)
            worst = (max if stream.lower else min)(row.values, key=lambda key, found=row.values: found[key])
            line |= {"mean": mean, "std": std, "worst": row.values[worst], "worst_order": worst}
            line |= dict(zip(("low", "high"), interval or (None, None), strict=True))
        if row.rank is not None:
            line |= dict(zip(("rank_from", "rank_to"), row.rank, strict=True))
        lines.append(line)
    return Table("rows", f"{of.version}, every row", COLUMNS, lines, (), {"core_seconds": 1, "tuning_seconds": 0})


def _missing(of: Suite, made: Mapping[Key, Row]) -> Table:
    """Rows that are not whole, and learners that a stream leaves out with the reason."""
    lines = []
    for (name, learner), row in made.items():
        if row.missing:
            failed = ", ".join(f"{order}: {kind}" for order, kind in row.failed.items() if order in row.missing)
            why = f"failed ({failed})" if failed else "not run"
            lines.append({"stream": name, "learner": learner, "missing": " ".join(row.missing), "why": why})
    for stream in of.streams.values():
        lines += [{"stream": stream.name, "learner": k, "missing": "all", "why": why} for k, why in stream.left_out.items()]
    done = sum(len(row.values) for row in made.values())
    every = sum(len(row.stream.orders) for row in made.values())
    whole = sum(row.whole for row in made.values())
    notes = [f"{done} of {every} runs have a result; {whole} of {len(made)} rows are whole"]
    if unknown := newer(of):
        notes.append(f"learners that are newer than the table: {', '.join(unknown)}")
    return Table("missing", f"{of.version}, what is missing", ("stream", "learner", "missing", "why"), lines, tuple(notes))


def newer(of: Suite) -> list[str]:
    """Learners of images and of pre-training that no stream of the suite knows, neither as fitting nor as left out."""
    known = {name for stream in of.streams.values() for name in (*stream.entries, *stream.left_out)}
    return [name for name in registry.choices("learner") if name not in known and registry.asks("learner", name) in ASKS]


def folders(results: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A results folder, and the folder `core` in it that holds the records of suites; of either of the two."""
    root = results.resolve().parent if results.name == FOLDER else results
    return root, root / FOLDER


def entries(results: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Every record of both folders, a run once."""
    root, own = folders(results)
    known: set[str] = set()
    for entry in itertools.chain(record.entries(own / "records", []), record.entries(root / "records", [])):
        if entry["run_id"] not in known:
            known.add(entry["run_id"])
            yield entry


def of_folder(results: pathlib.Path, name: str) -> tuple[Suite, dict[Key, Row]]:
    """A suite and its rows from a results folder and the folder `core` in it."""
    of = suite.load(name)
    return of, rows(of, entries(results))


def write(results: pathlib.Path) -> list[pathlib.Path]:
    """Write core/VERSION.csv and .md for every suite that the folder has a record of -> their paths."""
    written = []
    for name in suite.names():
        of, made = of_folder(results, name)
        if not any(row.values for row in made.values()):
            continue
        matrix, every, missing = tables(of, made)
        place = folders(results)[1] / of.version
        record.write_text(place.with_suffix(".csv"), csv_text(every.columns, every.rows, _formatted))
        record.write_text(place.with_suffix(".md"), "\n\n".join(to_markdown(table) for table in (matrix, missing)) + "\n")
        written += [place.with_suffix(".csv"), place.with_suffix(".md")]
    return written


def _formatted(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return fraction(value, 1 if "seconds" in name else 4) if isinstance(value, float) else str(value)
