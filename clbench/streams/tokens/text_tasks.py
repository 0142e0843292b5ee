"""Scenario `text_tasks`: made tasks of known structure, one after another, for a small decoder that was pre-trained on text
of its own (`base_text`). Imports no torch.

Streams by name (`scenario.tasks`), each task as `made_tasks` writes it:

    made8        copy, shift_3, reverse, topic_4, modsum_10, sort, facts_200, lego_3
    made_cl5     topic_4, topic_5, topic_5_1, topic_14, topic_10: for AG News, Amazon, Yelp, DBpedia, Yahoo. The
                 two of five classes share words and four fifths of each chain, the first and the last three words.
                 `order`: pp4, pp5, pp6 (Razdaibiedina et al. 2023), slm7 (Peng et al. 2024), o1, o2, o3 (Wang et al. 2023; four
                 tasks)
    made15       shift, topic, modsum, facts and lego with three numbers each; `order`: blocked, interleaved, random
    made_trace   made8 in another order: the tasks of two kinds (classes; sequences) in turn
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.tokens import base_text, made_tasks
from clbench.streams.tokens.made_tasks import Level, MadeTask, suggestion
from clbench.streams.tokens.text_lines import Task, TextScenario, scenario

OLD_ROWS, OLD_LENGTH = 64, 64
_FIFTEEN = (
    ("shift_1", "shift_7", "shift_13"),
    ("topic_4", "topic_6", "topic_8"),
    ("modsum_5", "modsum_7", "modsum_10"),
    ("facts_100", "facts_100_1", "facts_100_2"),
    ("lego_2", "lego_3", "lego_4"),
)
_CL5 = {"ag": "topic_4", "amazon": "topic_5", "yelp": "topic_5_1", "dbpedia": "topic_14", "yahoo": "topic_10"}
STREAMS: dict[str, tuple[str, ...]] = {
    "made8": ("copy", "shift_3", "reverse", "topic_4", "modsum_10", "sort", "facts_200", "lego_3"),
    "made_cl5": tuple(_CL5.values()),
    "made15": tuple(task for family in _FIFTEEN for task in family),
    "made_trace": ("topic_4", "modsum_10", "reverse", "copy", "lego_3", "shift_3", "facts_200", "sort"),
}
_BLOCKED = tuple(range(15))
CL5_ORDERS: dict[str, tuple[str, ...]] = {
    "pp4": ("ag", "yelp", "amazon", "yahoo", "dbpedia"),
    "pp5": ("yelp", "yahoo", "amazon", "dbpedia", "ag"),
    "pp6": ("dbpedia", "yahoo", "ag", "amazon", "yelp"),
    "slm7": ("yelp", "ag", "dbpedia", "amazon", "yahoo"),
    "o1": ("dbpedia", "amazon", "yahoo", "ag"),
    "o2": ("dbpedia", "amazon", "ag", "yahoo"),
    "o3": ("yahoo", "amazon", "ag", "dbpedia"),
}
ORDERS: dict[str, dict[str, tuple[int, ...]]] = {
    "made_cl5": {name: tuple(list(_CL5).index(one) for one in order) for name, order in CL5_ORDERS.items()},
    "made15": {"blocked": _BLOCKED, "interleaved": tuple(3 * f + n for n in range(3) for f in range(5))},
}


def text_tasks(
    *,
    name: str,
    tasks: str | Sequence[str] = "made8",
    order: str | None = None,
    level: Level = "L1",
    stages: Sequence[int] | None = None,
    old_share: float = 0.0,
    target: Sequence[str] = (),
    target_lines: int = 20,
    lines: int = 1000,
    test_lines: int = 200,
    seed: int = 0,
    discloses_task: bool = True,
    gap: float | None = 0.3,
    budget: Mapping[str, Any] | None = None,
) -> TextScenario:
    """Made tasks one after another.

    tasks       the name of a stream, or a list of tasks
    order       the name of an order of that stream; `random` (of `seed`) for any; None: as the tasks are listed
    level       how much they are in each other's way: L0 to L3, see `made_tasks`
    stages      how many tasks each experience has; None: one. Where one has several, no task is disclosed
    old_share   share of the training lines of each earlier task that stand among a later experience's, drawn once: the k of DMT
    target      tasks of the stream of which further lines, `target_lines` of each, are handed out as a target of selection
    lines       training lines of each task
    test_lines  lines of each task that are asked, of `facts` at most all facts
    seed        of the lines; tasks themselves do not depend on it
    gap         nats a byte of old text that the decoder may be worse than its source, else it is refused; None: any may run
    """
    for key, value in (("lines", lines), ("test_lines", test_lines), ("target_lines", target_lines)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"scenario.{key} must be a whole number from 1, got {value!r}")
    if gap is not None and (isinstance(gap, bool) or not isinstance(gap, int | float) or gap <= 0):
        raise UserError(f"scenario.gap must be a number above 0 or null, got {gap!r}")
    if isinstance(old_share, bool) or not isinstance(old_share, int | float) or not 0 <= old_share <= 1:
        raise UserError(f"scenario.old_share must be from 0 to 1, got {old_share!r}")
    chosen = _chosen(tasks, order, seed)
    parts = [made_tasks.lines(chosen, level, split, n, seed) for split, n in (("train", lines), ("test", test_lines))]
    made = [Task(task.name, train, test) for task, train, test in zip(chosen, *parts, strict=True)]
    further = made_tasks.lines(chosen, level, "target", target_lines, seed) if target else []
    wanted = [(i, further[i]) for i in _numbers(target, made)]
    old = base_text.old_text(OLD_ROWS, OLD_LENGTH, rng.key("text_tasks", "old"))
    floor = base_text.old_floor(old)
    options: dict[str, Any] = {"vocab": made_tasks.VOCAB, "discloses_task": discloses_task, "budget": budget}
    stream = tasks if isinstance(tasks, str) else "made"
    options |= {"target": wanted, "stages": stages, "old_share": old_share}
    return scenario(name, f"{stream} {level}", made, old=old, floor=floor, gap=gap, **options)


def _numbers(target: Sequence[str], tasks: Sequence[Task]) -> list[int]:
    """The places of the target's tasks; `UserError` for one that the stream does not have."""
    names = [task.name for task in tasks]
    if isinstance(target, str) or set(target) - set(names):
        raise UserError(f"scenario.target must be a list of tasks of the stream ({', '.join(names)}), got {target!r}")
    return [names.index(one) for one in dict.fromkeys(target)]


def _chosen(tasks: str | Sequence[str], order: str | None, seed: int) -> list[MadeTask]:
    """The tasks in the order in which they come."""
    if isinstance(tasks, str) and tasks not in STREAMS:
        raise UserError(
            f"unknown scenario.tasks={tasks}{suggestion(tasks, STREAMS)}: choose {', '.join(STREAMS)} or write a list of tasks"
        )
    listed = STREAMS[tasks] if isinstance(tasks, str) else tuple(tasks)
    if not listed:
        raise UserError("scenario.tasks is empty")
    found = [made_tasks.parse(one) for one in listed]
    known = ORDERS.get(tasks, {}) if isinstance(tasks, str) else {}
    if order is None:
        return found
    if order == "random":
        places: Sequence[int] | np.ndarray = rng.permutation(rng.key("text_tasks", "order", seed), len(found))
    elif order in known:
        places = known[order]
    else:
        raise UserError(f"unknown scenario.order={order} of these tasks: choose {', '.join([*known, 'random'])} or null")
    return [found[i] for i in places]
