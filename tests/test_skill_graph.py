"""Skill-It's graph: edges by hand, pilots against loops written by hand, the stream of LEGO chains, exact resume, refusals."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from test_cpt_train import Killed, experiences, killed_at, learn, learner

from clbench.config import compose
from clbench.interfaces import UserError
from clbench.learners.skill_it import SkillIt
from clbench.run.runner import DoesNotFit, prepare
from clbench.streams.tokens import lego, questions
from clbench.training.optimizer_state import Adam
from clbench.training.pretraining.skill_graph import JUDGED, Pilots, edges
from clbench.training.state import fingerprint

LEARNED = {"graph": "learned", "pilot": 3, "repeats": 2, "updates": 4, "eta": 0.5}
ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0}


def test_edges_by_hand():
    alone = np.array([[1.0, 2.0], [1.0, 4.0]])
    pairs = np.array([[[9.0, 1.5], [1.1, 9.0]], [[9.0, 3.0], [0.5, 9.0]]])
    # 0 -> 1: gains 0.25 and 0.25; 1 -> 0: worse in the first repeat, so no edge
    assert edges(alone, pairs).tolist() == [[1.0, 0.25], [0.0, 1.0]]


def test_pilots_are_short_trainings_and_leave_the_model_as_it_was():
    one = learner(SkillIt)
    texts = [experience.train for experience in experiences(2)]
    read = []
    options = {"steps": 3, "lr": 1e-2, "adam": ADAM, "key": 7, "check_stop": lambda: None, "read": read.append}
    pilots = Pilots(one.inner.model, texts, **options)
    before = fingerprint(one.inner.model.state_dict())
    found = pilots.loss_after((0, 1), 1, 0)
    assert fingerprint(one.inner.model.state_dict()) == before and read == [3 * 4]
    model = copy.deepcopy(one.inner.model)
    optimizer = Adam(model, **ADAM)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for step in range(3):
        tokens = pilots.batch((0, 1), step, 0)
        assert tokens.shape == (4, 7)
        model.zero_grad()
        model.loss(torch.from_numpy(tokens)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    judged = torch.from_numpy(texts[1].take(np.arange(JUDGED), "judged", np.arange(JUDGED)))
    with torch.no_grad():
        assert found == pytest.approx(float(model.loss(judged).double().mean()), abs=1e-9)


def test_no_pilot_is_trained_on_what_is_judged():
    texts = [experience.train for experience in experiences(2)]
    taken = []
    real = type(texts[0]).take

    class Noting:
        def __init__(self, data):
            self.data = data

        def __getattr__(self, name):
            return getattr(self.data, name)

        def __len__(self):
            return len(self.data)

        def take(self, numbers, role, positions):
            taken.append((self.data.name, role, numbers.tolist()))
            return real(self.data, numbers, role, positions)

    options = {"steps": 8, "lr": 1e-2, "adam": ADAM, "key": 7, "check_stop": lambda: None, "read": lambda n: None}
    graph = Pilots(learner(SkillIt).inner.model, [Noting(text) for text in texts], **options).graph(2)
    assert graph.shape == (2, 2) and graph.diagonal().tolist() == [1, 1] and (graph >= 0).all()
    assert all((min(numbers) >= JUDGED) == (role == "pilot") for _, role, numbers in taken)
    trained = [numbers for _, role, numbers in taken if role == "pilot"]
    assert sum(map(len, trained)) == 2 * 4 * 8 * 4 and {len(numbers) for numbers in trained} == {2, 4}
    assert len({tuple(numbers) for name, role, numbers in taken if role == "pilot" and len(numbers) == 4}) > 16


def test_a_graph_moves_the_shares_by_the_formula():
    given = [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.2, 1.0]]
    one = learn(learner(SkillIt, graph=given, updates=4, eta=5.0), experiences(2))
    score = 5.0 * np.array(given)[:2, :2] @ np.sum(one.losses[-3:], 0)
    assert one.shares == pytest.approx((np.exp(score - score.max()) / np.exp(score - score.max()).sum()).tolist())
    plain = learn(learner(SkillIt, updates=4, eta=5.0), experiences(2))
    same = learn(learner(SkillIt, updates=4, eta=5.0, graph=[[1.0, 0.0], [0.0, 1.0]]), experiences(2))
    assert fingerprint(same.inner.state_dict()) == fingerprint(plain.inner.state_dict())


def test_golden_values_of_the_released_update():
    """The mixture of the released LEGO graph: p ~ exp(eta A L), from losses of 1 and from three evaluations."""
    graph = np.eye(5)
    graph[1, [0, 2, 3]] = 0.5
    for losses, wanted in (
        ([[1.0] * 5], [0.16348, 0.34608, 0.16348, 0.16348, 0.16348]),
        (
            [[0.1, 0.7, 0.6, 0.7, 0.7], [0.1, 0.6, 0.6, 0.65, 0.7], [0.05, 0.5, 0.5, 0.6, 0.7]],
            [0.07309, 0.42063, 0.15092, 0.17102, 0.18434],
        ),
    ):
        one = learner(SkillIt, graph=graph.tolist(), eta=0.5)
        one.graph, one.losses = one._graph(5).tolist(), losses[:-1]
        one.sums = [[value, 1.0] for value in losses[-1]]
        segment = type("S", (), {"last": 1})
        one._after_step(segment, 1, torch.zeros(0, 6), np.zeros(5, np.int64))
        assert one.shares == pytest.approx(wanted, abs=2e-5)


def test_learned_where_an_experience_begins_and_killed_inside_it(tmp_path):
    straight = learn(learner(SkillIt, **LEARNED), experiences(2))
    assert np.diag(straight.graph).tolist() == [1, 1] and straight.runtime.ledger.probe == 2 * 4 * 3 * 24
    one = learn(learner(SkillIt, tmp_path, **LEARNED), experiences(1))
    assert one.graph == [[1.0]]
    state = copy.deepcopy(one.state_dict())
    one.runtime.begin(1)
    killed_at(one, 20)
    with pytest.raises(Killed):
        one.learn(experiences(2)[1])
    again = learner(SkillIt, tmp_path, **LEARNED)
    again.load_state_dict(state)
    again.runtime.journal.experience = 0
    again.runtime.begin(1)
    again._graph = None  # what is learned already is not learned again
    again.learn(experiences(2)[1])
    assert fingerprint(again.state_dict()) == fingerprint(straight.state_dict())
    assert "graph" not in learner(SkillIt).state_dict()  # as before there was one


@pytest.mark.parametrize("clauses", [3, 5])
def test_rows_of_chains_are_what_they_say(clauses):
    seen = set()
    for number in range(200):
        skill = number % clauses
        text = lego.row(clauses, skill, number)
        front, back = text.split(". Output: ")
        facts = [re.fullmatch(r"([a-z]) = (val|not) ([a-z01])", clause).groups() for clause in front.split("; ")]
        assert len({y for y, _, _ in facts}) == clauses
        known = {y: int(x) for y, _, x in facts if x in "01"}
        order = list(known)
        for _ in range(clauses):
            for y, how, x in facts:
                if x in known and y not in known:
                    known[y] = known[x] if how == "val" else 1 - known[x]
                    order.append(y)
        letter, bit = re.fullmatch(r"([a-z]) = val ([01]),", back).groups()
        assert letter == order[skill] and int(bit) == known[letter] and len(known) == clauses
        seen.add((tuple(y for y, _, _ in facts).index(order[0]), bit))
    assert len(seen) == 2 * clauses  # every place of the root, both answers
    assert lego.entropy(3) == pytest.approx(math.log(26 * 25 * 24 * 8 * 6))


def test_a_stream_of_chains():
    made = lego.lego(name="s", order=[0, 2], tokens=64 * 16 * 3, eval_tokens=64 * 20, evaluators=["answer"])
    assert [d["name"] for d in made.manifest.domains] == ["skill_0", "skill_1", "skill_2"]
    windows = made.evaluation(1)
    assert windows.shape == (20, 65) and not made.of_bytes
    asked = questions.answers(windows, False)
    assert len(asked) == 20
    for window, q in zip(windows, asked, strict=True):
        text = bytes(window.astype(np.uint8)).decode()
        assert re.fullmatch(r"[^\n]*\. Output: [a-z] = val [01],\n+[a-z]", text)
        right, wrong = (chr(int(option[0])) for option in q.options)
        assert bytes(q.before.astype(np.uint8)).decode().endswith("= val ") and {right, wrong} == {"0", "1"}
        assert text[len(q.before)] == right
    assert made.manifest.evals[0].floor == pytest.approx(math.log(26 * 25 * 24 * 8 * 6) / 64)
    train, held = made.domains[0].train, made.domains[0].validation
    assert not {bytes(train[i : i + 64]) for i in range(0, 64 * 48, 64)} & {bytes(held[i : i + 64]) for i in range(0, 1280, 64)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("learner.graph=[[1,0],[0,1]]",), "learner.graph has 2 rows, experience 2 needs one more"),
        (("learner.graph=[[1,0]]",), "learner.graph must be spread, learned, or a square list"),
        (("learner.graph=learned", "learner.spread=0.5"), "learner.spread belongs to graph=spread"),
        (("learner.graph=learned", "learner.pilot=0"), "learner.pilot and learner.repeats must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_planned(words, message):
    (job,) = compose.compose(["scenario=cpt_lego", "scenario.tokens=1024", "model.depth=1", "device=cpu", *words])
    with pytest.raises((DoesNotFit, UserError), match=message):
        prepare(job)


def test_chains_out_of_range():
    for options, message in (
        ({"clauses": 1}, "scenario.clauses"),
        ({"order": [3]}, "scenario.order must name skills 0..2"),
        ({"context": 40}, "scenario.context must be at least 5"),
    ):
        with pytest.raises(UserError, match=message):
            lego.lego(name="s", **options)
