"""Learners for updates of a model: bcwi, focal_kd, simplex, against loops, by hand, and where each becomes fine-tuning."""

import math

import numpy as np
import pytest
import torch
from conftest import NARROW

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError
from clbench.learners.bcwi import GRID, interpolated
from clbench.learners.focal_kd import focal_distillation
from clbench.models.simplex import SimplexHead, vertices
from clbench.testing.contract import Trial, small_stream
from clbench.training.distillation import prediction_distillation
from clbench.training.fisher import kept
from clbench.training.state import detached, fingerprint

RATES = ["learner.lr=0.05", "learner.backbone_lr=0.01", "learner.batch_size=8"]
AGAIN = {"operators": [{"rotate": {"experiences": 3}}]}  # the same classes in every experience


def taught(name, *words, experiences=3, **stream):
    """A learner after some experiences -> trial, learner, what `learn` returned, states after each."""
    (config,) = compose([f"learner={name}", *NARROW, *words])
    t = Trial(config, small_stream(**stream), Capabilities())
    learner, runtime, pipeline = t.start()
    states = []
    for i in range(experiences):
        t.learn(learner, runtime, pipeline, i)
        states.append(detached(learner.state_dict()))
    return t, learner, states


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bcwi learner.share=1.1", r"learner\.share must lie between 0 and 1, got 1\.1"),
        ("bcwi learner.share=null learner.held_out=0", r"learner\.held_out must lie between 0 and 1"),
        ("bcwi learner.tolerance=-0.1", r"learner\.tolerance"),
        ("focal_kd learner.focus=-1", r"learner\.focus must be a finite number from 0, got -1"),
        ("focal_kd learner.temperature=0", r"learner\.temperature"),
        ("simplex learner.scale=0", r"learner\.scale"),
        ("simplex learner.reserve=1", r"learner\.reserve must lie between 2 and"),
        ("simplex learner.reserve=100000", r"learner\.reserve must lie between 2 and"),
    ],
)
def test_refused(words, message):
    with pytest.raises(UserError, match=message):
        taught(*words.split(), experiences=0)


# --- interpolation


def test_interpolation_by_hand():
    old, new, f = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 3.0, 3.0]), torch.tensor([0.0, 1.0, 3.0])
    assert interpolated(old, new, 0.25).tolist() == [2.5, 2.5, 2.5]
    assert interpolated(old, new, 0.5, f).tolist() == [3.0, 2.0, 1.5]
    assert interpolated(old, new, 1.0, f).tolist() == [1.0, 1.0, 1.0], "0 / 0 keeps the old weight"
    assert interpolated(old, new, 0.0, f).tolist() == [3.0, 3.0, 3.0]
    torch.testing.assert_close(interpolated(old, new, 0.3, torch.full((3,), 1.0)), interpolated(old, new, 0.3))


@pytest.mark.parametrize("stream", [{}, AGAIN])
def test_bcwi_is_fine_tuning_and_a_way_back(stream):
    """Both learners stand in the same place after the first experience; after the second the weights are half the way back."""
    _, fine, fine_states = taught("finetune", *RATES, experiences=2, **stream)
    states = taught("bcwi", *RATES, experiences=2, **stream)[2]
    (old, new), mine = fine_states, states[1]
    assert fingerprint({k: states[0][k] for k in ("model", "head")}) == fingerprint(old)
    names = {f"model.{name}" for name, _ in fine.model.named_parameters()} | {
        f"head.{n}" for n, _ in fine.head.named_parameters()
    }
    moved = 0
    for part in ("model", "head"):
        for name, value in mine[part].items():
            if f"{part}.{name}" not in names or name not in old[part]:
                assert torch.equal(value, new[part][name]), name
                continue
            expected = (old[part][name].double() + new[part][name].double()) / 2
            torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
            moved += int(not torch.equal(value, new[part][name]))
    assert moved


@pytest.mark.parametrize("fisher", [False, True])
def test_share_0_is_fine_tuning_and_share_1_keeps_all(fisher):
    fine = taught("finetune", *RATES)[2]
    none = taught("bcwi", *RATES, "learner.share=0", f"learner.fisher={fisher}")[2]
    for a, b in zip(fine, none, strict=True):
        assert fingerprint(a) == fingerprint({k: b[k] for k in ("model", "head")})
    _, learner, states = taught("bcwi", *RATES, "learner.share=1", f"learner.fisher={fisher}")
    for name, p in learner.model.named_parameters():
        assert torch.equal(states[0]["model"][name], p), name
    assert torch.equal(states[2]["head"]["blocks.0.weight"], states[0]["head"]["blocks.0.weight"])
    assert states[2]["head"]["blocks.2.weight"].equal(learner.head.blocks[2].weight)


def test_the_information_is_of_batches_with_mean_1():
    """One batch holds the experience: of the head's biases it is the square of mean(p - one-hot), by its own scale."""
    (config,) = compose(["learner=bcwi", *NARROW, *RATES, "learner.fisher=true", "learner.batch_size=50"])
    t = Trial(config, small_stream(), Capabilities())
    learner, runtime, pipeline = t.start()
    experience = t.learn(learner, runtime, pipeline, 0)
    assert set(learner.fisher) == set(kept(learner.whole))
    mean = torch.cat([f.flatten() for f in learner.fisher.values()]).double().mean()
    assert float(mean) == pytest.approx(1, rel=1e-5)
    (batch,) = experience.train.test_batches(50)
    with torch.no_grad():
        p = learner.predict(batch).double().softmax(1)
    naive = (p - torch.nn.functional.one_hot(batch.y, 3)).mean(0).square()
    found = learner.fisher["head.blocks.0.bias"].double()
    torch.testing.assert_close(found / found.sum(), naive / naive.sum(), rtol=1e-3, atol=1e-5)


def test_the_share_is_chosen_on_what_was_held_out(monkeypatch):
    """The largest of the grid that answers as many held-out images as the new weights; a tolerance allows more."""
    from clbench.learners import bcwi

    seen = []
    real = bcwi.Bcwi._right

    def spy(self, experience, aside):
        count = real(self, experience, aside)
        seen.append((count, len(aside), len(experience.train)))
        return count

    monkeypatch.setattr(bcwi.Bcwi, "_right", spy)
    chosen = []
    learn = bcwi.Bcwi.learn
    monkeypatch.setattr(bcwi.Bcwi, "learn", lambda self, e: chosen.append(learn(self, e).get("share")) or {})
    for tolerance in (0.0, 1.0):
        seen.clear()
        chosen.clear()
        taught("bcwi", *RATES, "learner.share=null", "learner.held_out=0.3", f"learner.tolerance={tolerance}", **AGAIN)
        assert chosen[0] is None and len(seen) == 2 * len(GRID)
        for experience, share in enumerate(chosen[1:]):
            counts = [count for count, _, _ in seen[experience * len(GRID) : (experience + 1) * len(GRID)]]
            size, whole = seen[experience * len(GRID)][1:]
            assert size == round(0.3 * whole)
            fits = [s for s, count in zip(GRID, counts, strict=True) if count >= counts[0] - tolerance * size]
            assert share == fits[-1]
    assert chosen[1:] == [1.0, 1.0], "with a tolerance of 1 everything may be kept"


def test_a_sample_alone_cannot_be_held_out():
    """An experience of one image: the new weights stay, as with share=0."""
    one = {"operators": [{"shots": {"base": 3, "way": 1, "shot": 1}}]}
    chosen, none = (taught("bcwi", *RATES, f"learner.share={share}", experiences=2, **one)[2][1] for share in ("null", "0"))
    assert fingerprint(chosen) == fingerprint(none)


# --- focal distillation


def test_focal_distillation_against_a_loop():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        z, old = torch.randn(9, 5, generator=g) * 3, torch.randn(9, 3, generator=g) * 3
        y = torch.randint(0, 5, (9,), generator=g)
        total = 0.0
        for i in range(9):
            a, b = (np.asarray(v[i, :3], np.float64) / 2 for v in (old, z))
            p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
            right = int(np.argmax(a)) == int(y[i])
            total += (1 + 5 * right) * sum(p[k] * math.log(p[k] / q[k]) for k in range(3))
        assert float(focal_distillation(z, old, y, 1, 5, 2)) == pytest.approx(4 * total / 9, rel=1e-4)
    entropy = -(old.div(2).softmax(1) * old.div(2).log_softmax(1)).sum(1).mean()
    plain = prediction_distillation(z[:, :3], old) - 4 * entropy
    assert float(focal_distillation(z, old, y, 1, 0, 2)) == pytest.approx(float(plain), rel=1e-4)
    wrong = (old.argmax(1) + 1) % 3
    assert float(focal_distillation(z, old, wrong, 0, 1, 2)) == 0.0, "the old model is right nowhere"


def test_strength_0_is_fine_tuning():
    fine, none = taught("finetune", *RATES)[2], taught("focal_kd", *RATES, "learner.strength=0")[2]
    assert [fingerprint(a) for a in fine] == [fingerprint(b) for b in none]
    assert fingerprint(taught("focal_kd", *RATES)[2][1]) != fingerprint(fine[1])


def test_new_classes_alone_are_weighed_by_base():
    """Disjoint classes: the old model is right nowhere, `focus` changes nothing; where they come again it does."""
    for stream, same in (({}, True), (AGAIN, False)):
        a, b = (taught("focal_kd", *RATES, f"learner.focus={focus}", experiences=2, **stream)[2][1] for focus in (0, 5))
        assert (fingerprint(a) == fingerprint(b)) == same


# --- the simplex


@pytest.mark.parametrize("dimension", [2, 3, 16, 160])
def test_vertices_are_equally_far_from_each_other(dimension):
    rows = vertices(dimension)
    gram = rows @ rows.T
    expected = torch.full_like(gram, -1 / dimension).fill_diagonal_(1.0)
    torch.testing.assert_close(gram, expected, atol=1e-12, rtol=0)


def test_a_class_takes_the_next_vertex_and_none_moves():
    _, learner, states = taught("simplex", "learner.backbone_lr=0.01", "learner.reserve=8", "learner.batch_size=8")
    assert learner.head.num_classes == 6 and not list(learner.head.parameters())
    assert torch.equal(learner.head.rows_KD, vertices(learner.model.num_features)[:8].float())
    assert [int(s["head"]["taken"]) for s in states] == [3, 4, 6] and "rows_KD" not in states[0]["head"]
    assert fingerprint(states[0]["model"]) != fingerprint(states[1]["model"])


def test_scores_by_hand_and_a_class_too_many():
    head = SimplexHead(2, None, 2.0)
    head.grow(2)
    z = head(torch.tensor([[1.0, 0.0]]))
    assert z.shape == (1, 3) and float(z[0].sum()) == pytest.approx(0, abs=1e-6)
    assert float((head.rows_KD[0] * 2)[0]) == pytest.approx(float(z[0, 0]))
    with pytest.raises(UserError, match=r"class 4 has no vertex: learner\.reserve=3, and features of 2 numbers have 3"):
        head.grow(2)
