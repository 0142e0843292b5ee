"""Freezes a suite: its orders with the hashes of their manifests, and the learners that fit with their chosen options.

    python -m clbench.studies.core core_v1 orders     writes conf/suite/core_v1.json
    python -m clbench.studies.core core_v1 learners   writes conf/suite/core_v1_learners.json, from results/cards.yaml

A suite that has been frozen is not frozen anew under its name: `orders` refuses to change a hash, a new version is a new file.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.config import compose, defaults, registry
from clbench.config.overrides import word
from clbench.interfaces import UserError, declared, mismatch
from clbench.records import record
from clbench.report import cards, suites
from clbench.run.runner import DoesNotFit, build_learner, previewed
from clbench.streams import rng
from clbench.streams.operators import order, similarity

SEED = 1  # of the random order
VITS = ("nano", "vit_tiny_64")  # networks of one kind, whose learners are the same
_BUILT: dict[tuple[str, str], str | None] = {}  # (learner, network) -> what its constructor refused


def main(argv: Sequence[str]) -> int:
    """The command -> exit code."""
    name, part = argv
    made = orders(name) if part == "orders" else learners(name, Path("results"))
    path = registry.conf_dir() / "suite" / (f"{name}.json" if part == "orders" else f"{name}_learners.json")
    if part == "orders" and path.exists():
        _unchanged(json.loads(path.read_text(encoding="ascii")), made)
    record.write_text(path, _lines(made))
    print(f"written {path}")
    return 0


def _unchanged(old: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    for stream in old.keys() & made.keys():
        for one in old[stream]:
            if one in made[stream] and made[stream][one] != old[stream][one]:
                raise UserError(f"{stream}, order {one}, is frozen and would change: make a new version of the suite")


def _lines(made: Mapping[str, Any]) -> str:
    """JSON with a line for each order, or for each learner."""

    def of(node: Mapping[str, Any], left: str, depth: int) -> str:
        rows = [
            f"{left} {json.dumps(k)}: {of(v, left + ' ', depth - 1) if depth and v else json.dumps(v)}" for k, v in node.items()
        ]
        return "{\n" + ",\n".join(rows) + f"\n{left}}}"

    return of(made, "", 2 if any("fit" in node for node in made.values()) else 1) + "\n"


def streams_of(name: str) -> dict[str, Any]:
    """The streams of a suite as its YAML file describes them."""
    import yaml

    text = (registry.conf_dir() / "suite" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["streams"]


def words(node: Mapping[str, Any], overrides: Mapping[str, Any], learner: str | None = None) -> list[str]:
    """The overrides of a stream in one order."""
    given = {**(node.get("options") or {}), **overrides}
    chosen = [f"scenario={node['scenario']}", f"model={node['model']}", f"precision={node.get('precision', 'fp32')}"]
    return [*chosen, *([f"learner={learner}"] if learner else []), *(f"{k}={word(v)}" for k, v in given.items())]


def stream(node: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """A stream in one order, built."""
    return compose.build(compose.compose(words(node, overrides))[0]["scenario"])


def orders(name: str) -> dict[str, Any]:
    """Stream -> order -> its overrides, and the hash of the manifest that they make."""
    made: dict[str, Any] = {}
    for key, node in streams_of(name).items():
        listed = recipe(node)
        made[key] = {o: {"overrides": given, "sha256": stream(node, given).manifest.sha256} for o, given in listed.items()}
        print(key, *(f"{o} {one['sha256'][:8]}" for o, one in made[key].items()), flush=True)
    return made


def recipe(node: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The overrides that make each of the five orders of a stream; see the head of its YAML file."""
    how = node["orders"]
    make = {"classes": _classes, "sessions": _classes, "experiences": _experiences, "named": _named, "languages": _languages}
    return make[how["kind"]](node, how)


def _classes(node: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    operators = {"scenario.operators": node["operators"]} if "operators" in node else {}
    made: dict[str, dict[str, Any]] = {"natural": {"scenario.order": "natural"}, "published": {"scenario.order": "icarl1993"}}
    made["random"] = {"scenario.order": "random", "scenario.order_seed": SEED}
    plain = {**node, **({"scenario": how["like"], "model": "nano", "options": {}} if "like" in how else {})}
    whole = stream(plain, {"scenario.order": "natural", "scenario.operators": []})
    for by in ("edge_easy", "edge_hard") if how["kind"] == "classes" else ("easy_first", "hard_first"):
        made[by] = {"scenario.order": list(order.order(whole, by=by).manifest.class_order)}
    return {name: {**given, **operators} for name, given in made.items()}


def _experiences(node: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    drawn = node["operators"]
    ((first, options),) = drawn[0].items()
    made = {"natural": drawn, "redrawn": [{first: {**options, "seed": SEED}}, *drawn[1:]]}
    made["random"] = [*drawn, {"order": {"of": "experiences", "by": "random", "seed": SEED}}]
    made |= {by: [*drawn, {"order": {"of": "experiences", "by": by}}] for by in ("designer_best", "designer_worst")}
    return {name: {"scenario.operators": operators} for name, operators in made.items()}


def _named(node: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    values, option = how["values"], how["option"]

    def given(listed: Sequence[str], alone: bool = False) -> dict[str, Any]:
        if option.startswith("scenario."):
            return {option: list(listed)}
        operator, _, key = option.partition(".")
        changed = [{operator: {**one[operator], key: list(listed)}} if operator in one else one for one in node["operators"]]
        if alone:  # the pictures of these values without a clean experience before them, nor what is tested while it adapts
            changed = [{operator: {**changed[0][operator], "clean_first": False}}]
        return {"scenario.operators": changed}

    whole = stream(node, given(values, alone=True))
    entries = whole.manifest.experiences
    d = similarity.distances(whole.dataset, [e.train for e in entries], [e.transform for e in entries])
    made = {"natural": values, "published": how["published"]}
    made["random"] = [values[i] for i in rng.permutation(rng.key("core order", SEED), len(values)).tolist()]
    for by, best in (("designer_best", True), ("designer_worst", False)):
        made[by] = [values[i] for i in similarity.designed(d, rng.key("core order", SEED), 1000, best=best)]
    return {name: given(listed) for name, listed in made.items()}


def _languages(node: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Three languages that have nothing in common: no order is published, none is extreme; five of the six there are."""
    listed = {
        "natural": [0, 1, 2],
        "reversed": [2, 1, 0],
        "last_first": [2, 0, 1],
        "first_last": [1, 2, 0],
        "swapped": [1, 0, 2],
    }
    return {name: {"scenario.order": places} for name, places in listed.items()}


def learners(name: str, results: Path) -> dict[str, Any]:
    """Stream -> who fits, with options, how they were chosen and an estimate of seconds; and who does not, with the reason."""
    known = cards.load(results / "cards.yaml")
    frozen = json.loads((registry.conf_dir() / "suite" / f"{name}.json").read_text(encoding="ascii"))
    pace = _pace(known, _timed(results))
    made: dict[str, Any] = {}
    for key, node in streams_of(name).items():
        first = next(iter(frozen[key].values()))["overrides"]
        fit, left_out = {}, {}
        for learner, why in fitting(node, first).items():
            if why is not None:
                left_out[learner] = why
                continue
            given, tuning = options(known, learner, node["cards"])
            ratios = [pace[one][learner] for one in node["cards"] if learner in pace.get(one, {})]
            seconds = round(float(node["seconds"]) * (ratios[0] if ratios else 1.0), 1)
            fit[learner] = {"overrides": given, "tuning": tuning, "seconds": seconds}
        made[key] = {"fit": fit, "left_out": left_out}
        print(f"{key}: {len(fit)} fit, {len(left_out)} do not", flush=True)
    return made


def options(known: Mapping[str, Any], learner: str, listed: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Options of a learner's card on the first of these streams that it has a card on, and how they were chosen."""
    ours = {one["stream"]: one for one in reversed(known["cards"].get(learner, {"ours": ()})["ours"])}
    for name in listed:
        if name not in ours:
            continue
        given = {key: value for key, value in defaults.numbers(ours[name]["overrides"]).items() if key.startswith("learner.")}
        tuning = ours[name]["tuning"]
        if tuning is None:
            return given, None
        return given, {
            "card": name,
            "grid": tuning["grid"],
            "on": tuning["stream"],
            "runs": tuning["runs"],
            "seconds": tuning["seconds"],
        }
    return {}, None


def _timed(results: Path) -> list[dict[str, Any]]:
    """Of every finished record what `cards.matching` looks at, and its seconds."""
    kept = ("status", "learner", "scenario", "model", "config", "seconds", "machine")
    found = record.entries(results / "records", [], details=False)
    return [{key: entry[key] for key in kept} for entry in found if entry["status"] == "ok"]


def _pace(known: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Stream of the cards -> learner -> core seconds of its records over the median learner's."""
    made: dict[str, dict[str, float]] = {}
    for name, one in known["streams"].items():
        found: dict[str, list[float]] = {}
        for entry in entries:
            names = entry["scenario"]["name"], entry["model"]["name"]
            if entry["status"] == "ok" and names == (one["scenario"], one["model"]):
                if cards.matching(entry["learner"]["name"], one, {}, [entry]):
                    found.setdefault(entry["learner"]["name"], []).append(suites.core_seconds(entry))
        means = {learner: sum(v) / len(v) for learner, v in found.items()}
        median = sorted(means.values())[len(means) // 2] if means else 1.0
        made[name] = {learner: mean / median for learner, mean in means.items()}
    return made


def fitting(node: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, str | None]:
    """Why each learner that answers what the stream asks cannot run on it; None for those that can."""
    asked = registry.asks("scenario", node["scenario"])
    names = [name for name in registry.choices("learner") if registry.asks("learner", name) == asked]
    start = "finetune" if asked == "predict" else "rewarm_replay"
    config = compose.compose(words(node, overrides, start))[0]
    found: dict[str, str | None] = {}
    with previewed(config) as job:
        model, network = job.model, "pretrained ViT" if node["model"] in VITS else node["model"]
        for name in names:
            learner = defaults.read(registry.choices("learner")[name][0])
            job.config = {**config, "learner": learner, "names": {**config["names"], "learner": name}}
            found[name] = _refusal(job, name, network, model)
    return found


def _refusal(job: Any, name: str, network: str, model: Any) -> str | None:
    """Why a learner does not fit the stream and network of a job: its capabilities, the stream's check, its constructor.

    A constructor is tried once for each kind of network; what it refuses on another stream alone is left out when it runs.
    """
    can = declared(registry.load_target(job.config["learner"]["_target_"]), job.config["learner"])
    pretrained = str(job.config["model"].get("weights")) not in ("none", "None")
    if why := mismatch(name, can, job.scenario.facts(), pretrained):
        return why.partition(": ")[2]
    try:
        job.kind.check(job.scenario, job.options, "none", name, can)
    except UserError as error:
        return str(error).splitlines()[0]
    try:
        if (name, network) not in _BUILT:
            job.capabilities, job.model, job.learner, job.runtime = can, copy.deepcopy(model), None, None
            _BUILT[name, network] = None
            build_learner(job)
    except (DoesNotFit, UserError) as error:
        _BUILT[name, network] = str(error).splitlines()[0]
    return _BUILT[name, network]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
