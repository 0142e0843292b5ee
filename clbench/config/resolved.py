"""A composed configuration as a plain dictionary: interpolations resolved, Hydra's own node gone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clbench.interfaces import UserError

LOOSE = "_file"  # the name of a node for a target in a loose file


def resolve(config: Any) -> dict[str, Any]:
    """A composed configuration -> plain dictionary without Hydra's node; `names` are the chosen files' names.

    A top-level `schedule` or `pet` takes the place of the learner's.
    """
    return plain(*parts(config))


def parts(config: Any) -> tuple[Any, dict[str, Any]]:
    """A composed configuration without Hydra's node, and the names that were chosen."""
    from omegaconf import open_dict

    chosen = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, chosen


def plain(config: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        made: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        missing = f"{key} needs a value: add {key}=..." if key and "missing" in str(error).lower() else None
        text = " ".join(str(error).split())
        hint = "; ${...} stands for another option, a text with these characters is written \\${...}"
        raise UserError(missing or text + (hint if "nterpolation" in text else "")) from None
    made["names"] = {g: chosen[g] for g in ("scenario", "learner", "model") if chosen.get(g) not in (None, LOOSE)}
    for part in ("schedule", "pet"):
        node = made.pop(part, None)
        if node is None:
            continue
        if part not in (made.get("learner") or {}):
            raise UserError(f"{part}={chosen.get(part)} has no effect: learner {chosen.get('learner')} has no {part}")
        made["learner"][part] = node
    return made


def resolve_job(config: Any) -> dict[str, Any]:
    """`resolve` for the configuration that a launcher hands to a job, from which Hydra has removed its own node."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    whole = OmegaConf.create(config)
    with open_dict(whole):
        whole.hydra = {"runtime": {"choices": dict(HydraConfig.get().runtime.choices)}}
    return resolve(whole)
