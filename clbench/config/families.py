"""Families of scenarios and learners, read from the text of a configuration file alone.

A scenario's data, operators and target say what kind of stream it makes; a learner's file names its family: `# family: online`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

FAMILIES = (
    "class-incremental",
    "task-incremental",
    "domain-incremental",
    "few-shot",
    "re-occurring",
    "online and general",
    "test-time",
    "continual pre-training",
    "model editing",
    "continual fine-tuning",
    "your own data",
    "other",
)
LEARNERS = (
    "bounds",
    "regularisation",
    "rehearsal",
    "online",
    "expanding networks",
    "task-wise",
    "function space",
    "plasticity",
    "averaging and merging",
    "prompts",
    "adapters and low-rank terms",
    "alignment of classifiers",
    "classifiers on features",
    "few-shot",
    "test-time",
    "continual pre-training",
    "model editing",
    "continual fine-tuning",
    "other",
)
_OWN = ("from_manifest",)  # targets that run what somebody else made
_BY_OPERATOR = (  # the first that is among a scenario's operators
    ("test_time", "test-time"),
    ("shots", "few-shot"),
    ("repeat", "re-occurring"),
    ("file_lists", "re-occurring"),
    ("hide_boundaries", "online and general"),
    ("single_pass", "online and general"),
    ("blur", "online and general"),
    ("permute", "domain-incremental"),
    ("rotate", "domain-incremental"),
    ("corrupt", "domain-incremental"),
)
_BY_TARGET = (
    ("class_incremental", "class-incremental"),
    ("task_incremental", "task-incremental"),
    ("domain_incremental", "domain-incremental"),
)


def family(path: Path) -> str:
    """The family of a scenario by its file: its data, its operators and its target decide, in this order."""
    text = path.read_text(encoding="utf-8")
    target, operators = _value(text, "_target_"), _value(text, "operators")
    name = target.rpartition(".")[2]
    if _value(text, "dataset") == "???" or name in _OWN:
        return "your own data"
    for operator, found in _BY_OPERATOR:
        if re.search(rf"\b{operator}\b", operators):
            return found
    if ".tokens.edit" in target:
        return "model editing"
    if ".tokens.text_" in target:
        return "continual fine-tuning"
    if ".tokens." in target:
        return "continual pre-training"
    return dict(_BY_TARGET).get(name, "other")


def learner_family(path: Path) -> str:
    """The family that a learner's file names in its comments; "other" where it names none that is known."""
    found = re.search(r"^# family: (.+)$", path.read_text(encoding="utf-8"), re.M)
    return found[1] if found and found[1] in LEARNERS else "other"


ORDERED = {"scenario": (family, FAMILIES), "learner": (learner_family, LEARNERS)}  # group -> family of a file, all in order


def sorted_by_family(group: str, named: Sequence[tuple[str, Path]]) -> list[tuple[str, str, Path]]:
    """Family, name and file, in the order of the families and within a family as they were; groups without families: ""."""
    if group not in ORDERED:
        return [("", name, path) for name, path in named]
    of, families = ORDERED[group]
    return sorted(((of(path), name, path) for name, path in named), key=lambda one: families.index(one[0]))


def _value(text: str, key: str) -> str:
    """What stands behind a key of the first level, without the comment: on its line, and on the lines of a list below it."""
    found = re.search(rf"^{key}:(.*(?:\n(?:[ \t-].*))*)", text, re.M)
    return re.sub(r"#.*", "", found[1]).strip() if found else ""
