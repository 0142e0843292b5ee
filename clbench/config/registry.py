"""What can be chosen, clbench's own and the plug-ins', what an option may be, and the objects that targets name.

Imports neither torch nor Hydra.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.config import families
from clbench.config.definitions import Definition, definition, find_module, module, nearest, split_target
from clbench.config.moved import current
from clbench.config.run_options import wrong_options
from clbench.config.signatures import problems, signature
from clbench.evaluation import evaluators
from clbench.interfaces import Capabilities, UserError
from clbench.streams.operators import composition, registry

log = logging.getLogger("clbench")
GROUPS = ("scenario", "learner", "model", "schedule", "pet", "sweep", "machine")
PLUGINS = "clbench.plugins"
_SUPPLIED = {"learner": ("model", "runtime")}


def conf_dir() -> Path:
    """The configuration files: `conf` beside this file where clbench is installed from a wheel, else beside its parent."""
    here = Path(__file__).resolve().parent.parent
    return here / "conf" if (here / "conf" / "run.yaml").is_file() else here.parent / "conf"


@functools.cache
def plugin_dirs() -> dict[str, Path]:
    """Package -> its `conf` folder, for every installed package with an entry point in group `clbench.plugins`."""
    found = {}
    for entry in sorted(importlib.metadata.entry_points(group=PLUGINS), key=lambda e: e.name):
        package = entry.value.split(":")[0].strip()
        spec = find_module(package)
        folders = [Path(p) / "conf" for p in spec.submodule_search_locations or ()] if spec else []
        folder = next((f for f in folders if f.is_dir()), None)
        if folder is None:
            log.warning("plug-in %s: package %s has no conf folder; it is left out", entry.name, package)
        else:
            found[package] = folder
    return found


def choices(group: str) -> dict[str, list[Path]]:
    """Name -> files of that name in a group; clbench's own first, then the plug-ins'."""
    found: dict[str, list[Path]] = {}
    for folder in (conf_dir(), *plugin_dirs().values()):
        for path in sorted((folder / group).glob("*.yaml")):
            found.setdefault(path.stem, []).append(path)
    return dict(sorted(found.items()))


def description(path: Path) -> str:
    """The first comment line of a YAML file; where its sentence goes on in the next one, to the end of the sentence."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(("# @", "# family: "))]
    block = [line.lstrip("# ").strip() for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    if len(block) < 2 or block[0].endswith((".", ")")):
        return block[0] if block else ""
    return re.split(r"(?<=\.) (?=\w)", " ".join(block), maxsplit=1)[0]


def origin(path: Path) -> str:
    """The plug-in package that a configuration file belongs to, or clbench."""
    return next((package for package, folder in plugin_dirs().items() if path.is_relative_to(folder)), "clbench")


def listing(words: Sequence[str] = ()) -> str:
    """Names and first comment lines of the groups (plurals), or of all; of `learners`, if asked for, what there is to know."""
    plurals = [*(f"{group}s" for group in GROUPS), "operators", "evaluators"]
    for word in words:
        if f"{word.removesuffix('s')}s" not in plurals:
            raise UserError(f"no group '{word}'{nearest(word, plurals)} (one of: {', '.join(plurals)})")
    lines, known = [], stored()
    for group in [word.removesuffix("s") for word in words] or (*GROUPS, "operator", "evaluator"):
        lines.append(f"{group}s")
        lines += operators_listing() if group == "operator" else evaluators.listing() if group == "evaluator" else ()
        found = [(name, path) for name, (path, *_) in choices(group).items()]
        width, heading = 24 if group == "scenario" else 18, ""
        for family, name, path in families.sorted_by_family(group, found):
            mark = "" if origin(path) == "clbench" else f"  [{origin(path)}]"
            if heading != (heading := family):
                lines.append(f" {heading}")
            lines.append(f"  {name:<{width}} {description(path)}{mark}".rstrip())
            if words and group == "learner":
                paper, needs = details(path)
                held = stored_text(None if mark else known.get(name))
                lines += [f"  {'':<18} {text}" for text in (paper or "-", f"{needs or 'no special needs'}; holds {held}")]
        lines += ["", STORED, "", *_capability_lines()] if words and group == "learner" else []
    return "\n".join(lines)


def _capability_lines() -> list[str]:
    """What the words between a learner's paper and its bytes mean, as `Capabilities` says it."""
    said = [line[2:] for line in str(Capabilities.__doc__).splitlines() if line.startswith("    ") and line.strip()]
    return ["The words before it are a learner's capabilities:", *said]


def stored() -> dict[str, dict[str, int]]:
    """Learner -> bytes that it holds: `class` for each class, `experience` for each experience, `besides` the rest.

    The rest is below zero where growth itself grows (every expert of `seed_ensemble` keeps every class). The file is what
    `clbench check --measure 'learner=glob(*)'` prints.
    """
    path = Path(__file__).resolve().parent.parent / "learners" / "stored.json"
    try:
        return json.loads(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}


STORED = (
    "holds: bytes that grow with classes and with experiences, and the rest; exemplars not counted. Measured with the default\n"
    "options on the nano ViT (160 features), 12 images a class, from the second to the third experience. Learners with\n"
    "a random layer (ranpac, ...) hold a row a sample until these are as many as its features, or a quarter of them, and only\n"
    "sums of them from then on"
)


def stored_text(held: Mapping[str, int] | None) -> str:
    """Bytes in a few words; '-' where they were not measured."""
    if held is None:
        return "-"
    growth = (_bytes(max(0, held[name])) for name in ("class", "experience", "besides"))
    return "{} a class + {} an experience + {}".format(*growth)


def _bytes(count: int) -> str:
    for size, unit in ((1e6, "MB"), (1e3, "kB")):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def details(path: Path) -> tuple[str, str]:
    """Paper (first line of the module's docstring) and capabilities that are not default, by a learner's configuration file.

    Read from the source text, nothing is imported; empty where the source does not say.
    """
    found = _defined(path)
    if found is None:
        return "", ""
    paper = textwrap.shorten((ast.get_docstring(module(found.path)) or "").partition("\n")[0], 99, placeholder=" ...")
    return paper, _capabilities(found.node) if isinstance(found.node, ast.ClassDef) else ""


def _defined(path: Path) -> Definition | None:
    """What the target of a configuration file is in its source text; None where that does not say."""
    import yaml

    try:
        return definition(str(yaml.safe_load(path.read_text(encoding="utf-8"))["_target_"]))
    except (UserError, OSError, yaml.YAMLError, ValueError, TypeError, KeyError):  # `check` says so, where the file is chosen
        return None


def asks(group: str, name: str) -> str:
    """What a choice of group "learner" answers or of "scenario" asks (`interfaces.Asks`), from the source text."""
    path = choices(group)[name][0]
    if group == "learner":
        said = details(path)[1].split()
        return next((answer for answer in ("loss", "logits", "next_token") if f"asks='{answer}'" in said), "predict")
    found = _defined(path)
    returns = found.node.returns if found is not None and isinstance(found.node, ast.FunctionDef) else None
    makes = ast.unparse(returns) if returns is not None else ""
    if "EditScenario" in makes or "TextScenario" in makes:
        return "logits" if "EditScenario" in makes else "next_token"
    return "loss" if "TokenScenario" in makes or "ImageScenario" in makes else "predict"


def answering(learners: Sequence[str], scenario: str | None) -> list[str]:
    """Those learners that answer what a scenario asks; all of them where it is not known."""
    asked = asks("scenario", scenario) if scenario in choices("scenario") else None
    return [name for name in learners if asked in (None, asks("learner", name))]


def _capabilities(learner: ast.ClassDef) -> str:
    """What a class writes between the brackets of `Capabilities(...)`: `needs_pretrained needs_passes=2`."""
    words = []
    for node in learner.body:
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Call):
            names = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            if "capabilities" in (ast.unparse(n) for n in names):
                given = [(k.arg, ast.unparse(k.value)) for k in node.value.keywords if k.arg != "trains"]
                words += [str(arg) if value == "True" else f"{arg}={value}" for arg, value in given]
        elif isinstance(node, ast.FunctionDef) and node.name == "capabilities_of":
            words.append("(more with some options)")
    return " ".join(words)


def check(config: Mapping[str, Any]) -> None:
    """Compare options with what they may be and every `_target_` node with its signature. `UserError` with all problems."""
    options = dict(wrong_options(config))
    lines = [*options.values(), *_check_choices(config)]
    for group in ("scenario", "learner", "model"):
        node = config.get(group)
        if not isinstance(node, Mapping) or "_target_" not in node:
            lines.append(f"{group} has no _target_: choose one of {', '.join(choices(group))}")
        else:
            left = () if operators_after(node) is None else ("operators",)
            found = _check_node({k: v for k, v in node.items() if k not in left}, group, _SUPPLIED.get(group, ()))
            lines += [line for line in found if line.split()[0].split(".")[-1] not in options]
    lines += [*_check_operators(config), *_check_ranges(config.get("learner"))]
    if lines:
        raise UserError("\n".join(dict.fromkeys(lines)))


def _check_ranges(learner: Any) -> Iterator[str]:
    """Numbers of a learner of clbench's that no run can have: rates below 0, no epochs, no samples in a batch."""
    if not isinstance(learner, Mapping) or not str(learner.get("_target_", "")).startswith("clbench."):
        return
    for name, value in learner.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if (name == "lr" or name.endswith("_lr")) and not 0 <= value < math.inf:
            yield f"learner.{name} must be a finite number from 0, got {value:g}"
        if name in ("epochs", "batch_size") and value < 1:
            yield f"learner.{name} must be at least 1, got {value:g}"
        if name == "updates" and not 0 < value < math.inf:
            yield f"learner.updates must be a finite number above 0, got {value:g}"


def operators_after(node: Mapping[str, Any]) -> Any:
    """The operators of a scenario from outside that does not take them itself: they are applied to what it returns.

    None for any other node.
    """
    target = node.get("_target_")
    if "operators" not in node or not isinstance(target, str) or target.startswith("clbench."):
        return None
    found = signature(target)
    return None if found is None or "operators" in found.parameters else node["operators"]


def _check_node(node: Mapping[str, Any], where: str, supplied: Sequence[str]) -> Iterator[str]:
    yield from problems(node, where, supplied)
    for name, value in node.items():
        if isinstance(value, Mapping) and "_target_" in value:
            yield from _check_node(value, f"{where}.{name}", ())


def _check_operators(config: Mapping[str, Any]) -> Iterator[str]:
    """Names and options of the stream's operators, against their signatures."""
    node = config.get("scenario")
    operators = node.get("operators") if isinstance(node, Mapping) else None
    listed = []
    yield from evaluators.unknown(node.get("evaluators") if isinstance(node, Mapping) else None, "loss")
    for one in operators if isinstance(operators, list | tuple) else ():
        try:
            name, options = registry.parsed(one)
            target = registry.target_of(name)
        except UserError as error:
            yield str(error)
            continue
        if name == "evaluators":
            yield from evaluators.unknown(options.get("names"))
        found = problems({**options, "_target_": target}, f"operator {name}", registry.SUPPLIED)
        listed.append((name, options))
        if not found and (why := composition.refused(name, options)) is not None:
            yield why
        yield from (line.replace(f"(from _target_={target})", f"(from scenario.operators={name})") for line in found)
    yield from composition.misplaced(listed)


def operators_listing() -> Iterator[str]:
    """Name, options with defaults and first line of the docstring of every operator; from the source text."""
    for name, target in registry.targets().items():
        source, function = split_target(target)
        module = ast.parse(source.read_text(encoding="utf-8")) if source else ast.Module([], [])
        found = next((n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == function), None)
        text = (ast.get_docstring(found) or "").partition("\n")[0] if found else ""
        taken = signature(target)
        options = ", ".join(p for p in (taken.parameters if taken else ()) if p not in registry.SUPPLIED)
        mark = "" if target.startswith("clbench.") else f"  [{target.partition('.')[0]}]"
        yield f"  {name:<18} {text}{mark}".rstrip()
        yield f"  {'':<18} options: {options or 'none'}"


def _check_choices(config: Mapping[str, Any]) -> Iterator[str]:
    for group, name in config.get("names", {}).items():
        files = choices(group).get(name, [])
        if len(files) > 1:
            yield f"{group} '{name}' is defined twice: {' and '.join(map(str, files))}"


def importable(node: Any) -> Any:
    """The node with every `path/to/file.py:Class` loaded and named by its module."""
    if isinstance(node, Mapping):
        made = {key: importable(value) for key, value in node.items()}
        if isinstance(made.get("_target_"), str) and ".py:" in made["_target_"]:
            path, name = split_target(made["_target_"])
            assert path is not None
            made["_target_"] = f"{load_file(path)}.{name}"
        elif isinstance(made.get("_target_"), str):
            made["_target_"] = current(made["_target_"])
        return made
    return [importable(item) for item in node] if isinstance(node, list | tuple) else node


def load_target(target: str) -> Any:
    """The object that `_target_` names; a loose file is loaded under a name made from its path and content."""
    path, name = split_target(target)
    if ".py:" in target and path is not None:
        module: Any = importlib.import_module(load_file(path))
    else:
        module = importlib.import_module(current(target)[: -len(name) - 1])
    for part in name.split("."):
        if not hasattr(module, part):
            raise UserError(f"{target}: no '{part}'{nearest(part, dir(module))}")
        module = getattr(module, part)
    return module


def load_file(path: Path) -> str:
    """Import a file -> its module name."""
    content = path.read_bytes()
    name = "clbench_file_" + hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:16]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return name
