"""A page for each learner: paper and equations, needs, bytes held, options, the card, the command; and pages that list them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from clbench.config import defaults, families, registry
from clbench.guide import coverage
from clbench.guide.site import prose
from clbench.interfaces import Capabilities

_WORDS = {  # what a command says beside the learner's name, where the default stream or network is not for it
    "test-time": "scenario=tta_digits model=convnet",
    "continual pre-training": "scenario=cpt_synthetic",
    "model editing": "scenario=edit_facts",
    "few-shot": "scenario=fscil_digits",
    "online": "scenario=online_digits",
    "task-wise": "scenario=til_digits",
}
_SUPPLIED = ("model", "runtime")


def pages(cards: str) -> dict[str, str]:
    """File -> page. `cards` is the text of CARDS.md, empty where there is none."""
    held, peers, sections = registry.stored(), coverage.load(), split_cards(cards)
    made: dict[str, str] = {}
    listed: dict[str, list[tuple[str, str, str, str]]] = {}
    for family, name, path in named():
        paper, needs = registry.details(path)
        measured = sections.get(name, "")
        made[f"learners/{name}.md"] = page(name, path, family, held.get(name), _elsewhere(name, peers), measured)
        row = (f"[{name}]({name}.md)", prose.text(registry.description(path)), prose.text(paper), _marks(needs, measured))
        listed.setdefault(family, []).append(row)
    made["learners/index.md"] = _index(listed)
    return made


def named() -> list[tuple[str, str, Path]]:
    """Family, name and file of every learner, plug-ins' too, by family."""
    return families.sorted_by_family("learner", [(name, path) for name, (path, *_) in registry.choices("learner").items()])


def command(name: str, family: str) -> str:
    """The words of a small run that the learner can do."""
    return " ".join(["clbench run", f"learner={name}", *_EXCEPTIONS.get(name, _WORDS.get(family, "")).split()])


_EXCEPTIONS = {
    "bn_adapt": "scenario=tta_digits model=convnet",
    "gpm": "scenario=til_digits",
    "hypernetwork": "scenario=til_digits learner.offset=model",
    "laftr": "model=mlp model.norm=none",
    "vida": "scenario=tta_digits",
}


def page(name: str, path: Path, family: str, held: Mapping[str, int] | None, elsewhere: list[str], card: str) -> str:
    """One learner."""
    node = defaults.read(path)
    target = str(node["_target_"])
    parts = [
        f"# {name}",
        prose.text(registry.description(path)),
        f"Family [{family}](index.md#{anchor(family)}), class {prose.code(target)}.",
        prose.block(command(name, family), "bash"),
        "## What it does",
        prose.docstring(prose.about(target, whole=True)),
    ]
    if state := prose.about(target):
        parts.append(prose.docstring(state))
    parts += ["## What it needs", *_needs(registry.details(path)[1])]
    parts.append(f"It holds {registry.stored_text(held)}, as measured below *holds* in [the list](index.md).")
    found = prose.options(target, node, _SUPPLIED)
    parts += ["## Options", "`learner.NAME=VALUE` on the command line, with the default that is used without it."]
    parts.append(prose.options_table(found) if found else "It has none.")
    if elsewhere:
        parts += ["## In other suites", "\n".join(f"- {one}" for one in elsewhere)]
    parts += [
        "## Published and measured",
        card or "It has no card: no number is published or measured beside its own tests.",
    ]
    return "\n\n".join(parts) + "\n"


def anchor(words: str) -> str:
    """The id of a heading, as the site makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())


def _needs(words: str) -> list[str]:
    """What the words of its capabilities mean, as `Capabilities` says it."""
    said = capability_lines()
    rows = []
    for one in re.findall(r"\([^)]*\)|[\w]+(?:=\S+)?", words):
        name = one.partition("=")[0]
        if name in said:
            rows.append((prose.code(one), ("no: " if one.endswith("=False") else "") + prose.text(said[name])))
        else:
            rows.append(("", prose.text(one)))
    return [prose.table(("capability", "what it says"), rows)] if rows else ["Nothing special."]


def capability_lines() -> dict[str, str]:
    """Capability -> what it means, from the docstring of `Capabilities`."""
    found: dict[str, str] = {}
    last = ""
    for line in str(Capabilities.__doc__).splitlines():
        match = re.match(r"    (\w+)\s+(\S.*)", line)
        if match:
            last = match[1]
            found[last] = match[2]
        elif last and line.startswith("        "):
            found[last] += " " + line.strip()
    return found


def _elsewhere(name: str, peers: Mapping[str, dict]) -> list[str]:
    """What other suites call the method: a line for each."""
    lines = []
    for row in peers["methods"]:
        if "here" in row and coverage.learner_of(row) == name:
            for key, suite in peers["suites"].items():
                if called := coverage.names(row, key):
                    lines.append(f"{suite['name']}: {', '.join(map(prose.code, called))} ({prose.code(row['here'])} here)")
    return lines


def split_cards(cards: str) -> dict[str, str]:
    """Learner -> its part of CARDS.md."""
    parts = re.split(r"^## (.+)\n", cards, flags=re.M)
    return {name.strip(): body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True) if name != "Measured here"}


def _marks(needs: str, card: str) -> str:
    """The last column of the list: needs, and whether there is a card."""
    words = [prose.code(one) for one in needs.partition("(")[0].split()]
    return ", ".join([*words, *(["card"] if card else [])]) or "-"


def _index(listed: Mapping[str, list[tuple[str, str, str, str]]]) -> str:
    count = sum(map(len, listed.values()))
    parts = [
        "# Learners",
        f"{count} methods in {len(listed)} families. A page each: the paper and its equations, what deviates, what the method"
        " needs and holds, every option with its default, the published number beside the measured one, and the command.",
        prose.block("clbench list learners\nclbench run -m 'learner=glob(*lora)'", "bash"),
    ]
    for family, rows in listed.items():
        parts += [f"## {family}", prose.table(("learner", "what it is", "paper", "needs, and whether it has a card"), rows)]
    parts += ["## holds", prose.text(" ".join(registry.STORED.split()))]
    meaning = [(prose.code(name), prose.text(said)) for name, said in capability_lines().items()]
    return "\n\n".join([*parts, "## capabilities", prose.table(("capability", "what it says"), meaning)]) + "\n"
