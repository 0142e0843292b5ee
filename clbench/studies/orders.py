"""`clbench orders`: one learner, or several, on a stream in many orders of its experiences; what the order changes.

Each order is a run of its own, under `scenario.operators=[..., {order: {of: experiences, by: [...]}}]`, so it has a record,
is skipped when it is done, and goes on when it was stopped. The study says for each learner the spread over orders beside the
spread over seeds, the worst and the best order, and whether the score of the Curriculum Designer (`similarity.designer_scores`,
from mean pictures) ranks orders as the learner does; for several learners, how far they agree. Of texts, orders go from near to
near or from far to far, and the score is how near neighbours are (`tokens.similarity`): the study of Yildiz et al. 2024 (arXiv
2402.17400), with `--keep 1` for a first experience that is pre-training and `learner=dapt` for every domain alone.

Legend: P orders, T experiences, S seeds, L learners.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics as plain_statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clbench.config import compose, registry
from clbench.evaluation import metrics
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import numbers
from clbench.report.formats import Table, csv_text, to_text
from clbench.run import provenance
from clbench.streams import rng
from clbench.streams.operators import similarity
from clbench.streams.scenario import Scenario
from clbench.streams.tokens import similarity as text_similarity
from clbench.streams.tokens.scenario import Domain, TokenScenario
from clbench.studies.jobs import record_of

MOST = 720  # orders of `--orders all`: six experiences
COLUMNS = ("learner", "seed", "order", "name", "score", "value", "effectiveness", "run")


@dataclass(frozen=True)
class Order:
    """Places of the experiences [T], a name where it has one, and the Curriculum Designer's score."""

    places: tuple[int, ...]
    name: str
    score: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="choices and options; learner=A,B seed=0,1: several")
    parser.add_argument(
        "--orders",
        default="24",
        metavar="N | all",
        help="orders of the experiences: natural, extreme and drawn ones (24), or all",
    )
    parser.add_argument("--order-seed", type=int, default=0, metavar="N", help="of the drawn orders (0)")
    parser.add_argument(
        "--keep", type=int, default=0, metavar="N", help="of texts: the first N experiences stay where they are (0)"
    )
    parser.add_argument(
        "--metric", metavar="NAME", help="a number that `clbench report explain` names (last_macro; of texts final_loss)"
    )


def run(args: argparse.Namespace) -> int:
    """Run what is not done, write results_dir/orders/NAME.csv and .json, print the study -> exit code."""
    composed = compose.read(args.overrides, True)
    for job in composed.jobs:
        registry.check(job)
    first = composed.jobs[0]
    if any(job["scenario"] != first["scenario"] or job["results_dir"] != first["results_dir"] for job in composed.jobs):
        raise UserError("clbench orders takes one scenario and one results_dir; sweep learner, model and seed")
    stream = compose.build(first["scenario"])
    texts = isinstance(stream, TokenScenario)
    args.metric = args.metric or ("final_loss" if texts else "last_macro")
    numbers.check_metric(args.metric, losses=texts)
    orders = chosen(stream, args.orders, args.order_seed, args.keep)
    results = Path(str(first["results_dir"])).expanduser().resolve()
    record.ensure_writable(results / "orders")
    labels = _labels(composed)
    rows, lost = [], 0
    for number, (job, label) in enumerate(zip(composed.jobs, labels, strict=True)):
        for place, order in enumerate(orders):
            entry = record_of(in_order(job, order), args.command_line)
            head = f"[{number * len(orders) + place + 1}/{len(composed.jobs) * len(orders)}] {label} seed {job['seed']}"
            if isinstance(entry, str):
                lost += 1
                print(f"{head} order {_text(order)}  failed: {entry}", file=sys.stderr, flush=True)
                continue
            rows.append(_row(entry, label, order, args.metric))
            print(f"{head} order {_text(order)}  {args.metric} {rows[-1]['value']:.4f}", flush=True)
    if not rows:
        return 1
    made = study(rows, args.metric) | {"metric": args.metric, "orders": len(orders), "lost": lost, "texts": texts}
    name = record.digest([first["scenario"], labels, [o.places for o in orders], args.metric])[:8]
    file = results / "orders" / f"{first['names'].get('scenario') or 'stream'}-{name}"
    record.write_text(file.with_suffix(".csv"), csv_text(COLUMNS, rows, lambda name, value: str(value)))
    record.write_text(file.with_suffix(".json"), json.dumps(made, indent=1) + "\n")
    print(f"\n{told(made)}\nwritten {file.with_suffix('.csv')}, {file.with_suffix('.json')}")
    return 1 if lost else 0


def chosen(stream: Any, number: str, seed: int, keep: int = 0) -> list[Order]:
    """All orders of the experiences of a stream, or `number` of them: natural, extreme by similarity, then drawn ones."""
    of_texts = isinstance(stream, TokenScenario) and all(isinstance(domain, Domain) for domain in stream.domains)
    if not isinstance(stream, Scenario) and not of_texts:
        raise UserError("clbench orders knows streams of images, and of texts one after another")
    if not 0 <= keep < len(stream.manifest.experiences) or (keep and not of_texts):
        raise UserError(f"--keep must be from 0 to below the number of experiences, and is for texts, got {keep}")
    entries = stream.manifest.experiences
    count = len(entries) - keep
    most = math.factorial(min(count, 20))
    if number != "all" and not (number.isdigit() and int(number) >= 2):
        raise UserError(f"--orders must be all, or a whole number from 2, got {number!r}")
    if count < 2 or (number == "all" and most > MOST):
        what = "which is one order" if count < 2 else f"{most} orders: name a number of them"
        raise UserError(f"--orders {number}: the stream has {count} experiences{' to order' * bool(keep)}, {what}")
    key, limit = rng.key("order study", seed), most if number == "all" else int(number)
    if isinstance(stream, TokenScenario):
        d = text_similarity.distances([stream.domains[e.domain].train for e in entries], stream.manifest.vocab)
        extreme = {"near": text_similarity.chain(d, keep, True), "far": text_similarity.chain(d, keep, False)}
    else:
        d = similarity.distances(stream.dataset, [e.train for e in entries], [e.transform for e in entries])
        extreme = {} if limit >= most else _designed(d, key)
    places = {tuple(range(len(entries))): "natural"}
    for name, one in extreme.items():
        if len(places) < limit:
            places.setdefault(tuple(one), name)
    first = tuple(range(keep))
    if limit >= most:
        for one in itertools.permutations(range(keep, len(entries))):
            places.setdefault((*first, *one), "")
    for draw in itertools.count() if limit < most else ():
        if len(places) >= limit:
            break
        drawn = keep + rng.permutation(rng.key(key, draw), count)
        places.setdefault((*first, *drawn.tolist()), "")
    score = text_similarity.closeness if isinstance(stream, TokenScenario) else similarity.designer_scores
    scores = score(d, np.array(list(places)))
    return [Order(one, name, round(float(score), 9)) for (one, name), score in zip(places.items(), scores, strict=True)]


def _designed(d: np.ndarray, key: int) -> dict[str, list[int]]:
    """The best and the worst order of the Curriculum Designer."""
    words = {"designer_best": True, "designer_worst": False}
    return {name: similarity.designed(d, rng.key(key, "candidates"), 1000, best=best) for name, best in words.items()}


def _labels(composed: compose.Composed) -> list[str]:
    """What tells the jobs apart but for their seeds: the learner's name, and other varying options."""
    keys = [key for key in composed.varying if key not in ("seed", "learner")]
    made = []
    for job in composed.jobs:
        flat = {key: _value_at(job, key) for key in keys}
        made.append(" ".join([provenance.learner_name(job), *(f"{key}={value}" for key, value in flat.items())]))
    return made


def _value_at(job: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key of a configuration; of a group its chosen name."""
    if key in job.get("names", {}):
        return job["names"][key]
    value: Any = job
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def in_order(job: Mapping[str, Any], order: Order) -> dict[str, Any]:
    """A run's configuration with its experiences in another order."""
    made = copy.deepcopy(dict(job))
    scenario = made["scenario"]
    if (listed := next((name for name in ("corpora", "order") if isinstance(scenario.get(name), list)), None)) is not None:
        for name in (listed, "tokens"):  # of texts
            if isinstance(scenario.get(name), list):
                scenario[name] = [scenario[name][i] for i in order.places]
        return made
    if order.places != tuple(range(len(order.places))):
        one = {"order": {"of": "experiences", "by": list(order.places)}}
        made["scenario"]["operators"] = [*(made["scenario"].get("operators") or ()), one]
    return made


def _row(entry: Mapping[str, Any], label: str, order: Order, metric: str) -> dict[str, Any]:
    """A row of the study's CSV. Effectiveness: 2 a / (d a + 1), a the last macro, d what the first experience lost."""
    values = metrics.summary(entry)
    made = {"learner": label, "seed": entry["seed"], "order": " ".join(map(str, order.places)), "name": order.name}
    made |= {"score": order.score, "value": values.get(metric, math.nan), "run": entry["run_id"]}
    if not entry.get("correct"):
        return made | {"effectiveness": ""}
    a = metrics.accuracy(entry["correct"], entry["n"])
    first = np.asarray(entry["first_seen"]) == 0
    drop = float(a[0, first].mean() - a[-1, first].mean())
    return made | {"effectiveness": 2 * values["last_macro"] / (drop * values["last_macro"] + 1)}


def study(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """The numbers of a study: for each learner `of_learner`, and Kendall's W of those with all orders."""
    lower = numbers.lower(metric)
    by_learner: dict[str, dict[str, list[float]]] = {}
    scores = {row["order"]: row["score"] for row in rows}
    for row in rows:
        if math.isfinite(row["value"]):
            by_learner.setdefault(row["learner"], {}).setdefault(row["order"], []).append(row["value"])
    learners = {name: of_learner(values, scores, lower) for name, values in by_learner.items()}
    shared = [order for order in scores if all(order in values for values in by_learner.values())]
    ranked = [[plain_statistics.fmean(values[order]) for order in shared] for values in by_learner.values()]
    agreement = kendall_w(np.array(ranked)) if len(ranked) > 1 and len(shared) > 1 else None
    return {"learners": learners, "agreement": agreement}


def of_learner(values: Mapping[str, Sequence[float]], scores: Mapping[str, float], lower: bool = False) -> dict[str, Any]:
    """Values of each order over seeds -> mean, spread over orders (of means over seeds), mean spread over seeds, extremes.

    rank_correlation  Spearman's, of score and value (its sign turned where less is better), with its p; None below three orders
    top_quarter       share of the best quarter by score that lies in the best quarter by value
    """
    from scipy import stats

    means = {order: plain_statistics.fmean(of_seeds) for order, of_seeds in values.items()}
    sign = -1 if lower else 1
    ordered = sorted(means, key=lambda order: -sign * means[order])
    spreads = [plain_statistics.stdev(of_seeds) for of_seeds in values.values() if len(of_seeds) > 1]
    several = len(means) > 2 and len(set(means.values())) > 1 and len({scores[order] for order in means}) > 1
    found: Any = stats.spearmanr([scores[order] for order in means], [sign * v for v in means.values()]) if several else None
    size = max(1, len(means) // 4)
    by_score = sorted(means, key=lambda order: -scores[order])[:size]
    return {
        "orders": len(means),
        "mean": plain_statistics.fmean(means.values()),
        "std_orders": plain_statistics.stdev(means.values()) if len(means) > 1 else None,
        "std_seeds": plain_statistics.fmean(spreads) if spreads else None,
        "range": max(means.values()) - min(means.values()),
        "best": {"order": ordered[0], "value": means[ordered[0]]},
        "worst": {"order": ordered[-1], "value": means[ordered[-1]]},
        "rank_correlation": None if found is None else dict(zip(("rho", "p"), map(float, tuple(found)), strict=True)),
        "top_quarter": len({*by_score} & {*ordered[:size]}) / size,
    }


def kendall_w(values: np.ndarray) -> float | None:
    """Kendall's coefficient of concordance of L rankings of P orders [L, P], with the correction for ties; None without spread.

    1: all learners rank the orders alike; 0: no more than chance.
    """
    from scipy import stats

    judges, count = values.shape
    ranks = stats.rankdata(values, axis=1)
    ties = sum(float((n**3 - n).sum()) for row in ranks for n in [np.unique(row, return_counts=True)[1]])
    most = judges**2 * (count**3 - count) - judges * ties
    totals = ranks.sum(0)
    return float(12 * ((totals - totals.mean()) ** 2).sum() / most) if most else None


def told(made: Mapping[str, Any]) -> str:
    """The study as text."""
    rows = []
    for name, one in made["learners"].items():
        rho = one["rank_correlation"] or {"rho": None, "p": None}
        row = {"learner": name, "orders": one["orders"], "mean": one["mean"], "worst": one["worst"]["value"]}
        row |= {
            "best": one["best"]["value"],
            "range": one["range"],
            "std orders": one["std_orders"],
            "std seeds": one["std_seeds"],
        }
        rows.append(
            row | {"worst order": one["worst"]["order"], "rho": rho["rho"], "p": rho["p"], "top 1/4": one["top_quarter"]}
        )
    score = "Curriculum Designer's score, from mean pictures," if not made.get("texts") else "nearness of neighbours"
    notes = [f"rho: Spearman's rank correlation of the {score} with the number"]
    if made["agreement"] is not None:
        notes.append(f"agreement of the learners on the orders: Kendall's W {made['agreement']:.3f}")
    notes += [_sentence(name, one) for name, one in made["learners"].items()]
    notes += [f"{made['lost']} runs failed and are left out"] if made["lost"] else []
    title = f"{made['metric']} over {made['orders']} orders of the experiences"
    return to_text(Table("orders", title, tuple(rows[0]), rows, tuple(notes)))


def _sentence(name: str, one: Mapping[str, Any]) -> str:
    """Whether the order matters more than the seed, and whether similarity predicts it."""
    if one["std_seeds"] is None:
        spread = "one seed: the spread over orders holds that over seeds"
    else:
        more = (one["std_orders"] or 0.0) > one["std_seeds"]
        spread = f"the spread over orders is {'larger' if more else 'not larger'} than that over seeds"
    rho = one["rank_correlation"]
    if rho is None:
        return f"{name}: {spread}; no rank correlation without spread"
    known = rho["p"] < 0.05
    word = ("predicts the ranking" if rho["rho"] > 0 else "predicts it the wrong way round") if known else "does not predict it"
    return f"{name}: {spread}; similarity {word} (rho {rho['rho']:.2f}, p {rho['p']:.2g})"


def _text(order: Order) -> str:
    return ",".join(map(str, order.places)) + (f" ({order.name})" if order.name else "")
