"""Records that are handed in: checked, flagged, set beside the rows and the published numbers that are known, and packed.

How far a row can be believed:
    self-reported  its records are consistent: hashes, counts and streams fit each other; nobody ran them again
    verified       that, and the beginning of at least one of its records was run again here with the same counts
    signed         (of an archive) the holder of a key vouches for these bytes; it says nothing of their truth
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from clbench import __version__
from clbench.interfaces import UserError
from clbench.records import predictions, record
from clbench.records.verify import Verdict
from clbench.report import cards as cards_of
from clbench.report import formats
from clbench.report.board import Group, Row, rank
from clbench.report.columns import LEADERBOARDS
from clbench.report.formats import Table
from clbench.report.runs import Filter, Scan, scan
from clbench.report.travel import badge, flags, lines


@dataclass(frozen=True)
class Submission:
    """What is handed in: new rows with their runs, records by id, verdicts by file name, flags by row."""

    groups: Sequence[Group]
    entries: Mapping[str, Mapping[str, Any]]
    verdicts: Mapping[str, Verdict]
    flags: Mapping[int, Sequence[str]]
    reference: Sequence[Row]
    cards: Mapping[str, Any]
    known: Mapping[str, str]  # run id -> checksum of a record that is known already

    def level(self, group: Group) -> str:
        """`verified` where a record of the row was run again here with the same counts."""
        names = [f"{run.run_id}.json" for run in group.runs]
        return (
            "verified" if any(self.verdicts[n].verdict == "verified" for n in names if n in self.verdicts) else "self-reported"
        )


def gather(
    results: Path, wanted: Filter, checked: Sequence[Verdict], repeated: Sequence[Verdict], against: Path | None, now: datetime
) -> Submission:
    """Read what is handed in. `checked` are verdicts on every file of `results`, `repeated` those of records run again.

    `UserError` where nothing finished is there, where a record contradicts itself, or where a repeat did not agree.
    """
    entries: dict[str, Mapping[str, Any]] = {}
    found = scan(results, wanted, lambda entry, run: entries.__setitem__(run.run_id, _light(entry)))
    done = [run for run in found.runs if run.status == "ok" and run.usable]
    if not done:
        raise UserError(f"{results / 'records'} holds no finished record to hand in")
    chosen = {f"{run.run_id}.json" for run in done}
    chosen |= {f"{run.scenario} {run.learner} {run.model} {run.variant}" for run in done}  # as `verify` names groups of records
    for one in [*checked, *repeated]:
        if one.verdict == "failed" and one.name in chosen:
            raise UserError(f"{one.name} is not handed in: {'; '.join(one.reasons)}")
    groups = _ranked(found)
    reference, known = (_reference(scan(against)), _checksums(against)) if against is not None else ([], {})
    cards = cards_of.load(against / "cards.yaml") if against is not None and (against / "cards.yaml").is_file() else {}
    odd = {
        i: _flags(group, entries, [*reference, *(g.row for g in groups)], cards, known, now) for i, group in enumerate(groups)
    }
    return Submission(groups, entries, {v.name: v for v in repeated if v.verdict == "verified"}, odd, reference, cards, known)


def _light(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What flags and texts read of a record; `odd`: what its losses or edits make implausible."""
    keys = ("run_id", "config", "git", "created", "finished", "seconds", "resumed", "numbers_version", "marks", "checksum")
    return (
        {key: entry.get(key) for key in (*keys, "predictions_sha256")}
        | {"odd": list(flags.of_numbers(entry)) if entry["status"] == "ok" else []}
        | {"manifest": entry["scenario"]["manifest_sha256"]}
        | {"learner": entry["learner"], "scenario": entry["scenario"], "model": entry["model"], "seed": entry["seed"]}
    )


def _ranked(found: Scan) -> list[Group]:
    """Rows of all leaderboards that have a result: accuracies, losses, edits."""
    return [group for board in LEADERBOARDS for group in rank(found.runs, board, found.dead) if group.row["n_seeds"]]


def _reference(found: Scan) -> list[Row]:
    return [group.row for group in _ranked(found)]


def _checksums(results: Path) -> dict[str, str]:
    return {entry["run_id"]: str(entry.get("checksum")) for entry in record.entries(results / "records", [], details=False)}


def _flags(
    group: Group,
    entries: Mapping[str, Mapping[str, Any]],
    reference: Sequence[Row],
    cards: Mapping[str, Any],
    known: Mapping[str, str],
    now: datetime,
) -> list[str]:
    """Flags of a row and of its records: each once, with the seeds that it is about."""
    said: dict[str, list[int]] = {}
    for run in group.runs:
        if run.status != "ok":
            continue
        entry = entries[run.run_id]
        found = [*flags.of_record(entry, now), *entry["odd"]]
        if run.run_id in known:
            same = known[run.run_id] == str(entry.get("checksum"))
            found.append("this very record is known already" if same else "another record of this very run is known already")
        if plugin := entry["learner"].get("plugin"):
            found.append(f"its learner is outside of clbench: {plugin}")
        for line in found:
            said.setdefault(line, []).append(run.seed)
    dataset = (
        str(entries[group.runs[0].run_id]["config"]["scenario"].get("dataset", "")) if group.runs[0].run_id in entries else ""
    )
    of_row = list(flags.of_row(group.row, dataset, reference, cards, lines.board_of(group)))
    return of_row + [f"{line} (seed {', '.join(map(str, seeds))})" for line, seeds in said.items()]


def files(made: Submission, results: Path, conf: Path, answers: bool = False) -> dict[str, bytes]:
    """What goes into the archive: records and manifests as they lie there, the text, facts for programs, badges.

    answers: the predictions of every sample too, of the records that have them (`save_predictions=true`).
    """
    held: dict[str, bytes] = {}
    for group in made.groups:
        for run in group.runs:
            if run.status != "ok":
                continue
            held[f"records/{run.run_id}.json"] = (results / "records" / f"{run.run_id}.json").read_bytes()
            manifest = f"manifests/{made.entries[run.run_id]['manifest']}.json"
            if (results / manifest).is_file():
                held[manifest] = (results / manifest).read_bytes()
            path = predictions.path_of(results, run.run_id)
            if answers and made.entries[run.run_id]["predictions_sha256"] is not None and path.is_file():
                held[f"predictions/{path.name}"] = path.read_bytes()
        name = "-".join(str(group.row[key]) for key in ("scenario", "learner", "model", "variant"))
        held[f"badges/{table_file(name)}.svg"] = _badge(group, made.level(group)).encode()
    if answers and not any(name.startswith("predictions/") for name in held):
        raise UserError("--predictions: no chosen record has predictions; clbench run ... save_predictions=true keeps them")
    held["PULL_REQUEST.md"] = text(made, conf).encode()
    held["submission.json"] = (json.dumps(facts(made), indent=1, sort_keys=True) + "\n").encode()
    return held


def table_file(name: str) -> str:
    """A file name of a row: letters, digits, `-`, `_` and `.` alone."""
    made = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
    return made.lstrip(".")[:120] or "row"


def _badge(group: Group, level: str) -> str:
    return badge.svg(f"clbench {group.row['scenario']}", lines.claim(group.row, lines.board_of(group)), level)


def facts(made: Submission) -> dict[str, Any]:
    """The submission for programs."""
    rows = []
    for i, group in enumerate(made.groups):
        named = {key: group.row[key] for key in ("scenario", "learner", "model", "variant", "manifest", "seeds", "marks")}
        numbers = {key: group.row[f"{key}_mean"] for key in lines.NUMBERS[lines.board_of(group).part]}
        runs = [run.run_id for run in group.runs if run.status == "ok"]
        rows.append({**named, **numbers, "level": made.level(group), "flags": list(made.flags[i]), "records": runs})
    return {"clbench": __version__, "rows": rows, "repeated": sorted(made.verdicts)}


def text(made: Submission, conf: Path) -> str:
    """The text of a pull request: new rows beside those that are known, published numbers, flags, commands."""
    count = sum(g.row["n_seeds"] for g in made.groups)
    units = "; ".join(dict.fromkeys(lines.UNITS[lines.board_of(g).part] for g in made.groups))
    parts = [
        f"# {count} records, {len(made.groups)} rows",
        f"Made by `clbench submit`; check it with `clbench submit --check ARCHIVE`. {units}; mean ± standard"
        " deviation over seeds. *self-reported*: the records fit themselves and their streams;"
        " *verified*: and the beginning of one of them was run again with the same counts.",
    ]
    for scenario, manifest in dict.fromkeys((g.row["scenario"], g.row["manifest"]) for g in made.groups):
        mine = [g for g in made.groups if (g.row["scenario"], g.row["manifest"]) == (scenario, manifest)]
        known = [r for r in made.reference if (r["scenario"], r["manifest"]) == (scenario, manifest)]
        board = lines.board_of(mine[0])
        rows = [lines.line(g.row, board, made.level(g)) for g in mine] + [lines.line(r, board, "known") for r in known]
        table = formats.to_markdown(Table("rows", "", lines.columns(board), rows))
        parts += [f"## {formats.markdown(scenario)}, stream {manifest}", table]
    claims = [claim for name in dict.fromkeys(g.row["learner"] for g in made.groups) for claim in _claims(name, made.cards)]
    numbers = Table("claims", "", tuple(claims[0]) if claims else (), claims, digits={"last": 2, "average": 2})
    parts += ["## Published", formats.to_markdown(numbers) if claims else "No card is known."]
    odd = [
        f"- {formats.markdown(lines.named(g.row))}: {formats.markdown(line)}"
        for i, g in enumerate(made.groups)
        for line in made.flags[i]
    ]
    parts += ["## To look at", "\n".join(odd) or "Nothing is odd."]
    parts += ["## Commands"]
    for group in made.groups:
        first = made.entries[next(run.run_id for run in group.runs if run.status == "ok")]
        parts.append(f"```bash\n{cards_of.command(first, group.row['seeds'].split(), conf)}\n```")
    return "\n\n".join(parts) + "\n"


def _claims(learner: str, cards: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = (cards.get("cards") or {}).get(learner, {}).get("published", [])
    return [
        {
            "learner": learner,
            **{key: entry[key] for key in ("protocol", "model", "last", "average")},
            "source": entry["source"] if entry["checked"] else f"{entry['source']}; recalled, not re-checked",
        }
        for entry in entries
    ]


def summary(made: Submission) -> str:
    """The rows for the terminal, a table for each leaderboard, and what is odd."""
    tables = []
    for board in LEADERBOARDS:
        mine = [g for g in made.groups if lines.board_of(g) is board]
        rows = [{"scenario": g.row["scenario"], **lines.line(g.row, board, made.level(g))} for g in mine]
        if rows:
            tables.append(formats.to_text(Table("rows", "", ("scenario", *lines.columns(board)), rows)))
    odd = [f"look at {lines.named(g.row)}: {line}" for i, g in enumerate(made.groups) for line in made.flags[i]]
    return "\n".join(["\n\n".join(tables), *odd])
