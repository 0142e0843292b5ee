"""Recompute what can be recomputed of a pre-training record: sums, floors, ledger, curves, stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from clbench.evaluation import loss_metrics
from clbench.records.loss_facts import LEDGER

SLACK = 0.01  # nats per token by which a finite evaluation set may be predicted better than by its source


def check(entry: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is wrong with a finished record of kind `continual_pretraining`."""
    steps, sets = entry["scenario"]["num_experiences"], len(entry["n"])
    if entry["tokens"] != entry["n"]:
        yield "keys 'tokens' and 'n' differ"
    rows = [*entry["sum_loss"], entry["sum_loss_start"], *(row for row in entry["sum_loss_trunk"] or () if row is not None)]
    if len(entry["sum_loss"]) != steps or len(entry["sum_loss_trunk"] or entry["sum_loss"]) != steps:
        yield f"the losses do not have a row for each of {steps} experiences"
    for row in rows:
        if len(row) != sets or not all(isinstance(v, float | int) and math.isfinite(v) and v >= 0 for v in row):
            yield f"a row of losses is not {sets} finite numbers from 0: {row}"
            return
        for j, (total, tokens, floor) in enumerate(zip(row, entry["tokens"], entry["floor"], strict=True)):
            if floor is not None and total / tokens < floor - SLACK:
                yield f"set {j}: a loss of {total / tokens:.4f} is below the exact floor {floor:.4f}"
    yield from _ledger(entry)
    yield from _curves(entry)
    yield from _probe(entry)
    if not all(isinstance(value, float) for value in loss_metrics.summary(entry).values()):
        yield "a derived number is not a number"


def _ledger(entry: Mapping[str, Any]) -> Iterator[str]:
    """Tokens by purpose add up, and to what the plan says."""
    ledger, stream = entry["ledger"], entry["scenario"]
    if any(type(ledger[name]) is not int or ledger[name] < 0 for name in (*LEDGER, "evaluation")):
        yield "the ledger must hold whole numbers from 0"
        return
    trained = sum(ledger[name] for name in LEDGER[:4])
    if trained != ledger["unique"] + ledger["repeated"]:
        yield f"{trained} tokens were trained on, {ledger['unique']} unique and {ledger['repeated']} repeated ones are claimed"
    size = stream["batch"] * stream["context"]
    for role in ("trunk", "branch"):
        planned = sum(s["last"] - s["first"] for s in entry["plan"] if s["role"] == role) * size
        if planned != ledger[f"{role}_new"] + ledger[f"{role}_replay"]:
            yield f"the plan has {planned} tokens of {role}, the ledger {ledger[f'{role}_new'] + ledger[f'{role}_replay']}"
    if entry["steps"] * size != trained:
        yield f"{entry['steps']} steps are not {trained} tokens"
    rounds = stream["num_experiences"] + 1 + sum(row is not None for row in entry["sum_loss_trunk"] or ())
    if ledger["evaluation"] != rounds * sum(entry["tokens"]):
        yield f"{ledger['evaluation']} tokens of evaluation are not {rounds} rounds over all sets"
    limit = stream["budget"]["processed"]
    for k in range(stream["num_experiences"] if limit is not None and "reference" not in entry["marks"] else 0):
        used = sum(s["last"] - s["first"] for s in entry["plan"] if s["experience"] == k) * size
        if used > limit:
            yield f"experience {k} used {used} tokens, the budget allows {limit}"
    limit = stream["budget"]["exemplar_bytes"]
    if limit is not None and ledger["replay_bytes"] > limit:
        yield f"replay held {ledger['replay_bytes']} bytes, the budget allows {limit}"


def _probe(entry: Mapping[str, Any]) -> Iterator[str]:
    """Right answers of the linear probe are whole numbers up to the number of images, one for each set that is due."""
    probe, first = entry.get("probe"), entry["first_seen"]
    if (probe is None) == (entry["scenario"].get("unit") == "images"):
        yield "streams of images have a linear probe, streams of tokens have none"
    if probe is None:
        return
    if probe["n"] != entry["n"]:
        yield "the linear probe was judged on other images than the losses"
    rows = [probe["own_start"], *probe["own"], *probe["seen"]]
    due = [[True] * len(first)] * (1 + len(probe["own"])) + [[own <= i for own in first] for i in range(len(probe["seen"]))]
    if len(probe["own"]) != len(entry["sum_loss"]) or len(probe["seen"]) != len(entry["sum_loss"]):
        yield "the linear probe does not have a row for each experience"
    for row, wanted in zip(rows, due, strict=True):
        fits = len(row) == len(wanted) and all((c is not None) == w for c, w in zip(row, wanted, strict=True))
        if not fits or any(
            c is not None and (type(c) is not int or not 0 <= c <= n) for c, n in zip(row, probe["n"], strict=True)
        ):
            yield f"a row of the linear probe is not made of counts: {row}"


def _curves(entry: Mapping[str, Any]) -> Iterator[str]:
    """Curves are of one length, run forward, and end within what was trained on."""
    curves, names = entry["curves"], entry["scenario"]["eval_names"]
    number = len(curves["tokens"])
    columns = [curves[key] for key in ("lr", "experience", "step", "role")]
    for key in ("loss", "accuracy"):
        if set(curves[key]) != set(names):
            yield f"the curves of {key} are not of the evaluation sets"
        columns += list(curves[key].values())
    if any(len(column) != number for column in columns):
        yield "the curves differ in length"
    if any(b < a for a, b in zip(curves["tokens"], curves["tokens"][1:], strict=False)):
        yield "the curves run backwards"
    if number and curves["tokens"][-1] > sum(entry["ledger"][name] for name in LEDGER[:4]):
        yield "the curves end after the last token"
    if any(v is None or not math.isfinite(v) or v < 0 for column in curves["loss"].values() for v in column):
        yield "the curves hold losses that are no finite numbers from 0"
    planned = {s["experience"] for s in entry["plan"]}
    if len(curves["boundaries"]) != len(planned):
        yield f"{len(curves['boundaries'])} boundaries for {len(planned)} experiences that were trained"


def stream(entry: Mapping[str, Any], found: Any) -> Iterator[str]:
    """The manifest that lies beside the records: the record must describe it."""
    if not found.asks == "loss":
        yield "its manifest is of images"
        return
    told = entry["scenario"]
    pairs: dict[str, tuple[Any, Any]] = {
        "n": (entry["n"], [e["tokens"] for e in found.evals]),
        "floor": (entry["floor"], [e["floor"] for e in found.evals]),
        "bytes_per_token": (entry["bytes_per_token"], [e["bytes_per_token"] for e in found.evals]),
        "first_seen": (entry["first_seen"], [e["first_seen"] for e in found.evals]),
        "eval_names": (told["eval_names"], [e["name"] for e in found.evals]),
        "experiences": (told["experiences"], [dict(e) for e in found.experiences]),
        "budget": (told["budget"], dict(found.budget)),
        **{name: (told[name], getattr(found, name)) for name in ("kind", "context", "batch", "vocab")},
    }
    yield from (f"{name} differs from the manifest" for name, (said, true) in pairs.items() if said != true)
