"""What is odd about results that somebody hands in. A flag is no verdict: it says where a reader should look."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from clbench.records import record
from clbench.report.board import Row
from clbench.report.runs import is_legacy

SEEDS = 5  # as many as a card has
SLACK = timedelta(minutes=10)  # clocks of two machines differ
Entry = Mapping[str, Any]


def of_record(entry: Entry, now: datetime) -> Iterator[str]:
    """Code, versions and clock of one finished record."""
    if is_legacy(entry):
        here = record.numbers_version(entry["config"])
        yield f"numbers_version {entry['numbers_version']}, this code makes {here}: not comparable with new runs"
    git = entry.get("git")
    if not isinstance(git, Mapping) or not git.get("revision"):
        yield "no revision of the code is known"
    elif git.get("dirty"):
        yield f"the code had changes that were not committed (revision {str(git['revision'])[:12]})"
    yield from _clock(entry, now)


def _clock(entry: Entry, now: datetime) -> Iterator[str]:
    began, ended = (_moment(entry.get(key)) for key in ("created", "finished"))
    if began is None or ended is None:
        yield "it does not say when it ran"
        return
    if ended < began:
        yield "it ended before it began"
    if ended > now + SLACK:
        yield f"it ended in the future ({ended.isoformat()})"
    seconds = (entry.get("seconds") or {}).get("total")
    if isinstance(seconds, int | float) and not entry.get("resumed") and ended >= began:
        wall = (ended - began).total_seconds()
        if seconds > wall + 2 + 0.02 * wall:  # the moments are whole seconds
            yield f"it counts {seconds:.0f} s of work between two moments {wall:.0f} s apart"


def _moment(value: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def of_row(row: Row, dataset: str, reference: Sequence[Row], cards: Mapping[str, Any]) -> Iterator[str]:
    """Seeds of a row of the leaderboard, and numbers above the upper reference or above what was published."""
    seeds = [int(seed) for seed in str(row["seeds"]).split()]
    if gaps := sorted(set(range(max(seeds, default=-1) + 1)) - set(seeds)) if max(seeds, default=0) < 1000 else []:
        yield f"seeds {', '.join(map(str, gaps))} are missing between those that are here"
    if len(seeds) < SEEDS:
        yield f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}; a card has {SEEDS}"
    lost = sum(row[name] or 0 for name in ("failed", "dead"))
    if lost:
        yield f"{lost} runs of this setting have no result"
    mean = row["last_macro_mean"]
    if mean is None or "reference" in str(row["marks"]).split():
        return
    for one in reference:
        same = all(one[key] == row[key] for key in ("scenario", "manifest", "model"))
        above = one["last_macro_mean"]
        if same and "reference" in str(one["marks"]).split() and above is not None:
            margin = 2 * max(one["last_macro_std"] or 0.0, row["last_macro_std"] or 0.0)
            if mean > above + margin:
                yield f"{100 * mean:.2f} % is above {one['learner']}, the upper reference, with {100 * above:.2f} %"
    if (known := published(row["learner"], dataset, cards)) and 100 * mean > max(known):
        yield f"{100 * mean:.2f} % is above every number published for {row['learner']} on {dataset} (at most {max(known):g} %)"


def published(learner: str, dataset: str, cards: Mapping[str, Any]) -> list[float]:
    """Last accuracies of a card whose protocol names the data set, in per cent; protocols differ, so they only bound."""
    word = _plain(dataset)
    entries = (cards.get("cards") or {}).get(learner, {}).get("published", [])
    return [e["last"] for e in entries if word and e["last"] is not None and re.search(word + r"(?!\d)", _plain(e["protocol"]))]


def _plain(words: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", words.lower()).strip()
