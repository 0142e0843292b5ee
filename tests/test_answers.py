"""What the page answers: ranks with ties, pairs, class orders, win rates, changes, each against a naive version."""

import types

import numpy as np
import pytest
from scipy import stats

from clbench.interfaces import UserError
from clbench.report import answers, statistics
from clbench.report.board import Group


def group(learner, values, stream="s1", scenario="x", family="f", marks="", vs=None, legacy=False):
    """A row with a run for each seed of {seed: last_macro}."""
    runs = [
        types.SimpleNamespace(
            seed=seed, values={"last_macro": v}, usable=True, scenario=scenario, stream=stream, learner=learner, model="m",
            family=family, legacy=legacy,
        )
        for seed, v in values.items()
    ]  # fmt: skip
    mean = float(np.mean(list(values.values()))) if values else None
    row = {"learner": learner, "model": "m", "variant": learner, "scenario": scenario, "manifest": stream, "marks": marks}
    return Group(row | {"last_macro_mean": mean, "vs_best": vs, "n_seeds": len(values)}, runs)


def noisy(mean, seeds, rng):
    return {s: mean + float(v) for s, v in zip(range(seeds), rng.normal(0, 0.01, seeds), strict=True)}


def test_t_intervals_are_those_of_scipy():
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=n).tolist() for n in (2, 5, 5, 9)]
    for row, found in zip(rows, statistics.t_intervals(rows), strict=True):
        assert found == pytest.approx(tuple(stats.ttest_1samp(row, 0).confidence_interval()))
    assert statistics.t_intervals([[1.0], [], [2.0, 2.0]]) == [None, None, None]


def test_pairs_hold_difference_interval_and_p():
    rng = np.random.default_rng(1)
    a, b, c = noisy(0.5, 5, rng), noisy(0.52, 6, rng), {9: 0.1}
    made = answers.pairs([group("a", a), group("b", b), group("c", c), group("d", a, "s2")], 10)
    assert [(one.first, one.second) for one in made] == [(1, 0)]  # better rows first; c shares no seed, d no stream
    test = stats.ttest_rel([a[s] for s in range(5)], [b[s] for s in range(5)])
    assert made[0].seeds == 5 and made[0].p == pytest.approx(test.pvalue)
    assert (made[0].low, made[0].high) == pytest.approx(tuple(test.confidence_interval()))
    assert answers.pairs([group("a", a), group("b", b)], 0) == []


def test_ranks_against_a_naive_version():
    rng = np.random.default_rng(2)
    means = (0.9, 0.895, 0.7, 0.69, 0.3)
    groups = [group(f"l{i}", noisy(m, 5, rng)) for i, m in enumerate(means)]
    groups += [group("joint", noisy(0.99, 5, rng), marks="reference"), group("old", noisy(0.99, 5, rng), legacy=True)]
    fair = [[run.values["last_macro"] for run in g.runs] for g in groups[:5]]
    better = np.zeros((5, 5), bool)
    for y in range(5):
        others = [x for x in range(5) if x != y]
        ps = [stats.ttest_rel(fair[y], fair[x]).pvalue for x in others]
        order = np.argsort(ps)
        adjusted = np.maximum.accumulate([min(1, (4 - k) * ps[i]) for k, i in enumerate(order)])
        for p, i in zip(adjusted, order, strict=True):
            better[y, others[i]] = p < 0.05 and np.mean(fair[y]) > np.mean(fair[others[i]])
    wanted = [(1 + int(better[:, x].sum()), 5 - int(better[x].sum())) for x in range(5)]
    assert answers.ranks(groups) == [*wanted, None, None]
    assert wanted[0] == (1, 2) and wanted[4] == (5, 5)


def test_rows_that_share_no_seeds_are_not_ranked_apart():
    groups = [group("a", {0: 0.9, 1: 0.91}), group("b", {2: 0.1, 3: 0.11}), group("c", {0: 0.5})]
    assert answers.ranks(groups) == [(1, 3)] * 3


def test_shared_with_best():
    groups = [group("a", {0: 0.9, 1: 0.8}, vs="best"), group("b", {1: 0.5, 2: 0.5}, vs="too few seeds"), group("c", {0: 0.1})]
    assert answers.shared_with_best(groups) == [None, 1, None]


def test_orders_find_the_worst_one():
    one = [group("a", {0: 0.9, 1: 0.92}, "s1"), group("a", {0: 0.7, 1: 0.8}, "s2"), group("a", {0: 0.8}, "s3")]
    found = answers.orders([*one, group("a", {0: 0.1}, "s4", family="other"), group("b", {0: 0.2}, "s1")])
    assert found[0] == found[1] == found[2] and found[3] is None and found[4] is None
    means = [0.91, 0.75, 0.8]
    low, high = stats.ttest_1samp(means, 0).confidence_interval()
    known = found[0]
    assert (known["orders"], known["worst_order"]) == (3, "s2") and known["mean"] == pytest.approx(np.mean(means))
    assert (known["low"], known["high"], known["worst"]) == pytest.approx((low, high, 0.75))
    assert (known["worst_low"], known["worst_high"]) == pytest.approx(statistics.bootstrap([[0.7, 0.8]]))


def test_win_rates_weigh_streams_alike():
    groups = [
        *(group(name, {0: v}, "s1") for name, v in (("a", 0.9), ("b", 0.5), ("c", 0.5))),
        *(group(name, {0: v}, "s2") for name, v in (("a", 0.1), ("b", 0.5))),
        group("a", {0: 0.7}, "s1", family="g"),  # a second row of a on s1: its mean counts, 0.8
        group("joint", {0: 1.0}, "s1", marks="reference"),
        group("c", {0: 0.5}, "s3"),  # nobody to win against
    ]
    made = {one["learner"]: one for one in answers.win_rates(groups)}
    assert made.keys() == {"a", "b"} and made["a"]["rate"] == 0.5 and made["b"]["rate"] == pytest.approx((0.25 + 1) / 2)
    assert (made["b"]["lowest"], made["b"]["highest"], made["b"]["streams"]) == (0.25, 1.0, 2)


def test_changes_since_an_earlier_table(tmp_path):
    head = "scenario,learner,model,variant,manifest,n_seeds,last_macro_mean\n"
    old = {"same": "2,0.5000", "moved": "2,0.4", "gone": "1,0.3", "more": "1,0.5", "none": "0,"}
    rows = "".join(f"x,{name},m,{name},s1,{numbers}\n" for name, numbers in old.items())
    (tmp_path / "leaderboard.csv").write_text(head + rows)
    now = [
        group("same", {0: 0.4, 1: 0.60004}),
        group("moved", {0: 0.5, 1: 0.5}),
        group("more", {0: 0.5, 1: 0.5}),
        group("=new", {0: 1}),
    ]
    for since in (tmp_path, tmp_path / "leaderboard.csv"):
        found = {one["learner"]: one["what"] for one in answers.changes(now, since)}
        assert found == {"moved": "moved", "gone": "gone", "more": "seeds", "'=new": "new"}
    with pytest.raises(UserError, match="cannot read"):
        answers.changes(now, tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"no leaderboard\.csv"):
        answers.changes(now, tmp_path / "other.csv")
