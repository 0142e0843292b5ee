"""The overrides of `clbench tune`: options of the study itself (`tune.NAME=VALUE`) apart from those of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clbench.config.registry import conf_dir, description
from clbench.config.signatures import nearest
from clbench.interfaces import UserError
from clbench.tuning.space import SAMPLERS

PROTOCOLS = {
    "two_phase": "tune on other classes or other data (tune.on), evaluate the frozen choice on this stream",
    "first_experience": "tune on a share of the first experience's training data, then run the whole stream",
    "validation": "tune on a share of the whole stream's training data, then evaluate on its test data",
    "test": "tune on the test data, for comparison only: marks the records test_tuned",
}
WORDS: dict[str, tuple[str, str]] = {
    "protocol": ("two_phase", "how the choice is made: " + " | ".join(PROTOCOLS)),
    "on": ("rest", "two_phase: rest (the classes that scenario.num_classes=N leaves out), or the name of a scenario"),
    "scenario.NAME": ("", "an option of the tuning stream alone, such as tune.scenario.limit_train=20"),
    "space": ("null", "ranges from a file of conf/tune; ranges on the command line go before them"),
    "metric": ("last_macro", "what is compared: any number that `clbench report explain` names"),
    "trials": ("20", "choices tried; with sampler=grid all that there are"),
    "sampler": ("tpe", "who proposes: " + " | ".join(SAMPLERS)),
    "seed": ("0", "of the sampler"),
    "seeds": ("0", "seeds of each trial, such as 0,1; a trial's value is their mean"),
    "validation": ("0.2", "share set aside by first_experience and validation"),
}


@dataclass(frozen=True)
class Options:
    """What `tune.NAME=VALUE` said. `stream`: overrides of the tuning stream, `overrides`: all others."""

    protocol: str = "two_phase"
    on: str = "rest"
    metric: str = "last_macro"
    trials: int | None = None
    sampler: str = "tpe"
    seed: int = 0
    seeds: tuple[int, ...] = (0,)
    validation: float = 0.2
    overrides: tuple[str, ...] = ()
    stream: tuple[str, ...] = ()
    given: frozenset[str] = field(default_factory=frozenset)


def read(overrides: Sequence[str]) -> Options:
    """The command line -> options. `UserError` with the nearest name."""
    said: dict[str, str] = {}
    others, stream = [], []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not key.startswith("tune.") and key != "tune":
            others.append(override)
        elif key.startswith("tune.scenario.") and equals:
            stream.append(override.removeprefix("tune."))
        else:
            name = key.removeprefix("tune.")
            if name not in WORDS or not equals:
                raise UserError(f"no option '{key}'{nearest(key, [f'tune.{n}' for n in WORDS])} (clbench tune --help)")
            said[name] = value.strip().strip("'\"")
    space = said.pop("space", "null")
    others = [*_space(space, others), *others]
    made: dict[str, Any] = {"overrides": tuple(others), "stream": tuple(stream), "given": frozenset(said)}
    for name, value in said.items():
        made[name] = _value(name, value)
    options = Options(**made)
    _check(options)
    return options


def _value(name: str, value: str) -> Any:
    """A value of the kind that the option has."""
    known = {"protocol": tuple(PROTOCOLS), "sampler": SAMPLERS}
    if name in known:
        if value not in known[name]:
            raise UserError(f"tune.{name}={value}{nearest(value, known[name])} (one of: {', '.join(known[name])})")
        return value
    if name in ("on", "metric"):
        return value
    try:
        if name == "seeds":
            seeds = tuple(int(part) for part in value.strip("[] ").split(","))
            if not seeds or min(seeds) < 0 or len(set(seeds)) != len(seeds):
                raise ValueError
            return seeds
        number = float(value) if name == "validation" else int(value)
    except ValueError:
        kind = "whole numbers from 0, each once" if name == "seeds" else "a number"
        raise UserError(f"tune.{name} must be {kind}, got {value!r}") from None
    least, most = {"trials": (1, 100_000), "seed": (0, 2**32 - 1), "validation": (0.0001, 0.9999)}[name]
    if not least <= number <= most:
        raise UserError(f"tune.{name} must be in {least}..{most}, got {value}")
    return number


def _check(options: Options) -> None:
    """Refuse what has no effect, and what would mix runs."""
    protocol, given = options.protocol, options.given
    unused = []
    if "on" in given and protocol != "two_phase":
        unused.append("tune.on")
    if "validation" in given and protocol not in ("first_experience", "validation"):
        unused.append("tune.validation")
    if options.stream and protocol in ("first_experience", "test"):
        unused.append(f"tune.{options.stream[0]}")
    if "seed" in given and options.sampler == "grid":
        unused.append("tune.seed")
    if unused:
        other = "tune.sampler=grid" if unused == ["tune.seed"] else f"tune.protocol={protocol}"
        raise UserError(f"{unused[0]} has no effect with {other}")
    for override in options.overrides:
        key = override.partition("=")[0].strip().lstrip("+~")
        if key in ("sweep", "machine", "force") or key.startswith("hydra"):
            raise UserError(f"{override} has no effect with tune: it runs one job after another, and nothing twice")


def _space(name: str, overrides: Sequence[str]) -> list[str]:
    """Words of a file of ranges, without the keys that the command line gives itself."""
    if name == "null":
        return []
    files = {path.stem: path for path in sorted((conf_dir() / "tune").glob("*.yaml"))}
    own = Path(name)
    path = own if own.suffix in (".yaml", ".yml") else files.get(name)
    if path is None or not path.is_file():
        raise UserError(f"no space '{name}'{nearest(name, files)} (one of: {', '.join(files)}, or a .yaml file)")
    import yaml

    try:
        ranges = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(ranges, Mapping) or not all(isinstance(k, str) for k in ranges):
        raise UserError(f"{path} must hold lines like 'learner.lr: tag(log,interval(0.001,0.1))'")
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    return [f"{key}={value}" for key, value in ranges.items() if key.lstrip("+") not in given]


def overview() -> str:
    """Options, protocols and spaces, for --help."""
    rows = [f"  {f'tune.{name}={default}':<28}{about}" for name, (default, about) in WORDS.items()]
    spaces = [f"  {path.stem:<20}{description(path)}" for path in sorted((conf_dir() / "tune").glob("*.yaml"))]
    ways = [f"  {name:<20}{about}" for name, about in PROTOCOLS.items()]
    return "\n".join(["options and their defaults:", *rows, "", "protocols:", *ways, "", "spaces (tune.space=NAME):", *spaces])
