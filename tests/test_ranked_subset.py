"""A part of a text chosen by a reference decoder: against naive versions, what is read and replayed, refusals."""

import copy

import numpy as np
import pytest
import torch
from test_cpt_train import STEPS, experiences, learn, learner
from token_models import Bigram

from clbench.config import compose
from clbench.interfaces import UserError
from clbench.learners.pretrain import Pretrain
from clbench.run.provenance import identity
from clbench.run.runner import prepare
from clbench.streams import rng
from clbench.streams.tokens import sequences
from clbench.streams.tokens.data import TokenData
from clbench.streams.tokens.scenario import Domain, content_sha256, scenario
from clbench.streams.tokens.texts import synthetic, with_junk
from clbench.training.pretraining.data_mixture import Replay
from clbench.training.pretraining.ranked_subset import RankedSubset, ranked

ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0}


def test_ranks_by_hand():
    scores = np.array([3.0, 1.0, 2.0, 1.0, 5.0, 4.0])
    assert ranked(scores, 3, "lowest").tolist() == [1, 2, 3] and ranked(scores, 1, "lowest").tolist() == [1]
    assert ranked(scores, 2, "highest").tolist() == [4, 5] and ranked(scores, 2, "middle").tolist() == [0, 2]
    assert ranked(scores, 6, "middle").tolist() == list(range(6))


def half_noise(seed=0):
    """Rows of a cycle (what comes next is known), every other of them replaced by noise: 24 sequences of 6."""
    draw = np.random.default_rng(seed)
    text = (np.arange(24 * 6 + 1) % 8).astype(np.uint8)
    for row in range(0, 24, 2):
        text[row * 6 : row * 6 + 6] = draw.integers(0, 8, 6)
    options = {"vocab": 8, "tokens": 24 * 6, "context": 6, "batch": 4, "eval_tokens": 60}
    made = scenario("s", [Domain("d", text, text[:60], content_sha256(text))], [0], **options)
    return made.experience(0, True)


def test_scores_are_those_of_a_reference_trained_by_hand_and_thrown_away():
    text, model = half_noise().train, Bigram(8, 8, 6, seed=3)
    before, steps, key = copy.deepcopy(model), 40, 11
    subset = RankedSubset("lowest", steps, 0.03, ADAM)
    found = subset.scores(model, model, text, key, lambda: None)
    by_hand = copy.deepcopy(before)
    parts = [[p for p in by_hand.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False)]
    groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, (0.1, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=0.03, betas=(0.9, 0.95))
    order = []
    for number in range(steps * 4 // 24 + 1):
        positions = np.arange(number * 24, number * 24 + 24)
        order.append(sequences.passes(rng.key(key, "reference"), 24, positions))
        assert sorted(order[-1]) == list(range(24)), "one pass reads each sequence once"
    order = np.concatenate(order)
    for step in range(steps):
        rows = torch.from_numpy(text.take(order[step * 4 : step * 4 + 4], "pilot", np.arange(4)))
        optimizer.zero_grad()
        by_hand.loss(rows).mean().backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        wanted = [float(by_hand.loss(torch.from_numpy(text.take(np.array([i]), "x", np.array([0])))).mean()) for i in range(24)]
    assert np.allclose(found, wanted, atol=1e-5)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b), "the model is as it was"
    rows = text.take(np.arange(24), "x", np.arange(24))
    noise = [len(set((np.diff(row.astype(int)) % 8)[:4].tolist())) > 1 for row in rows]
    best, worst = ranked(found, 10, "lowest"), ranked(found, 10, "highest")
    assert sum(noise) >= 11 and not any(noise[i] for i in best) and all(noise[i] for i in worst)


def test_only_what_was_chosen_is_read_and_replayed():
    made = learner(passes=[1, 3], rank="lowest", pilot=5, replay=Replay(share=0.25))
    some = experiences(3)
    read = {0: set(), 1: set(), 2: set()}
    for e in some:
        for i, data in enumerate((*e.past, e.train)):

            def take(numbers, role, positions, data=data, i=i):
                if role in ("new", "replay"):
                    read[i] |= set(np.asarray(numbers).tolist())
                return TokenData.take(data, numbers, role, positions)

            object.__setattr__(data, "take", take)
    learn(made, some)
    first, second, third = made.ranked.chosen
    assert len(first) == 0 and len(second) == len(third) == STEPS * 4 // 3
    assert len(read[0]) == 48 and read[1] == set(second.tolist()) and read[2] == set(third.tolist())
    ledger = made.runtime.ledger
    assert ledger.trained == 3 * STEPS * 24 and ledger.unique == (48 + 16 + 16) * 6
    assert ledger.probe == 2 * (5 * 4 * 6 + 48 * 6), "two references, two texts ranked"
    other = learn(learner(passes=[1, 3], rank="highest", pilot=5, replay=Replay(share=0.25)), experiences(2))
    assert not set(other.ranked.chosen[1].tolist()) & set(second.tolist())


def test_a_list_of_passes():
    made = learn(learner(passes=[1, 4]), experiences(3))
    assert made.runtime.ledger.unique == (48 + 12 + 12) * 6
    assert not Pretrain.capabilities_of(rank="lowest").supports_parallel and Pretrain.capabilities_of().supports_parallel


def test_junk_windows():
    text = np.arange(100, dtype=np.uint16) % 5
    made = with_junk(text, 0.3, 8, 5, key=4)
    rows = [i for i in range(12) if (made[i * 8 : i * 8 + 8] != text[i * 8 : i * 8 + 8]).any()]
    assert len(rows) == round(0.3 * 12) and made[96:].tolist() == text[96:].tolist() and made.max() < 5
    assert with_junk(text, 0.0, 8, 5, key=4) is text
    options = {
        "name": "s",
        "order": [0, 1],
        "tokens": 320,
        "context": 8,
        "batch": 4,
        "eval_tokens": 80,
        "states": 8,
        "symbols": 8,
    }
    plain, some = synthetic(**options), synthetic(**options, junk=[0, 0.5])
    assert (plain.domains[0].train == some.domains[0].train).all() and (plain.domains[1].train != some.domains[1].train).any()
    assert (plain.domains[1].validation == some.domains[1].validation).all() and plain.domains[1].floor == some.domains[1].floor
    for wrong in ([0.5], 1.0, "all", [True, 0]):
        with pytest.raises(UserError, match=r"scenario\.junk must be a share"):
            synthetic(**options, junk=wrong)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("learner.passes=1", "learner.rank=lowest"), "learner.passes must be above 1"),
        (("learner.rank=best",), "learner.rank must be lowest, middle, highest or null"),
        (("learner.rank=lowest", "learner.pilot=0"), "learner.pilot at least 1"),
        (("learner.passes=[1,0]",), "learner.passes must be at least 1, or a list"),
        (("learner.passes=[]",), "learner.passes must be at least 1, or a list"),
        (("scenario.junk=2",), "scenario.junk must be a share"),
    ],
    ids=str,
)
def test_refused_before_anything_is_trained(tmp_path, words, said):
    base = ["scenario=cpt_synthetic", "scenario.tokens=2048", "learner=subset_epochs", f"results_dir={tmp_path}"]
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        prepare(compose.compose([*base, *words])[0])


def test_runs_without_them_keep_their_identity():
    (job,) = compose.compose(["scenario=cpt_synthetic", "learner=subset_epochs"])
    found = identity(job)
    assert "rank" not in found["learner"] and "pilot" not in found["learner"] and "junk" not in found["scenario"]
    (job,) = compose.compose(["scenario=cpt_synthetic", "learner=subset_epochs", "learner.rank=lowest", "scenario.junk=0.5"])
    assert identity(job)["learner"]["rank"] == "lowest" and identity(job)["scenario"]["junk"] == 0.5
