"""`clbench orders`: numbers by hand, the orders that are chosen, and the real command."""

import csv
import json

import numpy as np
import pytest

from clbench.config import compose
from clbench.interfaces import UserError
from clbench.studies import orders as order_study


def test_numbers_of_a_learner_by_hand():
    values = {"0 1 2": [0.4, 0.6], "0 2 1": [0.7, 0.9], "1 0 2": [0.2, 0.2], "2 1 0": [0.3, 0.5]}
    scores = {"0 1 2": 3.0, "0 2 1": 4.0, "1 0 2": 1.0, "2 1 0": 2.0}
    found = order_study.of_learner(values, scores)
    assert found["mean"] == pytest.approx(0.475) and found["range"] == pytest.approx(0.6)
    assert found["std_orders"] == pytest.approx(np.std([0.5, 0.8, 0.2, 0.4], ddof=1))
    assert found["std_seeds"] == pytest.approx(np.mean([0.02**0.5, 0.02**0.5, 0, 0.02**0.5]))
    assert (found["best"]["order"], found["worst"]["order"]) == ("0 2 1", "1 0 2")
    assert found["rank_correlation"]["rho"] == pytest.approx(1.0) and found["top_quarter"] == 1.0
    turned = order_study.of_learner(values, scores, lower=True)
    assert turned["rank_correlation"]["rho"] == pytest.approx(-1.0) and turned["best"]["order"] == "1 0 2"
    assert turned["top_quarter"] == 0.0
    one = order_study.of_learner({"0 1": [0.5]}, {"0 1": 1.0})
    assert one["std_orders"] is one["std_seeds"] is one["rank_correlation"] is None


def test_agreement_by_hand():
    assert order_study.kendall_w(np.array([[1, 2, 3], [4, 5, 9]])) == pytest.approx(1.0)
    assert order_study.kendall_w(np.array([[1, 2, 3], [3, 2, 1]])) == pytest.approx(0.0)
    # three judges, ranks (1 2 3), (1 3 2), (2 1 3): totals 4, 6, 8, S = 8, W = 12 * 8 / (9 * 24)
    assert order_study.kendall_w(np.array([[1, 2, 3], [1, 3, 2], [2, 1, 3]])) == pytest.approx(96 / 216)
    assert order_study.kendall_w(np.ones((2, 3))) is None


def stream(*words):
    return compose.build(compose.compose(["scenario.limit_train=4", "scenario.limit_test=2", *words])[0]["scenario"])


def test_orders_that_are_chosen():
    three = stream("scenario.num_classes=6")
    every = order_study.chosen(three, "all", 0)
    assert len({o.places for o in every}) == 6 == len(order_study.chosen(three, "100", 0))
    assert (every[0].places, every[0].name) == ((0, 1, 2), "natural")
    five = stream()
    some = order_study.chosen(five, "12", 3)
    assert [o.name for o in some[:3]] == ["natural", "designer_best", "designer_worst"] and len({o.places for o in some}) == 12
    assert some == order_study.chosen(five, "12", 3) != order_study.chosen(five, "12", 4)
    best, worst = some[1].score, some[2].score
    everything = order_study.chosen(five, "all", 0)
    assert best == max(o.score for o in everything) and worst == min(o.score for o in everything)


@pytest.mark.parametrize("number", ["1", "0", "-3", "some", "2.5"])
def test_a_wrong_number_is_one_line(number):
    with pytest.raises(UserError, match="--orders must be all, or a whole number from 2"):
        order_study.chosen(stream(), number, 0)


def test_too_many_and_too_few_orders():
    with pytest.raises(UserError, match="10 experiences, 3628800 orders: name a number"):
        order_study.chosen(stream("scenario.increment=1"), "all", 0)
    with pytest.raises(UserError, match="one order"):
        order_study.chosen(stream("scenario.num_classes=2"), "4", 0)


def test_the_command(clbench, small):
    words = ("orders", "learner=ncm", *small, "num_threads=1", "--orders", "all")
    first = clbench(*words)
    assert "Curriculum Designer" in first.stdout and "order 1,0" in first.stdout
    (file,) = (clbench.folder / "results" / "orders").glob("*.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["order"] for row in rows] == ["0 1", "1 0"]
    records = {one["run_id"]: one for one in clbench.records()}
    assert {row["run"] for row in rows} == set(records)
    operators = [records[row["run"]]["config"]["scenario"].get("operators", []) for row in rows]
    assert operators == [[], [{"order": {"of": "experiences", "by": [1, 0]}}]]
    made = json.loads(file.with_suffix(".json").read_text())
    assert made["learners"]["ncm"]["range"] == pytest.approx(abs(float(rows[0]["value"]) - float(rows[1]["value"])))
    again = clbench(*words)
    assert again.stdout == first.stdout and len(clbench.records()) == 2
    assert "no metric 'last_macr'" in clbench("orders", "--metric", "last_macr", code=2).stderr
    assert "takes one scenario" in clbench("orders", "scenario.increment=1,2", *small, code=2).stderr
    assert "streams of images" in clbench("orders", "scenario=text_tasks", "learner=text_finetune", code=2).stderr
