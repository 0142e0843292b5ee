"""What is odd about results that somebody hands in. A flag is no verdict: it says where a reader should look."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from clbench.evaluation import edit_metrics
from clbench.records import loss_facts, record
from clbench.report.board import Row
from clbench.report.columns import ACCURACY, EDITS, LOSS, Leaderboard
from clbench.report.runs import is_legacy

SEEDS = 5  # as many as a card has
SLACK = timedelta(minutes=10)  # clocks of two machines differ
FASTEST = {"cpu": 1e14, "gpu": 2.5e15}  # operations a second of a process: above any processor's or accelerator's dense bf16
KNOWING = 0.9  # share of ln V below which weights know something
LEAP = 0.05  # shares and nats that chance and greedy decoding do not give
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


def of_row(
    row: Row, dataset: str, reference: Sequence[Row], cards: Mapping[str, Any], board: Leaderboard = ACCURACY
) -> Iterator[str]:
    """Seeds of a row of a leaderboard, and numbers beyond the reference, beyond what was published, beyond what can be."""
    seeds = [int(seed) for seed in str(row["seeds"]).split()]
    if gaps := sorted(set(range(max(seeds, default=-1) + 1)) - set(seeds)) if max(seeds, default=0) < 1000 else []:
        yield f"seeds {', '.join(map(str, gaps))} are missing between those that are here"
    if len(seeds) < SEEDS:
        yield f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}; a card has {SEEDS}"
    lost = sum(row[name] or 0 for name in ("failed", "dead"))
    if lost:
        yield f"{lost} runs of this setting have no result"
    if board is LOSS:
        yield from _losses(row, reference)
    if board is EDITS:
        yield from _edits(row)
    mean = row[f"{board.headline}_mean"]
    if mean is None or "reference" in str(row["marks"]).split():
        return
    yield from _beyond(row, reference, board)
    if board is ACCURACY and (known := published(row["learner"], dataset, cards)) and 100 * mean > max(known):
        yield f"{100 * mean:.2f} % is above every number published for {row['learner']} on {dataset} (at most {max(known):g} %)"


def _beyond(row: Row, reference: Sequence[Row], board: Leaderboard) -> Iterator[str]:
    """Better than a reference (all data at once) on the same stream by more than two standard deviations."""
    name = board.headline
    mean, sign = row[f"{name}_mean"], -1 if board.lower else 1
    for one in reference:
        same = all(one[key] == row[key] for key in ("scenario", "manifest", "model"))
        bound = one.get(f"{name}_mean")
        if same and "reference" in str(one["marks"]).split() and bound is not None:
            margin = 2 * max(one[f"{name}_std"] or 0.0, row[f"{name}_std"] or 0.0)
            if sign * mean > sign * bound + margin:
                if board.per_cent:
                    yield f"{100 * mean:.2f} % is above {one['learner']}, the upper reference, with {100 * bound:.2f} %"
                else:
                    where = "below" if board.lower else "above"
                    yield f"{name} {mean:.4f} is {where} {one['learner']}, which trains on all data, with {bound:.4f}"


def _losses(row: Row, reference: Sequence[Row]) -> Iterator[str]:
    """A loss below that of the true source; more training than the known rows of the stream had."""
    if row["regret_mean"] is not None and row["regret_mean"] < 0:
        yield f"the mean loss is {-row['regret_mean']:.4f} below the exact loss of the true source"
    same = [one for one in reference if all(one[key] == row[key] for key in ("scenario", "manifest"))]
    used, most = _trained(row), max((_trained(one) for one in same), default=0)
    if used > 1.01 * most > 0:
        yield f"trained on {used} tokens or images; the known rows of this stream on at most {most}"


def _trained(row: Row) -> int:
    """Tokens or images that a run of a row was trained on, largest over the runs."""
    return sum(row.get(f"tokens_{name}") or 0 for name in ("trunk_new", "trunk_replay", "branch_new", "branch_replay"))


def _edits(row: Row) -> Iterator[str]:
    """Numbers of edits that no known method has a reason for."""
    right, again, kept, rise = (row[f"{name}_mean"] for name in ("reliability", "generalisation", "retention", "old_loss_rise"))
    if right is not None and again is not None and again > right + LEAP:
        yield f"paraphrases are answered better ({again:.3f}) than the edits themselves ({right:.3f})"
    if kept is not None and kept > 1 + LEAP:
        yield f"{kept:.3f} times as many edits are right at the end as were right when they were made"
    if rise is not None and rise < -LEAP and not row["exemplars"]:
        yield f"old text is predicted {-rise:.3f} nats per token better after the edits, and none of it is kept"


def of_numbers(entry: Entry) -> Iterator[str]:
    """What a finished record of losses or edits makes implausible: speed, start, knowledge before its time."""
    if loss_facts.is_loss(entry):
        yield from _speed(entry)
        yield from _start(entry)
    if edit_metrics.is_edits(entry):
        yield from _known_before(entry)


def _speed(entry: Entry) -> Iterator[str]:
    """More operations a second than a machine of its kind computes."""
    machine, seconds = entry["machine"], (entry.get("seconds") or {}).get("total")
    limit = FASTEST["cpu" if str(machine.get("device")) == "cpu" else "gpu"] * int(machine.get("processes") or 1)
    flops = entry["ledger"]["flops"]
    if isinstance(seconds, int | float) and flops > limit * seconds:
        yield f"{flops:.3g} operations in {seconds:.1f} s: more than {limit:.3g} a second, which no such machine computes"


def _start(entry: Entry) -> Iterator[str]:
    """Random weights predict no better than a uniform guess, ln V."""
    vocab, drawn = entry["scenario"].get("vocab"), entry["model"].get("source") == "none"
    if not drawn or not isinstance(vocab, int) or vocab < 2 or loss_facts.unit_of(entry) != "tokens":
        return
    nats = min(total / n for total, n in zip(entry["sum_loss_start"], entry["tokens"], strict=True))
    if nats < KNOWING * math.log(vocab):
        yield f"random weights begin at {nats:.3f} nats per token; a uniform guess has {math.log(vocab):.3f}"


def _known_before(entry: Entry) -> Iterator[str]:
    """Edits whose new answer the model gave before it was edited."""
    for row in entry["rows"]:
        if row["evaluator"] == "edit_success" and row["experience"] == -1:
            pairs = zip(row["sums"]["correct"], row["sums"]["n"], entry["probe"], strict=True)
            asked = [(right, n) for right, n, kind in pairs if kind == "edits" and n]
            right, n = (sum(values) for values in zip(*asked, strict=True)) if asked else (0, 0)
            if right > LEAP * n:
                yield f"{right} of {n} edits were right before the first edit"


def published(learner: str, dataset: str, cards: Mapping[str, Any]) -> list[float]:
    """Last accuracies of a card whose protocol names the data set, in per cent; protocols differ, so they only bound."""
    word = _plain(dataset)
    entries = (cards.get("cards") or {}).get(learner, {}).get("published", [])
    return [e["last"] for e in entries if word and e["last"] is not None and re.search(word + r"(?!\d)", _plain(e["protocol"]))]


def _plain(words: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", words.lower()).strip()
