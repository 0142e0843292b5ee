"""Families of scenarios: what kind of stream a configuration file makes, read from its text alone."""

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
    "your own data",
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
    if ".tokens." in target:
        return "continual pre-training"
    return dict(_BY_TARGET).get(name, "other")


def sorted_by_family(named: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Names and files in the order of `FAMILIES`, within a family as they were."""
    return sorted(named, key=lambda one: FAMILIES.index(family(one[1])))


def _value(text: str, key: str) -> str:
    """What stands behind a key of the first level, without the comment: on its line, and on the lines of a list below it."""
    found = re.search(rf"^{key}:(.*(?:\n(?:[ \t-].*))*)", text, re.M)
    return re.sub(r"#.*", "", found[1]).strip() if found else ""
