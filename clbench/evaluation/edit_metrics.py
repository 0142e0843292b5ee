"""Metrics of a run of edits by name, made of the sums of its record. Values are shares in 0..1 but for losses and norms.

A record has rows after each experience, which end after 1, 10, 100, ... edits, and before the first (the unedited model).
`seen` are the evaluation sets of the edits so far, all of them at the end. Higher is better but for `LOWER`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

KIND = "model_editing"
EVALUATORS = ("edit_success", "old_text", "newest_edit", "weights")
ABOUT: dict[str, str] = {
    "edit_score": "harmonic mean of reliability, generalisation and locality (0 where one of them is)",
    "reliability": "share of all edits so far whose prompt gets the new answer in full, end included, by greedy decoding",
    "generalisation": "the same of their paraphrases",
    "locality": "share of neighbours of the edits whose answer is that of the unedited model",
    "locality_gold": "the same, but right instead of unchanged",
    "same_subject": "share of probes of another relation of an edited subject whose answer is unchanged",
    "reliability_newest": "share of edits that got the new answer right after they were made, over the whole stream",
    "retention": "reliability of the edits that were right when they were made: reliability / reliability_newest",
    "reliability_old": "reliability of the edits of all experiences but the last, after the last: the older ones",
    "average_score": "mean of edit_score over the looks",
    "old_loss_rise": "loss on old text, nats per token - that of the unedited model",
    "token_reliability": "teacher-forced share of the tokens of new answers, as most published tables count",
    "efficacy_success": "share of edits whose new answer is likelier than the old one (ES, Meng et al. 2022)",
    "paraphrase_success": "the same of paraphrases (PS)",
    "neighbourhood_success": "share of neighbours whose right answer is likelier than the new one of the edit (NS)",
    "weight_drift": "norm of the change of the tensors that differ from the start / their norm at the start",
    "weight_growth": "norm of these tensors / their norm at the start; 1 where nothing changed",
    "collapse_at": "edits at the first look with old_loss_rise above 1 nat or reliability_newest below 1/2 (none: 0)",
}
LOWER = ("old_loss_rise", "weight_drift", "weight_growth", "collapse_at")
SHARES = tuple(name for name in ABOUT if name not in LOWER)


def is_edits(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a run of edits, finished or not."""
    return record.get("scenario", {}).get("kind") == KIND


def edits_at(record: Mapping[str, Any]) -> list[int]:
    """Edits made by the end of each experience."""
    made, total = [], 0
    for one in record["scenario"]["experiences"]:
        made.append(total := total + one["num_train"])
    return made


def course(record: Mapping[str, Any]) -> list[dict[str, float]]:
    """The numbers after each experience, by name; those that several experiences make are in `summary`."""
    rows = {(row["evaluator"], row["experience"]): row for row in record.get("rows") or () if row["step"] is None}
    looks = edits_at(record)
    start = rows["old_text", -1]["sums"] if ("old_text", -1) in rows else None
    found, newest = [], {"correct": 0, "n": 0}
    for i in range(len(looks)):
        if ("edit_success", i) not in rows:
            break
        sums = rows["edit_success", i]["sums"]
        values = {"edits": float(looks[i]), **_shares(record["probe"], sums)}
        if ("newest_edit", i) in rows:
            held = rows["newest_edit", i]["sums"]
            new = {name: sum(v for v in held[name] if v is not None) for name in newest}
            newest = {name: newest[name] + new[name] for name in newest}
            values["reliability_newest"] = newest["correct"] / newest["n"]
            values["newest_here"] = new["correct"] / new["n"]
        if start is not None and ("old_text", i) in rows:
            values["old_loss_rise"] = _loss(rows["old_text", i]["sums"]) - _loss(start)
        total = (rows["weights", i].get("total") or {}) if ("weights", i) in rows else {}
        if total:
            before = total["before"]
            values["weight_drift"] = math.sqrt(total["difference"] / before) if before else 0.0
            values["weight_growth"] = math.sqrt(total["now"] / before) if before else 1.0
        found.append(values)
    return found


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number of one record of edits, by name; {} for other records."""
    if not is_edits(record) or not (steps := course(record)):
        return {}
    last = {name: value for name, value in steps[-1].items() if name in ABOUT}
    last["average_score"] = sum(one["edit_score"] for one in steps) / len(steps)
    if last.get("reliability_newest"):
        last["retention"] = last["reliability"] / last["reliability_newest"]
    rows = [row for row in record["rows"] if row["evaluator"] == "edit_success" and row["experience"] == len(steps) - 1]
    earlier = [first < len(steps) - 1 for first in record["first_seen"]]
    if any(earlier) and len(steps) > 1:
        last["reliability_old"] = _share(record["probe"], rows[0]["sums"], "edits", "correct", earlier)
    broken = [s["edits"] for s in steps if s.get("old_loss_rise", 0.0) > 1 or s.get("newest_here", 1.0) < 0.5]
    last["collapse_at"] = broken[0] if broken else 0.0
    return {name: last[name] for name in ABOUT if name in last and last[name] == last[name]}


def _shares(kinds: list[str], sums: Mapping[str, Any]) -> dict[str, float]:
    """Shares by name of one row of `edit_success`; NaN where the stream has no such probes."""
    values = {
        "reliability": _share(kinds, sums, "edits", "correct"),
        "generalisation": _share(kinds, sums, "paraphrases", "correct"),
        "locality": _share(kinds, sums, "neighbours", "same"),
        "locality_gold": _share(kinds, sums, "neighbours", "correct"),
        "same_subject": _share(kinds, sums, "same_subject", "same"),
        "token_reliability": _share(kinds, sums, "edits", "token_hits", of="tokens"),
        "efficacy_success": _share(kinds, sums, "edits", "preferred"),
        "paraphrase_success": _share(kinds, sums, "paraphrases", "preferred"),
        "neighbourhood_success": _share(kinds, sums, "neighbours", "preferred"),
    }
    three = [v for v in (values[name] for name in ("reliability", "generalisation", "locality")) if v == v]
    values["edit_score"] = len(three) / sum(1 / v for v in three) if three and all(three) else 0.0
    return values


def _share(kinds: list[str], sums: Mapping[str, Any], kind: str, name: str, chosen: Any = None, of: str = "n") -> float:
    """Sum of `name` over the sets of a kind that were asked / sum of their sizes."""
    column = sums.get(name) or [None] * len(kinds)
    chosen = [True] * len(kinds) if chosen is None else chosen
    pairs = [(v, n) for v, n, k, c in zip(column, sums[of], kinds, chosen, strict=True) if v is not None and k == kind and c]
    size = sum(n for _, n in pairs)
    return sum(v for v, _ in pairs) / size if size else float("nan")


def _loss(sums: Mapping[str, Any]) -> float:
    """Nats per token of a row of `old_text`."""
    known = [(v, n) for v, n in zip(sums["nats"], sums["tokens"], strict=True) if v is not None]
    return sum(v for v, _ in known) / sum(n for _, n in known)
