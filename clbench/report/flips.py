"""`clbench report flips RECORD...`: what was answered right before an experience and wrong after it, and the other way round.

Of the samples of an evaluation set that had answers at both times, N in all:
    NF = #(old right, new wrong)   PF = #(old wrong, new right)   NFR = NF / N   PFR = PF / N   new - old accuracy = PFR - NFR
    relative NFR = NFR / (accuracy old (1 - accuracy new)): 1 for two models whose errors have nothing to do with each other
                   (Yan et al., CVPR 2021, arXiv 2011.09161, "Positive-Congruent Training")
    to new       share of the NF whose new answer is a class that the experience brought
Sets that were first seen before the experience take part. Needs the answers of every sample: `save_predictions=true`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.records import predictions, record
from clbench.records.predictions import Predictions
from clbench.report.formats import Table

KEYS = ("run_id", "learner", "seed", "experience")
SUMS = ("n", "old_right", "new_right", "nf", "pf", "nf_to_new")
NOTES = (
    "n: samples answered before and after the experience; nf: right before, wrong after; pf: wrong before, right after",
    "nfr = nf / n, pfr = pf / n; conditional_nfr = nf / old_right; to_new: share of nf answered with a class that is new",
    "relative_nfr = nfr / (accuracy before x (1 - accuracy after)): 1 for models whose errors are independent",
)
RATES = ("nfr", "pfr", "conditional_nfr", "relative_nfr", "to_new")


def counts(found: Predictions, row: int, place: int, new_classes: Sequence[int]) -> dict[str, int] | None:
    """Whole numbers of one set between `row` - 1 and `row`; None where it was not evaluated at both."""
    old, new = found.right(row - 1, place), found.right(row, place)
    if old is None or new is None:
        return None
    negative = old & ~new
    strayed = np.isin(found.answers[row, place][:, 0][negative], list(new_classes))
    values = (len(old), old.sum(), new.sum(), negative.sum(), (~old & new).sum(), strayed.sum())
    return {name: int(value) for name, value in zip(SUMS, values, strict=True)}


def rates(sums: dict[str, int]) -> dict[str, float | None]:
    """The rates of some counts; None where they divide by nothing."""
    n, nf = sums["n"], sums["nf"]
    chance = sums["old_right"] * (n - sums["new_right"])
    return {
        "nfr": nf / n,
        "pfr": sums["pf"] / n,
        "conditional_nfr": nf / sums["old_right"] if sums["old_right"] else None,
        "relative_nfr": nf * n / chance if chance else None,
        "to_new": sums["nf_to_new"] / nf if nf else None,
    }


def tables(words: Sequence[str], results: Path) -> list[Table]:
    """A row for each experience, all sets together, and a row for each set."""
    pairs: list[dict[str, Any]] = []
    sets: list[dict[str, Any]] = []
    for word in words:
        for about, parts in _experiences(word, results):
            total = {name: sum(one[name] for _, one in parts) for name in SUMS}
            pairs.append(about | total | rates(total))
            sets += [about | {"set": name} | one | rates(one) for name, one in parts]
    digits: dict[str, int] = dict.fromkeys(RATES, 4)
    return [
        Table("pairs", "flips from one experience to the next", (*KEYS, *SUMS, *RATES), pairs, NOTES, digits),
        Table("sets", "flips by evaluation set", (*KEYS, "set", *SUMS, *RATES), sets, (), digits),
    ]


def _experiences(word: str, results: Path) -> Iterator[tuple[dict[str, Any], list[tuple[str, dict[str, int]]]]]:
    """Of every experience but the first: what it is called, and the counts of the sets first seen before it by name."""
    path = Path(word).expanduser()
    if not path.is_file():
        path = results / "records" / f"{word}.json"
    if not path.is_file():
        raise UserError(f"no record {word} in {results / 'records'}")
    entry = record.read(path)
    where = predictions.path_of(path.resolve().parent.parent, entry["run_id"])
    if not where.exists():
        raise UserError(f"{entry['run_id']} has no predictions: save_predictions=true force=true makes the run again with them")
    if entry.get("predictions_sha256") != predictions.sha256(where):
        raise UserError(f"{where} does not hold the predictions of {entry['run_id']}")
    found, first_seen = predictions.read(where), entry["first_seen"]
    every = entry["scenario"].get("evaluate_every") or 1
    first = [seen // every for seen in first_seen]
    for row in range(1, len(entry["correct"])):
        places = [j for j, seen in enumerate(first) if seen < row]
        known = {int(c) for j in places for c in found.y[j]}
        new = {int(c) for j, seen in enumerate(first) if seen == row for c in found.y[j]} - known
        made = [(found.sets[j], one) for j in places if (one := counts(found, row, j, sorted(new)))]
        if made:
            about = {"run_id": entry["run_id"], "learner": entry["learner"]["name"], "seed": entry["seed"]}
            yield about | {"experience": row + 1}, made
