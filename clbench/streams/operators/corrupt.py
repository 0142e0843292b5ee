"""Corrupted images: noise, blur, weather and digital artefacts, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from clbench.interfaces import UserError
from clbench.streams.images.published import KINDS
from clbench.streams.operators.copies import chosen, copied, flag, whole, with_transforms
from clbench.streams.operators.published_sets import tested_on
from clbench.streams.scenario import Scenario
from clbench.streams.transforms import CORRUPTION_TABLES, CORRUPTIONS

TO = ("copies", "stream")
ORDERS = (  # the ten of CoTTA (Wang et al., CVPR 2022, arXiv 2203.13591), places in CORRUPTIONS
    (10, 13, 0, 5, 6, 4, 2, 14, 3, 12, 1, 8, 7, 9, 11),
    (14, 1, 6, 8, 11, 9, 3, 12, 0, 10, 4, 2, 13, 7, 5),
    (11, 3, 0, 1, 7, 8, 4, 6, 12, 14, 13, 10, 2, 5, 9),
    (1, 9, 4, 13, 7, 12, 10, 2, 3, 8, 11, 0, 5, 14, 6),
    (13, 4, 6, 7, 9, 2, 10, 5, 8, 14, 0, 1, 11, 3, 12),
    (5, 7, 9, 1, 3, 11, 6, 10, 8, 12, 4, 0, 13, 14, 2),
    (8, 2, 14, 11, 6, 4, 13, 7, 3, 5, 10, 12, 1, 9, 0),
    (4, 6, 2, 9, 7, 14, 0, 8, 1, 10, 11, 5, 13, 3, 12),
    (3, 5, 6, 1, 0, 4, 14, 9, 11, 13, 8, 7, 10, 12, 2),
    (11, 0, 3, 6, 8, 4, 14, 9, 13, 12, 1, 2, 7, 5, 10),
)


def corrupt(
    stream: Scenario,
    kinds: Sequence[str] | None = None,
    severity: int = 5,
    to: Literal["copies", "stream"] = "copies",
    order: int | None = None,
    gradual: bool = False,
    rounds: int = 1,
    clean_first: bool = True,
    seed: int = 0,
    table: Literal["auto", "cifar", "imagenet"] = "auto",
    published: str | None = None,
    data_root: str | None = None,
) -> Scenario:
    """Images under the common corruptions, one after another. With `test_time` behind it, they are sets to adapt to.

    kinds          names of `transforms.CORRUPTIONS`, in this order; null: all fifteen in the order of Hendrycks & Dietterich
    severity       1 to 5
    to             copies: every image in each of the experiences, a corruption each. stream: the experiences there are take the
                   corruptions in turn
    order          instead of kinds: number 0..9 of the ten orders of CoTTA
    gradual        severities 1 to `severity` and back for each corruption; the first one begins at `severity`
    rounds         so many times through all of them
    clean_first    the first experience has the images as they are
    seed           of the noise; every image has noise of its own, the same in every run
    table          constants of CIFAR-10-C or ImageNet-C; auto: by the shorter side, see `images.corruptions`
    published      cifar10_c, cifar100_c, imagenet_c or a folder in their layout: the pictures are those of the published files.
                   They are test images: one experience has the stream's training images as they are, and the sets show the
                   corruptions. `kinds` may name the four extra ones as well, see `images.published`
    """
    chosen(table, "corrupt.table", CORRUPTION_TABLES)
    flag(clean_first, "corrupt.clean_first")
    whole(seed, "corrupt.seed")
    chosen(to, "corrupt.to", TO)
    flag(gradual, "corrupt.gradual")
    known = CORRUPTIONS if published is None else KINDS
    steps = _sequence(_kinds(kinds, order, known), severity, gradual, whole(rounds, "corrupt.rounds", 1))
    if published is not None:
        _check_published(published, {"to": to, "seed": seed, "table": table, "clean_first": clean_first})
        return tested_on(stream, published, steps, _names(steps), data_root)
    listed: list[Any] = [({"corrupt": {"kind": k, "severity": s, "seed": seed, "table": table}},) for k, s in steps]
    listed = [(), *listed] if clean_first else listed
    if to == "copies":
        made = with_transforms(copied(stream, len(listed), "corrupt", "corrupt"), listed)
        return _named(made, ["clean", *_names(steps)] if clean_first else _names(steps))
    number = len(stream.manifest.experiences)
    if clean_first and number == 1:
        raise UserError("operator corrupt has no effect on one experience: say corrupt.clean_first=false, or corrupt.to=copies")
    return with_transforms(stream, [listed[i % len(listed)] for i in range(number)])


def _check_published(published: Any, options: dict[str, Any]) -> None:
    """Refuse what says how pictures are made, or that training images are corrupted too."""
    if not isinstance(published, str) or not published.strip():
        raise UserError(f"corrupt.published must be a name or a folder, got {published!r}")
    for name, default in {"to": "copies", "seed": 0, "table": "auto", "clean_first": True}.items():
        if options[name] != default:
            raise UserError(f"corrupt.{name}={options[name]} has no effect with corrupt.published, whose files are test images")


def _kinds(kinds: Any, order: Any, known: Sequence[str]) -> list[str]:
    if order is not None:
        if kinds is not None:
            raise UserError("corrupt.order excludes corrupt.kinds: leave one of them null")
        return [CORRUPTIONS[k] for k in ORDERS[_below(order, "corrupt.order", len(ORDERS))]]
    if kinds is None:
        return list(CORRUPTIONS)
    if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds:
        raise UserError(f"corrupt.kinds must be a list of corruptions, got {kinds!r}")
    return [chosen(kind, "corrupt.kinds", known) for kind in kinds]


def _below(value: Any, what: str, end: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < end:
        raise UserError(f"{what} must be a whole number in {least}..{end - 1}, got {value!r}")
    return value


def _sequence(kinds: Sequence[str], severity: Any, gradual: bool, rounds: int) -> list[tuple[str, int]]:
    """(corruption, severity) of every step."""
    most = _below(severity, "corrupt.severity", 6, 1)
    if gradual and most == 1:
        raise UserError("corrupt.gradual has no effect with corrupt.severity=1")
    up, down = list(range(1, most + 1)), list(range(most - 1, 0, -1))
    found = []
    for k, kind in enumerate(list(kinds) * rounds):
        levels = [most] if not gradual else [most, *down] if k == 0 else [*up, *down]
        found += [(kind, level) for level in levels]
    return found


def _names(steps: Sequence[tuple[str, int]]) -> list[str]:
    """fog5, and fog5#2 where it comes again."""
    names: list[str] = []
    count: dict[tuple[str, int], int] = {}
    for kind, level in steps:
        count[kind, level] = again = count.get((kind, level), 0) + 1
        names.append(f"{kind}{level}" + (f"#{again}" if again > 1 else ""))
    return names


def _named(stream: Scenario, names: Sequence[str]) -> Scenario:
    steps = tuple(replace(e, name=name) for e, name in zip(stream.manifest.experiences, names, strict=True))
    sets = tuple(replace(e, name=names[e.first_seen]) for e in stream.manifest.evals)
    return replace(stream, manifest=replace(stream.manifest, experiences=steps, evals=sets))
