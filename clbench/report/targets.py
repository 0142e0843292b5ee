"""`clbench report targets`: seven findings on continual pre-training that any implementation should show, on the runs at hand.

They are qualitative, of models 1,000 times the size: (d) and (e) Gupta et al. 2023 (arXiv 2308.04014), the others Ibrahim et
al. 2024 (arXiv 2403.08763). One that does not hold is no error of a run; it is worth a sentence. Everything is paired by
seed: a difference is taken between runs that differ in one setting only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clbench.records import record
from clbench.report import statistics
from clbench.report.formats import Table, fraction, plain
from clbench.report.runs import Run

CLOSE = 0.02  # nats per token: what the sources' tables call about equal
SHIFTS = (("cpt_text_strong", "cpt_text_weak"), ("cpt_ibrahim_strong", "cpt_ibrahim_weak"))
COLUMNS = ("target", "compared", "where", "seeds", "value", "95 %", "wanted", "verdict")
REPLAY, RATE, WARMUP, SHIFT = "learner.replay.share", "learner.lr", "learner.schedule.warmup", "scenario.shift"
_CODE = ("numbers_version", "weights", "plug-in")


@dataclass(frozen=True)
class Found:
    """One comparison: values by seed, and the range in which their mean is wanted."""

    compared: str
    where: str
    values: Sequence[float]
    low: float | None = None
    high: float | None = None


TARGETS: dict[str, str] = {
    "a": "a strong shift forgets more than a weak one",
    "b": "1 % of replay takes back over half of what joint training would",
    "c": "5 % of replay costs the newest domain at most 0.01 nats",
    "d": f"the length of the warm-up does not matter in the end (within {CLOSE} nats)",
    "e": "a higher peak rate forgets more, and learns the newest domain better",
    "f": "re-warming raises the loss even where the text stays the same",
    "g": f"where nothing shifts, schedules end alike (within {CLOSE} nats)",
}


def table(runs: Sequence[Run]) -> Table:
    """A line for each comparison that the runs allow, and one for each target that they say nothing of."""
    known = [run for run in runs if run.loss is not None and run.usable and not run.legacy]
    rows: list[dict[str, Any]] = []
    for letter, about in TARGETS.items():
        compared = sorted(_MAKERS[letter](known), key=lambda found: found.where)
        made = [_line(letter, about, found) for found in compared]
        rows += made or [{"target": f"({letter}) {about}", "verdict": f"no runs to tell: {_NEEDS[letter]}"}]
    notes = ("holds, fails: the 95 % bootstrap interval over seeds lies on one side; not shown: it does not; 1 seed has none",)
    return Table("targets", "seven findings of continual pre-training", COLUMNS, rows, notes)


def _line(letter: str, about: str, found: Found) -> dict[str, Any]:
    mean, _ = statistics.mean_std(found.values)
    interval = statistics.bootstrap([found.values])
    ends = interval or (mean, mean)
    limits = ((">", found.low), ("<=", found.high))
    wanted = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)
    known = {"target": f"({letter}) {about}", "compared": found.compared, "where": found.where, "seeds": len(found.values)}
    text = "" if interval is None else " .. ".join(map(fraction, interval))
    verdict = judged(found, *ends) + ("" if interval else " (1 seed)")
    return known | {"value": mean, "95 %": text, "wanted": wanted, "verdict": verdict}


def judged(found: Found, low: float | None, high: float | None) -> str:
    """Whether an interval lies in the wanted range, outside it, or neither."""
    assert low is not None and high is not None
    least = float("-inf") if found.low is None else found.low
    most = float("inf") if found.high is None else found.high
    if low > least and high <= most:
        return "holds"
    return "fails" if high <= least or low > most else "not shown"


def pairs(runs: Sequence[Run], key: str, same_stream: bool = True) -> Iterator[tuple[Run, dict[Any, dict[int, Run]]]]:
    """Runs that differ in setting `key` alone -> (one of them, value -> seed -> run), with two values at least."""
    groups: dict[str, dict[Any, dict[int, Run]]] = {}
    first: dict[str, Run] = {}
    for run in runs:
        if key in run.settings:
            rest = {name: value for name, value in run.settings.items() if name != key}
            name = record.digest([rest, run.scenario, run.learner, run.model, run.stream if same_stream else ""])
            groups.setdefault(name, {}).setdefault(run.settings[key], {})[run.seed] = run
            first.setdefault(name, run)
    for name, held in groups.items():
        if len(held) > 1:
            yield first[name], held


def differences(more: Mapping[int, Run], less: Mapping[int, Run], metric: str) -> list[float]:
    """Of a number, by shared seed: `more` - `less`."""
    seeds = sorted(s for s in more.keys() & less.keys() if metric in more[s].values and metric in less[s].values)
    return [more[s].values[metric] - less[s].values[metric] for s in seeds]


def _where(run: Run) -> str:
    return plain(f"{run.scenario}, {run.learner}")


def _shift(runs: Sequence[Run]) -> Iterator[Found]:
    known = [run for run in runs if run.settings.get(REPLAY) == 0 and "reference" not in run.marks]
    bare = [run for run in known if not run.loss["iid"]]  # type: ignore[index]
    for run, held in pairs(bare, SHIFT, same_stream=False):
        low, high = min(held), max(held)
        found = differences(held[high], held[low], "forgetting_after")
        if found:
            yield Found(f"forgetting, shift {high:g} - {low:g}", _where(run), found, low=0)
    for strong, weak in SHIFTS:
        sides: dict[str, dict[str, dict[int, Run]]] = {strong: {}, weak: {}}
        for run in bare:
            if run.scenario in sides:
                rest = {k: v for k, v in run.settings.items() if not k.startswith("scenario.") and k not in _CODE}
                sides[run.scenario].setdefault(record.digest([rest, run.learner, run.model]), {})[run.seed] = run
        for name in sorted(sides[strong].keys() & sides[weak].keys()):
            found = differences(sides[strong][name], sides[weak][name], "forgetting_after")
            if found:
                one = next(iter(sides[strong][name].values()))
                yield Found(f"forgetting, {strong} - {weak}", plain(one.learner), found, low=0)


def _recovery(runs: Sequence[Run]) -> Iterator[Found]:
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        if run.settings.get(REPLAY) == 0.01 and "recovery_ratio" in run.values:
            groups.setdefault((run.scenario, run.learner, run.variant), []).append(run)
    for held in groups.values():
        yield Found("recovery ratio", _where(held[0]), [run.values["recovery_ratio"] for run in held], low=0.5)


def _cost(runs: Sequence[Run]) -> Iterator[Found]:
    for run, held in pairs(runs, REPLAY):
        if 0.05 in held and 0 in held and not run.loss["iid"]:  # type: ignore[index]
            found = differences(held[0.05], held[0], "newest_loss")
            if found:
                yield Found("newest loss, 5 % - 0 % replay", _where(run), found, high=0.01)


def _warmup(runs: Sequence[Run]) -> Iterator[Found]:
    for run, held in pairs(runs, WARMUP):
        low, high = min(held), max(held)
        found = [abs(d) for d in differences(held[high], held[low], "final_loss")]
        if found:
            yield Found(f"|final loss|, warm-up {high:g} - {low:g}", _where(run), found, high=CLOSE)


def _rate(runs: Sequence[Run]) -> Iterator[Found]:
    for run, held in pairs(runs, RATE):
        low, high = min(held), max(held)
        for metric, words, sign in (("forgetting_after", "forgetting", 1), ("newest_loss", "fall of newest loss", -1)):
            found = [sign * d for d in differences(held[high], held[low], metric)]
            if found:
                yield Found(f"{words}, rate {high:g} - {low:g}", _where(run), found, low=0)


def _bump(runs: Sequence[Run]) -> Iterator[Found]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.loss["iid"] and run.settings.get(REPLAY) == 0 and run.learner == "rewarm_replay":  # type: ignore[index]
            groups.setdefault(run.variant, []).append(run)
    for held in groups.values():
        values = [run.loss["rise"] for run in held if run.loss["rise"] == run.loss["rise"]]  # type: ignore[index]
        if values:
            yield Found("rise at the second experience", _where(held[0]), values, low=0)


def _alike(runs: Sequence[Run]) -> Iterator[Found]:
    groups: dict[tuple[str, str, str], dict[str, dict[int, Run]]] = {}
    for run in runs:
        scheduled = run.loss["iid"] and run.settings.get(REPLAY) == 0 and "reference" not in run.marks  # type: ignore[index]
        if scheduled and run.learner in ("rewarm_replay", "infinite", "wsd_branch", "constant_lr"):
            groups.setdefault((run.scenario, run.stream, run.model), {}).setdefault(run.learner, {})[run.seed] = run
    for held in groups.values():
        base = held.get("rewarm_replay", {})
        for name, other in sorted(held.items()):
            found = [abs(d) for d in differences(other, base, "final_loss")] if name != "rewarm_replay" else []
            if found:
                where = next(iter(base.values())).scenario
                yield Found(f"|final loss|, {name} - rewarm_replay", plain(where), found, high=CLOSE)


_MAKERS: dict[str, Callable[[Sequence[Run]], Iterator[Found]]] = {
    **{"a": _shift, "b": _recovery, "c": _cost, "d": _warmup, "e": _rate, "f": _bump, "g": _alike},
}
_NEEDS = {
    "a": "no replay on cpt_text_strong and cpt_text_weak, or on two values of scenario.shift",
    "b": "replay 0 and 1 %, and joint_union",
    "c": "replay 0 and 5 %",
    "d": "two values of learner.schedule.warmup (sweep=cpt_synthetic_rates)",
    "e": "two values of learner.lr (sweep=cpt_synthetic_rates)",
    "f": "rewarm_replay without replay on cpt_iid (sweep=cpt_iid)",
    "g": "sweep=cpt_iid",
}
