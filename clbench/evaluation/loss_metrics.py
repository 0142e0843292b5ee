"""Metrics of pre-training runs by name: pure NumPy on loss matrices and curves. Losses are nats per token.

r [T, E]        mean loss on evaluation set j after experience i; every set is evaluated from the start
start [E]       the same before the first experience
first_seen [E]  the experience that reads the set's domain first; a set counts as old where that is before the last one
curves          {"tokens": [P], "loss": {set: [P]}, "lr": [P], "boundaries": [...], "experience": [P], "step": [P]}
Higher loss is worse: forgetting is a rise, transfer a fall, as in the sources named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
ABOUT: dict[str, str] = {
    "final_loss": "mean over sets after the last experience, nats per token",
    "average_loss": "mean over experiences of the mean over the sets seen by then",
    "learned_loss": "mean over sets right after the set's own experience (Abbes et al. 2025)",
    "retained_loss": "mean over old sets after the last experience (Abbes et al. 2025)",
    "newest_loss": "mean over the sets of the last experience, after it",
    "forgetting_after": "mean over old sets of final - right after the set's own experience",
    "forgetting_best": "mean over old sets of final - lowest from the set's own experience on",
    "backward_transfer": "-forgetting_after: positive is good",
    "forward_transfer": "mean over later sets of before any training - just before the set's own experience: positive is good",
    "regret": "mean over sets of final - the exact loss of the true source, where that is known",
    "regret_learned": "mean over sets of right after the set's own experience - the exact loss of the true source",
    "final_bpb": "final_loss in bits per byte: nats / (ln 2 x bytes per token), mean over the sets that are texts",
    "recovery_ratio": "(final_loss without replay - final_loss) / (without replay - joint training), from three runs",
    "gap_depth": "mean over old sets and later experiences of highest loss within - loss at its start",
    "gap_area": "the same of nats x tokens above the start",
    "gap_tokens": "tokens until the loss is back at its start, where it comes back",
    "gap_recovered": "share of old sets and later experiences where it comes back",
    "dip_depth": "mean over later experiences of right guesses on their own sets, share at first - lowest (Guo et al. 2024)",
    "dip_recovered": "share of later experiences in which it comes back to the start, or never fell below it",
    "dip_tokens": "tokens until it is back, where it comes back",
    "rate_share": "rise on the first set in the second experience: on the IID control / here, from two runs",
    "anneal_gain_new": "trunk's loss - evaluated loss on the newest set, where a branch or an average is evaluated",
    "anneal_gain_old": "the same on older sets: below zero, annealing specialises",
    "min_acc": "mean over old sets of the lowest share of right guesses at any look after their own experience",
    "wc_acc": "share of right guesses on the newest set / T + (1 - 1 / T) min_acc",
    "probe_own": "images: mean over sets of a linear probe's accuracy after the last experience, on each group's own classes",
    "probe_seen": "images: the same by one classifier for the classes of all groups seen",
    "probe_seen_average": "images: mean over experiences of `probe_seen` on the sets seen by then (Singh et al. 2025)",
    "probe_gain": "images: probe_own - what random weights gave before the first experience",
}
HIGHER = (
    "backward_transfer",
    "forward_transfer",
    "recovery_ratio",
    "gap_recovered",
    "dip_recovered",
    "anneal_gain_new",
    "anneal_gain_old",
    "min_acc",
    "wc_acc",
    "probe_own",
    "probe_seen",
    "probe_seen_average",
    "probe_gain",
)


def loss_matrix(sum_loss: Any, tokens: Any) -> Array:
    """Summed nats [T, E] and token counts [E] -> nats per token [T, E]."""
    return np.array(sum_loss, np.float64) / np.asarray(tokens, np.float64)


def bits_per_byte(nats: Any, bytes_per_token: Any) -> Array:
    """Nats per token [..., E] and bytes per token [E] (None: no text) -> bits per byte, NaN where there are no bytes."""
    sizes = np.array([np.nan if size is None else size for size in bytes_per_token], np.float64)
    return np.asarray(nats, np.float64) / (math.log(2) * sizes)


def _mean(values: Any) -> float:
    found = np.asarray(values, np.float64)
    return float(np.add.reduce(found, axis=None) / found.size) if found.size else float("nan")  # `mean` without its overhead


def _old(r: Array, first_seen: Sequence[int]) -> list[int]:
    return [j for j, i in enumerate(first_seen) if i < len(r) - 1]


def final_loss(r: Array) -> float:
    """Mean over sets after the last experience."""
    return _mean(r[-1])


def average_loss(r: Array, first_seen: Sequence[int]) -> float:
    """Mean over experiences of the mean over the sets seen by then."""
    return _mean([_mean(row[np.asarray(first_seen) <= i]) for i, row in enumerate(r)])


def learned_loss(r: Array, first_seen: Sequence[int]) -> float:
    """Mean over sets of the loss right after the set's own experience (Abbes et al. 2025)."""
    return _mean([r[i, j] for j, i in enumerate(first_seen)])


def retained_loss(r: Array, first_seen: Sequence[int]) -> float:
    """Mean over old sets of the final loss (Abbes et al. 2025); NaN where nothing is old."""
    return _mean([r[-1, j] for j in _old(r, first_seen)])


def newest_loss(r: Array, first_seen: Sequence[int]) -> float:
    """Mean over the sets of the last experience of the final loss; NaN where it brings none."""
    return _mean([r[-1, j] for j, i in enumerate(first_seen) if i == len(r) - 1])


def forgetting_after(r: Array, first_seen: Sequence[int]) -> float:
    """Mean over old sets of (final) - (right after the set's own experience); below zero where later text helped."""
    return _mean([r[-1, j] - r[first_seen[j], j] for j in _old(r, first_seen)])


def forgetting_best(r: Array, first_seen: Sequence[int]) -> float:
    """Mean over old sets of (final) - (lowest from the set's own experience on); never below zero."""
    return _mean([r[-1, j] - r[first_seen[j] :, j].min() for j in _old(r, first_seen)])


def backward_transfer(r: Array, first_seen: Sequence[int]) -> float:
    """Minus `forgetting_after`: positive is good."""
    return -forgetting_after(r, first_seen)


def forward_transfer(r: Array, start: Array, first_seen: Sequence[int]) -> float:
    """Mean over later sets of (before any training) - (just before the set's own experience); positive is good."""
    return _mean([start[j] - r[i - 1, j] for j, i in enumerate(first_seen) if i > 0])


def regret(r: Array, floor: Any) -> float:
    """Mean over sets of (final) - (exact loss of the true source); NaN where no floor is known."""
    if any(value is None for value in floor):
        return float("nan")
    return _mean(r[-1] - np.asarray(floor, np.float64))


def regret_learned(r: Array, floor: Any, first_seen: Sequence[int]) -> float:
    """Mean over sets of (right after its own experience) - (floor)."""
    if any(value is None for value in floor):
        return float("nan")
    return _mean([r[i, j] - floor[j] for j, i in enumerate(first_seen)])


def recovery_ratio(without: float, here: float, union: float) -> float:
    """(L without replay - L) / (L without replay - L of joint training): 0 as without replay, 1 as good as joint training."""
    return (without - here) / (without - union) if without != union else float("nan")


def anneal_gain(trunk: Any, r: Array, tokens: Any, first_seen: Sequence[int]) -> dict[str, float]:
    """Trunk loss minus evaluated loss: on the newest set, and on older ones (below zero: annealing specialises)."""
    new, old = [], []
    for i, row in enumerate(trunk or ()):
        if row is not None:
            gains = np.asarray(row, np.float64) / np.asarray(tokens, np.float64) - r[i]
            new += [gains[j] for j, own in enumerate(first_seen) if own == i]
            old += [gains[j] for j, own in enumerate(first_seen) if own < i]
    return {"anneal_gain_new": _mean(new), "anneal_gain_old": _mean(old)}


def gaps(curves: Mapping[str, Any], names: Sequence[str], first_seen: Sequence[int], tolerance: float = 0.0) -> list[dict]:
    """The stability gap of every old set in every later experience.

    start     loss when the experience began
    depth     highest loss within the experience - start
    area      nats x tokens above the start (trapezoids between looks)
    tokens    until the first look after the peak that is within `tolerance` of the start; None: never
    peak_step the step at which it was highest
    """
    experience = np.asarray(curves["experience"])
    tokens, steps = np.asarray(curves["tokens"], np.float64), np.asarray(curves["step"])
    found = []
    columns = {name: np.asarray(curves["loss"][name], np.float64) for name in names}
    for k in sorted(set(experience.tolist())):
        if not any(own < k for own in first_seen):
            continue
        rows = np.flatnonzero(experience == k)
        at = tokens[rows]
        between = at[1:] - at[:-1]
        for name, own in zip(names, first_seen, strict=True):
            if own >= k:
                continue
            loss = columns[name][rows]
            above = np.maximum(loss - loss[0], 0)
            peak = int(loss.argmax())
            back = peak + np.flatnonzero(loss[peak:] <= loss[0] + tolerance)
            area = float(((above[1:] + above[:-1]) / 2 * between).sum())
            gap = {"experience": int(k), "set": name, "start": float(loss[0]), "depth": float(loss[peak] - loss[0])}
            gap |= {"area": area, "tokens": float(at[back[0]] - at[0]) if len(back) else None}
            found.append(gap | {"peak_step": int(steps[rows[peak]])})
    return found


def dips(curves: Mapping[str, Any], names: Sequence[str], first_seen: Sequence[int]) -> list[dict]:
    """The stability gap on what is learned (Guo et al. 2024): what a model could say of a domain falls before it rises.

    For every experience from the second on, on the sets that it brings, whose shares of right guesses are averaged:

    start   share of right guesses when the experience began
    depth   start - the lowest share within the experience, at least 0
    tokens  until the first look after the lowest that is at the start again; 0 where none is below it; None: never
    """
    experience, tokens = np.asarray(curves["experience"]), np.asarray(curves["tokens"], np.float64)
    found = []
    for k in sorted(set(experience.tolist()) - {0}):
        rows = np.flatnonzero(experience == k)
        new = [name for name, own in zip(names, first_seen, strict=True) if own == k]
        if not new:
            continue
        right = np.mean([np.asarray(curves["accuracy"][name], np.float64)[rows] for name in new], 0)
        low = int(right.argmin())
        back = low + np.flatnonzero(right[low:] >= right[0])
        dip = {"experience": int(k), "start": float(right[0]), "depth": float(right[0] - right[low])}
        found.append(dip | {"tokens": float(tokens[rows[back[0]]] - tokens[rows[0]]) if len(back) else None})
    return found


def min_accuracy(curves: Mapping[str, Any], names: Sequence[str], first_seen: Sequence[int]) -> float:
    """min-ACC (De Lange et al. 2023): mean over old sets of the lowest accuracy at any look after their own experience."""
    experience = np.asarray(curves["experience"])
    last = int(experience.max())
    worst = [
        np.asarray(curves["accuracy"][name])[experience > own].min()
        for name, own in zip(names, first_seen, strict=True)
        if own < last
    ]
    return _mean(worst)


def worst_case_accuracy(curves: Mapping[str, Any], names: Sequence[str], first_seen: Sequence[int]) -> float:
    """WC-ACC (De Lange et al. 2023): accuracy on the newest set / T + (1 - 1 / T) * min-ACC."""
    experience = np.asarray(curves["experience"])
    t = int(experience.max()) + 1
    newest = [curves["accuracy"][name][-1] for name, own in zip(names, first_seen, strict=True) if own == t - 1]
    return _mean(newest) / t + (1 - 1 / t) * min_accuracy(curves, names, first_seen) if t > 1 else _mean(newest)


def probe_accuracy(probe: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies of a linear probe on frozen features, from the counts of a record: {} where there is none.

    probe_own           mean over sets after the last experience, one classifier for each group's own classes
    probe_seen          the same, one classifier for all classes (all groups are seen by then)
    probe_seen_average  mean over experiences of the mean over the sets seen by then (Singh et al. 2025)
    probe_gain          `probe_own` minus what random weights gave before the first experience
    """
    n = np.asarray(probe["n"], np.float64)
    own = np.array(probe["own"], np.float64) / n
    seen = [_mean([c / m for c, m in zip(row, n, strict=True) if c is not None]) for row in probe["seen"]]
    start = _mean(np.asarray(probe["own_start"], np.float64) / n)
    found = {"probe_own": _mean(own[-1]), "probe_seen": seen[-1], "probe_seen_average": _mean(seen)}
    return found | {"probe_gain": found["probe_own"] - start}


def first_rise(curves: Mapping[str, Any], name: str) -> float:
    """Depth of the gap of the first set in experience 1; NaN without one."""
    loss = np.asarray(curves["loss"][name], np.float64)[np.asarray(curves["experience"]) == 1]
    return float(loss.max() - loss[0]) if len(loss) else math.nan


def rate_share(same: Mapping[str, Any], shifted: Mapping[str, Any], name: str) -> float:
    """Share of forgetting that the learning rate causes: rise on the first set when the text stays the same / when it shifts.

    `same` is the run on the IID control with the same learner and seed.
    """
    rises = [first_rise(curves, name) for curves in (same, shifted)]
    return rises[0] / rises[1] if rises[1] > 0 else float("nan")


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number that the losses of one record allow, by name; {} for a record without."""
    if not isinstance(record.get("sum_loss"), list) or not isinstance(record.get("tokens"), list):
        return {}
    tokens, first, names = record["tokens"], record["first_seen"], record["scenario"]["eval_names"]
    r = loss_matrix(record["sum_loss"], tokens)
    start, floor = loss_matrix(record["sum_loss_start"], tokens), record["floor"]
    values = {
        "final_loss": final_loss(r),
        "average_loss": average_loss(r, first),
        "final_bpb": _mean(bits_per_byte(r[-1], record["bytes_per_token"])),
        "learned_loss": learned_loss(r, first),
        "retained_loss": retained_loss(r, first),
        "newest_loss": newest_loss(r, first),
        "forgetting_after": forgetting_after(r, first),
        "forgetting_best": forgetting_best(r, first),
        "backward_transfer": backward_transfer(r, first),
        "forward_transfer": forward_transfer(r, start, first),
        "regret": regret(r, floor),
        "regret_learned": regret_learned(r, floor, first),
        **anneal_gain(record.get("sum_loss_trunk"), r, tokens, first),
    }
    if record.get("probe"):
        values |= probe_accuracy(record["probe"])
    curves = record.get("curves")
    if curves and curves["tokens"]:
        found = gaps(curves, names, first)
        values["gap_depth"] = _mean([g["depth"] for g in found])
        values["gap_area"] = _mean([g["area"] for g in found])
        values["gap_recovered"] = _mean([float(g["tokens"] is not None) for g in found])
        values["gap_tokens"] = _mean([g["tokens"] for g in found if g["tokens"] is not None])
        if curves.get("accuracy"):
            dipped = dips(curves, names, first)
            values["dip_depth"] = _mean([d["depth"] for d in dipped])
            values["dip_recovered"] = _mean([float(d["tokens"] is not None) for d in dipped])
            values["dip_tokens"] = _mean([d["tokens"] for d in dipped if d["tokens"] is not None])
            values["min_acc"] = min_accuracy(curves, names, first)
            values["wc_acc"] = worst_case_accuracy(curves, names, first)
    return values
