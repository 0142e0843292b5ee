"""Which records are runs of one row: a short hash of everything but the seed, or but the seed and the class order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clbench.records import record

ORDER = ("order", "order_seed")  # of a scenario's configuration: what makes another class order of the same settings


def variant(entry: Mapping[str, Any]) -> str:
    """Short hash of everything but the seed: rows with other settings, streams or weights never mix.

    Random weights (`source` "none") are drawn from the seed, so they do not count: their seeds are one row.
    """
    config = _settings(entry)
    parts = [config, entry["scenario"].get("manifest_sha256"), weights_of(entry), entry["numbers_version"]]
    parts += [outside] if (outside := outside_of(entry)) else []
    return record.digest([*parts, entry["learner"].get("plugin")])[:8]


def family(entry: Mapping[str, Any]) -> str:
    """`variant` over all class orders: neither the seed nor `scenario.order` nor the manifest count."""
    config = _settings(entry)
    if isinstance(config.get("scenario"), Mapping):
        config["scenario"] = {key: value for key, value in config["scenario"].items() if key not in ORDER}
    return record.digest([config, weights_of(entry), entry["numbers_version"], entry["learner"].get("plugin"), "family"])[:8]


def _settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the seed; that a run goes on from another counts, not from which: each seed has its own."""
    config = {key: value for key, value in entry["config"].items() if key != "seed"}
    return config | {"continues": True} if "continues" in config else config


def outside_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """Versions of the code outside clbench, but the learner's, on which a record's numbers depend."""
    return {**(entry.get("evaluators") or {}), **(entry.get("code") or {})}


def weights_of(entry: Mapping[str, Any]) -> Any:
    """The hash of the weights that a run started from; None for random ones, which are drawn from the seed."""
    model = entry["model"]
    return None if model.get("source") == "none" else model.get("state_sha256")
