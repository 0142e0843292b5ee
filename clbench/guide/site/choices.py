"""Pages of what else can be chosen: scenarios by family, models, schedules, modules, operators, evaluators, tables, options."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from clbench.config import defaults, families, registry
from clbench.evaluation import evaluators
from clbench.guide.site import prose
from clbench.report import explain, formats
from clbench.streams.operators import registry as operators

_TITLES = {  # group -> title, what it is, a command with NAME in it
    "model": ("Models", "The networks that learn, by their configuration files.", "clbench run model=NAME"),
    "schedule": ("Schedules", "Learning-rate schedules: functions of the place of a step.", "clbench schedule show NAME"),
    "pet": ("Parameter-efficient modules", "Small modules that are trained in place of the network.", "clbench run pet=NAME"),
    "sweep": (
        "Published tables",
        "Whole tables as one command, with the numbers that were published.",
        "clbench plan sweep=NAME",
    ),
    "machine": ("Machines", "Where the jobs of a sweep run.", "clbench run -m machine=NAME seed=0,1"),
    "effect": ("Effects", "What the literature says a setting does, as runs and claims.", "clbench effects NAME"),
    "tune": ("Search spaces", "Options of learners that a search may try.", "clbench tune learner=NAME tune.space=NAME"),
}
_SUPPLIED = {"schedule": ("place",), "pet": ("model", "runtime")}


def pages() -> dict[str, str]:
    """File -> page."""
    made = {f"choices/{group}s.md": group_page(group) for group in _TITLES}
    made |= scenario_pages()
    return made | {
        "choices/operators.md": operators_page(),
        "choices/evaluators.md": evaluators_page(),
        "choices/options.md": options_page(),
    }


def files(group: str) -> dict[str, Path]:
    """Name -> file of everything in a group, plug-ins' too."""
    return {name: path for name, (path, *_) in registry.choices(group).items()}


def group_page(group: str) -> str:
    """Everything of a group: a list, then a section for each."""
    title, what, command = _TITLES[group]
    found = files(group)
    rows = [(f"[{name}](#{name})", prose.text(registry.description(path))) for name, path in found.items()]
    parts = [f"# {title}", what, prose.table(("name", "what it is"), rows)]
    for name, path in found.items():
        parts += section(group, name, path, command.replace("NAME", name))
    return "\n\n".join(parts) + "\n"


def section(group: str, name: str, path: Path, command: str) -> list[str]:
    """One choice: its remark, the docstring and options of its target, its file."""
    node = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    parts = [f"## {name}", prose.text(registry.description(path)), prose.block(command, "bash")]
    target = str(node.get("_target_", ""))
    if target:
        parts.append(prose.docstring(prose.about(target)))
        if group in defaults.GROUPS:
            found = prose.options(target, defaults.read(path), _SUPPLIED.get(group, ()))
            parts += [f"`learner.{group}.NAME=VALUE`:", prose.options_table(found)] if found else []
    if not target or group not in defaults.GROUPS:
        parts.append(prose.block(path.read_text(encoding="utf-8"), "yaml"))
    return [part for part in parts if part]


def scenario_pages() -> dict[str, str]:
    """A page for each family, and one that lists them."""
    found = families.sorted_by_family("scenario", list(files("scenario").items()))
    made, listed = {}, []
    for family in dict.fromkeys(one[0] for one in found):
        mine = [(name, path) for of, name, path in found if of == family]
        file = f"{re.sub(r'[^a-z]+', '_', family)}.md"
        rows = [(f"[{name}](#{name})", prose.text(registry.description(path))) for name, path in mine]
        parts = [f"# Scenarios: {family}", prose.table(("name", "what it is"), rows)]
        for name, path in mine:
            parts += section("scenario", name, path, f"clbench manifest show scenario={name}")
        made[f"scenarios/{file}"] = "\n\n".join(parts) + "\n"
        listed += [
            f"## {family}",
            prose.table(
                ("scenario", "what it is"), [(f"[{n}]({file}#{n})", r[1]) for (n, _), r in zip(mine, rows, strict=True)]
            ),
        ]
    head = [
        "# Scenarios",
        f"{len(found)} streams, by what changes from one experience to the next. Each is a file of options:"
        " `scenario.NAME=VALUE` changes one, and [operators](../choices/operators.md) make other streams of it."
        " `clbench manifest write` writes the exact stream, whose hash is its identity.",
        prose.block("clbench list scenarios\nclbench manifest show scenario=cil_digits", "bash"),
    ]
    return made | {"scenarios/index.md": "\n\n".join([*head, *listed]) + "\n"}


def operators_page() -> str:
    """Every operator of a stream."""
    found = operators.targets()
    firsts = {name: prose.about(target).partition("\n")[0] for name, target in found.items()}
    parts = [
        "# Operators",
        "Functions from stream to stream, from left to right: `scenario.operators=[permute]`, or with options"
        " `scenario.operators=[{rotate: {experiences: 5}}, single_pass]`. A function of your own is named by its dotted path.",
        prose.block("clbench list operators", "bash"),
        prose.table(
            ("operator", "what it does"), [(f"[{name}](#{name})", prose.text(first)) for name, first in firsts.items()]
        ),
    ]
    for name, target in found.items():
        options = prose.options(target, {}, operators.SUPPLIED)
        parts += [f"## {name}", prose.docstring(prose.about(target))]
        parts += [prose.options_table(options) if options else "It has no options."]
    return "\n\n".join(parts) + "\n"


def evaluators_page() -> str:
    """Evaluators, then the numbers that are made of their sums, on one worked example."""
    parts = [
        "# Evaluators and numbers",
        "An evaluator takes answers and labels and gives sums over samples; a record holds these sums, and every"
        " number below is recomputed from them. [An evaluator of your own](../guide/my_evaluator.md) is a class with a name.",
        "Every scenario has those of its kind: "
        + ", ".join(map(prose.code, evaluators.BUILT_IN))
        + ". These may be named beside them:",
    ]
    outside = {entry.name: entry.value.replace(":", ".") for entry in importlib.metadata.entry_points(group=evaluators.GROUP)}
    for name, target in {**evaluators.OWN, **outside}.items():
        parts += [f"## {name}", prose.docstring(prose.about(target, whole=True)), prose.docstring(prose.about(target))]
        parts.append(prose.block(f"clbench run 'scenario.operators=[{{evaluators: {{names: [{name}]}}}}]'", "bash"))
    parts += [
        "## Numbers",
        "`clbench report explain` shows the same, also of a record.",
        prose.block("clbench report explain", "bash"),
    ]
    parts += [formats.to_markdown(one) for one in explain.tables(explain.example())]
    return "\n\n".join(part for part in parts if part) + "\n"


def options_page() -> str:
    """Options that every run has, as run.yaml says them."""
    text = (registry.conf_dir() / "run.yaml").read_text(encoding="utf-8")
    lines = text[text.index("\nseed:") : text.index("\nhydra:")].strip().splitlines()
    rows = []
    for line in lines:
        name, _, rest = line.partition(": ")
        value, _, remark = rest.partition("  # ")
        rows.append((prose.code(name), prose.code(value), prose.text(remark)))
    words = "`NAME=VALUE` on the command line of `clbench run` and `clbench plan`."
    return "\n\n".join(["# Options of every run", words, prose.table(("option", "default", "remark"), rows)]) + "\n"


def names() -> Mapping[str, Sequence[str]]:
    """Group -> names that the pages above must hold."""
    return {
        **{group: list(files(group)) for group in (*_TITLES, "scenario")},
        "operator": list(operators.targets()),
        "evaluator": [*evaluators.BUILT_IN, *evaluators.OWN],
    }
