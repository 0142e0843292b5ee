"""The configuration of a record, whole enough to run again. A record is foreign input: names are looked up, never resolved."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clbench.config import defaults, registry
from clbench.config.moved import current
from clbench.config.signatures import signature
from clbench.evaluation import evaluators
from clbench.interfaces import UserError
from clbench.streams.operators import registry as operators


def restored(entry: Mapping[str, Any], data_root: str | None, folder: Path | None = None) -> dict[str, Any]:
    """The configuration of a record, whole enough to run: machine options as they were, weights from their source.

    A record is foreign input: every `_target_` must be one that a configuration file of clbench or of an installed plug-in
    names, every operator and evaluator one of clbench or of an installed package, and nothing in it is resolved. `UserError`
    says what is not. A record that its run went on from is looked for in `folder`.
    """
    made = copy.deepcopy(dict(entry["config"]))
    known = set(_known_targets())
    for where, key, value in _nodes(made, ""):
        if key == "_target_" and current(value) not in known:
            raise UserError(f"{where} is {value}, which no configuration file here names: it is not run")
        if key.startswith("_") and key not in ("_target_", "_partial_"):
            raise UserError(f"{where} is no option of a run")
        if "${" in f"{key}{value if isinstance(value, str) else ''}":
            raise UserError(f"{where} holds an interpolation")
    if any(not isinstance(made.get(part), dict) or "_target_" not in made[part] for part in ("scenario", "learner", "model")):
        raise UserError("its configuration does not name scenario, learner and model")
    if made.get("continues") is not None:
        made["continues"] = str((folder or Path()) / f"{Path(str(made['continues']).split('@')[0]).name}.json")
    for kind, name in _unregistered(made["scenario"]):
        raise UserError(f"{kind} {name} is of no installed package: it is not run")
    from clbench.config.compose import compose

    options = {key: value for key, value in compose([])[0].items() if key not in ("scenario", "learner", "model", "names")}
    machine = entry.get("machine") or {}
    flags = machine.get("flags") or {}
    options |= {"device": str(machine.get("device", "cpu")), "num_threads": flags.get("num_threads", 1), "data_root": data_root}
    options |= {"eval_batch_size": machine.get("eval_batch_size", 128), "micro_batch": machine.get("micro_batch")}
    options |= {"results_dir": "results", "on_error": "raise"}
    options |= {"feature_store": "off", "track": "none", "download": False, "force": False, "checkpoint_seconds": None}
    made = options | made | {"names": {"learner": entry["learner"]["name"]}}
    made["model"] |= {"weights": entry["model"].get("source", "none"), "seed": entry["seed"]}
    for part in ("scenario", "model"):
        found = signature(made[part]["_target_"])
        given = {"data_root": data_root, "download": False}
        made[part] |= {key: value for key, value in given.items() if found is not None and key in found.parameters}
    return made


def _unregistered(scenario: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted paths among a scenario's operators and evaluators that no installed package registers."""
    registered = operators.targets()
    for one in scenario.get("operators") or ():
        name, _ = operators.parsed(one)
        if name not in registered and name not in registered.values():
            yield "operator", name
    known = evaluators.registered_paths()
    yield from (("evaluator", name) for name in evaluators.asked_for(scenario) if "." in str(name) and name not in known)


def _nodes(node: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """(dotted place, key, value) of everything in a configuration."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        place = f"{where}.{key}".lstrip(".")
        yield place, str(key), value
        yield from _nodes(value, place)


def _known_targets() -> Iterator[str]:
    """Every `_target_` that a configuration file names."""
    for group in registry.GROUPS:
        for paths in registry.choices(group).values():
            for path in paths:
                nodes = _nodes(read_yaml(path), "")
                yield from (value for _, key, value in nodes if key == "_target_" and isinstance(value, str))


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file, empty where it cannot be read."""
    import yaml

    try:
        found = defaults.read(path)
    except (OSError, yaml.YAMLError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
