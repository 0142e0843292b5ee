"""Numbers of figures over their dimensions, as nested lists: small in the page, and unfolded to tidy rows where they are drawn.

The page unfolds them by the same rule (`unfold` in its script).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clbench.evaluation import metrics
from clbench.report.figures.data import Course, Line, Sets, Trace, forgotten_of, mean_over

# Of each figure of one row its dimensions from the outermost: (name, where its values come from). `sets` and `seeds` are those
# of the row, `from 0` and `from 1` count, "" has no values of its own.
OVER: dict[str, tuple[tuple[str, str], ...]] = {
    "matrix": (("after", "from 1"), ("set", "sets")),
    "curve": (("seed", "seeds"), ("after", "from 1")),
    "forgotten": (("seed", "seeds"), ("set", "sets")),
    "seconds": (("phase", "phases"),),
    "loss": (("seed", "seeds"), ("", "")),
    "stability": (("evaluation", "from 1"), ("set", "sets")),
    "losses": (("seed", "seeds"), ("", ""), ("set", "sets")),
    "loss_matrix": (("after", "from 0"), ("set", "sets")),
    "gaps": (("experience", "from 1"), ("", "")),
}
PHASES = ("optimisation", "features and statistics", "other learning", "evaluation", "set-up and other")
Values = dict[str, Any]


def unfold(kind: str, values: Mapping[str, Any], **names: Sequence[Any]) -> list[dict[str, Any]]:
    """Tidy rows of the nested values of a figure; `names` gives the dimensions their values (`sets`, `seeds`)."""
    return list(_unfold(OVER[kind], dict(values), {}, {"phases": PHASES, **names}))


def _unfold(
    over: Sequence[tuple[str, str]], values: dict[str, Any], known: dict[str, Any], names: Mapping[str, Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    if not over:
        yield known | values
        return
    (name, source), *rest = over
    for i in range(max(len(v) for v in values.values() if isinstance(v, list))):
        own = names[source][i] if source in names else i + (source == "from 1")
        inner = {key: v[i] if isinstance(v, list) else v for key, v in values.items()}
        yield from _unfold(rest, inner, known | ({name: own} if name else {}), names)


def plain(values: Any, digits: int = 5) -> Any:
    """An array as nested lists of numbers of so many digits; what is not finite is None."""
    made = np.asarray(values, np.float64)
    return _plain(made.tolist(), digits)


def _plain(value: Any, digits: int) -> Any:
    if isinstance(value, list):
        return [_plain(v, digits) for v in value]
    if not math.isfinite(value) or abs(value) > 1e300:
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def percent(values: Any) -> Any:
    """Fractions as nested lists of per cent with two decimals."""
    return plain(np.round(100 * np.asarray(values, np.float64), 2), 9)


def matrix(matrices: Sequence[np.ndarray]) -> Values:
    """Mean over runs of accuracies [T, E]."""
    return {"accuracy": percent(mean_over(np.stack(matrices)))}


def curve(matrices: Sequence[np.ndarray], first: Any) -> Values:
    """Mean over the sets seen after each experience [T], for each run."""
    return {"accuracy": percent([metrics.macro(a, np.asarray(first)) for a in matrices])}


def forgotten(matrices: Sequence[np.ndarray], first: Any) -> Values:
    """Points lost on each set since the best, for each run."""
    return {"lost": percent([forgotten_of(a, np.asarray(first)) for a in matrices])}


def seconds(row: Mapping[str, Any]) -> Values | None:
    """Where the seconds of a row went, in the order of `PHASES`; None without any."""
    fit, extract, learn, evaluate = (row[f"seconds_{name}_mean"] or 0.0 for name in ("fit", "extract", "learn", "evaluate"))
    total = row["seconds_mean"] or 0.0
    rest = max(0.0, learn - fit - extract)
    other = max(0.0, total - max(learn, fit + extract) - evaluate)
    made = [fit, extract, rest, evaluate, other]
    return {"seconds": plain(made, 4)} if sum(made) > 0 else None


def losses(courses: Sequence[Course]) -> Values:
    """Looks of runs that looked at the same steps: tokens, rates and losses on every set."""
    return {
        "tokens": [plain(c.tokens, 9) for c in courses],
        "experience": [plain(c.experience) for c in courses],
        "lr": [plain(c.lr) for c in courses],
        "loss": [plain(c.loss) for c in courses],
    }


def rises(courses: Sequence[Course], first: np.ndarray) -> tuple[Values, int] | None:
    """Rise of the loss on old sets over the steps of each later experience, mean over runs and sets; and the first of these.

    None without any old set.
    """
    steps, rise, start = [], [], 0
    for k in sorted(set(courses[0].experience.astype(int).tolist())):
        old = [j for j, own in enumerate(first) if own < k]
        at = np.flatnonzero(courses[0].experience == k)
        if old:
            start = start or k
            steps.append(plain(courses[0].step[at]))
            rise.append(plain(np.mean([(c.loss[at][:, old] - c.loss[at[0], old]).mean(1) for c in courses], axis=0)))
    return ({"step": steps, "rise": rise}, start) if steps else None


def labelled(rows: Sequence[Mapping[str, Any]], label: str) -> list[dict[str, Any]]:
    """Rows with the name of what they belong to."""
    return [{"label": label, **row} for row in rows]


def over_experiences(line: Line) -> list[dict[str, Any]]:
    """Tidy rows of the accuracy of a line over experiences: seed, after, accuracy."""
    return unfold("curve", curve([t.matrix for t in line.traces], _sets(line).first_seen), seeds=_seeds(line.traces))


def _sets(line: Line) -> Sets:
    return line.traces[0].sets


def _seeds(traces: Sequence[Trace]) -> list[int]:
    return [trace.run.seed for trace in traces]
