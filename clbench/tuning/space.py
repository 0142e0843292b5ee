"""What a study may choose from, and who proposes the next trial.

The grammar is that of Hydra's sweeps: `interval(a,b)`, `int(interval(a,b))`, `tag(log,interval(a,b))`, `choice(...)`,
`range(...)`, `glob(...)` and comma lists. The proposals come from optuna directly and not from Hydra's optuna sweeper: that
one is pinned to optuna below 3 (2021), hands a trial's value to optuna as whatever a job returns, and knows neither seeds per
trial nor a second stream on which the choice is evaluated. The grid needs no library.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from clbench.config.signatures import nearest
from clbench.interfaces import UserError

FUNCTIONS = ("bool", "choice", "float", "glob", "int", "interval", "range", "shuffle", "sort", "str", "tag")
SAMPLERS = ("tpe", "random", "grid")
TAGS = ("log", "int")
GROUPS = ("learner", "model", "schedule", "pet", "precision")


@dataclass(frozen=True)
class Variable:
    """One key: its values as words, or an interval of numbers (`whole`: of whole ones; `log`: even in the logarithm)."""

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def about(self) -> str:
        """The range in words, for records."""
        if self.values:
            return ",".join(self.values)
        ends = f"interval({self.number(self.low)},{self.number(self.high)})"
        ends = f"int({ends})" if self.whole else ends
        return f"tag(log,{ends})" if self.log else ends

    def number(self, value: float) -> str:
        """A value of the interval as a word: four digits, never outside."""
        if self.whole:
            return str(round(value))
        return f"{min(self.high, max(self.low, float(f'{value:.4g}'))):.12g}"

    def ends(self) -> tuple[str, ...]:
        """Words that stand for all in a check before the first trial."""
        inner = self.low + 0.38197 * (self.high - self.low)  # no whole number
        return self.values or (self.number(self.low), self.number(inner), self.number(self.high))


def check_functions(words: Sequence[str]) -> None:
    """Raise `UserError` with the nearest name for a function that the grammar does not have."""
    for word in words:
        value = re.sub(r"'[^']*'|\"[^\"]*\"", "", word.partition("=")[2])
        for name in re.findall(r"([A-Za-z_]\w*)\s*\(", value):
            if name not in FUNCTIONS:
                raise UserError(f"{word}: no function '{name}'{nearest(name, FUNCTIONS)} (one of: {', '.join(FUNCTIONS)})")


def variables(spaces: Mapping[str, Any]) -> tuple[Variable, ...]:
    """What `config.searched` found -> variables in the order of their keys. `UserError` for what cannot be tuned."""
    made = []
    for key, space in sorted(spaces.items()):
        name = key.lstrip("+")
        if name.split(".")[0] not in GROUPS:
            why = "is the stream's, not the method's" if name.startswith("scenario") else "does not belong to the method"
            raise UserError(f"{key} {why}: what can be tuned begins with {', '.join(GROUPS)}")
        made.append(_interval(key, space) if isinstance(space, Mapping) else _listed(key, space))
    if not made:
        raise UserError(
            "nothing to tune: give at least one range, such as 'learner.lr=tag(log,interval(0.001,0.1))', or tune.space="
        )
    return tuple(made)


def _listed(key: str, values: Sequence[str]) -> Variable:
    values = tuple(dict.fromkeys(values))
    if not values:
        raise UserError(f"{key} has nothing to choose from")
    return Variable(key, values)


def _interval(key: str, space: Mapping[str, Any]) -> Variable:
    low, high, tags = space["start"], space["end"], space["tags"]
    for tag in sorted(tags):
        if tag not in TAGS:
            raise UserError(f"{key}: no tag '{tag}'{nearest(tag, TAGS)} (one of: {', '.join(TAGS)})")
    whole = "int" in tags or (type(low) is int and type(high) is int)
    if low is None or high is None or not all(math.isfinite(v) for v in (low, high)) or low >= high:
        raise UserError(f"{key}: interval({low},{high}) must go from a smaller to a larger number")
    if "log" in tags and low <= 0:
        raise UserError(f"{key}: a logarithmic interval must begin above 0, not at {low}")
    return Variable(key, (), float(low), float(high), "log" in tags, whole)


class Search(Protocol):
    """Proposes choices one after another; is told how each did before it proposes the next."""

    def ask(self) -> dict[str, str]:
        """Key -> word."""
        ...

    def tell(self, value: float | None) -> None:
        """The value of the last proposal; None if it failed."""
        ...


def size(space: Sequence[Variable]) -> int | None:
    """How many different choices there are; None with an interval of numbers."""
    return math.prod(len(v.values) for v in space) if all(v.values for v in space) else None


def begin(sampler: str, space: Sequence[Variable], seed: int, trials: int, lower: bool) -> Search:
    """A search: the same arguments and the same values told give the same proposals. `lower`: smaller values are better."""
    if sampler == "grid":
        return _Grid(space)
    return _Optuna(sampler, space, seed, trials, lower)


class _Grid:
    """Every combination, the last key fastest."""

    def __init__(self, space: Sequence[Variable]) -> None:
        keys = [v.key for v in space]
        words = itertools.product(*(v.values for v in space))
        self.points: Iterator[dict[str, str]] = (dict(zip(keys, point, strict=True)) for point in words)

    def ask(self) -> dict[str, str]:
        """The next combination."""
        return next(self.points)

    def tell(self, value: float | None) -> None:
        """It does not matter."""


class _Optuna:
    """Random, or the tree-structured Parzen estimator after the first trials (a third of them, at least 3, at most 10)."""

    def __init__(self, sampler: str, space: Sequence[Variable], seed: int, trials: int, lower: bool) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        first = min(10, max(3, trials // 3))
        make = {
            "tpe": functools.partial(optuna.samplers.TPESampler, seed=seed, n_startup_trials=first),
            "random": functools.partial(optuna.samplers.RandomSampler, seed=seed),
        }[sampler]
        self.study = optuna.create_study(direction="minimize" if lower else "maximize", sampler=make())
        self.failed = optuna.trial.TrialState.FAIL
        self.space, self.trial = space, None
        self.ranges: dict[str, Any] = {}
        for v in space:
            if v.values:
                self.ranges[v.key] = optuna.distributions.CategoricalDistribution(v.values)
            elif v.whole:
                self.ranges[v.key] = optuna.distributions.IntDistribution(int(v.low), int(v.high), log=v.log)
            else:
                self.ranges[v.key] = optuna.distributions.FloatDistribution(v.low, v.high, log=v.log)

    def ask(self) -> dict[str, str]:
        """What optuna proposes, as words."""
        self.trial = self.study.ask(self.ranges)
        given = self.trial.params
        return {v.key: given[v.key] if v.values else v.number(given[v.key]) for v in self.space}

    def tell(self, value: float | None) -> None:
        assert self.trial is not None
        if value is None:
            self.study.tell(self.trial, state=self.failed)
        else:
            self.study.tell(self.trial, value)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        why = f"tune.sampler=tpe and random need optuna ({error})"
        raise UserError(f"{why}: pip install 'clbench[search]', or tune.sampler=grid") from None
    return optuna
