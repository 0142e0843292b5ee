"""Orders of domains of text: distances and chains by hand, languages on a line, each domain alone, the real command."""

import csv
import json

import numpy as np
import pytest
from test_cpt_train import experiences, learn, learner, weights

from clbench.config import compose
from clbench.interfaces import UserError
from clbench.run.provenance import identity
from clbench.streams.tokens import similarity
from clbench.streams.tokens.languages import synthetic as language
from clbench.streams.tokens.texts import synthetic
from clbench.studies import orders as order_study
from clbench.training.pretraining.data_mixture import Replay

TINY = {"tokens": 2048, "context": 8, "batch": 4, "eval_tokens": 80, "symbols": 8, "states": 8}


def test_distances_by_hand():
    # pairs of the first: 00 twice, 01 once; of the second: 01 twice, 10 once
    first, second = np.array([0, 0, 0, 1]), np.array([0, 1, 0, 1])
    assert similarity.pair_shares(first, 2).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    p, q = np.array([2 / 3, 1 / 3, 0]), np.array([0, 2 / 3, 1 / 3])
    middle = (p + q) / 2

    def kl(a):
        return sum(x * np.log(x / m) for x, m in zip(a, middle, strict=True) if x)

    found = similarity.distances([first, second, first], 2)
    assert found.tolist() == found.T.tolist() and found[0, 0] == found[0, 2] == 0
    assert found[0, 1] == round((kl(p) + kl(q)) / 2 * 1e4)
    apart = similarity.distances([np.zeros(9, int), np.ones(9, int)], 2)
    assert apart[0, 1] == round(np.log(2) * 1e4), "nothing in common: ln 2"
    wide = similarity.distances([np.array([5, 70_000, 5]), np.array([5, 70_000, 5])], 100_000)
    assert wide[0, 1] == 0 and len(similarity.pair_shares(np.array([1, 2]), 1000)) == similarity.BUCKETS


def test_chains_by_hand():
    d = np.array([[0, 3, 1, 2], [3, 0, 5, 4], [1, 5, 0, 9], [2, 4, 9, 0]])
    assert similarity.chain(d, 0, True) == [0, 2, 1, 3] and similarity.chain(d, 1, False) == [0, 1, 2, 3]
    assert similarity.chain(d, 2, True) == [0, 1, 3, 2] and similarity.chain(d, 4, True) == [0, 1, 2, 3]
    scores = similarity.closeness(d, np.array([[0, 2, 1, 3], [0, 1, 2, 3]]))
    assert scores == pytest.approx([-(1 + 5 + 4) / 3 * 1e-4, -(3 + 5 + 9) / 3 * 1e-4])


def test_languages_on_a_line():
    """Exact divergences grow along the line, and so do the distances of their texts; without it others are equally far."""
    made = synthetic(name="s", order=[0, 1, 2, 3], family="line", shift=0.75, **TINY)
    sources = [language(8, 8, "markov", 0.25 * i, min(i, 1), 0) for i in range(4)]
    for source, domain in zip(sources, made.domains, strict=True):
        assert (domain.train[:100] == source.sample(len(domain.train), domain_key(made, domain))[:100]).all()
    for i, source in enumerate(sources):
        away = [source.divergence(other) for other in sources]
        assert away[i] == 0 and away[i:] == sorted(away[i:]) and away[: i + 1] == sorted(away[: i + 1], reverse=True)
    d = similarity.distances([domain.train for domain in made.domains], 8)
    assert d[0].tolist() == sorted(d[0].tolist()) and d[3, 2] < d[3, 1] < d[3, 0]
    assert similarity.chain(d, 1, True) == [0, 1, 2, 3]
    plain = synthetic(name="s", order=[0, 1, 2, 3], shift=0.75, **TINY)
    assert plain.manifest.sha256 != made.manifest.sha256
    with pytest.raises(UserError, match=r"unknown scenario\.family=circle"):
        synthetic(name="s", family="circle", **TINY)
    (job,) = compose.compose(["scenario=cpt_synthetic"])
    assert "family" not in identity(job)["scenario"]


def domain_key(made, domain):
    from clbench.streams import rng

    return rng.key("train", 0, int(domain.name.removeprefix("language_")))


def test_each_domain_alone_from_the_end_of_the_first():
    some = experiences(3)
    alone = learn(learner(start="base", boundary="reset"), some)
    chained = learn(learner(boundary="reset"), [some[0]])
    chained.runtime.begin(2)
    chained.cursor.begin(1, False)
    straight = chained.run(some[2], chained.plan(some[2]))
    assert weights(alone) == weights(chained) and straight["tokens"] > 0, "the second leaves no trace in the third"
    assert weights(alone) != weights(learn(learner(boundary="reset"), some))
    first = learn(learner(start="base", boundary="reset"), some[:1])
    assert weights(first) == weights(learn(learner(boundary="reset"), some[:1]))
    assert [s.start_from for k in range(2) for s in alone.plan(some[k])] == ["init", "base"]
    for wrong in ({"replay": Replay(share=0.3), "boundary": "reset"}, {"boundary": "keep"}):
        with pytest.raises(UserError, match=r"learner\.start=base needs boundary=reset, no replay and no branch"):
            learner(start="base", **wrong)
    with pytest.raises(UserError, match="data=union is joint training"):
        learner(start="base", boundary="reset", data="union")


def test_orders_of_texts():
    made = synthetic(name="s", order=[0, 2, 1, 3], family="line", shift=1.0, **TINY)
    some = order_study.chosen(made, "6", 0, keep=1)
    assert [o.name for o in some[:2]] == ["natural", "near"] and some[1].places == (0, 2, 1, 3)
    assert len({o.places for o in some}) == 6 and all(o.places[0] == 0 for o in some)
    assert some[1].score == max(o.score for o in some)
    assert len(order_study.chosen(made, "all", 0)) == 24
    with pytest.raises(UserError, match="--keep must be from 0 to below"):
        order_study.chosen(made, "6", 0, keep=4)
    with pytest.raises(UserError, match="1 experiences to order, which is one order"):
        order_study.chosen(made, "6", 0, keep=3)
    job = {"scenario": {"order": [0, 2, 1], "tokens": [1, 2, 3]}}
    found = order_study.in_order(job, order_study.Order((1, 0, 2), "", 0.0))
    assert found["scenario"] == {"order": [2, 0, 1], "tokens": [2, 1, 3]} and job["scenario"]["order"] == [0, 2, 1]
    texts = order_study.in_order({"scenario": {"corpora": ["a", "b"], "tokens": 5}}, order_study.Order((1, 0), "", 0.0))
    assert texts["scenario"] == {"corpora": ["b", "a"], "tokens": 5}


SMALL = (
    "scenario=cpt_synthetic",
    "scenario.order=[0,1,2]",
    "scenario.family=line",
    "scenario.tokens=1024",
    "scenario.context=16",
)
SMALL += ("scenario.eval_tokens=256", "scenario.probe_evenly=0", "model.depth=1", "model.width=16", "model.heads=2")


def test_the_command(clbench):
    words = ("orders", "learner=dapt", *SMALL, "num_threads=1", "--orders", "all", "--keep", "1", "--metric", "learned_loss")
    done = clbench(*words)
    assert "nearness of neighbours" in done.stdout and "learned_loss over 2 orders" in done.stdout
    (file,) = (clbench.folder / "results" / "orders").glob("*.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["order"] for row in rows] == ["0 1 2", "0 2 1"]
    values = [float(row["value"]) for row in rows]
    assert values[0] == pytest.approx(values[1], abs=1e-9), "alone, the order changes nothing"
    made = json.loads(file.with_suffix(".json").read_text())
    assert made["metric"] == "learned_loss" and made["learners"]["dapt"]["orders"] == 2
    wrong = clbench("orders", "learner=dapt", *SMALL, "--metric", "last_macro_nope", code=2)
    assert "no metric" in wrong.stderr
