"""From command-line overrides to checked plain dictionaries, and from those to objects. Imports no torch.

Hydra composes; this module adds the plug-ins' search path, one-line errors with the nearest name, the check against the
targets' own signatures, and targets in loose files (`learner._target_=my_file.Mine`, `learner._target_=path/my.py:Mine`).
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from clbench.config.jobs import Jobs, without_seed
from clbench.config.overrides import check_groups, dotted, key_of, looks_like_path, unknown_choice
from clbench.config.registry import (
    GROUPS,
    answering,
    check,
    choices,
    conf_dir,
    description,
    importable,
    load_target,
    operators_after,
    plugin_dirs,
)
from clbench.config.resolved import LOOSE, parts, plain, resolve, resolve_job
from clbench.config.run_options import MACHINE
from clbench.config.signatures import nearest
from clbench.config.suite import Asked, asked
from clbench.interfaces import UserError
from clbench.streams.operators.registry import apply

__all__ = [
    "build",
    "check",
    "choices",
    "compose",
    "conf_dir",
    "description",
    "load_target",
    "plugin_dirs",
    "read",
    "resolve_job",
]


@dataclass(frozen=True)
class Composed:
    """The composed jobs: one configuration each, the overrides that Hydra is given, and how they are launched.

    by_pattern  the learners were not named one by one but by `learner=glob(...)`: those that do not fit are left out
    words       overrides of each job of a sweep; None where its sweeper chooses them (a search)
    suite       of a sweep that is a suite: which part of it was asked for
    """

    jobs: Sequence[dict[str, Any]]
    overrides: list[str]
    multirun: bool
    launcher: str = ""
    varying: tuple[str, ...] = ()
    by_pattern: bool = False
    words: Sequence[list[str]] | None = None
    suite: Asked | None = None

    def only(self, places: Sequence[int]) -> Composed:
        """Those jobs of a suite."""
        assert self.words is not None and self.suite is not None
        words = [self.words[place] for place in places]
        part = replace(self.suite, jobs=[self.suite.jobs[place] for place in places])
        return replace(self, jobs=Jobs(words, _resolved), words=words, suite=part)


def compose(overrides: Sequence[str] = (), multirun: bool = False) -> list[dict[str, Any]]:
    """The resolved configuration of each job that the overrides ask for, in order. Raises `UserError` with one line."""
    return list(read(overrides, multirun).jobs)


def read(overrides: Sequence[str], multirun: bool = False) -> Composed:
    """Compose every job; a sweep is expanded (choice, range, glob, and the `sweep` group's parameters)."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from clbench.config.sweeper import product

    register()
    overrides = _loose_targets(list(overrides))
    with initialize_config_dir(str(conf_dir()), job_name="clbench", **behaviour()):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        overrides = [_parsable(override, parser) for override in overrides]
        parsed = parser.parse_overrides(overrides)
        check_groups(parsed)
        _check_lists(parsed)
        late = _late(parsed)
        overrides = [late.get(o.get_key_element(), str(o.input_line)) for o in parsed]
        parsed = parser.parse_overrides(overrides) if late else parsed
        sweeping = [o.input_line for o in parsed if o.is_sweep_override()]
        base = _compose([override for override in overrides if override not in sweeping])
        multirun = multirun or str(base.hydra.mode or "").endswith("MULTIRUN")
        if sweeping and not multirun:
            key, _, value = str(sweeping[0]).partition("=")
            one = f"; for one value with a comma, write {quoted(key, value)}" if "/" in value else ""
            raise UserError(f"{sweeping[0]} asks for several runs: add -m{one}")
        launcher = str(base.hydra.launcher._target_)
        if not multirun:
            return Composed([resolve(base)], overrides, False, launcher)
        if base.get("suite") is not None:
            part = _part_of_suite(str(base.suite), str(base.results_dir), parsed)
            words = list(part.words())
            return Composed(
                Jobs(words, _resolved), overrides, True, launcher, ("scenario", "learner", "seed"), True, words, part
            )
        by_pattern = any(_is_pattern(o) for o in parsed)
        overrides = [_fitting(o, base) for o in parsed]
        params = [f"{k}={v}" for k, v in (base.hydra.sweeper.get("params") or {}).items()]
        every = parser.parse_overrides([*params, *overrides])
        last = {o.get_key_element(): o for o in every}
        varying = tuple(key for key, o in last.items() if o.is_sweep_override() and key not in late)
        if any(o.is_sweep_override() and not o.is_discrete_sweep() for o in every):
            return Composed(
                [resolve(base)], overrides, True, launcher, varying, by_pattern
            )  # a search: its sweeper chooses the jobs
        words = product(every)
        return Composed(Jobs(words, _resolved), overrides, True, launcher, varying, by_pattern, words)


def _resolved(jobs: Sequence[list[str]]) -> list[dict[str, Any]]:
    """The configurations of jobs by their overrides. Neighbours that differ in the seed alone are composed once."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    made: list[dict[str, Any]] = []
    known: Any = None
    found: tuple[Any, Any] = ({}, {})
    with nullcontext() if GlobalHydra().is_initialized() else initialize_config_dir(str(conf_dir()), **_named()):
        for words in jobs:
            others, seed = without_seed(words)
            if seed is None or others != known:
                known, found = others, parts(_compose(words))
            config, chosen = found
            if seed is not None:
                config.seed = seed
            made.append(plain(config, chosen))
    return made


def _named() -> dict[str, str]:
    return {"job_name": "clbench", **behaviour()}


def _part_of_suite(name: str, results: str, parsed: Sequence[Any]) -> Asked:
    """What the overrides ask of a suite, whose records go into a folder of their own unless another is named."""
    given = []
    for o in parsed:
        value = o.value()
        if hasattr(value, "include"):  # glob(...)
            values = list(value.include)
        elif o.is_sweep_override():
            values = list(o.sweep_string_iterator())
        else:
            values = [str(one) for one in (value if isinstance(value, list) else [value])]
        given.append((o.get_key_element(), str(o.input_line), values))
    if all(key != "results_dir" for key, *_ in given):
        given.append(("results_dir", f"results_dir={results}", [results]))
    return asked(name, given, MACHINE)


def _check_lists(parsed: Sequence[Any]) -> None:
    """Operators are a list, also where there is one: Hydra's own words for another form help nobody."""
    for one in parsed:
        value = None if one.is_sweep_override() else one.value()
        if one.get_key_element() != "scenario.operators" or not isinstance(value, str | dict):
            continue
        if isinstance(value, dict) or not value.startswith("$"):
            written = str(one.input_line).partition("=")[2]
            raise UserError(f"scenario.operators is a list: write 'scenario.operators=[{written}]'")


def _late(parsed: Sequence[Any]) -> dict[str, str]:
    """Key -> override for options of what a `sweep` chooses: as sweeps of one value, which Hydra puts into the jobs alone.

    `sweep=cpt_synthetic scenario.shift=0.3` means an option of the sweep's scenario, not of the default one.
    """
    chosen = [str(o.input_line) for o in parsed if o.get_key_element() == "sweep"]
    groups = (_compose(chosen).hydra.sweeper.get("params") or {}).keys() & set(GROUPS) if chosen else set()
    found = {}
    for o in parsed:
        key, (name, equals, value) = o.get_key_element(), str(o.input_line).partition("=")
        if key.partition(".")[0] in groups and "." in key and value and not o.is_sweep_override() and not o.is_delete():
            found[key] = f"{name}{equals}choice({value})"
    return found


def _is_pattern(o: Any) -> bool:
    """Whether an override is `learner=glob(...)`."""
    return o.get_key_element() == "learner" and o.is_sweep_override() and hasattr(o.value(), "filter")


def _fitting(o: Any, base: Any) -> str:
    """The override as typed; `learner=glob(...)` as the names of learners that can answer what the scenario asks."""
    if not _is_pattern(o):
        return str(o.input_line)
    names = answering(o.value().filter(list(choices("learner"))), base.hydra.runtime.choices.get("scenario"))
    return f"learner={','.join(names)}" if names else str(o.input_line)


def searched(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Overrides of a search -> (those that fix an option, key -> its values as text, or start, end and tags of an interval)."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    register()
    with initialize_config_dir(str(conf_dir()), job_name="clbench", **behaviour()):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides([_parsable(override, parser) for override in overrides])
    swept = {o.get_key_element(): o for o in parsed if o.is_sweep_override()}
    found = {k: list(o.sweep_string_iterator()) if o.is_discrete_sweep() else vars(o.value()) for k, o in swept.items()}
    return [str(o.input_line) for o in parsed if not o.is_sweep_override()], found


def behaviour() -> dict[str, str]:
    """`version_base` for Hydra 1.3 only: later versions have no other and warn."""
    import hydra

    return {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}


def register() -> None:
    """Have Hydra find the plug-ins' folders, and read all files with their targets' defaults filled in."""
    from clbench.config import search_path

    search_path.register()


def _loose_targets(overrides: list[str]) -> list[str]:
    """`learner._target_=X` without `learner=`, or `learner=X` with a dotted path: X replaces the default learner.

    Its arguments go with it.

    It starts from an empty node, which Hydra knows only in this case, so that no list of names and no glob shows it.
    """
    from hydra.core.config_store import ConfigStore

    overrides = [_as_target(override) for override in overrides]
    keys = {key_of(override) for override in overrides}
    for group in ("learner", "scenario", "model"):
        ConfigStore.instance().repo.get(group, {}).pop(f"{LOOSE}.yaml", None)
        if f"{group}._target_" in keys and group not in keys:
            ConfigStore.instance().store(group=group, name=LOOSE, node={})
            overrides = [f"++{w.lstrip('+')}" if w.lstrip("+").startswith(f"{group}.") else w for w in overrides]
            overrides.insert(0, f"{group}={LOOSE}")
    return overrides


def _as_target(override: str) -> str:
    """`model=package.module.Class`, or `model=path/to/file.py:Class`, as `model._target_=`; other overrides as they are."""
    group, _, value = override.partition("=")
    dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+|[^,=()\[\]{}'\" ]+\.py:[A-Za-z_]\w*", value)
    return f"{group}._target_={value}" if group in ("learner", "scenario", "model") and dotted else override


def _parsable(override: str, parser: Any) -> str:
    """The override as Hydra's grammar wants it: a value that it cannot read and that looks like a path is quoted."""
    from hydra.errors import OverrideParseException

    if not key_of(override) or override.startswith("="):
        raise UserError(f"{override!r}: write NAME=VALUE")
    try:
        parser.parse_overrides([override])
    except OverrideParseException as error:
        key, equals, value = override.partition("=")
        if not equals and not override.startswith("~"):
            known = nearest(override, ("-m", "--multirun", "--cfg")) if override.startswith("-") else ""
            raise UserError(f"{override!r}: write NAME=VALUE{known}") from None
        if not looks_like_path(key, value):
            reason = next((line for line in str(error).splitlines() if not line.startswith("See ")), "").strip()
            raise UserError(f"cannot read {override!r} ({reason}); if the value is text, write {quoted(key, value)}") from None
        return f"{key}={_in_quotes(value)}"
    return override


def _in_quotes(value: str) -> str:
    """A text as Hydra's grammar quotes it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=value, quote=Quote.single).with_quotes()


def quoted(key: str, value: str) -> str:
    """What to type at a shell, so that Hydra takes a value as one text."""
    word = f"{key}={_in_quotes(value)}"
    return shlex.quote(word) if re.search(r'["$`\\!]', word) else f'"{word}"'


def _compose(overrides: Sequence[str]) -> Any:
    """Hydra's composition; its errors become one line."""
    import hydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return hydra.compose("run", overrides=list(overrides), return_hydra_config=True)
    except MissingConfigException as error:
        raise UserError(_unknown_choice(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_unknown_key(str(error), overrides)) from None
    except ValueError as error:  # of Hydra's own checks of group names
        raise UserError(" ".join(str(error).split())) from None


def _unknown_choice(error: Any) -> str:
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    names = [option for option in (error.options or ()) if not option.startswith("_")]
    if group == "hydra/launcher":
        return f"no launcher '{name}' is installed: pip install 'clbench[sweep]' brings joblib and submitit"
    if not names:
        return str(error).splitlines()[0]
    return unknown_choice(group, name, names)


def _unknown_key(message: str, overrides: Sequence[str]) -> str:
    found = re.search(r"Could not override '([^']+)'", message) or re.search(r"Key '([^']+)' is not in struct", message)
    if found is None:
        return " ".join(message.split())
    key = next((k for k in map(key_of, overrides) if k == found[1] or k.endswith(f".{found[1]}")), found[1])
    others = [w for w in overrides if key_of(w) != key and "." not in key_of(w)]
    known = _names(_compose(others)) if others != list(overrides) else []
    if key in known:
        return f"'{key}' takes no new parts at once: write +{key}.NAME=VALUE for each"
    if key.startswith("scenario.") and key != "scenario.path" and "scenario.path" in known:
        return f"no key '{key}' beside scenario=manifest: samples, order and budget are those of the file"
    return f"no key '{key}'{nearest(key, [*(name for name in known if not name.endswith('._target_')), *GROUPS])}"


def _names(config: Any) -> list[str]:
    """Dotted keys of a composed configuration, also of one whose values are still missing."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config, resolve=False)
    return list(dotted({key: value for key, value in plain.items() if key != "hydra"}))


def build(node: Mapping[str, Any], /, **extra: Any) -> Any:
    """Make the object that a node describes, nested nodes first; `extra` arguments are handed over as they are.

    The only place that instantiates. Hydra 1.4 wants an allow-list: clbench, the plug-ins and the node's own target.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    if (after := operators_after(node)) is not None:
        made = build({key: value for key, value in node.items() if key != "operators"}, **extra)
        return apply(made, after, node.get("data_root"), bool(node.get("download"))) if after else made
    prepared = importable(node)
    allowed = ["clbench.*", *(f"{package.split('.')[0]}.*" for package in plugin_dirs()), prepared["_target_"]]
    scope = getattr(hydra.utils, "execution_whitelist", None)
    with scope(allowed) if scope else nullcontext():
        try:
            make = hydra.utils.instantiate({**prepared, "_partial_": True}, _convert_="all")
        except InstantiationException as error:
            cause = error.__cause__
            if isinstance(cause, UserError):
                raise cause from None
            raise UserError(" ".join(str(error).split())) from error
        if node.get("_partial_"):
            return functools.partial(make, **extra) if extra else make
        return make(**extra)


def label(varying: Sequence[str]) -> str:
    """The overrides that vary in its sweep, for this job."""
    from hydra.core.hydra_config import HydraConfig

    overrides = list(HydraConfig.get().overrides.task)
    return " ".join(override for override in overrides if key_of(override) in [key_of(v) for v in varying]) or " ".join(
        overrides
    )


def to_yaml(plain: Mapping[str, Any]) -> str:
    """A resolved configuration as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(plain)))
